"""Claims are judged by the tests that are named, on made-up runs."""

import math
import re
import statistics
import warnings

import numpy as np
import pytest
import scipy
from PIL import Image
from statsmodels.stats.weightstats import ttost_ind

from eit.reproduce import experiment as experiments
from eit.reproduce.experiment import Cell, Claim
from eit.reproduce.forest import Row, draw_forest
from eit.reproduce.forest import digest as forest_digest
from eit.reproduce.runs import Result
from eit.reproduce.tables import FACTORIAL, ablation_table, effect_text, has_digest
from eit.reproduce.verdict import (
    FAILS,
    FEW,
    HOLDS,
    NOT_RUN,
    PARTLY,
    UNDECIDED,
    UNTESTABLE,
    Verdict,
    _dunnett,
    correct,
    judge_claim,
)  # fmt: skip


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


def judged(results, control=None, more=(), **given):
    return judge_claim(claim(**given), results, cells_of(results, *more), control)


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
def test_two_levels_are_compared(vit, eit_, word):
    assert judged(made(dict(vit=vit, eit=eit_))).word == word


def test_runs_are_not_paired():
    """A spread that both levels share over their seeds hides a difference: one seed gives them nothing in common."""
    assert judged(made(dict(vit=[10, 30, 50, 70, 90], eit=[11, 32, 51, 72, 91]))).word == UNDECIDED


def test_the_test_is_welch_s_and_two_sided():
    (effect,) = judged(made(dict(vit=LOW, eit=HIGH))).effects
    difference = statistics.fmean(HIGH) - statistics.fmean(LOW)
    a, b = statistics.variance(HIGH) / 5, statistics.variance(LOW) / 5
    freedom = (a + b) ** 2 / (a**2 / 4 + b**2 / 4)
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
    assert (effect.difference, effect.low, effect.high) == pytest.approx(
        (difference, difference - half, difference + half)
    )
    assert effect.p == pytest.approx(2 * scipy.stats.t.sf(difference / math.sqrt(a + b), freedom))
    assert effect.opposite == 1 and effect.runs == (5, 5) and effect.judged


def test_against_a_control_the_test_is_dunnett_s():
    """By other code: its integral over the common spread and the control's mean, of equal samples (Dunnett 1955)."""
    arms = dict(eit=HIGH, vit=[58, 60, 61, 59, 63], lsra=[57, 59, 60, 58, 63], other=[61, 60, 64, 62, 63])
    found = judged(made(arms), control="eit")
    n, others = 5, 3
    pooled = statistics.fmean(statistics.variance(runs) for runs in arms.values())
    error, freedom = math.sqrt(2 * pooled / n), len(arms) * (n - 1)
    (effect,) = found.effects
    t = effect.difference / error
    spread, z = np.linspace(0.05, 4, 400)[:, None], np.linspace(-8, 8, 801)  # of the common spread, the control's mean
    weight = scipy.stats.chi(freedom).pdf(spread * math.sqrt(freedom)) * math.sqrt(freedom) * scipy.stats.norm.pdf(z)

    def inside(t):
        width = t * spread * math.sqrt(2)
        each = scipy.stats.norm.cdf(z + width) - scipy.stats.norm.cdf(z - width)
        return np.trapezoid(np.trapezoid(weight * each**others, z), spread[:, 0])

    assert effect.p == pytest.approx(1 - inside(t), abs=2e-3)
    critical = scipy.optimize.brentq(lambda t: inside(t) - 0.95, 1, 5)
    assert (effect.low, effect.high) == pytest.approx(
        (effect.difference - critical * error, effect.difference + critical * error), abs=0.03
    )
    assert effect.p > judged(made(arms)).effects[0].p, "more than one comparison"
    back = judged(made(arms), control="eit", rises=["eit", "vit"]).effects[0]
    assert (back.difference, back.low, back.high) == pytest.approx((-effect.difference, -effect.high, -effect.low))


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_dunnetts_interval_that_does_not_converge_is_left_out_without_a_warning(monkeypatch, recwarn, runs):
    levels = dict(eit=HIGH[:runs], vit=[58, 60, 61, 59, 63][:runs], lsra=[57, 60, 62, 59, 61][:runs])
    confidence_interval = scipy.stats._multicomp.DunnettResult.confidence_interval
    seen = []

    def noisy(self, level):
        seen.append(level)
        if len(seen) <= fails:
            warnings.warn("did not converge", stacklevel=2)
        return confidence_interval(self, level)

    monkeypatch.setattr(scipy.stats._multicomp.DunnettResult, "confidence_interval", noisy)
    for fails, shown in ((0, True), (1, True), (99, False)):
        _dunnett.cache_clear()
        seen.clear()
        (effect,) = judged(made(levels), control="eit", more=[("d", "eit", 9)]).effects
        assert (effect.low is not None) == shown and effect.p is not None
        assert ("(interval not available)" in effect_text(effect, "last_top1")) == (not shown)
        assert len(seen) == (min(fails + 1, 5))
    _dunnett.cache_clear()
    assert not recwarn.list


def test_one_comparison_with_a_control_is_the_t_test_with_equal_variances():
    arms = dict(eit=HIGH, vit=[58, 60, 61, 59, 63])
    (effect,) = judged(made(arms), control="eit").effects
    exact = scipy.stats.ttest_ind(arms["eit"], arms["vit"])
    interval = exact.confidence_interval(0.95)
    assert (effect.p, effect.low, effect.high) == pytest.approx((exact.pvalue, interval.low, interval.high))
    dunnett = scipy.stats.dunnett(np.array(arms["vit"]), control=np.array(arms["eit"]))
    assert effect.p == pytest.approx(dunnett.pvalue[0], abs=1e-3)


def test_a_control_is_compared_with_what_is_whole():
    """A model whose runs are not finished changes nothing for the others."""
    arms = dict(eit=HIGH, vit=[58, 60, 61, 59, 63])
    alone = judged(made(arms), control="eit")
    assert judged(made(arms | dict(lsra=[1, 99])), control="eit", more=[("d", "lsra", 2)]).effects == alone.effects


def test_a_claim_holds_where_it_does_on_every_data_set():
    one, same = made(dict(vit=LOW, eit=HIGH)), made(dict(vit=LOW, eit=HIGH), data="other")
    weak, against = made(dict(vit=LOW, eit=LOW), data="weak"), made(dict(vit=HIGH, eit=LOW), data="against")
    assert judged(one + same).word == HOLDS
    assert judged(one + weak).word == UNDECIDED and judged(one + weak).p == 1
    assert judged(one + against).word == FAILS
    assert judged(one + against).opposite == pytest.approx(2 * judged(against).opposite), "on one of two"
    both = judged(one + same)
    assert both.p == max(effect.p for effect in both.effects)


def test_the_mean_over_data_sets_has_an_interval_of_its_own():
    found = judged(
        made(dict(vit=LOW, eit=HIGH)) + made(dict(vit=[70, 71, 72, 73, 74], eit=[73, 72, 75, 74, 76]), data="b")
    )
    first, second = found.effects
    assert found.mean.difference == pytest.approx((first.difference + second.difference) / 2)
    squares = [statistics.variance(runs) / 5 for runs in (HIGH, LOW, [70, 71, 72, 73, 74], [73, 72, 75, 74, 76])]
    freedom = sum(squares) ** 2 / sum(square**2 / 4 for square in squares)
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(squares)) / 2
    assert found.mean.high - found.mean.difference == pytest.approx(half)
    assert judged(made(dict(vit=LOW, eit=HIGH))).mean is None


def test_nothing_is_decided_before_all_runs_are_done():
    results = made(dict(vit=LOW, eit=HIGH, resnet=[70, 70]))
    assert judged(results).word == HOLDS
    verdict = judged(results, more=[("d", "eit", 5)])
    assert verdict.word == PARTLY and verdict.effects[0].difference == 10 and not verdict.effects[0].judged
    assert str(verdict) == PARTLY
    assert judged(results, more=[("d", "resnet", 5)]).word == HOLDS, "of which the claim does not speak"
    partly = judged(results, more=[("other", level, seed) for level in ("eit", "vit") for seed in range(5)])
    assert partly.word == PARTLY and str(partly) == "partly run (1 of 2 data sets)" and partly.effects[0].judged
    others = [("other", level, seed) for level in ("eit", "vit") for seed in range(5)]
    none = judged([], more=others)
    assert none.word == NOT_RUN and not none.effects
    assert judged(made(dict(resnet=HIGH), data="other"), more=others).word == NOT_RUN, "runs of other levels"
    for level in ("eit", "vit"):
        one = judged(made({level: [60]}, data="other"), more=others)
        assert one.word == PARTLY and not one.effects, "some runs of one level only"
    macs = judged(made(dict(eit=[1], vit=[2]), "macs"), more=others, metric="macs", rises=["eit", "vit"])
    assert str(macs) == "partly run (1 of 2 data sets)"
    published = dict(rises=None, reaches=dict(eit=60.0, vit=50.0))
    assert judged(results, **published).word == HOLDS
    assert judged(results, more=[("d", "eit", 5)], **published).word == PARTLY


def test_levels_are_equal_where_two_one_sided_tests_say_so():
    equal = dict(rises=None, equal=["vit", "eit"], within=1.0)
    near, far = [50.0, 50.4, 49.8, 50.2, 50.1], [53.0, 53.4, 52.8, 53.2, 53.1]
    assert judged(made(dict(vit=near, eit=[x + 0.1 for x in near])), **equal).word == HOLDS
    assert judged(made(dict(vit=near, eit=far)), **equal).word == FAILS
    assert judged(made(dict(vit=far, eit=near)), **equal).word == FAILS
    wide = judged(made(dict(vit=LOW, eit=[x + 0.2 for x in LOW])), **equal)
    found = re.search(r"(\d+) runs of each would decide on d", wide.note)
    assert wide.word == UNDECIDED and found
    (effect,) = wide.effects
    a = statistics.variance(LOW) / 5
    error, freedom = math.sqrt(2 * a), 8
    tests = [scipy.stats.t.sf((1 + side * effect.difference) / error, freedom) for side in (1, -1)]
    assert effect.p == pytest.approx(max(tests))
    half = scipy.stats.t.ppf(0.95, freedom) * error
    assert (effect.low, effect.high) == pytest.approx((effect.difference - half, effect.difference + half)), "90%"
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

    assert judged(runs(0.9), metric="trained.diversity").word == HOLDS
    found = judged(runs(0.96), metric="trained.diversity")
    assert found.word == UNTESTABLE and "vit on d: 96.0% of uniform attention's entropy" in str(found)


def test_a_verdict_says_what_decided():
    assert re.fullmatch(r"holds \(p = 0.0000?\d+|holds \(p < 0.0001\)", str(judged(made(dict(vit=LOW, eit=HIGH)))))
    against = judged(made(dict(vit=HIGH, eit=LOW)))
    assert re.fullmatch(r"does not hold \(opposite: p < 0.0001\)", str(against))
    undecided = str(judged(made(dict(vit=[50, 60, 55, 51, 58], eit=[52, 57, 56, 59, 54]))))
    assert re.fullmatch(r"undecided \(p = 0\.\d+, opposite: p = 1\)", undecided)


def test_what_is_counted_is_compared_as_it_is():
    cheaper = dict(metric="macs", rises=["eit", "vit"])
    assert judged(made(dict(eit=[10], vit=[12]), "macs"), **cheaper).word == HOLDS
    assert judged(made(dict(eit=[10, 10], vit=[12, 9]), "macs"), **cheaper).word == FAILS


def test_values_to_reach():
    published = dict(rises=None, reaches=dict(eit=70.0, vit=60.0), within=0.5)
    assert judged(made(dict(eit=[69.6], vit=[61])), **published).word == HOLDS
    assert judged(made(dict(eit=[69.4], vit=[61])), **published).word == FAILS
    assert judged(made(dict(eit=[70])), **published).word == PARTLY
    assert judged(made(dict(eit=[69])), **published).word == FAILS
    assert judged(made(dict(eit=[10, 20, 90], vit=[61])), **published).word == FAILS  # their mean


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
    verdict = judged(made(dict(vit=LOW, eit=HIGH)) + made(dict(vit=HIGH, eit=HIGH), data="other"))
    rows = [Row(claim(says="a claim " * 20), verdict, effect) for effect in (*verdict.effects, verdict.mean)]
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
