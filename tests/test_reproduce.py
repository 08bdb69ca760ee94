"""Experiments: their files, the runs, the verdicts, the pages."""

import csv
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import eit
from eit.config import load_recipe
from eit.errors import UserError
from eit.reproduce import cells, matrix
from eit.reproduce.cells import Again, Result, read_results
from eit.reproduce.matrix import Cell, Claim
from eit.reproduce.plan import commands
from eit.reproduce.published import compare, published_curve
from eit.reproduce.report import digest, disagreement, figure, frequency_table
from eit.reproduce.verdict import FAILS, HOLDS, NOT_RUN, UNDECIDED, Verdict, weigh
from eit.zoo import VARIANTS
from tests.conftest import SHARED, require, run_eit

ROOT = Path(__file__).parents[1]
MATRICES = [name for name in matrix.experiment_names() if not matrix.load(name).of]
BUDGETS = [(name, budget) for name in MATRICES for budget in matrix.load(name).budgets]

# Two models, two seeds, on the digits
TINY = """
shows: that it runs
refuted: it does not
recipe: digits
axes:
  data: {digits: {}}
  model:
    eit: {}
    vit: {set: {model: {family: vit}}}
  seed: [0, 1]
budgets:
  tiny:
    cost: seconds
    set:
      model: {embed_dim: 16, depth: 2, num_heads: 2, drop_path_rate: 0}
      data: {workers: 0}
      train: {epochs: 1, warmup_epochs: 0}
measure: {analysis: 20, sizes: [150]}
claims:
  dearer: {says: EIT is dearer, code: "macs.py, complexity", metric: macs, axis: model, rises: [vit, eit]}
"""


# -- The files --------------------------------------------------------------------------------------------------------


def test_every_experiment_of_the_package_is_read():
    assert matrix.experiment_names() == ["small_data", "ablation", "pooling", "frequency", "diversity", "imagenet"]
    assert all(matrix.load(name).claims for name in matrix.experiment_names())


@pytest.mark.parametrize(("name", "budget"), BUDGETS)
def test_every_run_has_a_recipe_and_a_name_of_its_own(name, budget):
    folders = [cell.recipe(Path("results"), {}).out for cell in matrix.load(name).cells(budget)]
    assert len(set(folders)) == len(folders) > 0


@pytest.mark.parametrize("budget", ["smoke", "short", "medium", "full"])
def test_models_of_small_data_differ_in_their_family_alone(budget):
    found = matrix.load("small_data").cells(budget)
    recipes = {cell.name: cell.recipe(Path("results"), {}).model_dump() for cell in found}
    for cell in found:
        if cell.levels["model"] in ("lsra", "vit"):
            own = recipes[cell.name]
            twin = recipes[cell.name.replace(cell.levels["model"], "eit")]
            assert own["model"] | dict(family="eit") == twin["model"]
            assert {k: v for k, v in own.items() if k not in ("model", "out")} == {
                k: v for k, v in twin.items() if k not in ("model", "out")
            }


def test_the_paper_s_sizes():
    """The full budget has the paper's 3.08 M and 0.212 G, and the ResNet its ratio; short ones at most 96 channels."""
    for cell in matrix.load("small_data").cells("full"):
        model = cell.values["model"]
        assert (
            model["name"] == "timm/resnet24_small"
            or [model[key] for key in ("embed_dim", "depth", "num_heads")] == [None] * 3
        ), "eit_mini's own 250, 5, 10"
    assert all(cell.values["model"]["embed_dim"] <= 96 for cell in matrix.load("small_data").cells("short"))
    resnet = eit.create_model("timm/resnet24_small", num_classes=10)
    small = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, num_classes=10)
    ours = eit.complexity(eit.create_model("eit_mini", **small), (3, 32, 32))
    theirs = eit.complexity(resnet, (3, 32, 32))
    assert ours.params / theirs.params == pytest.approx(0.177, abs=0.0005)
    assert ours.macs < theirs.macs


@pytest.mark.parametrize("budget", ["smoke", "short", "full"])
def test_schedules_of_the_ablation_have_equal_mean_shares(budget):
    arms = {}
    for cell in matrix.load("ablation").cells(budget):
        model = cell.recipe(Path("results"), {}).model
        arms[cell.levels["variant"]] = eit.create_model(model.name, img_size=32, **model.arguments())
    shares = {name: statistics.mean(arm.attn_channels) for name, arm in arms.items()}
    assert shares["eit"] == shares["increasing"] == shares["constant"]
    assert len(set(arms["constant"].attn_channels)) == 1
    assert shares["no_convolution"] == arms["eit"].embed_dim
    assert budget != "full" or arms["constant"].attn_channels == [150] * 5


def test_claims_name_files_and_code_that_exist():
    for name in matrix.experiment_names():
        for claim in matrix.load(name).claims.values():
            file, _, symbol = claim.code.partition(", ")
            found = list((ROOT / "src" / "eit").glob(file))
            assert found, claim.code
            assert not symbol or re.search(rf"\b{symbol}\b", found[0].read_text()), claim.code


def test_claims_speak_of_levels_and_metrics_that_are_measured():
    for name in matrix.experiment_names():
        experiment = matrix.load(name)
        for claim in experiment.claims.values():
            assert set(claim.levels) <= set(experiment.runs.axes[claim.axis])
            assert experiment.runs.measure.has(claim.metric)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shows: x", "refuted"),
        (TINY.replace("rises: [vit, eit]", "rises: [eit]"), "claims.dearer.rises"),
        (TINY.replace("rises: [vit, eit]", ""), "either rises or reaches"),
        (TINY.replace("cost: seconds", "cost: seconds\n    levels: {model: [vat]}"), "model=vat"),
        (TINY.replace("cost: seconds", "cost: seconds\n    adjust: {vat: {seed: 1}}"), "adjusts vat"),
        (TINY.replace("measure: {", "measure: {analyse: 3, "), "measure.analyse"),
        (TINY.replace("axis: model", "axis: modle"), "claims.dearer.axis=modle"),
        (TINY.replace("rises: [vit, eit]", "rises: [vit, swin]"), "model has no swin"),
        (TINY.replace("metric: macs", "metric: macks"), "claims.dearer.metric=macks is not measured"),
        (TINY.replace("metric: macs", "metric: kept.75"), "metric=kept.75 is not measured"),
        (TINY.partition("axes:")[0], "axes and budgets are needed"),
        ("shows: x\nrefuted: y\naxes: [1]", "axes"),
        ("- 1", "is not an experiment"),
        (TINY.replace("seed: [0, 1]", "seed: []"), "axes.seed has no levels"),
        (TINY.replace("cost: seconds", "cost: seconds\n    levels: {model: []}"), "a budget has no levels of model"),
        ("shows: x\nrefuted: y\nof: small_data", "claims are needed"),
        (TINY.replace("    vit: {", "    ../vit: {"), "'../vit' is no name"),
        (TINY.replace("shows:", "name: a/b\nshows:"), "'a/b' is no name"),
        (TINY.replace("shows:", "name: frequency\nshows:"), "an experiment called frequency ships with the package"),
        (TINY.replace("cost: seconds\n    set:", "cost: seconds\n    set:\n      out: here"), "out is not to be set"),
        (
            TINY.replace("{digits: {}}", "{x-eit: {}, x: {}}").replace("    vit:", "    eit-eit:"),
            "called x-eit-eit-seed",
        ),
        ("shows: x\nrefuted: y\nof: frequency\nclaims:" + TINY.partition("claims:")[2], "axes and budgets are needed"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused_in_one_line(tmp_path, text, said):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        matrix.load(str(file))
    assert "\n" not in str(error.value)


# -- Verdicts ---------------------------------------------------------------------------------------------------------


def made(values, metric="last_top1"):
    """Results: values[level] is a list by seed."""
    return [
        Result(Cell("e", "b", dict(data="d", model=level, seed=str(seed)), "digits", {}), {metric: value}, {}, {})
        for level, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]


def claim(**given):
    return Claim(**dict(says="s", code="c", metric="last_top1", axis="model", rises=["vit", "eit"]) | given)


@pytest.mark.parametrize(
    ("vit", "eit_", "word"),
    [
        ([50, 52, 54], [60, 63, 64], HOLDS),
        ([60, 63, 64], [50, 52, 54], FAILS),
        ([50, 60, 55], [52, 57, 56], UNDECIDED),
        ([50], [60], NOT_RUN),
        ([50, 51], [60], NOT_RUN),
        ([50, 50], [60, 60], UNDECIDED),  # no spread was seen
        ([50.0, 60.3], [50.1, 60.4], UNDECIDED),  # but for rounding
        ([50, 50], [50, 50], UNDECIDED),
    ],
)
def test_two_levels_are_weighed_over_pairs(vit, eit_, word):
    assert weigh(claim(), made(dict(vit=vit, eit=eit_))).word == word


def test_pairs_share_all_but_the_axis():
    """A spread over seeds that both share does not hide a difference."""
    verdict = weigh(claim(), made(dict(vit=[10, 50, 90], eit=[11, 52, 91])))
    assert verdict.word == HOLDS and list(verdict.gaps.values()) == [1, 2, 1]
    assert verdict.p == pytest.approx(0.0286, abs=1e-4)  # t = 4 with 2 degrees of freedom


def test_what_may_be_missing():
    results = made(dict(vit=[50, 52, 54], eit=[49.9, 51.8, 53.8]))
    assert weigh(claim(), results).word != HOLDS
    assert weigh(claim(within=0.5), results).word == HOLDS
    assert weigh(claim(within=0.5), made(dict(vit=[50, 52, 54], eit=[48, 50.1, 52]))).word == FAILS


def test_an_order_of_three_holds_where_each_step_does():
    order = claim(rises=["vit", "lsra", "eit"])
    low, middle, high = [1.0, 2.0, 1.5], [3.0, 3.5, 2.5], [5.0, 6.0, 4.0]
    assert weigh(order, made(dict(vit=low, lsra=middle, eit=high))).word == HOLDS
    assert weigh(order, made(dict(vit=high, lsra=middle, eit=low))).word == FAILS
    twelve = dict(
        vit=[i % 3 for i in range(12)], lsra=[9 + i % 5 for i in range(12)], eit=[4 + i % 4 for i in range(12)]
    )
    assert weigh(order, made(twelve)).word == FAILS  # vit < eit < lsra
    assert weigh(order, made(dict(vit=low, lsra=middle, eit=[3.1, 3.4, 2.6]))).word == UNDECIDED


def test_data_sets_that_disagree_decide_nothing():
    one = made(dict(vit=[50, 51, 52], eit=[70, 71.5, 72.5]))
    other = [
        Result(Cell("e", "b", r.cell.levels | dict(data="other"), "digits", {}), dict(last_top1=v), {}, {})
        for r, v in zip(one, (60, 61, 62, 59, 60.5, 61.2), strict=True)
    ]
    assert weigh(claim(), one).word == HOLDS
    assert weigh(claim(), one + other).word == UNDECIDED
    assert weigh(claim(), one + other).evidence.endswith(", data sets disagree")


def test_an_order_fails_by_the_step_that_data_sets_agree_on():
    order = claim(rises=["vit", "lsra", "eit"])
    one = made(dict(vit=[5.0, 6.0, 5.5], lsra=[2.0, 3.1, 2.4], eit=[1.0, 2.0, 1.6]))
    other = [
        Result(Cell("e", "b", r.cell.levels | dict(data="other"), "digits", {}), dict(last_top1=v), {}, {})
        for r, v in zip(one, (5.1, 6.1, 5.4, 2.1, 3.0, 2.2, 9.0, 9.1, 9.4), strict=True)
    ]
    verdict = weigh(order, one + other)
    assert weigh(claim(rises=["lsra", "eit"]), one + other).word == UNDECIDED
    assert weigh(claim(rises=["vit", "lsra"]), one + other).word == FAILS
    assert verdict.word == FAILS
    upward = weigh(claim(rises=["lsra", "vit", "eit"]), one + other)
    assert upward.word == UNDECIDED and upward.why == "data sets disagree on eit against vit"


def test_nothing_is_decided_before_all_runs_are_done():
    results = made(dict(vit=[50, 52, 54], eit=[60, 63, 64], resnet=[70, 70]))
    assert weigh(claim(), results).word == HOLDS
    left = [Cell("e", "b", dict(data="d", model=model, seed="3"), "digits", {}) for model in ("eit", "resnet")]
    verdict = weigh(claim(), results, left[:1])
    assert verdict.word == NOT_RUN and list(verdict.gaps.values()) == [10, 11, 10] and str(verdict) == NOT_RUN
    assert weigh(claim(), results, left[1:]).word == HOLDS, "of which the claim does not speak"
    assert (
        weigh(claim(), [r for r in results if r.cell.beside("model") != "d 2" or r.cell.levels["model"] != "eit"]).word
        == NOT_RUN
    )
    published = claim(rises=None, reaches=dict(eit=60.0, vit=50.0))
    assert weigh(published, results).word == HOLDS and weigh(published, results, left[:1]).word == NOT_RUN


def test_a_verdict_says_what_decided():
    low, high = [50, 52, 54], [60, 63, 64]
    assert re.fullmatch(r"holds \(p = 0.000\d+\)", str(weigh(claim(), made(dict(vit=low, eit=high)))))
    against = weigh(claim(), made(dict(vit=high, eit=low)))
    assert re.fullmatch(r"does not hold \(opposite: p = 0.000\d+\)", str(against))
    order = claim(rises=["vit", "lsra", "eit"])
    one = weigh(order, made(dict(vit=high, lsra=low, eit=[90, 91, 93])))
    assert one.word == FAILS and one.opposite == pytest.approx(2 * against.opposite), "of two steps"
    assert str(one).endswith(", lsra below vit)")
    assert (
        str(weigh(claim(), made(dict(vit=[50, 60, 55], eit=[52, 57, 56])))) == "undecided (p = 0.5, opposite: p = 0.5)"
    )


def test_what_is_counted_is_compared_as_it_is():
    cheaper = claim(metric="macs", rises=["eit", "vit"])
    assert weigh(cheaper, made(dict(eit=[10], vit=[12]), "macs")) == Verdict(HOLDS, {"d 0": 2})
    assert weigh(cheaper, made(dict(eit=[10, 10], vit=[12, 9]), "macs")).word == FAILS


def test_values_to_reach():
    published = claim(rises=None, reaches=dict(eit=70.0, vit=60.0), within=0.5)
    assert weigh(published, made(dict(eit=[69.6], vit=[61]))).word == HOLDS
    assert weigh(published, made(dict(eit=[69.4], vit=[61]))).word == FAILS
    assert weigh(published, made(dict(eit=[70]))).word == NOT_RUN
    assert weigh(published, made(dict(eit=[69]))).word == FAILS
    assert weigh(published, made(dict(eit=[10, 20, 90], vit=[61]))).word == FAILS  # their mean


def test_metrics_are_means_over_layers_and_gains():
    measured = dict(trained=dict(share=[0.2, 0.4], diversity=[]), initial=dict(share=[0.1, 0.1]), size={"150": 40.0})
    result = Result(Cell("e", "b", {}, "digits", {}), dict(last_top1=50.0), measured, {})
    assert result.value("trained.share") == pytest.approx(0.3)
    assert result.value("gain.share") == pytest.approx(0.2)
    assert result.value("size.150") == 40 and result.value("last_top1") == 50 and result.value("kept.150") == -10
    third = Result(result.cell, dict(last_top1=100 / 3), dict(size={"150": 33.3333}), {})
    assert third.value("kept.150") == 0, "the file has six digits"
    assert result.value("trained.diversity") is None and result.value("gain.diversity") is None


# -- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with tiny.yaml and its results."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "tiny.yaml").write_text(TINY)
    done = run_eit("reproduce", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run ") >= 4 and "results/tiny/tiny/README.md" in done.stdout
    return folder


def test_runs_are_trained_measured_and_reported(ran):
    for name in ("digits-eit-seed-0", "digits-eit-seed-1", "digits-vit-seed-0", "digits-vit-seed-1"):
        run = ran / "results" / "tiny" / "tiny" / name
        assert {f.name for f in run.iterdir()} >= {"recipe.yaml", "log.jsonl", "environment.json", "summary.json"}
        measured = json.loads((run / "measured.json").read_text())
        assert measured["images"] == 20 and 0 <= measured["size"]["150"] <= 100
        for state in ("initial", "trained"):
            assert len(measured[state]["share"]) == len(measured[state]["diversity"]) == 2
    page = (ran / "results" / "tiny" / "tiny" / "README.md").read_text()
    assert "4 of 4 runs are done" in page and "| EIT is dearer | `macs.py, complexity` | digits +0.0" in page
    assert "| holds |" in page


def test_finished_runs_are_kept(ran):
    file = ran / "results" / "tiny" / "tiny" / "digits-eit-seed-0" / "log.jsonl"
    before = file.stat().st_mtime_ns
    done = run_eit("reproduce", "tiny.yaml", "--json", cwd=ran)
    assert done.returncode == 0 and file.stat().st_mtime_ns == before
    assert done.stderr == "finished: all 4 runs are in results/tiny/tiny; another --results trains anew\n"
    found = json.loads(done.stdout)
    assert len(found["runs"]) == 4 and not found["missing"] and found["claims"]["dearer"]["word"] == "holds"


def test_tables_come_from_results_alone_without_weights(ran, tmp_path):
    shutil.copytree(ran, tmp_path / "clone", ignore=shutil.ignore_patterns("*.safetensors", "checkpoints", "*.png"))
    done = run_eit("reproduce", "tiny.yaml", "--tables", cwd=tmp_path / "clone")
    assert done.returncode == 0
    pages = [base / "results" / "tiny" / "tiny" / "README.md" for base in (ran, tmp_path / "clone")]
    assert pages[0].read_text() == pages[1].read_text()
    assert (pages[1].parent / "figure.png").exists()


def test_another_recipe_in_a_folder_is_refused(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "results")
    (tmp_path / "tiny.yaml").write_text(TINY.replace("embed_dim: 16", "embed_dim: 32"))
    done = run_eit("reproduce", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "model.embed_dim: 16 -> 32" in done.stderr and done.stderr.count("\n") == 1


def test_experiments_of_one_another_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one, other in (("a", "b"), ("b", "a"), ("c", "c")):
        text = f"shows: x\nrefuted: y\nof: {other}.yaml\nclaims:" + TINY.partition("claims:")[2]
        Path(f"{one}.yaml").write_text(text)
    for name in "abc":
        with pytest.raises(UserError, match="axes and budgets are needed"):
            matrix.load(f"{name}.yaml")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("environment.json", dict(world_size=4), "a global batch of 256, not 64"),
        ("environment.json", None, "environment.json is damaged: world_size: Field required"),
        ("environment.json", dict(world_size="1"), "environment.json is damaged: world_size: Input should be"),
        ("measured.json", [], "measured.json is damaged: all of it: "),
        ("measured.json", dict(trained=dict(share=[1, "b"])), "measured.json is damaged: trained.share"),
        ("summary.json", "{", "summary.json is damaged: "),
        ("summary.json", dict(last_top1=float("nan")), "summary.json is damaged: last_top1: Input should be a finite"),
        ("summary.json", dict(last_top1=99.0), "log.jsonl is not of 1 epochs to 99.0%"),
        ("log.jsonl", "{", "log.jsonl is not of 1 epochs to "),
    ],
)
def test_a_run_of_another_batch_or_a_damaged_one_is_in_no_table(ran, tmp_path, file, change, said):
    shutil.copytree(ran, tmp_path / "clone")
    file = tmp_path / "clone" / "results" / "tiny" / "tiny" / "digits-eit-seed-0" / file
    if isinstance(change, dict):
        change = json.loads(file.read_text()) | change
    file.write_text(change if isinstance(change, str) else json.dumps({} if change is None else change))
    done = run_eit("reproduce", "tiny.yaml", "--tables", cwd=tmp_path / "clone")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_half_of_a_copy_is_not_copied(ran, tmp_path):
    folder = tmp_path / "results" / "tiny" / "tiny"
    shutil.copytree(ran / "results" / "tiny" / "tiny" / "digits-eit-seed-0", folder / ".digits-eit-seed-0")
    recipe = matrix.load(str(ran / "tiny.yaml")).cells("tiny")[0].recipe(tmp_path / "results", {})
    assert not cells.adopt(recipe, tmp_path / "results")


def test_a_run_that_another_experiment_has_is_copied(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "results")
    (tmp_path / "other.yaml").write_text(TINY.replace("analysis: 20, sizes: [150]", "sizes: [200]"))
    done = run_eit("reproduce", "other.yaml", "--only", "eit-seed-0", cwd=tmp_path)
    assert done.returncode == 0 and "has the same recipe: copied" in done.stderr and "epoch 1" not in done.stderr
    old, new = (tmp_path / "results" / n / "tiny" / "digits-eit-seed-0" for n in ("tiny", "other"))
    assert (old / "log.jsonl").read_bytes() == (new / "log.jsonl").read_bytes()
    assert set(json.loads((new / "measured.json").read_text())["size"]) == {"200"}


@pytest.mark.parametrize("change", ["data.root: sklearn:digits -> tmp", "data.batch_size: 64 -> 32"])
def test_a_run_of_other_data_or_another_batch_is_not_copied(ran, tmp_path, change, folder):
    key, _, value = change.partition(": ")
    value = str(folder) if key == "data.root" else 32
    results = tmp_path / "results"
    shutil.copytree(ran / "results", results)
    recipe = matrix.load(str(ran / "tiny.yaml")).cells("tiny")[0].recipe(results, {})
    assert cells.adopt(recipe.model_copy(update=dict(out=str(results / "o" / "b" / "same"))), results)
    data = recipe.data.model_copy(update={key.removeprefix("data."): value})
    assert not cells.adopt(recipe.model_copy(update=dict(out=str(results / "o" / "b" / "other"), data=data)), results)


def test_a_run_without_weights_is_not_copied_and_is_trained_again(ran, tmp_path):
    """As in a fresh clone, where results/ has no weights."""
    clone = tmp_path / "clone"
    shutil.copytree(ran, clone, ignore=shutil.ignore_patterns("*.safetensors", "checkpoints"))
    (clone / "tiny.yaml").write_text(TINY.replace("sizes: [150]", "sizes: [150, 200]"))
    done = run_eit("reproduce", "tiny.yaml", "--only", "eit-seed-0", cwd=clone)
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
    done = run_eit("reproduce", "tiny.yaml", cwd=tmp_path / "clone")
    assert done.returncode == 0 and done.stderr.count("epoch 1 ") == 2 and "run 3 of 3" in done.stderr, done.stderr
    pages = [base / "results" / "tiny" / "tiny" / "README.md" for base in (ran, tmp_path / "clone")]
    assert pages[0].read_text() == pages[1].read_text()


def test_a_run_that_diverges_does_not_keep_the_others_waiting(tmp_path):
    arm = "wild: {set: {optim: {lr: 1.0e+6}}}"
    (tmp_path / "tiny.yaml").write_text(TINY.replace("    eit: {}\n", f"    {arm}\n    eit: {{}}\n"))
    done = run_eit("reproduce", "tiny.yaml", "--only", "seed-0", "--json", cwd=tmp_path)
    assert done.returncode == 1 and "digits-wild-seed-0: the loss is nan in epoch 1" in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("eit: 1 of 3 runs: digits-wild-seed-0: the loss was not finite")
    found = json.loads(done.stdout)
    assert [run["name"] for run in found["runs"]] == ["digits-eit-seed-0", "digits-vit-seed-0"]
    assert "digits-wild-seed-0" in found["missing"] and found["claims"]["dearer"]["word"] == NOT_RUN
    page = (tmp_path / "results" / "tiny" / "tiny" / "README.md").read_text()
    assert "2 of 6 runs are done. Not done: digits-wild-seed-0, " in page


@pytest.mark.slow
def test_two_processes_make_the_same_pages(ran, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = run_eit("reproduce", "tiny.yaml", "--only", "seed-0", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (base / "results" / "tiny" / "tiny" / "digits-eit-seed-0" for base in (ran, tmp_path))
    assert load_recipe(str(two / "recipe.yaml")).data.batch_size == 32
    before, after = (json.loads((folder / "measured.json").read_text()) for folder in (one, two))
    assert before["images"] == after["images"] and before["trained"]["share"] == pytest.approx(
        after["trained"]["share"], rel=0.05
    )
    assert done.stdout.count("# tiny, budget tiny") == 1
    again = run_eit("reproduce", "tiny.yaml", "--tables", cwd=tmp_path, ranks=2)
    assert again.returncode == 0 and again.stdout.count("# tiny, budget tiny") == 1


def test_the_global_batch_stays_on_any_number_of_processes():
    (cell,) = [c for c in matrix.load("imagenet").cells("full") if c.levels["model"] == "mini"]
    for world in (1, 2, 4, 8, 16):
        recipe = cell.recipe(Path("results"), {}, world)
        assert recipe.data.batch_size * recipe.train.accumulate * world == 1024
    with pytest.raises(UserError, match="a global batch of 1024 is no multiple of 3 processes"):
        cell.recipe(Path("results"), {}, 3)


def test_a_model_of_timm_goes_all_the_way(tmp_path):
    arm = "resnet: {set: {model: {name: timm/test_resnet}}}"
    (tmp_path / "tiny.yaml").write_text(TINY.replace("    eit: {}\n", f"    eit: {{}}\n    {arm}\n"))
    done = run_eit("reproduce", "tiny.yaml", "--only", "resnet-seed-0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| digits | resnet | 1 |" in done.stdout
    results, cell = tmp_path / "results", matrix.load(str(tmp_path / "tiny.yaml")).cells("tiny")[2]
    assert cell.levels["model"] == "resnet"
    measured = json.loads((cell.folder(results) / "measured.json").read_text())
    assert measured["trained"].get("missing") or not measured["trained"]["diversity"]
    result = cells.read_result(cell, results)
    assert frequency_table(matrix.load("frequency"), [result])


def test_our_resnet_takes_no_argument_that_it_does_not_have():
    with pytest.raises(UserError, match="drop_rate"):
        eit.create_model("timm/resnet24_small", drop_rate=0.5)
    assert eit.create_model("timm/resnet24_small", num_classes=7, in_chans=1).num_classes == 7


def test_a_run_again_is_identical_or_within_the_spread(ran, tmp_path):
    words = ("reproduce", "tiny.yaml", "--again", "digits-eit-seed-0")
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
    words = ("reproduce", "tiny.yaml", "--again", "digits-eit-seed-0", "--out", str(tmp_path / "again"), "--json")
    done = run_eit(*words, cwd=tmp_path / "two")
    assert done.returncode == 0 and "22 x 64 of them an epoch" in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"] and "world_size: 2 -> 1" in found["changed"]
    assert any(change.startswith("capability: not recorded -> ") for change in found["changed"])


def test_an_environment_is_compared_by_its_parts(ran):
    environment = json.loads((ran / "results/tiny/tiny/digits-eit-seed-0/environment.json").read_text())
    flat = cells.flat(environment)
    assert flat["torch"] and flat["model"] == environment["cpu"]["model"] and "command" not in flat


def test_the_cheapest_run_of_the_tables_can_be_trained_again(tmp_path):
    """Identical on the machine that made it, else within three standard deviations over seeds."""
    words = ("reproduce", "small_data", "--budget", "smoke", "--again", "digits-eit-seed-0")
    done = run_eit(*words, "--results", ROOT / "results", "--out", tmp_path / "again", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_agreement_is_three_standard_deviations():
    assert Again(True, 50, 50, None, []).agrees
    assert Again(False, 50, 52.9, 3.0, []).agrees
    assert not Again(False, 50, 53.1, 3.0, []).agrees
    assert not Again(False, 50, 50, None, []).agrees


def test_tables_of_an_experiment_that_was_changed_since_are_refused(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "results")
    (tmp_path / "tiny.yaml").write_text(TINY.replace("depth: 2", "depth: 3"))
    done = run_eit("reproduce", "tiny.yaml", "--tables", cwd=tmp_path)
    assert done.returncode == 2 and "model.depth: 2 -> 3" in done.stderr


def test_a_page_or_a_figure_that_disagrees_with_its_runs_is_seen(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "results")
    experiment = matrix.load(str(ran / "tiny.yaml"))
    assert disagreement(experiment, "tiny", tmp_path / "results") is None
    folder = tmp_path / "results" / "tiny" / "tiny"
    page = (folder / "README.md").read_text()
    (folder / "README.md").write_text(page.replace("holds", "does not hold"))
    assert disagreement(experiment, "tiny", tmp_path / "results").name == "README.md"
    (folder / "README.md").write_text(page)
    measured = folder / "digits-eit-seed-0" / "measured.json"
    values = json.loads(measured.read_text())
    values["trained"]["share"][0] += 0.1  # which the page does not show
    measured.write_text(json.dumps(values))
    assert disagreement(experiment, "tiny", tmp_path / "results").name == "figure.png"


def test_figures_of_each_experiment_are_drawn(ran, tmp_path):
    experiment = matrix.load(str(ran / "tiny.yaml"))
    for name in ("tiny", "frequency", "diversity"):
        own = experiment.model_copy(update=dict(name=name))
        results = tmp_path / "results"
        shutil.copytree(ran / "results" / "tiny", results / name, dirs_exist_ok=True)
        file = tmp_path / f"{name}.png"
        figure(own, read_results(own, "tiny", results), file)
        assert file.stat().st_size > 5000
    assert digest(read_results(experiment, "tiny", ran / "results"))


def test_weights_are_prepared_for_a_release(ran, tmp_path, monkeypatch):
    results = tmp_path / "results"
    first = matrix.load("small_data").cells("smoke")[:3]
    for cell, name in zip(first, ("digits-eit-seed-0", "digits-eit-seed-1", "digits-vit-seed-0"), strict=True):
        shutil.copytree(ran / "results" / "tiny" / "tiny" / name, cell.folder(results))
        (cell.folder(results) / "recipe.yaml").write_text(cell.recipe(results, {}).to_yaml())
    command = [sys.executable, str(ROOT / "docs" / "release_weights.py"), str(tmp_path / "out"), str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = "small-data-smoke-digits-eit"
    assert (tmp_path / "out" / name / "README.md").exists()
    assert (tmp_path / "out" / "SHA256SUMS").read_text().endswith(f"  {name}.zip\n")
    assert eit.load(tmp_path / "out" / name).card.metrics
    card = (tmp_path / "out" / name / "README.md").read_text()
    assert "Trained with eit" in card and "those after the last epoch" in card
    assert (tmp_path / "out" / name / "curves.png").exists()
    for cell in first:
        (cell.folder(results) / "final.safetensors").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "eit reproduce small_data --budget smoke --results FOLDER trains it" in done.stdout
    assert subprocess.run(command[:2], capture_output=True, text=True).stderr.startswith("usage: ")


# -- The command ------------------------------------------------------------------------------------------------------


def test_the_list_says_what_each_shows_costs_and_what_refutes_it():
    text = run_eit("reproduce", "--list").stdout
    assert text == run_eit("reproduce").stdout
    for name in matrix.experiment_names():
        assert f"\n{name}\n" in f"\n{text}"
    assert text.count("refuted if: ") == text.count("shows: ") == 6 and "3.7 hours of one CPU core" in text
    assert len(json.loads(run_eit("reproduce", "--list", "--json").stdout)) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smal_data"], "did you mean 'small_data'?"),
        (["nowhere.yaml"], "cannot read nowhere.yaml"),
        (["small_data", "--budget", "huge"], "--budget huge: small_data has smoke, short, medium, full"),
        (["small_data", "--data", "cifar10"], "--data cifar10 is not NAME=PATH"),
        (["small_data", "--data", "imagenet=x"], "its data sets are cifar10, fashion_mnist"),
        (["small_data", "--only", "swin"], "no run of small_data has it"),
        (["small_data", "--again", "swin"], "has no such run"),
        (["small_data", "--budget", "smoke", "--again", "digits-eit-seed-0"], "is no finished run"),
        (["small_data", "--data", "cifar10=nowhere"], "nowhere is not a folder"),
        (["imagenet", "--curve", "nowhere"], "nowhere has no log of a run"),
        (["imagenet", "--images-per-s", "8000"], "--images-per-s is of --plan"),
        (["small_data", "--out", "x"], "--out is of --again"),
        (["small_data", "--plan", "--tables"], "exclude each other"),
        (["small_data", "--tables", "--only", "eit"], "--only is of the runs to train"),
        (["small_data", "--tables"], "has no finished run"),
        (["--budget", "short", "--tables"], "NAME is missing for --budget, --tables"),
        (["small_data", "--list"], "--list takes no small_data"),
        (["small_data", "--curve", "x"], "--curve is of imagenet"),
        (["imagenet", "--curve", "x", "--data", "imagenet=y"], "no other option (--data)"),
        (["imagenet", "--plan", "--images-per-s", "inf"], "--images-per-s inf is no rate"),
        (["small_data", "--data", "cifar10=a", "--data", "cifar10=b"], "--data cifar10=... is given twice"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, words, said):
    done = run_eit("reproduce", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "results").exists()


def test_the_plan_s_commands_make_the_recipes():
    for name, budget in (("small_data", "full"), ("ablation", "short"), ("imagenet", "full")):
        runs = matrix.load(name).cells(budget)
        plan = commands(runs, Path("results"), {}, 1000.0)
        for cell, planned in zip(runs, plan, strict=True):
            words = shlex.split(planned.command)
            start = words.index("train") + 1
            assert load_recipe(words[start], words[start + 1 :]) == cell.recipe(Path("results"), {})
            rate = 1000.0 * plan[0].training_macs / plan[0].images
            assert planned.hours == pytest.approx(planned.training_macs / rate / 3600)
    assert (
        f"{sum(run.training_macs for run in plan) / 1e18:.1f}e18 MACs" in matrix.load("imagenet").budgets["full"].cost
    )
    text = run_eit("reproduce", "imagenet", "--plan", "--images-per-s", "8000").stdout
    assert text.startswith("torchrun --nproc-per-node=8 -m eit train imagenet_mini") and "a run)" in text


# -- ImageNet ---------------------------------------------------------------------------------------------------------


def write_run(folder, model, lines):
    folder.mkdir()
    recipe = load_recipe(f"imagenet_{model}", [f"out={folder}"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps(dict(world_size=8)))
    return folder


def as_log(curve, top1=0.0):
    """The authors' curve as our log would have it: their epoch e + 1 is our e."""
    moved = [*curve[1:], curve[-1]]
    return [
        dict(epoch=i, step=i, val_top1=row["top1"] + top1, train_loss=row["train_loss"]) for i, row in enumerate(moved)
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_published_curves_end_at_the_published_figures(name):
    curve = published_curve(name)
    assert len(curve) == 300
    assert max(row["top1"] for row in curve) == pytest.approx(VARIANTS[name].published_top1, abs=0.06)


def test_the_published_curves_are_those_of_the_reference():
    file = SHARED / "reference" / "published_curves.csv"
    require(file.exists(), "shared/reference is not beside the checkout")
    shipped = resources.files("eit").joinpath("published_curves.csv").read_text()
    assert list(csv.reader(shipped.splitlines())) == list(csv.reader(file.read_text().splitlines()))


def test_a_run_is_compared_epoch_by_epoch(tmp_path):
    curve = published_curve("eit_mini")
    same = compare(write_run(tmp_path / "same", "mini", as_log(curve)))
    assert same.worst == 0 and "reproduced" in same.verdict and "not" not in same.verdict
    worse = compare(write_run(tmp_path / "worse", "mini", as_log(curve, -1.0)))
    assert worse.worst == pytest.approx(-1) and "not reproduced" in worse.verdict
    early = compare(write_run(tmp_path / "early", "mini", as_log(curve)[:10]))
    assert early.worst is None and "too early" in early.verdict
    half = compare(write_run(tmp_path / "half", "mini", as_log(curve, -0.25)[:150]))
    assert half.worst == pytest.approx(-0.25) and len(half.rows) == 150
    assert "149" in str(half) and len(str(half).splitlines()) < 20


def test_a_torn_last_line_is_left_out_and_a_damaged_one_named(tmp_path):
    folder = write_run(tmp_path / "run", "mini", as_log(published_curve("eit_mini"))[:30])
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"epoch": 30, "train_l')
    assert compare(folder).epochs == 30
    with open(folder / "log.jsonl", "a") as log:
        log.write('oss": null, "val_top1": 60.0}\n')
    with pytest.raises(UserError, match="log.jsonl is damaged: line 31 has train_loss None"):
        compare(folder)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("family: eit", "family: vit", "model.family: eit -> vit"),
        ("epochs: 300", "epochs: 10", "train.epochs: 300 -> 10"),
        ("accumulate: 1", "accumulate: 2", "global batch: 1024 -> 2048"),
        ("name: eit_mini", "name: timm/resnet18", "no training curve of timm/resnet18"),
    ],
)
def test_a_run_of_another_recipe_is_not_compared(tmp_path, old, new, said):
    folder = write_run(tmp_path / "run", "mini", as_log(published_curve("eit_mini")))
    text = (folder / "recipe.yaml").read_text()
    assert old in text
    (folder / "recipe.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=said):
        compare(folder)
