"""Experiments: their files, the runs, the verdicts, the pages."""

import csv
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import scipy
from PIL import Image
from statsmodels.stats.weightstats import ttost_ind

import eit
from eit.config import load_recipe
from eit.errors import UserError
from eit.models.registry import VARIANTS
from eit.reproduce import experiment as experiments
from eit.reproduce import runs
from eit.reproduce.commands import commands
from eit.reproduce.experiment import Cell, Claim
from eit.reproduce.forest import Row, draw_forest
from eit.reproduce.forest import digest as forest_digest
from eit.reproduce.published import compare, published_curve
from eit.reproduce.runs import Again, Result, read_results
from eit.reproduce.tables import FACTORIAL, ablation_table, digest, disagreement, figure, frequency_table, has_digest
from eit.reproduce.verdict import (
    FAILS,
    FEW,
    HOLDS,
    NOT_RUN,
    PARTLY,
    UNDECIDED,
    UNTESTABLE,
    Verdict,
    correct,
    weigh,
)  # fmt: skip
from tests.conftest import SHARED, require, run_eit

ROOT = Path(__file__).parents[2]
MATRICES = [name for name in experiments.experiment_names() if not experiments.load(name).of]
BUDGETS = [(name, budget) for name in MATRICES for budget in experiments.load(name).budgets]

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
  dearer: {says: EIT is dearer, code: "models/complexity.py, complexity", metric: macs, axis: model, rises: [vit, eit]}
"""


# -- The files --------------------------------------------------------------------------------------------------------


def test_every_experiment_of_the_package_is_read():
    assert experiments.experiment_names() == ["small_data", "ablation", "pooling", "frequency", "diversity", "imagenet"]
    assert all(experiments.load(name).claims for name in experiments.experiment_names())


@pytest.mark.parametrize(("name", "budget"), BUDGETS)
def test_every_run_has_a_recipe_and_a_name_of_its_own(name, budget):
    folders = [cell.recipe(Path("results"), {}).out for cell in experiments.load(name).cells(budget)]
    assert len(set(folders)) == len(folders) > 0


@pytest.mark.parametrize("budget", ["smoke", "short", "medium", "full"])
def test_models_of_small_data_differ_in_what_their_names_say_alone(budget):
    found = experiments.load("small_data").cells(budget)
    recipes = {cell.name: cell.recipe(Path("results"), {}).model_dump() for cell in found}
    for cell in found:
        if cell.levels["model"] not in ("eit", "resnet"):
            own = recipes[cell.name]
            twin = recipes[cell.name.replace(cell.levels["model"], "eit")]
            assert own["model"] | dict(family="eit", cls_conv=None, schedule=None) == twin["model"]
            assert {k: v for k, v in own.items() if k not in ("model", "out")} == {
                k: v for k, v in twin.items() if k not in ("model", "out")
            }


def test_the_paper_s_sizes():
    """The full budget has the paper's 3.08 M and 0.212 G, and the ResNet its ratio; short ones at most 96 channels."""
    for cell in experiments.load("small_data").cells("full"):
        model = cell.values["model"]
        assert (
            model["name"] == "timm/resnet24_small"
            or [model[key] for key in ("embed_dim", "depth", "num_heads")] == [None] * 3
        ), "eit_mini's own 250, 5, 10"
    assert all(cell.values["model"]["embed_dim"] <= 96 for cell in experiments.load("small_data").cells("short"))
    resnet = eit.create_model("timm/resnet24_small", num_classes=10)
    small = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, num_classes=10)
    ours = eit.complexity(eit.create_model("eit_mini", **small), (3, 32, 32))
    theirs = eit.complexity(resnet, (3, 32, 32))
    assert ours.params / theirs.params == pytest.approx(0.177, abs=0.0005)
    assert ours.macs < theirs.macs


@pytest.mark.parametrize("budget", ["smoke", "short", "full"])
def test_schedules_of_the_ablation_have_equal_mean_shares(budget):
    arms = {}
    for cell in experiments.load("ablation").cells(budget):
        model = cell.recipe(Path("results"), {}).model
        arms[cell.levels["variant"]] = eit.create_model(model.name, img_size=32, **model.arguments())
    shares = {name: statistics.mean(arm.attn_channels) for name, arm in arms.items()}
    assert shares["eit"] == shares["increasing"] == shares["constant"]
    assert len(set(arms["constant"].attn_channels)) == 1
    assert shares["no_convolution"] == arms["eit"].embed_dim
    assert budget != "full" or arms["constant"].attn_channels == [150] * 5


def test_claims_name_files_and_code_that_exist():
    for name in experiments.experiment_names():
        for claim in experiments.load(name).claims.values():
            file, _, symbol = claim.code.partition(", ")
            found = list((ROOT / "src" / "eit").glob(file))
            assert found, claim.code
            assert not symbol or re.search(rf"\b{symbol}\b", found[0].read_text()), claim.code


def test_claims_speak_of_levels_and_metrics_that_are_measured():
    for name in experiments.experiment_names():
        experiment = experiments.load(name)
        for claim in experiment.claims.values():
            assert set(claim.levels) <= set(experiment.runs.axes[claim.axis])
            assert experiment.runs.measure.has(claim.metric)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shows: x", "refuted"),
        (TINY.replace("rises: [vit, eit]", "rises: [eit]"), "claims.dearer.rises"),
        (TINY.replace("rises: [vit, eit]", ""), "a claim has one of rises, equal and reaches"),
        (TINY.replace("rises: [vit, eit]", "equal: [vit, eit]"), "within is the margin of equal, or of reaches"),
        (
            TINY.replace("rises: [vit, eit]", "rises: [vit, eit], within: 1"),
            "within is the margin of equal, or of reaches",
        ),
        (TINY.replace("recipe: digits", "control: vat\nrecipe: digits", 1), "control=vat: model has no such level"),
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
        experiments.load(str(file))
    assert "\n" not in str(error.value)


# -- Verdicts ---------------------------------------------------------------------------------------------------------


def made(values, metric="last_top1", data="d", **measured):
    """Results: values[level] is a list by seed."""
    return [
        Result(
            Cell("e", "b", dict(data=data, model=level, seed=str(seed)), "digits", {}), {metric: value}, measured, {}
        )
        for level, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]


def cells_of(results, *more):
    """The runs that were planned: those that are done, and `more` (data, level, seed)."""
    left = [Cell("e", "b", dict(data=data, model=level, seed=str(seed)), "digits", {}) for data, level, seed in more]
    return [result.cell for result in results] + left


def claim(**given):
    return Claim(**dict(says="s", code="c", metric="last_top1", axis="model", rises=["vit", "eit"]) | given)


def weighed(results, control=None, more=(), **given):
    return weigh(claim(**given), results, cells_of(results, *more), control)


LOW, HIGH = [50, 52, 54, 51, 53], [60, 63, 64, 61, 62]


@pytest.mark.parametrize(
    ("vit", "eit_", "word"),
    [
        (LOW, HIGH, HOLDS),
        (HIGH, LOW, FAILS),
        ([50, 60, 55, 51, 58], [52, 57, 56, 59, 53], UNDECIDED),
        (LOW[:4], HIGH, FEW),
        ([50], [60], FEW),
        ([50] * 5, [60] * 5, UNDECIDED),  # no spread was seen
        ([50.0] * 5, [50.0] * 5, UNDECIDED),
    ],
)
def test_two_levels_are_weighed(vit, eit_, word):
    assert weighed(made(dict(vit=vit, eit=eit_))).word == word


def test_runs_are_not_paired():
    """A spread that both levels share over their seeds hides a difference: one seed gives them nothing in common."""
    assert weighed(made(dict(vit=[10, 30, 50, 70, 90], eit=[11, 32, 51, 72, 91]))).word == UNDECIDED


def test_the_test_is_welch_s_and_two_sided():
    (gap,) = weighed(made(dict(vit=LOW, eit=HIGH))).gaps
    difference = statistics.fmean(HIGH) - statistics.fmean(LOW)
    a, b = statistics.variance(HIGH) / 5, statistics.variance(LOW) / 5
    freedom = (a + b) ** 2 / (a**2 / 4 + b**2 / 4)
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
    assert (gap.difference, gap.low, gap.high) == pytest.approx((difference, difference - half, difference + half))
    assert gap.p == pytest.approx(2 * scipy.stats.t.sf(difference / math.sqrt(a + b), freedom))
    assert gap.opposite == 1 and gap.runs == (5, 5) and gap.judged


def test_against_a_control_the_test_is_dunnett_s():
    """By other code: its integral over the common spread and the control's mean, of equal samples (Dunnett 1955)."""
    arms = dict(eit=HIGH, vit=[58, 60, 61, 59, 63], lsra=[57, 59, 60, 58, 63], other=[61, 60, 64, 62, 63])
    found = weighed(made(arms), control="eit")
    n, others = 5, 3
    pooled = statistics.fmean(statistics.variance(runs) for runs in arms.values())
    error, freedom = math.sqrt(2 * pooled / n), len(arms) * (n - 1)
    (gap,) = found.gaps
    t = gap.difference / error
    normal, chi = scipy.stats.norm, scipy.stats.chi(freedom)

    def inside(t):
        def given(s):
            def both(z):
                width = t * s * math.sqrt(2)
                return normal.pdf(z) * (normal.cdf(z + width) - normal.cdf(z - width)) ** others

            return chi.pdf(s * math.sqrt(freedom)) * math.sqrt(freedom) * scipy.integrate.quad(both, -8, 8)[0]

        return scipy.integrate.quad(given, 0.05, 4)[0]

    assert gap.p == pytest.approx(1 - inside(t), abs=2e-3)
    critical = scipy.optimize.brentq(lambda t: inside(t) - 0.95, 1, 5)
    assert (gap.low, gap.high) == pytest.approx(
        (gap.difference - critical * error, gap.difference + critical * error), abs=0.03
    )
    assert gap.p > weighed(made(arms)).gaps[0].p, "more than one comparison"
    back = weighed(made(arms), control="eit", rises=["eit", "vit"]).gaps[0]
    assert (back.difference, back.low, back.high) == pytest.approx((-gap.difference, -gap.high, -gap.low))


def test_a_control_is_compared_with_what_is_whole():
    """An arm that is not finished changes nothing of the others."""
    arms = dict(eit=HIGH, vit=[58, 60, 61, 59, 63])
    alone = weighed(made(arms), control="eit")
    assert weighed(made(arms | dict(lsra=[1, 99])), control="eit", more=[("d", "lsra", 2)]).gaps == alone.gaps


def test_a_claim_holds_where_it_does_on_every_data_set():
    one, same = made(dict(vit=LOW, eit=HIGH)), made(dict(vit=LOW, eit=HIGH), data="other")
    weak, against = made(dict(vit=LOW, eit=LOW), data="weak"), made(dict(vit=HIGH, eit=LOW), data="against")
    assert weighed(one + same).word == HOLDS
    assert weighed(one + weak).word == UNDECIDED and weighed(one + weak).p == 1
    assert weighed(one + against).word == FAILS
    assert weighed(one + against).opposite == pytest.approx(2 * weighed(against).opposite), "on one of two"
    both = weighed(one + same)
    assert both.p == max(gap.p for gap in both.gaps)


def test_the_mean_over_data_sets_has_an_interval_of_its_own():
    found = weighed(
        made(dict(vit=LOW, eit=HIGH)) + made(dict(vit=[70, 71, 72, 73, 74], eit=[73, 72, 75, 74, 76]), data="b")
    )
    first, second = found.gaps
    assert found.mean.difference == pytest.approx((first.difference + second.difference) / 2)
    squares = [statistics.variance(runs) / 5 for runs in (HIGH, LOW, [70, 71, 72, 73, 74], [73, 72, 75, 74, 76])]
    freedom = sum(squares) ** 2 / sum(square**2 / 4 for square in squares)
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(squares)) / 2
    assert found.mean.high - found.mean.difference == pytest.approx(half)
    assert weighed(made(dict(vit=LOW, eit=HIGH))).mean is None


def test_nothing_is_decided_before_all_runs_are_done():
    results = made(dict(vit=LOW, eit=HIGH, resnet=[70, 70]))
    assert weighed(results).word == HOLDS
    verdict = weighed(results, more=[("d", "eit", 5)])
    assert verdict.word == NOT_RUN and verdict.gaps[0].difference == 10 and not verdict.gaps[0].judged
    assert str(verdict) == NOT_RUN
    assert weighed(results, more=[("d", "resnet", 5)]).word == HOLDS, "of which the claim does not speak"
    partly = weighed(results, more=[("other", level, seed) for level in ("eit", "vit") for seed in range(5)])
    assert partly.word == PARTLY and str(partly) == "partly run (1 of 2 data sets)" and partly.gaps[0].judged
    assert weighed(made(dict(eit=HIGH))).word == NOT_RUN
    published = dict(rises=None, reaches=dict(eit=60.0, vit=50.0))
    assert weighed(results, **published).word == HOLDS
    assert weighed(results, more=[("d", "eit", 5)], **published).word == PARTLY


def test_levels_are_equal_where_two_one_sided_tests_say_so():
    equal = dict(rises=None, equal=["vit", "eit"], within=1.0)
    near, far = [50.0, 50.4, 49.8, 50.2, 50.1], [53.0, 53.4, 52.8, 53.2, 53.1]
    assert weighed(made(dict(vit=near, eit=[x + 0.1 for x in near])), **equal).word == HOLDS
    assert weighed(made(dict(vit=near, eit=far)), **equal).word == FAILS
    assert weighed(made(dict(vit=far, eit=near)), **equal).word == FAILS
    wide = weighed(made(dict(vit=LOW, eit=[x + 0.2 for x in LOW])), **equal)
    found = re.search(r"(\d+) runs of each would decide on d", wide.note)
    assert wide.word == UNDECIDED and found
    (gap,) = wide.gaps
    a = statistics.variance(LOW) / 5
    error, freedom = math.sqrt(2 * a), 8
    tests = [scipy.stats.t.sf((1 + side * gap.difference) / error, freedom) for side in (1, -1)]
    assert gap.p == pytest.approx(max(tests))
    half = scipy.stats.t.ppf(0.95, freedom) * error
    assert (gap.low, gap.high) == pytest.approx((gap.difference - half, gap.difference + half)), "90%"
    # So many runs of two levels that are the same are found equal four times in five
    n, chance = int(found[1]), np.random.default_rng(0)
    sd = math.sqrt(statistics.variance(LOW))
    draws = chance.normal(0, sd, (2000, 2, n))
    p = [ttost_ind(x, y, -1, 1, usevar="unequal")[0] for x, y in draws]
    assert 0.77 < np.mean(np.array(p) < 0.05) < 0.85


def test_primary_claims_are_corrected_together():
    """Holm's method, by a loop."""
    ps = [0.001, 0.04, 0.012, 0.03]
    verdicts = {n: Verdict(HOLDS, primary=True, p=p, opposite=1.0) for n, p in enumerate(ps)}
    verdicts[4] = Verdict(NOT_RUN, primary=True)
    found, worst = {}, 0.0
    for rank, n in enumerate(sorted(range(5), key=lambda n: [*ps, 1.0][n])):
        worst = max(worst, min(1.0, (5 - rank) * [*ps, 1.0][n]))
        found[n] = worst
    corrected = correct(verdicts)
    assert [corrected[n].p for n in range(4)] == pytest.approx([found[n] for n in range(4)])
    assert [corrected[n].word for n in range(5)] == [HOLDS, UNDECIDED, HOLDS, UNDECIDED, NOT_RUN]
    assert corrected[4] == verdicts[4]
    failed = correct({0: Verdict(FAILS, primary=True, p=1.0, opposite=0.02), 1: Verdict(NOT_RUN, primary=True)})
    assert failed[0].word == FAILS and failed[0].opposite == pytest.approx(0.04)


def test_at_most_six_claims_are_primary_and_all_ask_for_five_runs():
    loaded = [experiments.load(name) for name in experiments.experiment_names()]
    primary = [(one, claim) for one in loaded for claim in one.claims.values() if claim.primary]
    assert 0 < len(primary) <= 6
    for one, claim in primary:
        planned = [cell for cell in one.cells("short") if cell.levels[claim.axis] in claim.levels]
        sets = {cell.data for cell in planned}
        assert all(
            sum(cell.data == data and cell.levels[claim.axis] == level for cell in planned) >= 5
            for data in sets
            for level in claim.levels
        )


def test_diversity_of_uniform_heads_is_not_testable():
    def runs(entropy):
        return [
            Result(r.cell, {}, dict(trained=dict(diversity=[r.summary["last_top1"]], entropy=[entropy])), {})
            for r in made(dict(vit=LOW, eit=HIGH))
        ]

    assert weighed(runs(0.9), metric="trained.diversity").word == HOLDS
    found = weighed(runs(0.96), metric="trained.diversity")
    assert found.word == UNTESTABLE and "vit on d: 96.0% of uniform attention's entropy" in str(found)


def test_a_verdict_says_what_decided():
    assert re.fullmatch(r"holds \(p = 0.0000?\d+|holds \(p < 0.0001\)", str(weighed(made(dict(vit=LOW, eit=HIGH)))))
    against = weighed(made(dict(vit=HIGH, eit=LOW)))
    assert re.fullmatch(r"does not hold \(opposite: p < 0.0001\)", str(against))
    undecided = str(weighed(made(dict(vit=[50, 60, 55, 51, 58], eit=[52, 57, 56, 59, 54]))))
    assert re.fullmatch(r"undecided \(p = 0\.\d+, opposite: p = 1\)", undecided)


def test_what_is_counted_is_compared_as_it_is():
    cheaper = dict(metric="macs", rises=["eit", "vit"])
    assert weighed(made(dict(eit=[10], vit=[12]), "macs"), **cheaper).word == HOLDS
    assert weighed(made(dict(eit=[10, 10], vit=[12, 9]), "macs"), **cheaper).word == FAILS


def test_values_to_reach():
    published = dict(rises=None, reaches=dict(eit=70.0, vit=60.0), within=0.5)
    assert weighed(made(dict(eit=[69.6], vit=[61])), **published).word == HOLDS
    assert weighed(made(dict(eit=[69.4], vit=[61])), **published).word == FAILS
    assert weighed(made(dict(eit=[70])), **published).word == PARTLY
    assert weighed(made(dict(eit=[69])), **published).word == FAILS
    assert weighed(made(dict(eit=[10, 20, 90], vit=[61])), **published).word == FAILS  # their mean


def test_the_effects_of_the_factorial_are_those_of_a_linear_model():
    """By least squares on -1 and 1, of arms that have an effect of each factor, and one of two together."""
    chance = np.random.default_rng(0)
    rows, results = [], []
    for arm, has in FACTORIAL.items():
        signs = [2 * one - 1 for one in has]
        for seed in range(5):
            top1 = 60 + 2 * signs[0] + 0.5 * signs[2] + 1.5 * signs[0] * signs[2] + chance.normal(0, 0.3)
            rows.append([1, *signs, signs[0] * signs[1], signs[0] * signs[2], signs[1] * signs[2], top1])
            cell = Cell("ablation", "short", dict(data="cifar10", variant=arm, seed=str(seed)), "cifar10", {})
            results.append(Result(cell, dict(last_top1=top1, best_top1=top1, params=1), dict(macs=1), {}))
    table = np.array(rows)
    slopes = np.linalg.lstsq(table[:, :-1], table[:, -1], rcond=None)[0][1:]
    lines = [
        line for line in ablation_table(experiments.load("ablation"), results) if " | cifar10 " in line and "[" in line
    ]
    found = [float(re.search(r"cifar10 ([+-][\d.]+) \[", line)[1]) for line in lines]
    assert found == pytest.approx([2 * slope for slope in slopes], abs=0.006), "twice the slope: from without to with"
    assert not [line for line in ablation_table(experiments.load("ablation"), results[5:]) if "effect of" in line]


def test_the_forest_shows_every_interval(tmp_path):
    verdict = weighed(made(dict(vit=LOW, eit=HIGH)) + made(dict(vit=HIGH, eit=HIGH), data="other"))
    rows = [Row(claim(says="a claim " * 20), verdict, gap) for gap in (*verdict.gaps, verdict.mean)]
    draw_forest(rows, tmp_path / "forest.png")
    assert has_digest(tmp_path / "forest.png", forest_digest(rows))
    assert not has_digest(tmp_path / "forest.png", forest_digest(rows[:2]))
    assert Image.open(tmp_path / "forest.png").width > 800


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
    done = run_eit("reproduce", "run", "tiny.yaml", cwd=folder)
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
            assert all(len(measured[state][key]) == 2 for key in ("share", "diversity", "entropy", "class_token"))
            assert measured[state]["logit_spread"] > 0
    page = (ran / "results" / "tiny" / "tiny" / "README.md").read_text()
    assert (
        "4 of 4 runs are done" in page
        and "| EIT is dearer | ours | `models/complexity.py, complexity` | digits +0.0" in page
    )
    assert "| **holds** |" in page


def test_finished_runs_are_kept(ran):
    file = ran / "results" / "tiny" / "tiny" / "digits-eit-seed-0" / "log.jsonl"
    before = file.stat().st_mtime_ns
    done = run_eit("reproduce", "run", "tiny.yaml", "--json", cwd=ran)
    assert done.returncode == 0 and file.stat().st_mtime_ns == before
    assert done.stderr == "finished: all 4 runs are in results/tiny/tiny; another --results trains anew\n"
    found = json.loads(done.stdout)
    assert len(found["runs"]) == 4 and not found["missing"] and found["claims"]["dearer"]["word"] == "holds"


def test_tables_come_from_results_alone_without_weights(ran, tmp_path):
    shutil.copytree(ran, tmp_path / "clone", ignore=shutil.ignore_patterns("*.safetensors", "checkpoints", "*.png"))
    done = run_eit("reproduce", "tables", "tiny.yaml", cwd=tmp_path / "clone")
    assert done.returncode == 0
    pages = [base / "results" / "tiny" / "tiny" / "README.md" for base in (ran, tmp_path / "clone")]
    assert pages[0].read_text() == pages[1].read_text()
    assert (pages[1].parent / "figure.png").exists()


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
        with pytest.raises(UserError, match="axes and budgets are needed"):
            experiments.load(f"{name}.yaml")


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
    assert "2 of 6 runs are done. Not done: digits-wild-seed-0, " in page


@pytest.mark.slow
def test_two_processes_make_the_same_pages(ran, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = run_eit("reproduce", "run", "tiny.yaml", "--only", "seed-0", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (base / "results" / "tiny" / "tiny" / "digits-eit-seed-0" for base in (ran, tmp_path))
    assert load_recipe(str(two / "recipe.yaml")).data.batch_size == 32
    before, after = (json.loads((folder / "measured.json").read_text()) for folder in (one, two))
    assert before["images"] == after["images"] and before["trained"]["share"] == pytest.approx(
        after["trained"]["share"], rel=0.05
    )
    assert done.stdout.count("# tiny, budget tiny") == 1
    again = run_eit("reproduce", "tables", "tiny.yaml", cwd=tmp_path, ranks=2)
    assert again.returncode == 0 and again.stdout.count("# tiny, budget tiny") == 1


def test_the_global_batch_stays_on_any_number_of_processes():
    (cell,) = [c for c in experiments.load("imagenet").cells("full") if c.levels["model"] == "mini"]
    for world in (1, 2, 4, 8, 16):
        recipe = cell.recipe(Path("results"), {}, world)
        assert recipe.data.batch_size * recipe.train.accumulate * world == 1024
    with pytest.raises(UserError, match="a global batch of 1024 is no multiple of 3 processes"):
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
    flat = runs.flat(environment)
    assert flat["torch"] and flat["model"] == environment["cpu"]["model"] and "command" not in flat


def test_the_cheapest_run_of_the_tables_can_be_trained_again(tmp_path):
    """Identical on the machine that made it, else within three standard deviations over seeds."""
    words = ("reproduce", "again", "small_data", "digits-eit-seed-0", "--budget", "smoke")
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
    done = run_eit("reproduce", "tables", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "model.depth: 2 -> 3" in done.stderr


def test_a_page_or_a_figure_that_disagrees_with_its_runs_is_seen(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "results")
    experiment = experiments.load(str(ran / "tiny.yaml"))
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
    experiment = experiments.load(str(ran / "tiny.yaml"))
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
    first = experiments.load("small_data").cells("smoke")[:3]
    for cell, name in zip(first, ("digits-eit-seed-0", "digits-eit-seed-1", "digits-vit-seed-0"), strict=True):
        shutil.copytree(ran / "results" / "tiny" / "tiny" / name, cell.folder(results))
        (cell.folder(results) / "recipe.yaml").write_text(cell.recipe(results, {}).to_yaml())
    command = [sys.executable, str(ROOT / "tools" / "release_weights.py"), str(tmp_path / "out"), str(results)]
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
    assert (
        done.returncode == 1 and "eit reproduce run small_data --budget smoke --results FOLDER trains it" in done.stdout
    )
    assert subprocess.run(command[:2], capture_output=True, text=True).stderr.startswith("usage: ")


# -- The command ------------------------------------------------------------------------------------------------------


def test_the_plan_s_commands_make_the_recipes():
    for name, budget in (("small_data", "full"), ("ablation", "short"), ("imagenet", "full")):
        runs = experiments.load(name).cells(budget)
        plan = commands(runs, Path("results"), {}, 1000.0)
        for cell, planned in zip(runs, plan, strict=True):
            words = shlex.split(planned.command)
            start = words.index("train") + 1
            assert load_recipe(words[start], words[start + 1 :]) == cell.recipe(Path("results"), {})
            rate = 1000.0 * plan[0].training_macs / plan[0].images
            assert planned.hours == pytest.approx(planned.training_macs / rate / 3600)
    assert (
        f"{sum(run.training_macs for run in plan) / 1e18:.1f}e18 MACs"
        in experiments.load("imagenet").budgets["full"].cost
    )
    text = run_eit("reproduce", "plan", "imagenet", "--images-per-s", "8000").stdout
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
    shipped = resources.files("eit.reproduce").joinpath("published_curves.csv").read_text()
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
