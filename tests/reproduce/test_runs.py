"""Runs are trained, measured, kept, copied, and trained again."""

import json
import shutil
from pathlib import Path

import pytest

import eit
from eit.errors import UserError
from eit.reproduce import experiment as experiments
from eit.reproduce import runs
from eit.reproduce.runs import Rerun
from eit.reproduce.tables import frequency_table
from eit.reproduce.verdict import (
    HOLDS,
)  # fmt: skip
from tests.helpers.commands import run_eit
from tests.reproduce.conftest import TINY

ROOT = Path(__file__).parents[2]


def test_runs_are_trained_measured_and_reported(ran):
    for name in ("digits-eit-seed-0", "digits-eit-seed-1", "digits-vit-seed-0", "digits-vit-seed-1"):
        run = ran / "results" / "tiny" / "tiny" / name
        assert {f.name for f in run.iterdir()} >= {"recipe.yaml", "log.jsonl", "environment.json", "summary.json"}
        measured = json.loads((run / "measured.json").read_text())
        assert measured["images"] == 20 and 0 <= measured["size"]["150"] <= 100
        for state in ("initial", "trained"):
            assert all(len(measured[state][key]) == 2 for key in ("share", "diversity", "entropy", "class_token"))
            assert measured[state]["logit_spread"] > 0
    page = (ran / "results" / "tiny" / "tiny" / "README.md").read_text()
    assert (
        "4 of 4 runs are finished" in page
        and "| EIT is dearer | ours | `models/complexity.py, complexity` | digits +0.0" in page
    )
    assert "| **holds** |" in page


def test_finished_runs_are_kept(ran):
    file = ran / "results" / "tiny" / "tiny" / "digits-eit-seed-0" / "log.jsonl"
    before = file.stat().st_mtime_ns
    done = run_eit("reproduce", "run", "tiny.yaml", "--json", cwd=ran)
    assert done.returncode == 0 and file.stat().st_mtime_ns == before
    assert done.stderr.startswith("finished: all 4 runs are in results/tiny/tiny; ")
    found = json.loads(done.stdout)
    assert len(found["runs"]) == 4 and not found["missing"] and found["claims"]["dearer"]["word"] == "holds"


def test_another_recipe_in_a_folder_is_refused(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "results")
    (tmp_path / "tiny.yaml").write_text(TINY.replace("embed_dim: 16", "embed_dim: 32"))
    done = run_eit("reproduce", "run", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "model.embed_dim: 16 -> 32" in done.stderr and done.stderr.count("\n") == 1


def test_experiments_of_one_another_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one, other in (("a", "b"), ("b", "a"), ("c", "c")):
        text = f"shows: x\nrefuted: y\nof: {other}.yaml\nclaims:" + TINY.partition("claims:")[2]
        Path(f"{one}.yaml").write_text(text)
    for name in "abc":
        with pytest.raises(UserError, match="axes and budgets"):
            experiments.load(f"{name}.yaml")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("environment.json", dict(world_size=4), "the global batch 256, not 64"),
        ("environment.json", None, "environment.json is damaged: world_size: Field required"),
        ("environment.json", dict(world_size="1"), "environment.json is damaged: world_size: Input should be"),
        ("measured.json", [], "measured.json is damaged: the whole file: "),
        ("measured.json", dict(trained=dict(share=[1, "b"])), "measured.json is damaged: trained.share"),
        ("summary.json", "{", "summary.json is damaged: "),
        ("summary.json", dict(last_top1=float("nan")), "summary.json has NaN, which is not a number of JSON"),
        ("summary.json", dict(last_top1=99.0), "log.jsonl does not match summary.json"),
        ("log.jsonl", "{", "log.jsonl does not match summary.json"),
    ],
)
def test_a_run_of_another_batch_or_a_damaged_one_is_in_no_table(ran, tmp_path, file, change, said):
    shutil.copytree(ran, tmp_path / "clone")
    file = tmp_path / "clone" / "results" / "tiny" / "tiny" / "digits-eit-seed-0" / file
    if isinstance(change, dict):
        change = json.loads(file.read_text()) | change
    file.write_text(change if isinstance(change, str) else json.dumps({} if change is None else change))
    done = run_eit("reproduce", "tables", "tiny.yaml", cwd=tmp_path / "clone")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_half_of_a_copy_is_not_copied(ran, tmp_path):
    folder = tmp_path / "results" / "tiny" / "tiny"
    shutil.copytree(ran / "results" / "tiny" / "tiny" / "digits-eit-seed-0", folder / ".digits-eit-seed-0")
    recipe = experiments.load(str(ran / "tiny.yaml")).cells("tiny")[0].recipe(tmp_path / "results", {})
    assert not runs.reuse_identical_run(recipe, tmp_path / "results")


def test_a_run_that_another_experiment_has_is_copied(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "results")
    (tmp_path / "other.yaml").write_text(TINY.replace("analysis: 20, sizes: [150]", "sizes: [200]"))
    done = run_eit("reproduce", "run", "other.yaml", "--only", "eit-seed-0", cwd=tmp_path)
    assert done.returncode == 0 and "has the same recipe" in done.stderr and "epoch 1" not in done.stderr
    old, new = (tmp_path / "results" / n / "tiny" / "digits-eit-seed-0" for n in ("tiny", "other"))
    assert (old / "log.jsonl").read_bytes() == (new / "log.jsonl").read_bytes()
    assert set(json.loads((new / "measured.json").read_text())["size"]) == {"200"}


@pytest.mark.parametrize("change", ["data.root: sklearn:digits -> tmp", "data.batch_size: 64 -> 32"])
def test_a_run_of_other_data_or_another_batch_is_not_copied(ran, tmp_path, change, folder):
    key, _, value = change.partition(": ")
    value = str(folder) if key == "data.root" else 32
    results = tmp_path / "results"
    shutil.copytree(ran / "results", results)
    recipe = experiments.load(str(ran / "tiny.yaml")).cells("tiny")[0].recipe(results, {})
    assert runs.reuse_identical_run(recipe.model_copy(update=dict(out=str(results / "o" / "b" / "same"))), results)
    data = recipe.data.model_copy(update={key.removeprefix("data."): value})
    assert not runs.reuse_identical_run(
        recipe.model_copy(update=dict(out=str(results / "o" / "b" / "other"), data=data)), results
    )


def test_a_run_without_weights_is_not_copied_and_is_trained_again(ran, tmp_path):
    """As in a fresh clone, where results/ has no weights."""
    clone = tmp_path / "clone"
    shutil.copytree(ran, clone, ignore=shutil.ignore_patterns("*.safetensors", "checkpoints"))
    (clone / "tiny.yaml").write_text(TINY.replace("sizes: [150]", "sizes: [150, 200]"))
    done = run_eit("reproduce", "run", "tiny.yaml", "--only", "eit-seed-0", cwd=clone)
    assert done.returncode == 0 and "copied" not in done.stderr and "epoch 1" in done.stderr
    measured = json.loads((clone / "results" / "tiny" / "tiny" / "digits-eit-seed-0" / "measured.json").read_text())
    assert set(measured["size"]) == {"150", "200"}


def test_a_stopped_experiment_goes_on(ran, tmp_path):
    """One run finished and measured, one trained but not measured, one with half of a copy, one not begun."""
    shutil.copytree(ran, tmp_path / "clone")
    folder = tmp_path / "clone" / "results" / "tiny" / "tiny"
    (folder / "digits-eit-seed-1" / "measured.json").unlink()
    shutil.rmtree(folder / "digits-vit-seed-0")
    shutil.copytree(folder / "digits-eit-seed-0", folder / ".digits-vit-seed-0")
    shutil.rmtree(folder / "digits-vit-seed-1")
    done = run_eit("reproduce", "run", "tiny.yaml", cwd=tmp_path / "clone")
    assert done.returncode == 0 and done.stderr.count("epoch 1 ") == 2 and "run 3 of 3" in done.stderr, done.stderr
    pages = [base / "results" / "tiny" / "tiny" / "README.md" for base in (ran, tmp_path / "clone")]
    assert pages[0].read_text() == pages[1].read_text()


def test_a_run_that_diverges_does_not_keep_the_others_waiting(tmp_path):
    arm = "wild: {set: {optim: {lr: 1.0e+6}}}"
    (tmp_path / "tiny.yaml").write_text(TINY.replace("    eit: {}\n", f"    {arm}\n    eit: {{}}\n"))
    done = run_eit("reproduce", "run", "tiny.yaml", "--only", "seed-0", "--json", cwd=tmp_path)
    assert done.returncode == 1 and "digits-wild-seed-0: the loss is nan in epoch 1" in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("eit: 1 of 3 runs: digits-wild-seed-0: the loss was not finite")
    found = json.loads(done.stdout)
    assert [run["name"] for run in found["runs"]] == ["digits-eit-seed-0", "digits-vit-seed-0"]
    assert "digits-wild-seed-0" in found["missing"] and found["claims"]["dearer"]["word"] == HOLDS, "counted"
    page = (tmp_path / "results" / "tiny" / "tiny" / "README.md").read_text()
    assert "2 of 6 runs are finished. Not finished: digits-wild-seed-0, " in page


def test_the_global_batch_stays_on_any_number_of_processes():
    (cell,) = [c for c in experiments.load("imagenet").cells("full") if c.levels["model"] == "mini"]
    for world in (1, 2, 4, 8, 16):
        recipe = cell.recipe(Path("results"), {}, world)
        assert recipe.data.batch_size * recipe.train.accumulate * world == 1024
    with pytest.raises(UserError, match="1024 is not a multiple of 3 processes"):
        cell.recipe(Path("results"), {}, 3)


def test_a_model_of_timm_goes_all_the_way(tmp_path):
    arm = "resnet: {set: {model: {name: timm/test_resnet}}}"
    (tmp_path / "tiny.yaml").write_text(TINY.replace("    eit: {}\n", f"    eit: {{}}\n    {arm}\n"))
    done = run_eit("reproduce", "run", "tiny.yaml", "--only", "resnet-seed-0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| digits | resnet | 1 |" in done.stdout
    results, cell = tmp_path / "results", experiments.load(str(tmp_path / "tiny.yaml")).cells("tiny")[2]
    assert cell.levels["model"] == "resnet"
    measured = json.loads((cell.folder(results) / "measured.json").read_text())
    assert measured["trained"].get("missing") or not measured["trained"]["diversity"]
    result = runs.read_result(cell, results)
    assert frequency_table(experiments.load("frequency"), [result])


def test_our_resnet_takes_no_argument_that_it_does_not_have():
    with pytest.raises(UserError, match="drop_rate"):
        eit.create_model("timm/resnet24_small", drop_rate=0.5)
    assert eit.create_model("timm/resnet24_small", num_classes=7, in_chans=1).num_classes == 7


def test_a_run_again_is_identical_or_within_the_spread(ran, tmp_path):
    words = ("reproduce", "again", "tiny.yaml", "digits-eit-seed-0")
    done = run_eit(*words, "--out", str(tmp_path / "again"), cwd=ran)
    assert done.returncode == 0 and "identical in every epoch" in done.stdout, done.stdout + done.stderr
    done = run_eit(*words, "--out", str(tmp_path / "again"), cwd=ran)
    assert done.returncode == 0 and "is finished" in done.stderr and "identical in every epoch" in done.stdout
    own = ran / "results" / "tiny" / "tiny" / "digits-eit-seed-0"
    assert "is the recorded run itself" in run_eit(*words, "--out", str(own), cwd=ran).stderr
    other = own.with_name("digits-vit-seed-0")
    assert "another recipe" in run_eit(*words, "--out", str(other), cwd=ran).stderr
    shutil.copytree(ran, tmp_path / "changed")
    log = tmp_path / "changed" / "results" / "tiny" / "tiny" / "digits-eit-seed-0" / "log.jsonl"
    line = json.loads(log.read_text())
    log.write_text(json.dumps(line | dict(val_loss=9.0, val_top1=99.0)) + "\n")
    summary = log.with_name("summary.json")
    summary.write_text(json.dumps(json.loads(summary.read_text()) | dict(last_top1=99.0)))
    done = run_eit(*words, "--out", str(tmp_path / "other"), "--json", cwd=tmp_path / "changed")
    found = json.loads(done.stdout)
    assert not found["identical"] and found["recorded_top1"] == 99 and done.returncode == (0 if found["agrees"] else 1)


def test_a_run_again_has_the_recorded_global_batch_on_another_number_of_processes(ran, tmp_path):
    shutil.copytree(ran, tmp_path / "two")
    folder = tmp_path / "two" / "results" / "tiny" / "tiny" / "digits-eit-seed-0"
    environment = json.loads((folder / "environment.json").read_text())
    del environment["cpu"]
    (folder / "environment.json").write_text(json.dumps(environment | dict(world_size=2)))
    recipe = (folder / "recipe.yaml").read_text()
    assert "batch_size: 64" in recipe
    (folder / "recipe.yaml").write_text(recipe.replace("batch_size: 64", "batch_size: 32"))
    words = ("reproduce", "again", "tiny.yaml", "digits-eit-seed-0", "--out", str(tmp_path / "again"), "--json")
    done = run_eit(*words, cwd=tmp_path / "two")
    assert done.returncode == 0 and "22 steps of 64 images per epoch" in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"] and "world_size: 2 -> 1" in found["changed"]
    assert any(change.startswith("capability: not recorded -> ") for change in found["changed"])


def test_an_environment_is_compared_by_its_parts(ran):
    environment = json.loads((ran / "results/tiny/tiny/digits-eit-seed-0/environment.json").read_text())
    facts = runs.flatten(environment)
    assert facts["torch"] and facts["model"] == environment["cpu"]["model"] and "command" not in facts


@pytest.mark.results
def test_the_cheapest_run_of_the_tables_can_be_trained_again(tmp_path):
    """Identical on the machine that made it, else within three standard deviations over seeds."""
    words = ("reproduce", "again", "small_data", "digits-eit-seed-0", "--budget", "smoke")
    done = run_eit(*words, "--results", ROOT / "results", "--out", tmp_path / "again", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_agreement_is_three_standard_deviations():
    assert Rerun(True, 50, 50, None, []).agrees
    assert Rerun(False, 50, 52.9, 3.0, []).agrees
    assert not Rerun(False, 50, 53.1, 3.0, []).agrees
    assert not Rerun(False, 50, 50, None, []).agrees
