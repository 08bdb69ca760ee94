"""`make gpu`, tried on the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.record import Session, as_markdown

ROOT = Path(__file__).parents[2]


def run(*words, **env):
    done = [sys.executable, "-m", "benchmarks.gpu", *map(str, words)]
    return subprocess.run(done, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.project
def test_a_dry_run_does_every_part_and_leaves_few_small_files(tmp_path):
    done = run("--dry-run", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "dry-run"
    assert done.stdout.splitlines()[-1] == f"results: {folder}/gpu.md"
    found = json.loads((folder / "gpu.json").read_text())
    assert list(found) == ["check", "bench", "train"]
    items = {item["name"]: item for part in found.values() for item in part["items"]}
    assert not [item for item in items.values() if item.get("ok") is False or "error" in item]
    assert items["stopped and continued, fp32"]["identical"] and items["a NaN changes no weight"]["weights_unchanged"]
    assert items["a group of one, DDP and torch.compile"]["ok"] and items["compiled as eager"]["difference"] < 1e-4
    ways = [row["way"] for row in items["training, batch 128, bf16"]["rows"]]
    assert ways == ["eager", "eager", "without padded heads", "strides of the stem as channels"]
    assert items["eit on CIFAR-10"]["epochs"] == items["vit on CIFAR-10"]["epochs"] == items["plan"]["epochs"] == 2
    files = sorted(folder.rglob("*"))
    assert len(files) <= 8 and all(file.parent == folder and file.stat().st_size < 16 << 20 for file in files)
    page = (folder / "gpu.md").read_text()
    assert page.startswith("# cpu: ") and "| naive eit_mini | eager |" in page and "**holds**" in page


def test_a_part_that_is_run_again_replaces_its_own_items_alone(tmp_path):
    about = dict(device="cpu", packages={}, python="3", command="", date="", commit=None)
    old = dict(check=dict(about=about, items=[dict(name="x", ok=True)]), train={})
    (tmp_path / "gpu.json").write_text(json.dumps(old))
    session = Session("train", torch.device("cpu"), tmp_path, None, True, time.monotonic() + 5, about)
    session.run("quick", lambda: dict(ok=True))
    session.run("broken", lambda: 1 / 0)
    session.run("long", lambda: dict(ok=True), seconds=60)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["check"] == old["check"]
    quick, broken, long = found["train"]["items"]
    assert quick["ok"] is True and "ok" not in long and long["skipped"].endswith("about 60 s are needed")
    assert "in <lambda>" in broken["traceback"] and "lambda" not in (tmp_path / "gpu.md").read_text()
    assert broken["ok"] is False and broken["error"] == "ZeroDivisionError: division by zero" and session.failed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "5"], "make gpu: --minutes 5 is less than 9.7"),
        (["--data", "gone", "--dry-run"], "make gpu: --data gone is not there"),
        (["--part", "all"], "invalid choice: 'all'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, message):
    done = run(*words)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "make gpu: torch sees no CUDA GPU here" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "NEEDED", ("torch", "no_such_package"))
    assert command.main(["--dry-run"]) == 2
    assert capsys.readouterr().err == "make gpu: these Python packages are missing: no_such_package\n"


def test_training_gets_the_time_that_is_left():
    assert command.budgets(60)["train"] == 3600 - 90 - 150 and command.budgets(60)["check"] == 90


def test_what_failed_and_what_was_skipped_is_on_the_page():
    about = dict(device="GPU", packages=dict(torch="2"), python="3", command="c", date="d", commit="e")
    items = [dict(name="one", ok=False, error="wrong"), dict(name="two", skipped="no time")]
    page = as_markdown(dict(check=dict(about=about, items=items)))
    assert "- one: **FAILS** error wrong" in page and "- two: skipped no time" in page
