"""A model with its measurements, and a group of runs that is shown as one curve."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from eit.analysis.filters import FilteredAccuracy
from eit.analysis.image_maps import ImageMaps, ShownImage
from eit.analysis.inputs import LoadedModel
from eit.analysis.measure import Analysis
from eit.analysis.robustness import BandAccuracy


@dataclass
class AnalyzedModel:
    """A model with its measurements, or a group of runs that is shown as one model."""

    loaded: LoadedModel
    analysis: Analysis  # for a group, that of its first run; `runs` has all
    colour: str
    marker: str
    missing: list[str] = field(default_factory=list)  # what cannot be measured or shown, and why
    bands: list[BandAccuracy] | None = None
    filters: list[FilteredAccuracy] | None = None
    image_maps: list[ImageMaps] = field(default_factory=list)
    shown_images: list[ShownImage] = field(default_factory=list)  # as this model sees them
    members: list["AnalyzedModel"] = field(default_factory=list)  # the runs of a group

    @property
    def runs(self) -> list["AnalyzedModel"]:
        """The runs of a group; for a single model, the model itself."""
        return self.members or [self]

    @property
    def is_initial(self) -> bool:
        return self.loaded.state == "initial"

    @property
    def name(self) -> str:
        return self.loaded.name

    def mean(self, value: Callable[[Analysis], float]) -> float:
        """The mean of a value over the runs of a group."""
        return fmean(value(run.analysis) for run in self.runs)

    def at_initial_values(self, measured: Sequence["AnalyzedModel"]) -> "AnalyzedModel | None":
        """The same model with its initial values, if it was measured too."""
        label = self.loaded.label
        return next((other for other in measured if other.is_initial and other.loaded.label == label), None)

    def style(self) -> dict[str, Any]:
        """Style of its lines: dashed, with hollow markers, for initial values."""
        if self.is_initial:
            return dict(
                color=self.colour, linestyle="--", linewidth=1.1, marker=self.marker, markersize=3.5, mfc="none"
            )
        return dict(color=self.colour, linestyle="-", linewidth=1.8, marker=self.marker, markersize=4.5)


def curves(models: Sequence[AnalyzedModel]) -> list[AnalyzedModel]:
    """One entry per curve: the runs of a group in the same state become one, at the position of the first."""
    groups: dict[tuple[str, str], list[AnalyzedModel]] = {}
    for model in models:
        loaded = model.loaded
        groups.setdefault((loaded.group or f"\0{loaded.label}", loaded.state), []).append(model)
    return [_merge_runs(runs) if runs[0].loaded.group else runs[0] for runs in groups.values()]


def _merge_runs(runs: list[AnalyzedModel]) -> AnalyzedModel:
    first = runs[0]
    source = ", ".join(run.loaded.source for run in runs)
    loaded = replace(first.loaded, label=f"{first.loaded.group}, n = {len(runs)}", source=source, sha256="")
    missing = list(dict.fromkeys(text for run in runs for text in run.missing))
    return AnalyzedModel(loaded, first.analysis, first.colour, first.marker, missing, members=runs)


def claimed_and_others(models: Sequence[AnalyzedModel]) -> tuple[list[AnalyzedModel], list[AnalyzedModel]]:
    """The trained models that the paper's claims are about, and the trained models that they are compared with.

    The claims are about models whose convolution decreases with depth; if there are none, about all that convolve.
    """
    trained = [model for model in models if model.loaded.state == "trained"]
    mixed = [model for model in trained if model.analysis.layers_at("conv")]
    claimed = [model for model in mixed if _decreases([f.channels for f in model.analysis.layers_at("conv")])] or mixed
    return claimed, [model for model in trained if model not in claimed]


def _decreases(channels: Sequence[int]) -> bool:
    return all(a > b for a, b in itertools.pairwise(channels))


def layout(analysis: Analysis) -> tuple[Any, ...]:
    """Layers, places, grids and heads: they must be the same in all runs that are averaged."""
    places = [(f.layer, f.where, f.grid) for f in analysis.frequency]
    return analysis.depth, analysis.image_size, places, [(a.layer, len(a.distance)) for a in analysis.attention]
