"""The figures of a report: panels that draw themselves on an axis, for paper and for the page alike."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from eit.analysis.frequency import Frequency, diagonal_frequencies
from eit.analysis.measure import Analysis
from eit.analysis.pictures import Example, Picture
from eit.analysis.robustness import Band
from eit.analysis.subjects import Subject

# Okabe & Ito's palette without black and yellow: the colour-blind can tell them, on white and on black paper.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one more than colours, so that 42 models differ
HEAT = "cividis"
FIGURES = ("share", "parts", "amplitude", "spectra", "distances", "diversity", "attention", "robustness")  # their keys


@dataclass
class Measured:
    """A subject with all that was measured of it."""

    subject: Subject
    analysis: Analysis
    colour: str
    marker: str
    missing: list[str] = field(default_factory=list)  # what cannot be measured or shown of it
    bands: list[Band] | None = None
    pictures: list[Picture] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)  # the images of the pictures, as this model sees them

    @property
    def is_initial(self) -> bool:
        return self.subject.state == "initial"

    @property
    def name(self) -> str:
        return self.subject.name

    def twin(self, measured: Sequence["Measured"]) -> "Measured | None":
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


@dataclass
class Panel:
    title: str
    draw: Callable[[Any], None]


@dataclass
class Figure:
    """Panels with a caption that says what they show and what would count against the claim."""

    key: str  # of its files
    title: str
    caption: str
    panels: list[Panel]
    legend: list[Measured]
    noise: bool = False  # a dotted line stands for white noise


def figures(measured: Sequence[Measured]) -> list[Figure]:
    """All that the measurements have something to say to."""
    found = [_share(measured), _parts(measured), _amplitude(measured), _spectra(measured)]
    found += [_distances(measured), _diversity(measured), _attention(measured), _robustness(measured)]
    return [figure for figure in found if figure is not None]


# -- Frequency --------------------------------------------------------------------------------------------------------


def _line(axis: Any, one: Measured, places: Sequence[Frequency], with_dc: bool) -> None:
    x = [f.layer for f in places]
    y = [100 * (f.share_with_dc if with_dc else f.share) for f in places]
    error = [100 * (f.share_with_dc_se if with_dc else f.share_se) for f in places]
    axis.errorbar(x, y, [0 if math.isnan(e) else e for e in error], capsize=0, elinewidth=1, **one.style())


def _noise(axis: Any, places: Sequence[Frequency], with_dc: bool) -> None:
    for level in sorted({f.noise_share_with_dc if with_dc else f.noise_share for f in places}):
        axis.axhline(100 * level, linestyle=":", linewidth=1.2, color=_ink(), zorder=1)


def _share(measured: Sequence[Measured]) -> Figure:
    def panel(with_dc: bool) -> Panel:
        def draw(axis: Any) -> None:
            for one in measured:
                places = [f for f in one.analysis.frequency if f.where in ("stem", "block")]
                _line(axis, one, places, with_dc)
                _noise(axis, places, with_dc)
            _depth(axis, measured, first=0)
            axis.set_ylabel("high-frequency share (%)")
            _from_zero(axis)

        return Panel("share with DC: the mean counts" if with_dc else "share: the mean left out", draw)

    rho = measured[0].analysis.frequency[0].rho
    return Figure(
        "share",
        "High-frequency share over depth",
        f"Share of the energy of a layer's tokens above {rho:g} of the Nyquist frequency (mean over channels and "
        "images, bars: one standard error), after the stem (0) and each layer. Dashed: the same models at their "
        "initial values; dotted: white noise on each model's grid. The paper claims a larger share in each layer of "
        "EIT. Against it would count: a line of EIT that is not above those of LSRA and ViT, or one that was as high "
        "before training, for then the architecture alone makes it and nothing was learnt. The two panels may "
        "disagree: name the one you quote.",
        [panel(False), panel(True)],
        list(measured),
        noise=True,
    )


def _parts(measured: Sequence[Measured]) -> Figure | None:
    """Convolution's channels against attention's."""
    mixed = [one for one in measured if one.analysis.at("conv") and not one.is_initial]
    if not mixed:
        return None

    def panel(one: Measured) -> Panel:
        twin = one.twin(measured)

        def draw(axis: Any) -> None:
            for where, colour, marker in (("conv", PALETTE[0], "o"), ("attention", PALETTE[5], "s")):
                for source in (one, twin) if twin else (one,):
                    places = source.analysis.at(where)
                    line = dict(color=colour, marker=marker) | (
                        dict(linestyle="--", mfc="none", markersize=3.5, linewidth=1.1)
                        if source.is_initial
                        else dict(markersize=4.5, linewidth=1.8, label=where)
                    )
                    axis.plot([f.layer for f in places], [100 * f.share for f in places], **line)
            _noise(axis, one.analysis.at("attention"), with_dc=False)
            _depth(axis, [one])
            axis.set_ylabel("high-frequency share (%)")
            _from_zero(axis)
            axis.legend(frameon=False, fontsize=9)

        return Panel(one.name, draw)

    return Figure(
        "parts",
        "Where the high frequencies come from",
        "High-frequency share (without DC) of the channels that were convolved and of those that attended, at the "
        "mixer's output before the residual is added. Dashed: initial values; dotted: white noise. If convolution "
        "brings in the high frequencies, its line lies above attention's. Against it would count: lines that "
        "coincide, or a gap that is as wide before training.",
        [panel(one) for one in mixed],
        [],
        noise=True,
    )


def _amplitude(measured: Sequence[Measured]) -> Figure | None:
    trained = [one for one in measured if one.analysis.at("mixer") and not one.is_initial]
    if not trained:
        return None
    places = ("stem", "mixer", "block")
    values = [f.log_amplitude[-1] for one in measured for f in one.analysis.frequency if f.where in places]
    lowest, highest = min(values), max(values)

    def panel(one: Measured) -> Panel:
        twin = one.twin(measured)

        def draw(axis: Any) -> None:
            for source in (one, twin) if twin else (one,):
                along = [f for f in source.analysis.frequency if f.where in places]
                x = [f.layer - (0.5 if f.where == "mixer" else 0.0) for f in along]
                axis.plot(x, [f.log_amplitude[-1] for f in along], **source.style())
            for layer in range(1, one.analysis.depth + 1):
                axis.axvspan(layer - 1, layer - 0.5, color=_ink(), alpha=0.08, linewidth=0)
            _depth(axis, [one], first=0)
            axis.set_ylabel(f"log amplitude at f = {diagonal_frequencies(one.analysis.grid)[-1]:.2f}")
            axis.set_ylim(lowest - 0.1 * (highest - lowest), highest + 0.1 * (highest - lowest))

        return Panel(one.name, draw)

    return Figure(
        "amplitude",
        "Which sub-block amplifies high frequencies",
        "Logarithm of the Fourier amplitude at the highest frequency of the diagonal, minus that at frequency 0, after "
        "each sub-block: shaded steps are token mixers (convolution and attention), white ones MLPs (Park & Kim 2022, "
        "figure 2b). Dashed: initial values. A line that falls in the shaded steps is a low-pass filter. Against the "
        "paper would count: mixers of EIT that damp high frequencies as much as ViT's.",
        [panel(one) for one in trained],
        [],
    )


def _spectra(measured: Sequence[Measured]) -> Figure:
    """Heat maps of layer x frequency: energy per coefficient against that of white noise, in decibels."""
    shown = [one for one in measured if not one.is_initial]

    def panel(one: Measured) -> Panel:
        def draw(axis: Any) -> None:
            import numpy as np

            places = [f for f in one.analysis.frequency if f.where in ("stem", "block")]
            for f in places:  # each with the rings of its own grid
                rings = f.radial()
                edges = [rings[0][0], *(ring[1] for ring in rings)]
                decibels = np.array([[10 * math.log10(max(share / noise, 1e-9)) for _, _, share, noise in rings]])
                rows = [f.layer - 0.5, f.layer + 0.5]
                mesh = axis.pcolormesh(edges, rows, decibels, cmap=HEAT, vmin=-10, vmax=10, linewidth=0.5)
                mesh.set_edgecolor("face")  # else the paper shows through the seams
            bar = axis.figure.colorbar(mesh, ax=axis, pad=0.02, fraction=0.06, ticks=[-10, -5, 0, 5, 10], extend="both")
            bar.ax.tick_params(length=2)
            bar.set_label("dB")
            bar.outline.set_visible(False)
            _integers(axis.yaxis, [f.layer for f in places])
            axis.set(xlabel="frequency", ylabel="layer")
            axis.spines[:].set_visible(False)

        return Panel(one.name, draw)

    return Figure(
        "spectra",
        "Radial spectra",
        "Energy per Fourier coefficient of each layer's tokens (without DC) against that of white noise, in decibels: "
        "0 is flat, bright is more, dark is less; frequency 1 is the Nyquist frequency of an axis of tokens. Energy "
        "that moves to the right with depth is what the paper calls a thirst for high frequencies. Against it would "
        "count: rows of EIT that look like those of ViT.",
        [panel(one) for one in shown],
        [],
    )


# -- Attention --------------------------------------------------------------------------------------------------------


def _distances(measured: Sequence[Measured]) -> Figure | None:
    shown = [one for one in measured if one.analysis.attention and not one.is_initial]
    if not shown:
        return None
    same_size = len({one.analysis.image_size for one in shown}) == 1

    def span(ones: Sequence[Measured]) -> tuple[float, float]:
        """Pixels between which all dots and dotted lines lie."""
        layers = [layer for one in ones for layer in one.analysis.attention]
        values = [value for layer in layers for value in (*layer.distance, layer.uniform)]
        margin = 0.08 * (max(values) - min(values))
        return min(values) - margin, max(values) + margin

    def panel(one: Measured) -> Panel:
        twin = one.twin(measured)

        def draw(axis: Any) -> None:
            for layer in one.analysis.attention:
                axis.plot(
                    [layer.layer - 0.32, layer.layer + 0.32], [layer.uniform] * 2, ":", color=_ink(), linewidth=1.2
                )
            for source in (twin, one) if twin else (one,):
                for layer in source.analysis.attention:
                    x = [layer.layer + (-0.16 if source.is_initial else 0.1)] * len(layer.distance)
                    face = "none" if source.is_initial else one.colour
                    axis.scatter(
                        x, layer.distance, s=16, facecolors=face, edgecolors=one.colour, linewidths=0.8, alpha=0.85
                    )
            _depth(axis, [one])
            axis.set_ylabel("mean attention distance (px)")
            axis.set_ylim(*span([o for o in measured if o.analysis.attention] if same_size else [one]))

        return Panel(one.name, draw)

    return Figure(
        "distances",
        "How far each head looks",
        "Mean attention distance in pixels, one dot a head (Dosovitskiy et al. 2021, figure 11). Filled: as given; "
        "hollow: initial values; dotted: a head that looks everywhere alike; the axis does not begin at 0. The paper "
        "claims that EIT's heads are more diverse: its dots should spread more within a layer. Against it would "
        "count: columns as short as those of LSRA and ViT.",
        [panel(one) for one in shown],
        [],
    )


def _diversity(measured: Sequence[Measured]) -> Figure | None:
    shown = [one for one in measured if one.analysis.attention]
    if not shown:
        return None

    def panel(relative: bool) -> Panel:
        def draw(axis: Any) -> None:
            for one in shown:
                layers = one.analysis.attention
                y = [100 * layer.relative_std if relative else layer.std for layer in layers]
                axis.plot([layer.layer for layer in layers], y, **one.style())
            _depth(axis, shown)
            axis.set_ylabel("diversity (% of uniform)" if relative else "diversity (px)")
            _from_zero(axis)

        return Panel("by the distance of uniform attention" if relative else "in pixels", draw)

    return Figure(
        "diversity",
        "Head diversity over depth",
        "Standard deviation over a layer's heads of their mean attention distance. Dashed: initial values, "
        "of which the paper claims nothing. Against it would count: a line of EIT "
        "that is not above the others after training. Grids differ in pitch: compare them in the panel on the right.",
        [panel(False), panel(True)],
        shown,
    )


def _attention(measured: Sequence[Measured]) -> Figure | None:
    shown = [one for one in measured if one.analysis.attention]
    if not shown:
        return None

    def panel(title: str, label: str, value: Callable[[Any], list[float]], scale: Callable[[Any], float]) -> Panel:
        def draw(axis: Any) -> None:
            for one in shown:
                layers = one.analysis.attention
                y = [100 * sum(value(layer)) / len(layer.distance) / scale(layer) for layer in layers]
                axis.plot([layer.layer for layer in layers], y, **one.style())
            _depth(axis, shown)
            axis.set_ylabel(label)
            _from_zero(axis)

        return Panel(title, draw)

    cut = "which the distances leave out" if shown[0].analysis.renormalize else "which counts as distance 0"
    return Figure(
        "attention",
        "Class-token mass and entropy",
        f"Left: the part of the patches' attention that goes to the class token (and to registers), {cut}; where it is "
        "large, they speak of little. Right: entropy of a patch's attention over the grid, as a share of its largest "
        "value, log(h w); low means that a head looks at few places. Means over heads; dashed: initial values. Neither "
        "is a claim of the paper; masses that differ widely would count against comparing distances.",
        [
            panel(
                "class-token mass", "attention to class token (%)", lambda layer: layer.class_mass, lambda layer: 1.0
            ),
            panel(
                "entropy",
                "entropy (% of uniform)",
                lambda layer: layer.entropy,
                lambda layer: math.log(layer.grid[0] * layer.grid[1]),
            ),
        ],
        shown,
    )


# -- Robustness -------------------------------------------------------------------------------------------------------


def _robustness(measured: Sequence[Measured]) -> Figure | None:
    shown = [one for one in measured if one.bands]
    if not shown:
        return None

    def draw(axis: Any) -> None:
        for one in shown:
            clean, *noisy = one.bands or []
            x = [((band.low or 0) + (band.high or 0)) / 2 for band in noisy]
            axis.errorbar(x, [b.top1 - clean.top1 for b in noisy], [b.standard_error for b in noisy], **one.style())
        axis.axhline(0, linestyle=":", linewidth=1.2, color=_ink())
        axis.set(xlabel="frequency of the noise in pixels", ylabel="change of top-1 (points)")

    clean = ", ".join(f"{one.name} {(one.bands or [])[0].top1:.1f}%" for one in shown)
    return Figure(
        "robustness",
        "Accuracy under noise of one band",
        "Change of top-1 when noise of one ring of frequencies (1 is the Nyquist frequency of the pixels) is added "
        f"to the pixels (Park & Kim 2022); bars: one standard error of top-1. Without noise: {clean}. A model that "
        "reads high frequencies falls on the right, one that reads low ones on the left. Against the claim that EIT "
        "uses more high frequencies would count: a line that is not below those of LSRA and ViT on the right.",
        [Panel("", draw)],
        shown,
    )


# -- Axes -------------------------------------------------------------------------------------------------------------


def _ink() -> str:
    from matplotlib import rcParams

    return rcParams["text.color"]


def _depth(axis: Any, measured: Sequence[Measured], first: int = 1) -> None:
    """Layers on the x axis."""
    depth = max(one.analysis.depth for one in measured)
    _integers(axis.xaxis, range(first, depth + 1))
    axis.set_xlim(first - 0.5, depth + 0.5)
    axis.set_xlabel("layer")


def _from_zero(axis: Any) -> None:
    """The y axis from 0 to a little above the data: a line at the top is not cut in half."""
    axis.set_ylim(0, 1.06 * axis.dataLim.y1 or 1)


def _integers(axis: Any, values: Sequence[int]) -> None:
    step = -(-len(values) // 13)
    axis.set_ticks([v for v in values if (v - values[0]) % step == 0 or (v == values[-1] and step == 1)])
