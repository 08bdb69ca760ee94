"""Groups of runs: mean and spread over the runs, and differences of two groups paired by seed."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from eit.analysis.analyzed_model import AnalyzedModel, curves
from eit.analysis.measure import Analysis

CONFIDENCE = 0.95

# Name of a measure -> (layer, value) for each layer that has it
MEASURES: dict[str, Callable[[Analysis], list[tuple[int, float]]]] = {
    "share": lambda a: [(f.layer, f.share) for f in a.layers_at("block")],
    "share_with_dc": lambda a: [(f.layer, f.share_with_dc) for f in a.layers_at("block")],
    "mixer_gain": lambda a: [(t.layer, t.gain) for t in a.transfers("mixer")],
    "mlp_gain": lambda a: [(t.layer, t.gain) for t in a.transfers("mlp")],
    "relative_std": lambda a: [(h.layer, h.relative_std) for h in a.attention],
    "divergence": lambda a: [(h.layer, h.mean_divergence) for h in a.attention if h.divergence],
    "relative_entropy": lambda a: [(h.layer, fmean(h.relative_entropy)) for h in a.attention],
    "class_token_share": lambda a: [(t.layer, t.share) for t in a.class_tokens("block")],
    "cosine": lambda a: [(s.layer, s.cosine) for s in a.smoothing if s.where == "block"],
    "effective_rank": lambda a: [(s.layer, s.rank) for s in a.smoothing if s.where == "block"],
}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) of one measure in one layer over the runs of a group."""

    group: str
    state: str
    measure: str
    layer: int
    runs: int
    mean: float
    std: float


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two groups, averaged over pairs of runs that were trained with the same seed.

    Attributes:
        one, other: names of the groups.
        measure: a key of `MEASURES`.
        layer: number of the layer; None: the mean of the layers.
        seeds: number of pairs.
        difference: mean over the pairs, `one` minus `other`.
        low, high: ends of its 95% interval by Student's t.
    """

    one: str
    other: str
    measure: str
    layer: int | None
    seeds: int
    difference: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def spreads(models: Sequence[AnalyzedModel]) -> list[Spread]:
    """The spread of each group, measure and layer."""
    rows = []
    for group in (model for model in curves(models) if model.members):
        for name, values in MEASURES.items():
            for run in zip(*(values(run.analysis) for run in group.members), strict=True):
                of_runs = [value for _, value in run]
                loaded = group.loaded
                mean, std = fmean(of_runs), stdev(of_runs)
                rows.append(Spread(loaded.group, loaded.state, name, run[0][0], len(of_runs), mean, std))
    return rows


def paired_differences(models: Sequence[AnalyzedModel]) -> tuple[list[PairedDifference], list[str]]:
    """The differences of all pairs of trained groups, and one line for each two groups that cannot be paired."""
    groups = [group for group in curves(models) if group.members and group.loaded.state == "trained"]
    differences: list[PairedDifference] = []
    lines: list[str] = []
    for group, other in itertools.combinations(groups, 2):
        names = f"{group.loaded.group} and {other.loaded.group}"
        mine, theirs = _by_seed(group), _by_seed(other)
        if mine is None or theirs is None:
            lines.append(f"{names} are not paired: runs of a group have the same seed, or name no seed")
            continue
        seeds = sorted(mine.keys() & theirs.keys())
        if len(seeds) < 2:
            lines.append(f"{names} are not paired: they have {len(seeds)} seed{'s' * (len(seeds) != 1)} in common")
            continue
        for name, values in MEASURES.items():
            runs = [(dict(values(mine[s].analysis)), dict(values(theirs[s].analysis))) for s in seeds]
            key = group.loaded.group, other.loaded.group, name
            layers = sorted(runs[0][0].keys() & runs[0][1].keys())
            if group.analysis.depth == other.analysis.depth:
                differences += [_paired(*key, n, [a[n] - b[n] for a, b in runs]) for n in layers]
            if runs[0][0] and runs[0][1]:
                differences.append(_paired(*key, None, [fmean(a.values()) - fmean(b.values()) for a, b in runs]))
    return differences, lines


def _by_seed(group: AnalyzedModel) -> dict[int, AnalyzedModel] | None:
    """Seed -> run; None if two runs have the same seed, or a run names no seed."""
    seeds = {run.loaded.seed: run for run in group.members}
    known = {seed: run for seed, run in seeds.items() if seed is not None}
    return known if len(known) == len(group.members) else None


def _paired(one: str, other: str, measure: str, layer: int | None, gaps: list[float]) -> PairedDifference:
    from scipy import stats

    mean = fmean(gaps)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))
    return PairedDifference(one, other, measure, layer, len(gaps), mean, mean - half, mean + half)
