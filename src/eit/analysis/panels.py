"""Parts of figures: panels that draw themselves on an axis, in print and on the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from eit.analysis.analyzed_model import AnalyzedModel, claimed_and_others

# Okabe & Ito's colour-blind safe palette, without black and yellow, for white and for black backgrounds.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # with 6 colours and 7 markers, 42 models differ


@dataclass
class Panel:
    title: str
    draw: Callable[[Any], None]


@dataclass
class Figure:
    """Panels with a caption: what they show, and what would count against the claim."""

    key: str  # name of its files
    title: str
    caption: str
    panels: list[Panel]
    legend: list[AnalyzedModel]
    noise: bool = False  # a dotted line stands for white noise


def contradiction(models: Sequence[AnalyzedModel], evidence: str, claim: str = "The claim") -> str:
    """` The claim is contradicted if ...`, with the names of `models`; empty if there are no two sides to compare.

    `evidence` has {ours}, the models that the claim is about, and {others}.
    """
    sides = claimed_and_others(models)
    if not all(sides):
        return ""
    ours, others = (" and ".join(model.name for model in side) for side in sides)
    return f" {claim} is contradicted if {evidence.format(ours=ours, others=others)}."


Points = list[tuple[float, float]]


def curve(axis: Any, model: AnalyzedModel, value: Callable[[AnalyzedModel], Points], **style: Any) -> None:
    """Draw the points of a model, or mean and band of a group's runs."""
    of_runs = [value(run) for run in model.runs]
    x = [point[0] for point in of_runs[0]]
    columns = [[point[1] for point in column] for column in zip(*of_runs, strict=True)]
    mean = [fmean(column) for column in columns]
    line = model.style() | style
    axis.plot(x, mean, **line)
    if len(of_runs) > 1:
        band(axis, x, mean, [stdev(column) for column in columns], line["color"])


def band(axis: Any, x: list[float], mean: list[float], std: list[float], colour: Any) -> None:
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def depth_axis(axis: Any, models: Sequence[AnalyzedModel], first: int = 1) -> None:
    """Layers on the x axis."""
    depth = max(model.analysis.depth for model in models)
    integers(axis.xaxis, range(first, depth + 1))
    axis.set_xlim(first - 0.5, depth + 0.5)
    axis.set_xlabel("layer")


def from_zero(axis: Any) -> None:
    """Set the y axis from 0 to a little above the data, so that a line at the top is not clipped."""
    axis.set_ylim(0, 1.06 * axis.dataLim.y1 or 1)


def logarithmic(axis: Any) -> None:
    """Make the y axis logarithmic, with labels without exponents, which are too small to read on a phone."""
    from matplotlib.ticker import NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def integers(axis: Any, values: Sequence[int]) -> None:
    step = -(-len(values) // 13)
    axis.set_ticks([v for v in values if (v - values[0]) % step == 0 or (v == values[-1] and step == 1)])
