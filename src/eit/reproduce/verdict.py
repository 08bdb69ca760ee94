"""Claims against measurements: a test over paired runs, and one word."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import ttest_1samp

from eit.reproduce.cells import Result
from eit.reproduce.matrix import EXACT, Cell, Claim

ALPHA = 0.05
HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not yet run"


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        word: holds, does not hold, undecided, or not yet run; see `weigh`.
        gaps: in each block of runs the last level's value less the first's; of values to reach, at each level the mean
            less the value.
        p: of the test that it holds; None of what is counted, is to be reached, or is not yet run.
        opposite: p of the test that it does not hold, corrected for the number of steps; None as p.
        why: what else decided: the step by which an order does not hold, or on which data sets disagree.
    """

    word: str
    gaps: dict[str, float]
    p: float | None = None
    opposite: float | None = None
    why: str = ""

    @property
    def evidence(self) -> str:
        """What decided, in words; nothing where no test did."""
        if self.p is None:
            return ""
        parts = [f"p = {self.p:.2g}"] if self.word != FAILS else []
        parts += [f"opposite: p = {self.opposite:.2g}"] if self.word != HOLDS else []
        return ", ".join([*parts, self.why] if self.why else parts)

    def __str__(self) -> str:
        return f"{self.word} ({self.evidence})" if self.evidence else self.word


def weigh(claim: Claim, results: Sequence[Result], missing: Sequence[Cell] = ()) -> Verdict:
    """The verdict on a claim, from runs in blocks that differ in the claim's axis alone (so of equal data and seed).

    An order holds where each level is above the one before it: one-sided paired t-tests over the blocks, the largest p
    below 0.05. It does not hold where a level is below the one before it: the smallest p over steps, times their
    number, below 0.05. A step whose mean difference has another sign in another data set decides neither. What is
    counted (parameters, MACs) is compared as it is. Values to reach fail as soon as the mean of one is below.

    Args:
        claim: what is said.
        results: finished runs.
        missing: planned runs that are not finished. A claim that speaks of one is not yet run: nothing is decided by
            the runs that came first, or that did not diverge.
    """
    rows: dict[str, dict[str, float]] = {}
    data: dict[str, str] = {}
    for result in results:
        level, value = result.cell.levels[claim.axis], result.value(claim.metric)
        if level in claim.levels and value is not None:
            block = result.cell.beside(claim.axis)
            rows.setdefault(block, {})[level] = value
            data[block] = result.cell.data
    missing = [cell for cell in missing if cell.levels[claim.axis] in claim.levels]
    if claim.reaches:
        return reached(claim.reaches, claim.within, rows, missing)
    partial = missing or any(len(row) < len(claim.levels) for row in rows.values())
    rows = {block: row for block, row in rows.items() if len(row) == len(claim.levels)}
    first, last = claim.levels[0], claim.levels[-1]
    gaps = {block: row[last] - row[first] for block, row in rows.items()}
    exact = claim.metric in EXACT
    if partial or len(rows) < (1 if exact else 2):
        return Verdict(NOT_RUN, gaps)
    steps = [
        [row[after] - row[before] + claim.within for row in rows.values()]
        for before, after in itertools.pairwise(claim.levels)
    ]
    if exact:
        above = all(gap > 0 for step in steps for gap in step)
        return Verdict(HOLDS if above else FAILS, gaps)
    tests = [paired(step) for step in steps]
    agree = [of_one_sign(step, [data[block] for block in rows]) for step in steps]
    p = max(above for above, _ in tests)
    against = [min(1.0, below * len(steps)) for _, below in tests]
    worst = min([i for i, one in enumerate(agree) if one] or range(len(steps)), key=against.__getitem__)
    opposite = against[worst]
    if p < ALPHA and all(agree):
        return Verdict(HOLDS, gaps, p, opposite)
    if opposite < ALPHA and agree[worst]:
        why = f"{claim.levels[worst + 1]} below {claim.levels[worst]}" if len(steps) > 1 else ""
        return Verdict(FAILS, gaps, p, opposite, why)
    if all(agree):
        return Verdict(UNDECIDED, gaps, p, opposite)
    step = agree.index(False)
    of = f" on {claim.levels[step + 1]} against {claim.levels[step]}" if len(steps) > 1 else ""
    return Verdict(UNDECIDED, gaps, p, opposite, f"data sets disagree{of}")


def of_one_sign(gaps: Sequence[float], data: Sequence[str]) -> bool:
    """Whether no mean over the runs of one data set is below 0 where another's is above."""
    means = [fmean(gap for gap, own in zip(gaps, data, strict=True) if own == name) for name in dict.fromkeys(data)]
    return not min(means) < 0 < max(means)


def reached(
    values: dict[str, float], within: float, rows: dict[str, dict[str, float]], missing: Sequence[Cell]
) -> Verdict:
    """Of means over runs."""
    found = {level: [row[level] for row in rows.values() if level in row] for level in values}
    gaps = {level: fmean(runs) - values[level] for level, runs in found.items() if runs}
    missed = any(gap < -within for gap in gaps.values())
    return Verdict(FAILS if missed else HOLDS if len(gaps) == len(values) and not missing else NOT_RUN, gaps)


def paired(gaps: Sequence[float]) -> tuple[float, float]:
    """p that their mean is not above 0, and that it is not below. Gaps without a spread say nothing of it: 1, 1."""
    if stdev(gaps) <= 1e-9 * max(map(abs, gaps)):
        return 1.0, 1.0
    p = float(ttest_1samp(gaps, 0.0, alternative="greater").pvalue)
    assert not math.isnan(p)
    return p, 1 - p
