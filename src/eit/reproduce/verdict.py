"""Claims against measurements: a test over paired runs, and one word."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import page_trend_test, ttest_1samp

from eit.reproduce.cells import Result
from eit.reproduce.matrix import Claim

ALPHA = 0.05
HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not yet run"


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        word: holds (p below 0.05), does not hold (the opposite has such a p), undecided, or not yet run.
        p: of a one-sided test over blocks of runs with equal data and seed: paired t of two levels, Page's trend test
            of more; None of a value that is to be reached.
        gaps: in each block the last level's value less the first's; at each level what is above the value to reach.
    """

    word: str
    p: float | None
    gaps: dict[str, float]

    def __str__(self) -> str:
        return "" if self.word == NOT_RUN else f"{self.word} (p = {self.p:.2g})" if self.p is not None else self.word


def weigh(claim: Claim, results: Sequence[Result]) -> Verdict:
    """The verdict on a claim. Runs of one block differ in the claim's axis alone."""
    rows: dict[str, dict[str, float]] = {}
    for result in results:
        level, value = result.cell.levels[claim.axis], result.value(claim.metric)
        if level in claim.levels and value is not None:
            rows.setdefault(result.cell.beside(claim.axis), {})[level] = value
    if claim.reaches:
        gaps = {level: value - claim.reaches[level] for row in rows.values() for level, value in row.items()}
        word = NOT_RUN if len(gaps) < len(claim.reaches) else HOLDS if min(gaps.values()) >= -claim.within else FAILS
        return Verdict(word, None, gaps)
    rows = {name: row for name, row in rows.items() if len(row) == len(claim.levels)}
    whole = {name: [row[level] for level in claim.levels] for name, row in rows.items()}
    gaps = {name: values[-1] - values[0] for name, values in whole.items()}
    if len(whole) < 2:
        return Verdict(NOT_RUN, None, gaps)
    if len(claim.levels) == 2:
        rising, falling = paired(list(gaps.values()), claim.within)
    else:
        rising, falling = (
            float(page_trend_test([values[::step] for values in whole.values()]).pvalue) for step in (1, -1)
        )
    word = HOLDS if rising < ALPHA else FAILS if falling < ALPHA else UNDECIDED
    return Verdict(word, rising, gaps)


def paired(gaps: Sequence[float], within: float) -> tuple[float, float]:
    """p that the mean gap is not above -within, and that it is not below."""
    if len(set(gaps)) == 1:  # no spread, as of parameters
        above = gaps[0] + within
        return (0.0, 1.0) if above > 0 else (1.0, 0.0) if above < 0 else (0.5, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of gaps that are nearly equal
        p = float(ttest_1samp(gaps, -within, alternative="greater").pvalue)
    return p, 1 - p
