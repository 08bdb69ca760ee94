"""A model with all that was measured of it; several runs of one group as one curve."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from eit.analysis.filters import Filtered
from eit.analysis.image_maps import Example, Picture
from eit.analysis.inputs import Subject
from eit.analysis.measure import Analysis
from eit.analysis.robustness import Band


@dataclass
class AnalyzedModel:
    """A subject with all that was measured of it, or a group of runs that is shown as one."""

    subject: Subject
    analysis: Analysis  # of a group that of its first run: `runs` has all
    colour: str
    marker: str
    missing: list[str] = field(default_factory=list)  # what cannot be measured or shown of it
    bands: list[Band] | None = None
    filters: list[Filtered] | None = None
    pictures: list[Picture] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)  # the images of the pictures, as this model sees them
    members: list["AnalyzedModel"] = field(default_factory=list)  # the runs of a group

    @property
    def runs(self) -> list["AnalyzedModel"]:
        """The runs of a group, else this one."""
        return self.members or [self]

    @property
    def is_initial(self) -> bool:
        return self.subject.state == "initial"

    @property
    def name(self) -> str:
        return self.subject.name

    def mean(self, value: Callable[[Analysis], float]) -> float:
        """Of a group's runs."""
        return fmean(value(run.analysis) for run in self.runs)

    def twin(self, measured: Sequence["AnalyzedModel"]) -> "AnalyzedModel | None":
        """The same model at its initial values, if it is among those measured."""
        label = self.subject.label
        return next((other for other in measured if other.is_initial and other.subject.label == label), None)

    def style(self) -> dict[str, Any]:
        """How its lines look: dashed and hollow at initial values."""
        if self.is_initial:
            return dict(
                color=self.colour, linestyle="--", linewidth=1.1, marker=self.marker, markersize=3.5, mfc="none"
            )
        return dict(color=self.colour, linestyle="-", linewidth=1.8, marker=self.marker, markersize=4.5)


def curves(models: Sequence[AnalyzedModel]) -> list[AnalyzedModel]:
    """One entry for each curve: runs of one group, apart by state, are one, in the place of the first."""
    groups: dict[tuple[str, str], list[AnalyzedModel]] = {}
    for model in models:
        subject = model.subject
        groups.setdefault((subject.group or f"\0{subject.label}", subject.state), []).append(model)
    return [_together(runs) if runs[0].subject.group else runs[0] for runs in groups.values()]


def _together(runs: list[AnalyzedModel]) -> AnalyzedModel:
    first = runs[0]
    source = ", ".join(run.subject.source for run in runs)
    subject = replace(first.subject, label=f"{first.subject.group}, n = {len(runs)}", source=source, sha256="")
    missing = list(dict.fromkeys(text for run in runs for text in run.missing))
    return AnalyzedModel(subject, first.analysis, first.colour, first.marker, missing, members=runs)


def shape(analysis: Analysis) -> tuple[Any, ...]:
    """What runs must have in common to be averaged: layers, places, grids and heads."""
    places = [(f.layer, f.where, f.grid) for f in analysis.frequency]
    return analysis.depth, analysis.image_size, places, [(a.layer, len(a.distance)) for a in analysis.attention]
