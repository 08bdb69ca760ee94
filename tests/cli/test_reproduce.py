"""`eit reproduce`; what its runs and tables are is in tests/reproduce/."""

import json

import pytest

from eit.reproduce import experiment as experiments
from tests.cli.conftest import assert_mistake
from tests.helpers.commands import run_eit


def test_the_list_says_what_each_shows_costs_and_what_refutes_it():
    text = run_eit("reproduce", "list").stdout
    assert text == run_eit("reproduce").stdout
    for name in experiments.experiment_names():
        assert f"\n{name}\n" in f"\n{text}"
    assert text.count("refuted if: ") == text.count("shows: ") == 6 and "30 hours of one CPU core" in text
    listed = run_eit("reproduce", "list", "--json").stdout
    assert len(json.loads(listed)) == 6 and listed == run_eit("reproduce", "--json").stdout


def test_a_plan_is_made_of_commands():
    text = run_eit("reproduce", "plan", "imagenet", "--images-per-s", "8000").stdout
    assert text.startswith("torchrun --nproc-per-node=8 -m eit train imagenet_mini") and "per run)" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run smal_data", ["did you mean 'small_data'?"]),
        ("run nowhere.yaml", ["cannot read", "nowhere.yaml"]),
        ("run small_data --budget huge", ["--budget huge", "smoke, short, long, medium, full"]),
        ("run small_data --data cifar10", ["--data cifar10 is not NAME=PATH"]),
        (
            "run small_data --data imagenet=x",
            ["--data imagenet=", "=... is not a data set of this experiment; they are cifar10, cifar100_half, "],
        ),
        ("run small_data --data cifar10=nowhere", ["nowhere is not a folder"]),
        ("run small_data --data cifar10=a --data cifar10=b", ["--data cifar10=... is given twice"]),
        ("run small_data --only swin", ["--only swin", "small_data"]),
        ("plan small_data --only swin", ["--only swin", "small_data"]),
        ("plan imagenet --images-per-s inf", ["--images-per-s inf", "8000"]),
        ("tables small_data", ["results/small_data/short has no finished run"]),
        ("again small_data swin", ["swin", "has no run of this name"]),
        ("again small_data digits-eit-seed-0 --budget smoke", ["no finished run"]),
        ("curve nowhere", ["nowhere has no log of a run"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["reproduce", *words.split()], said)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("run imagenet --images-per-s 8000", "--images-per-s"),
        ("run small_data --out x", "--out"),
        ("plan small_data --tables", "--tables"),
        ("tables small_data --only eit", "--only"),
        ("tables small_data --plan", "--plan"),
        ("list --budget short", "--budget"),
        ("curve x --data imagenet=y", "--data"),
    ],
)
def test_an_option_of_another_command_is_refused(tmp_path, words, option):
    command = words.split()[0]
    assert_mistake(tmp_path, ["reproduce", *words.split()], [f"No such option: {option}", f"reproduce {command} -h"])


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("small_data", "run small_data"),
        ("small_data --budget smoke --results mine", "run small_data --budget smoke --results mine"),
        ("mine.yaml", "run mine.yaml"),
        ("--budget short small_data", "run NAME --budget short small_data"),
        ("--list", "list"),
        ("small_data --list", "list"),
        ("imagenet --plan --images-per-s 8000", "plan imagenet --images-per-s 8000"),
        ("frequency --budget smoke --tables", "tables frequency --budget smoke"),
        ("--tables frequency", "tables frequency"),
        ("--budget short --tables", "tables NAME --budget short"),
        ("small_data --again vit-seed-0 --out x", "again small_data vit-seed-0 --out x"),
        ("small_data --out x --again=vit-seed-0", "again small_data vit-seed-0 --out x"),
        ("imagenet --curve x", "curve x"),
    ],
)
def test_an_old_spelling_is_answered_with_the_new_one(tmp_path, words, right):
    error = [f"reproduce {words} is not a command", f"type python -m eit reproduce {right}"]
    assert_mistake(tmp_path, ["reproduce", *words.split()], error)


def test_an_unknown_command_is_refused(tmp_path):
    assert_mistake(tmp_path, ["reproduce", "smal_data"], ["smal_data", "reproduce -h"])
    assert_mistake(tmp_path, ["reproduce", "--json", "run", "small_data"], ["--json", "run", "leave"])
