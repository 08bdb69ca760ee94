"""Claims against measurements: per data set a difference, its interval and a test; over all of them one word.

Runs of two levels are compared unpaired: one seed gives models of different shapes nothing in common. Comparisons with
the experiment's control go through Dunnett's test (scipy), others through Welch's. A claim holds where it does on every
data set, so its p is the largest of theirs (an intersection-union test). The primary claims, at most six, are corrected
together by Holm's method (statsmodels); all others are exploratory.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean, variance
from typing import TypeVar

import numpy as np
from scipy import stats

from eit.analysis.attention import NEAR_UNIFORM
from eit.reproduce.experiment import EXACT, Cell, Claim
from eit.reproduce.runs import Result

ALPHA = 0.05
LEAST = 5  # runs of a level on a data set, below which nothing is decided
MOST = 6  # primary claims
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
PARTLY, NOT_RUN, FEW, UNTESTABLE = "partly run", "not yet run", "too few runs", "not testable"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Gap:
    """The higher level's mean less the lower one's, on one data set.

    Attributes:
        data: the data set; of values to reach, the level.
        difference: of the means.
        low: end of the 95% interval (90% of an equivalence, whose test it is); None without a spread.
        high: its other end.
        p: of the claim here: that the difference has another sign than claimed, two-sided; of an equivalence, that it
            is not within the margin (TOST). None without a spread.
        opposite: p of its opposite.
        runs: of the higher and of the lower level.
        judged: whether every planned run is there, and at least five of each level.
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
    """What the runs say of a claim.

    Attributes:
        word: holds, does not hold, undecided; too few runs (of a budget with fewer than five seeds), partly run, not
            yet run; not testable (diversity of heads that attend uniformly).
        gaps: by data set; of values to reach, by level.
        primary: whether its p is corrected together with those of the other primary claims.
        p: that it does not hold on every data set; None where nothing was tested.
        opposite: that its opposite is true on no data set, corrected for their number; None as p.
        mean: over the data sets, each counted once, where all are judged.
        note: what else decided, or is needed to decide.
    """

    word: str
    gaps: tuple[Gap, ...] = ()
    primary: bool = False
    p: float | None = None
    opposite: float | None = None
    mean: Gap | None = None
    note: str = ""

    @property
    def evidence(self) -> str:
        """What decided, in words; nothing where no test did."""
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


def weigh(claim: Claim, results: Sequence[Result], planned: Iterable[Cell], control: str | None = None) -> Verdict:
    """The verdict on a claim, taken for itself; `correct` is for those that are primary.

    Args:
        claim: what is said.
        results: finished runs of the budget.
        planned: all its runs. A data set is judged when every run there that the claim speaks of is finished, so that
            nothing is decided by the runs that came first.
        control: the level that Dunnett's test compares all others with; None: Welch's test for each pair.
    """
    if claim.reaches:
        return _reached(claim, results, [cell for cell in planned if cell.levels.get(claim.axis) in claim.levels])
    values, want = _by_level(results, claim.axis, claim.metric), _count(claim, planned)
    data = [name for name in want if set(claim.levels) <= set(want[name])]
    gaps, notes = [], []
    for name in data:
        have = {level: values.get(name, {}).get(level, []) for level in claim.levels}
        whole = {level: runs for level, runs in values.get(name, {}).items() if len(runs) >= want[name].get(level, 0)}
        complete = set(claim.levels) <= set(whole)
        if claim.metric in EXACT:
            if all(have.values()):
                gaps.append(_counted(name, claim, have))
            continue
        if all(have.values()):
            judged = complete and all(len(runs) >= LEAST for runs in have.values())
            gaps.append(replace(_compare(name, claim, whole | have, control), judged=judged))
    tests = [gap for gap in gaps if gap.judged]
    verdict = Verdict(NOT_RUN, tuple(gaps), claim.primary)
    if not data or not gaps:
        return verdict
    if claim.metric in EXACT:
        above = all(gap.difference > 0 for gap in gaps)
        return replace(verdict, word=NOT_RUN if len(gaps) < len(data) else HOLDS if above else FAILS)
    if any(want[name][level] < LEAST for name in data for level in claim.levels):
        return replace(verdict, word=FEW, note=f"fewer than {LEAST} of each are planned")
    if uniform := _uniform(claim, results, data):
        return replace(verdict, word=UNTESTABLE, note=uniform)
    if len(tests) < len(data):
        note = f"{len(tests)} of {len(data)} data sets" if tests else ""
        return replace(verdict, word=PARTLY if tests else NOT_RUN, note=note)
    if claim.equal:
        for gap in tests:
            if (gap.p is None or gap.p >= ALPHA) and (runs := runs_needed(values[gap.data], claim)):
                notes.append(f"{runs} runs of each would decide on {gap.data}, were there no difference")
    p, opposite = _together(tests)
    mean = _mean(claim, [values[name] for name in data]) if len(data) > 1 else None
    return decide(replace(verdict, p=p, opposite=opposite, mean=mean, note="; ".join(notes)))


def decide(verdict: Verdict) -> Verdict:
    """The verdict with the word that its p and its opposite's say."""
    assert verdict.p is not None and verdict.opposite is not None
    word = HOLDS if verdict.p < ALPHA else FAILS if verdict.opposite < ALPHA else UNDECIDED
    return replace(verdict, word=word, note=verdict.note if word == UNDECIDED else "")


def correct(primary: Mapping[Key, Verdict]) -> dict[Key, Verdict]:
    """Primary verdicts, decided anew by Holm's method over all of them; what is not yet tested counts as p = 1."""
    from statsmodels.stats.multitest import multipletests

    assert len(primary) <= MOST
    adjusted = {}
    for side in ("p", "opposite"):
        p_values = [1.0 if (p := getattr(verdict, side)) is None else p for verdict in primary.values()]
        adjusted[side] = multipletests(p_values, ALPHA, method="holm")[1].tolist() if p_values else []
    return {
        key: verdict if verdict.p is None else decide(replace(verdict, p=p, opposite=opposite))
        for (key, verdict), p, opposite in zip(primary.items(), adjusted["p"], adjusted["opposite"], strict=True)
    }


Runs = Mapping[str, Sequence[float]]  # of one data set: a metric, by level


def _by_level(results: Sequence[Result], axis: str, metric: str) -> dict[str, dict[str, list[float]]]:
    """Data set -> level -> the metric of each run, of all levels: Dunnett's test takes more than the claim's two."""
    by_level: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if axis in result.cell.levels and (value := result.value(metric)) is not None:
            by_level.setdefault(result.cell.data, {}).setdefault(result.cell.levels[axis], []).append(value)
    return by_level


def _count(claim: Claim, planned: Iterable[Cell]) -> dict[str, dict[str, int]]:
    """Data set -> level -> planned runs."""
    counts: dict[str, dict[str, int]] = {}
    for cell in planned:
        levels = counts.setdefault(cell.data, {})
        levels[cell.levels[claim.axis]] = levels.get(cell.levels[claim.axis], 0) + 1
    return counts


def _counted(data: str, claim: Claim, have: Runs) -> Gap:
    """Of what is counted, the least difference of any two runs."""
    lower, higher = claim.levels
    gap = min(have[higher]) - max(have[lower])
    return Gap(data, gap, gap, gap, runs=(len(have[higher]), len(have[lower])))


def _compare(data: str, claim: Claim, values: Runs, control: str | None) -> Gap:
    """One data set."""
    lower, higher = claim.levels
    a, b = values[higher], values[lower]
    gap = Gap(data, fmean(a) - fmean(b), runs=(len(a), len(b)))
    if min(len(a), len(b)) < 2 or variance(a) + variance(b) <= 1e-18 * max(map(abs, (*a, *b))) ** 2:
        return gap
    if claim.equal:
        return _equivalence(gap, a, b, claim.within)
    if control in claim.levels:
        others = {level: runs for level, runs in values.items() if level != control and len(runs) > 1}
        index = list(others).index(higher if lower == control else lower)
        p, low, high = _dunnett(tuple(map(tuple, others.values())), tuple(values[str(control)]), index)
        if higher == control:
            low, high = -high, -low
    else:
        test = stats.ttest_ind(a, b, equal_var=False)
        interval = test.confidence_interval(1 - ALPHA)
        p, low, high = float(test.pvalue), float(interval.low), float(interval.high)
    up = gap.difference > 0
    return replace(gap, low=low, high=high, p=p if up else 1.0, opposite=1.0 if up else p)


@lru_cache(maxsize=512)
def _dunnett(
    others: tuple[tuple[float, ...], ...], control: tuple[float, ...], index: int
) -> tuple[float, float, float]:
    """Two-sided p and 95% interval of one of `others` less the control. The integral is random; its seed is fixed."""
    test = stats.dunnett(*map(np.asarray, others), control=np.asarray(control), rng=np.random.default_rng(0))
    interval = test.confidence_interval(1 - ALPHA)
    return float(test.pvalue[index]), float(interval.low[index]), float(interval.high[index])


def _equivalence(gap: Gap, a: Sequence[float], b: Sequence[float], within: float) -> Gap:
    """Two one-sided Welch tests (TOST), and the 90% interval: inside the margin just where they say so."""
    from statsmodels.stats.weightstats import ttost_ind

    inside = float(ttost_ind(a, b, -within, within, usevar="unequal")[0])
    beyond = [
        stats.ttest_ind(np.asarray(x) - within, y, equal_var=False, alternative="greater") for x, y in ((a, b), (b, a))
    ]
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 2 * ALPHA)
    opposite = min(1.0, 2 * min(float(test.pvalue) for test in beyond))
    return replace(gap, low=float(interval.low), high=float(interval.high), p=inside, opposite=opposite)


def runs_needed(values: Runs, claim: Claim, power: float = 0.8, most: int = 10_000) -> int | None:
    """Runs of each level for two one-sided tests to find the levels equal, at the spread seen, if they are."""
    lower, higher = claim.levels
    spread = math.sqrt((variance(values[lower]) + variance(values[higher])) / 2)
    for n in range(2, most):
        error, freedom = spread * math.sqrt(2 / n), 2 * n - 2
        room = claim.within / error - float(stats.t.ppf(1 - ALPHA, freedom))
        if 2 * float(stats.t.cdf(room, freedom)) - 1 >= power:
            return n
    return None


def _together(gaps: Sequence[Gap]) -> tuple[float, float]:
    """p of the claim on every data set, and of its opposite on any, by Bonferroni over them."""
    p = max(1.0 if gap.p is None else gap.p for gap in gaps)
    return p, min(1.0, len(gaps) * min(1.0 if gap.opposite is None else gap.opposite for gap in gaps))


def contrast(samples: Sequence[Sequence[float]], weights: Sequence[float], name: str) -> Gap:
    """A weighted sum of means, with the 95% interval that the spread of each sample gives it (Welch, Satterthwaite)."""
    difference = math.fsum(weight * fmean(runs) for weight, runs in zip(weights, samples, strict=True))
    least = min(map(len, samples))
    gap = Gap(name, difference, runs=(least, least))
    if least < 2:
        return gap
    parts = [
        (weight**2 * variance(runs) / len(runs), len(runs) - 1) for weight, runs in zip(weights, samples, strict=True)
    ]
    if (total := math.fsum(square for square, _ in parts)) == 0:
        return gap
    freedom = total**2 / math.fsum(square**2 / n for square, n in parts)
    half = float(stats.t.ppf(1 - ALPHA / 2, freedom)) * math.sqrt(total)
    return replace(gap, low=difference - half, high=difference + half, judged=least >= LEAST)


def _mean(claim: Claim, by_data: Sequence[Runs]) -> Gap:
    """The mean difference over these data sets, each counted once."""
    lower, higher = claim.levels
    samples = [values[level] for values in by_data for level in (higher, lower)]
    return contrast(samples, [1 / len(by_data), -1 / len(by_data)] * len(by_data), "mean")


def _uniform(claim: Claim, results: Sequence[Result], data: Sequence[str]) -> str:
    """Which level's heads attend all but uniformly, where the claim is about their diversity."""
    if not claim.metric.endswith(".diversity"):
        return ""
    entropies = _by_level(results, claim.axis, "trained.entropy")
    for name in data:
        for level in claim.levels:
            runs = entropies.get(name, {}).get(level, [])
            if runs and fmean(runs) > NEAR_UNIFORM:
                return f"{level} on {name}: {100 * fmean(runs):.1f}% of uniform attention's entropy"
    return ""


def _reached(claim: Claim, results: Sequence[Result], planned: Sequence[Cell]) -> Verdict:
    """Of means over runs; a claim fails as soon as one is below."""
    assert claim.reaches
    done = {result.cell.name for result in results}
    values: dict[str, list[float]] = {level: [] for level in claim.reaches}
    for result in results:
        level, value = result.cell.levels.get(claim.axis, ""), result.value(claim.metric)
        if level in values and value is not None:
            values[level].append(value)
    gaps = tuple(
        Gap(level, fmean(runs) - claim.reaches[level], runs=(len(runs), 0)) for level, runs in values.items() if runs
    )
    if any(gap.difference < -claim.within for gap in gaps):
        return Verdict(FAILS, gaps, claim.primary)
    whole = len(gaps) == len(values) and all(cell.name in done for cell in planned)
    return Verdict(HOLDS if whole else PARTLY if gaps else NOT_RUN, gaps, claim.primary)
