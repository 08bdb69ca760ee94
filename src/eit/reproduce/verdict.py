"""Judge claims by measurements: a difference, an interval and a test for each data set, then one verdict over all.

Runs of two levels are compared unpaired, because models of different shapes share nothing with the same seed.
Comparisons with the experiment's control use Dunnett's test (scipy), others Welch's. A claim holds if it holds on every
data set, so its p is the largest over the data sets (an intersection-union test). The primary claims, at most six, are
corrected together by Holm's method (statsmodels). All others are exploratory.
"""

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean, variance
from typing import TypeVar

import numpy as np
from scipy import stats

from eit.analysis.attention import NEAR_UNIFORM
from eit.reproduce.experiment import COUNTED, Cell, Claim
from eit.reproduce.runs import Result

ALPHA = 0.05
MIN_RUNS = 5  # of each level on a data set; with fewer there is no verdict
MAX_PRIMARY = 6
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
PARTLY, NOT_RUN, FEW, UNTESTABLE = "partly run", "not yet run", "too few runs", "not testable"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Effect:
    """The mean of the higher level minus the mean of the lower level, on one data set.

    Attributes:
        data: the data set; for a claim that reaches values, the level.
        difference: of the means.
        low: lower end of the 95% interval (90% for an equivalence); None if there are fewer than two runs of a level,
            no spread, or no convergence of Dunnett's interval.
        high: its upper end.
        p: two-sided p of a difference with the claimed sign; for an equivalence, p of a difference within the margin
            (TOST). None if there is no spread.
        opposite: p of the opposite of the claim.
        runs: number of runs of the higher and of the lower level.
        judged: whether all planned runs are finished, at least five of each level.
    """

    data: str
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    opposite: float | None = None
    runs: tuple[int, int] = (0, 0)
    judged: bool = False


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    Attributes:
        word: holds, does not hold, undecided; too few runs (the budget has fewer than five seeds), partly run, not yet
            run; not testable (diversity of heads that attend uniformly).
        effects: by data set; for a claim that reaches values, by level.
        primary: whether its p is corrected together with those of the other primary claims.
        p: the largest p over the data sets; None if nothing was tested.
        opposite: the smallest p of the opposite, times the number of data sets; None if nothing was tested.
        mean: over the data sets with equal weights, if all are judged; None for one data set.
        note: why there is no verdict, or what would decide.
    """

    word: str
    effects: tuple[Effect, ...] = ()
    primary: bool = False
    p: float | None = None
    opposite: float | None = None
    mean: Effect | None = None
    note: str = ""

    @property
    def evidence(self) -> str:
        """The p values and the note, in words."""
        parts = []
        if self.word in (HOLDS, UNDECIDED) and self.p is not None:
            parts.append(p_text(self.p))
        if self.word in (FAILS, UNDECIDED) and self.opposite is not None:
            parts.append(f"opposite: {p_text(self.opposite)}")
        return ", ".join([*parts, self.note] if self.note else parts)

    def __str__(self) -> str:
        return f"{self.word} ({self.evidence})" if self.evidence else self.word


def p_text(p: float) -> str:
    """`p = 0.012`, or `p < 0.0001`."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def judge_claim(
    claim: Claim, results: Sequence[Result], planned: Iterable[Cell], control: str | None = None
) -> Verdict:
    """The verdict on one claim, without a correction for other claims; see `correct`.

    Args:
        claim: the claim.
        results: finished runs of the budget.
        planned: all its runs. A data set is judged when all of its runs of the claim's levels are finished, so that the
            runs that come first decide nothing.
        control: the level that Dunnett's test compares all others with; None: Welch's test for each pair.
    """
    if claim.reaches:
        return _judge_reached(claim, results, [cell for cell in planned if cell.levels.get(claim.axis) in claim.levels])
    values, counts = _values_by_level(results, claim.axis, claim.metric), _planned_counts(claim, planned)
    data = [name for name in counts if set(claim.levels) <= set(counts[name])]
    is_counted, effects = claim.metric in COUNTED, []
    for name in data:
        runs = {level: values.get(name, {}).get(level, []) for level in claim.levels}
        if not all(runs.values()):
            continue
        complete = {k: v for k, v in values.get(name, {}).items() if len(v) >= counts[name].get(k, 0)}
        if is_counted:
            effects.append(_compare_counts(name, claim, runs))
        else:
            is_judged = set(runs) <= set(complete) and all(len(v) >= MIN_RUNS for v in runs.values())
            effects.append(replace(_compare(name, claim, complete | runs, control), judged=is_judged))
    judged = [effect for effect in effects if is_counted or effect.judged]
    verdict = Verdict(NOT_RUN, tuple(effects), claim.primary)
    if not any(values.get(name, {}).get(level) for name in data for level in claim.levels):
        return verdict
    partly = replace(verdict, word=PARTLY, note=f"{len(judged)} of {len(data)} data sets" if len(data) > 1 else "")
    if not effects:
        return partly
    if not is_counted and any(counts[name][level] < MIN_RUNS for name in data for level in claim.levels):
        return replace(verdict, word=FEW, note=f"fewer than {MIN_RUNS} of each are planned")
    if uniform := _uniform_heads(claim, results, data):
        return replace(verdict, word=UNTESTABLE, note=uniform)
    if len(judged) < len(data):
        return partly
    if is_counted:
        return replace(verdict, word=HOLDS if all(effect.difference > 0 for effect in effects) else FAILS)
    notes = []
    for effect in judged if claim.equal else ():
        if (effect.p is None or effect.p >= ALPHA) and (n := runs_needed(values[effect.data], claim)):
            notes.append(f"{n} runs of each would decide on {effect.data}, if there is no difference")
    p, opposite = _combine(judged)
    mean = _mean_effect(claim, [values[name] for name in data]) if len(data) > 1 else None
    return decide(replace(verdict, p=p, opposite=opposite, mean=mean, note="; ".join(notes)))


def decide(verdict: Verdict) -> Verdict:
    """The verdict with the word that follows from its two p values."""
    assert verdict.p is not None and verdict.opposite is not None
    word = HOLDS if verdict.p < ALPHA else FAILS if verdict.opposite < ALPHA else UNDECIDED
    return replace(verdict, word=word, note=verdict.note if word == UNDECIDED else "")


def correct(primary: Mapping[Key, Verdict]) -> dict[Key, Verdict]:
    """Primary verdicts, decided again with p corrected by Holm's method; a claim that is not yet tested has p = 1."""
    from statsmodels.stats.multitest import multipletests

    assert len(primary) <= MAX_PRIMARY
    adjusted = {}
    for side in ("p", "opposite"):
        p_values = [1.0 if (p := getattr(verdict, side)) is None else p for verdict in primary.values()]
        adjusted[side] = multipletests(p_values, ALPHA, method="holm")[1].tolist() if p_values else []
    return {
        key: verdict if verdict.p is None else decide(replace(verdict, p=p, opposite=opposite))
        for (key, verdict), p, opposite in zip(primary.items(), adjusted["p"], adjusted["opposite"], strict=True)
    }


Runs = Mapping[str, Sequence[float]]  # level -> the metric of each run, on one data set


def _values_by_level(results: Sequence[Result], axis: str, metric: str) -> dict[str, dict[str, list[float]]]:
    """Data set -> level -> the metric of each run, of all levels: Dunnett's test uses more than the claim's two."""
    by_level: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if axis in result.cell.levels and (value := result.value(metric)) is not None:
            by_level.setdefault(result.cell.data, {}).setdefault(result.cell.levels[axis], []).append(value)
    return by_level


def _planned_counts(claim: Claim, planned: Iterable[Cell]) -> dict[str, dict[str, int]]:
    """Data set -> level -> number of planned runs."""
    counts: dict[str, dict[str, int]] = {}
    for cell in planned:
        levels = counts.setdefault(cell.data, {})
        levels[cell.levels[claim.axis]] = levels.get(cell.levels[claim.axis], 0) + 1
    return counts


def _compare_counts(data: str, claim: Claim, runs: Runs) -> Effect:
    """For a counted metric: the smallest difference of any two runs."""
    lower, higher = claim.levels
    difference = min(runs[higher]) - max(runs[lower])
    return Effect(data, difference, difference, difference, runs=(len(runs[higher]), len(runs[lower])))


def _compare(data: str, claim: Claim, values: Runs, control: str | None) -> Effect:
    """The test of the claim on one data set."""
    lower, higher = claim.levels
    a, b = values[higher], values[lower]
    effect = Effect(data, fmean(a) - fmean(b), runs=(len(a), len(b)))
    if min(len(a), len(b)) < 2 or variance(a) + variance(b) <= 1e-18 * max(map(abs, (*a, *b))) ** 2:
        return effect
    if claim.equal:
        return _equivalence(effect, a, b, claim.within)
    others = {level: runs for level, runs in values.items() if level != control and len(runs) > 1}
    if control in claim.levels and len(others) > 1:
        index = list(others).index(higher if lower == control else lower)
        p, low, high = _dunnett(tuple(map(tuple, others.values())), tuple(values[str(control)]), index)
        if higher == control and low is not None and high is not None:
            low, high = -high, -low
    else:  # Welch's test; or Dunnett's with one other level, which is the t-test with equal variances
        test = stats.ttest_ind(a, b, equal_var=control in claim.levels)
        interval = test.confidence_interval(1 - ALPHA)
        p, low, high = float(test.pvalue), float(interval.low), float(interval.high)
    up = effect.difference > 0
    return replace(effect, low=low, high=high, p=p if up else 1.0, opposite=1.0 if up else p)


@lru_cache(maxsize=512)
def _dunnett(
    others: tuple[tuple[float, ...], ...], control: tuple[float, ...], index: int
) -> tuple[float, float | None, float | None]:
    """Two-sided p and 95% interval of one of `others` minus the control; None if scipy's interval does not converge.

    scipy integrates with random numbers. Their seed is fixed; other seeds are tried if the interval does not converge.
    """
    p = None
    for seed in range(5):
        rng = np.random.default_rng(seed)
        test = stats.dunnett(*map(np.asarray, others), control=np.asarray(control), rng=rng)
        p = float(test.pvalue[index]) if p is None else p
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            interval = test.confidence_interval(1 - ALPHA)
        if not caught:
            return p, float(interval.low[index]), float(interval.high[index])
    assert p is not None
    return p, None, None


def _equivalence(effect: Effect, a: Sequence[float], b: Sequence[float], within: float) -> Effect:
    """Two one-sided Welch tests (TOST), and the 90% interval, which is inside the margin if both tests pass."""
    from statsmodels.stats.weightstats import ttost_ind

    inside = float(ttost_ind(a, b, -within, within, usevar="unequal")[0])
    beyond = [
        stats.ttest_ind(np.asarray(x) - within, y, equal_var=False, alternative="greater") for x, y in ((a, b), (b, a))
    ]
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 2 * ALPHA)
    opposite = min(1.0, 2 * min(float(test.pvalue) for test in beyond))
    return replace(effect, low=float(interval.low), high=float(interval.high), p=inside, opposite=opposite)


def runs_needed(values: Runs, claim: Claim, power: float = 0.8, most: int = 10_000) -> int | None:
    """Runs of each level that the two one-sided tests need to confirm that equal levels are equal; from the spread."""
    lower, higher = claim.levels
    spread = math.sqrt((variance(values[lower]) + variance(values[higher])) / 2)
    for n in range(2, most):
        error, freedom = spread * math.sqrt(2 / n), 2 * n - 2
        room = claim.within / error - float(stats.t.ppf(1 - ALPHA, freedom))
        if 2 * float(stats.t.cdf(room, freedom)) - 1 >= power:
            return n
    return None


def _combine(effects: Sequence[Effect]) -> tuple[float, float]:
    """p of the claim on all data sets, and of its opposite on any of them (Bonferroni)."""
    p = max(1.0 if effect.p is None else effect.p for effect in effects)
    return p, min(1.0, len(effects) * min(1.0 if effect.opposite is None else effect.opposite for effect in effects))


def contrast(samples: Sequence[Sequence[float]], weights: Sequence[float], name: str) -> Effect:
    """A weighted sum of means, with its 95% interval from the spread of each sample (Welch, Satterthwaite)."""
    difference = math.fsum(weight * fmean(runs) for weight, runs in zip(weights, samples, strict=True))
    least = min(map(len, samples))
    effect = Effect(name, difference, runs=(least, least))
    if least < 2:
        return effect
    parts = [
        (weight**2 * variance(runs) / len(runs), len(runs) - 1) for weight, runs in zip(weights, samples, strict=True)
    ]
    if (total := math.fsum(square for square, _ in parts)) == 0:
        return effect
    freedom = total**2 / math.fsum(square**2 / n for square, n in parts)
    half = float(stats.t.ppf(1 - ALPHA / 2, freedom)) * math.sqrt(total)
    return replace(effect, low=difference - half, high=difference + half, judged=least >= MIN_RUNS)


def _mean_effect(claim: Claim, by_data: Sequence[Runs]) -> Effect:
    """The mean difference over the data sets, with equal weights."""
    lower, higher = claim.levels
    samples = [values[level] for values in by_data for level in (higher, lower)]
    return contrast(samples, [1 / len(by_data), -1 / len(by_data)] * len(by_data), "mean")


def _uniform_heads(claim: Claim, results: Sequence[Result], data: Sequence[str]) -> str:
    """For a claim about head diversity: the level whose heads attend nearly uniformly, and where; otherwise empty."""
    if not claim.metric.endswith(".diversity"):
        return ""
    entropies = _values_by_level(results, claim.axis, "trained.entropy")
    for name in data:
        for level in claim.levels:
            runs = entropies.get(name, {}).get(level, [])
            if runs and fmean(runs) > NEAR_UNIFORM:
                return f"{level} on {name}: {100 * fmean(runs):.1f}% of uniform attention's entropy"
    return ""


def _judge_reached(claim: Claim, results: Sequence[Result], planned: Sequence[Cell]) -> Verdict:
    """Compare means over runs with the values to reach; the claim fails as soon as one is below."""
    assert claim.reaches
    done = {result.cell.name for result in results}
    values: dict[str, list[float]] = {level: [] for level in claim.reaches}
    for result in results:
        level, value = result.cell.levels.get(claim.axis, ""), result.value(claim.metric)
        if level in values and value is not None:
            values[level].append(value)
    effects = tuple(
        Effect(level, fmean(runs) - claim.reaches[level], runs=(len(runs), 0)) for level, runs in values.items() if runs
    )
    if any(effect.difference < -claim.within for effect in effects):
        return Verdict(FAILS, effects, claim.primary)
    complete = len(effects) == len(values) and all(cell.name in done for cell in planned)
    return Verdict(HOLDS if complete else PARTLY if effects else NOT_RUN, effects, claim.primary)
