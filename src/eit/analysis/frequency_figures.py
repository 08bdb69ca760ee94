"""Figures of frequencies: shares, spectra, and how sub-blocks change them."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from eit.analysis.analyzed_model import AnalyzedModel
from eit.analysis.frequency import RHOS, Frequency, diagonal_frequencies, noise_shares
from eit.analysis.measure import Analysis
from eit.analysis.panels import (
    PALETTE,
    Figure,
    Panel,
    Points,
    contradiction,
    curve,
    depth_axis,
    from_zero,
    integers,
)
from eit.pages.render import HEAT, ink


def _line(axis: Any, model: AnalyzedModel, with_dc: bool) -> None:
    if model.members:
        curve(axis, model, lambda run: [(f.layer, 100 * _kind(f, with_dc)) for f in _after_layers(run.analysis)])
        return
    places = _after_layers(model.analysis)
    x = [f.layer for f in places]
    y = [100 * _kind(f, with_dc) for f in places]
    error = [100 * (f.share_with_dc_se if with_dc else f.share_se) for f in places]
    axis.errorbar(x, y, [0 if math.isnan(e) else e for e in error], capsize=0, elinewidth=1, **model.style())


def _kind(f: Frequency, with_dc: bool) -> float:
    return f.share_with_dc if with_dc else f.share


def _after_layers(analysis: Analysis) -> list[Frequency]:
    return [f for f in analysis.frequency if f.where in ("stem", "block")]


def _noise(axis: Any, places: Sequence[Frequency], with_dc: bool) -> None:
    for level in sorted({f.noise_share_with_dc if with_dc else f.noise_share for f in places}):
        axis.axhline(100 * level, linestyle=":", linewidth=1.2, color=ink(), zorder=1)


def share(models: Sequence[AnalyzedModel]) -> Figure:
    def panel(with_dc: bool) -> Panel:
        def draw(axis: Any) -> None:
            for model in models:
                _line(axis, model, with_dc)
                _noise(axis, _after_layers(model.analysis), with_dc)
            depth_axis(axis, models, first=0)
            axis.set_ylabel("high-frequency share (%)")
            from_zero(axis)

        return Panel("share with DC (the mean)" if with_dc else "share without DC", draw)

    rho = models[0].analysis.frequency[0].rho
    return Figure(
        "share",
        "High-frequency share over depth",
        f"Share of the energy of a layer's tokens above {rho:g} of the Nyquist frequency, after the stem (0) and each "
        "layer, averaged over channels and images. Bars: one standard error. Dashed: the same models with their "
        "initial values; dotted: white noise on each model's grid. The paper claims a larger share in each layer "
        "for decreasing convolution."
        + contradiction(models, "the line of {ours} is not above that of {others}")
        + " If a line is as high before training, the share comes from the architecture alone and was not learnt. The "
        "two panels may disagree, so name the one that you quote.",
        [panel(False), panel(True)],
        list(models),
        noise=True,
    )


def sweep(models: Sequence[AnalyzedModel]) -> Figure:
    """The share for every cut-off frequency, by layer."""
    shown = [model for model in models if not model.is_initial]

    def panel(model: AnalyzedModel) -> Panel:
        def draw(axis: Any) -> None:
            from matplotlib import colormaps

            last = model.analysis.depth
            for number, f in enumerate(_after_layers(model.analysis)):

                def points(run: AnalyzedModel, number: int = number) -> Points:
                    sweep = _after_layers(run.analysis)[number].sweep
                    return [(rho, 100 * share) for rho, share in zip(RHOS, sweep, strict=True)]

                colour = colormaps[HEAT](f.layer / last)
                named = dict(label="stem" if f.layer == 0 else f"layer {f.layer}") if f.layer in (0, 1, last) else {}
                curve(axis, model, points, color=colour, marker="", linewidth=1.3, **named)
            grid = model.analysis.layers_at("block")[-1].grid
            axis.plot(RHOS, [100 * noise_shares(grid, rho)[0] for rho in RHOS], ":", linewidth=1.2, color=ink())
            axis.axvline(model.analysis.rho, linewidth=0.8, color=ink(), alpha=0.4)
            axis.set(xlabel="cut-off frequency rho", ylabel="share above rho (%)")
            from_zero(axis)
            axis.legend(frameon=False, fontsize=9)

        return Panel(model.name, draw)

    return Figure(
        "sweep",
        "The share for every cut-off frequency",
        "High-frequency share (without DC) against the cut-off frequency rho, after the stem and each layer, from "
        "dark to bright. Dotted: white noise; vertical line: the rho of all other figures. If lines cross, another "
        "rho changes the order of the layers, and claims about shares depend on rho.",
        [panel(model) for model in shown],
        [],
        noise=True,
    )


def transfer(models: Sequence[AnalyzedModel]) -> Figure | None:
    """The update of sub-blocks relative to their input."""
    names = dict(
        mixer="token mixer", mlp="MLP", conv="mixer: convolved channels", attention="mixer: attention channels"
    )
    having = {where: [model for model in models if model.analysis.transfers(where)] for where in names}
    if not having["mixer"] and not having["mlp"]:
        return None
    if not having["conv"]:  # without convolution it would be the panel of the mixer again
        having["attention"] = []

    def panel(where: str, shown: Sequence[AnalyzedModel]) -> Panel:
        def draw(axis: Any) -> None:
            for model in shown:
                curve(axis, model, lambda run: [(t.layer, t.gain) for t in run.analysis.transfers(where)])
            axis.axhline(1, linewidth=0.8, color=ink(), alpha=0.5, zorder=1)
            depth_axis(axis, shown)
            axis.set_ylabel("gain of the share")

        return Panel(names[where], draw)

    return Figure(
        "transfer",
        "Which sub-block adds high frequencies",
        "High-frequency share of the update that a sub-block adds to the tokens, divided by that of its input (after "
        "its norm). Stem and residual are not included. Above 1 the sub-block is a high-pass filter, below 1 a "
        "low-pass filter. Dashed: initial values. The paper says that convolution adds high frequencies and attention "
        "damps them. This is contradicted if the convolved channels are below 1, or not above the attention channels.",
        [panel(where, shown) for where, shown in having.items() if shown],
        [model for model in models if any(model in shown for shown in having.values())],
    )


def parts(models: Sequence[AnalyzedModel]) -> Figure | None:
    """Shares of the convolved and of the attention channels."""
    mixed = [model for model in models if model.analysis.layers_at("conv") and not model.is_initial]
    if not mixed:
        return None

    def panel(model: AnalyzedModel) -> Panel:
        initial = model.at_initial_values(models)

        def draw(axis: Any) -> None:
            for where, colour, marker in (("conv", PALETTE[0], "o"), ("attention", PALETTE[5], "s")):
                for source in (model, initial) if initial else (model,):
                    line = dict(color=colour, marker=marker) | (
                        dict(linestyle="--", mfc="none", markersize=3.5, linewidth=1.1)
                        if source.is_initial
                        else dict(markersize=4.5, linewidth=1.8, label=where)
                    )

                    def points(run: AnalyzedModel, where: str = where) -> Points:
                        return [(f.layer, 100 * f.share) for f in run.analysis.layers_at(where)]

                    curve(axis, source, points, **line)
            _noise(axis, model.analysis.layers_at("attention"), with_dc=False)
            depth_axis(axis, [model])
            axis.set_ylabel("high-frequency share (%)")
            from_zero(axis)
            axis.legend(frameon=False, fontsize=9)

        return Panel(model.name, draw)

    return Figure(
        "parts",
        "Where the high frequencies come from",
        "High-frequency share (without DC) of the convolved channels and of the attention channels at the mixer's "
        "output, before the residual is added. Dashed: initial values; dotted: white noise. If convolution adds the "
        "high frequencies, its line is above attention's. This is contradicted if the lines coincide, or if their gap "
        "is as wide before training.",
        [panel(model) for model in mixed],
        [],
        noise=True,
    )


def amplitude(models: Sequence[AnalyzedModel]) -> Figure | None:
    trained = [model for model in models if model.analysis.layers_at("mixer") and not model.is_initial]
    if not trained:
        return None
    places = ("stem", "mixer", "block")
    runs = [run for model in models for run in model.runs]
    values = [f.log_amplitude[-1] for run in runs for f in run.analysis.frequency if f.where in places]
    lowest, highest = min(values), max(values)

    def points(run: AnalyzedModel) -> Points:
        along = [f for f in run.analysis.frequency if f.where in places]
        return [(f.layer - (0.5 if f.where == "mixer" else 0.0), f.log_amplitude[-1]) for f in along]

    def panel(model: AnalyzedModel) -> Panel:
        initial = model.at_initial_values(models)

        def draw(axis: Any) -> None:
            for source in (model, initial) if initial else (model,):
                curve(axis, source, points)
            for layer in range(1, model.analysis.depth + 1):
                axis.axvspan(layer - 1, layer - 0.5, color=ink(), alpha=0.08, linewidth=0)
            depth_axis(axis, [model], first=0)
            axis.set_ylabel(f"log amplitude at f = {diagonal_frequencies(model.analysis.grid)[-1]:.2f}")
            axis.set_ylim(lowest - 0.1 * (highest - lowest), highest + 0.1 * (highest - lowest))

        return Panel(model.name, draw)

    return Figure(
        "amplitude",
        "Which sub-block amplifies high frequencies",
        "Log Fourier amplitude at the highest frequency of the diagonal, minus that at frequency 0, after each "
        "sub-block (Park & Kim 2022, figure 2b). Shaded steps are token mixers (convolution and attention), white "
        "steps MLPs. Dashed: initial values. If a line falls in a shaded step, that mixer is a low-pass filter."
        + contradiction(models, "the mixers of {ours} damp high frequencies as much as those of {others}", "The paper"),
        [panel(model) for model in trained],
        [],
    )


def spectra(models: Sequence[AnalyzedModel]) -> Figure:
    """Heat maps of layer x frequency: energy per coefficient relative to white noise, in decibels."""
    shown = [model for model in models if not model.is_initial]

    def panel(model: AnalyzedModel) -> Panel:
        def draw(axis: Any) -> None:
            import numpy as np

            places = _after_layers(model.analysis)
            for number, f in enumerate(places):  # each has the rings of its own grid
                rings = f.radial()
                edges = [rings[0][0], *(ring[1] for ring in rings)]
                of_runs = [[ring[2] for ring in _after_layers(run.analysis)[number].radial()] for run in model.runs]
                means = [fmean(shares) for shares in zip(*of_runs, strict=True)]
                noise = [ring[3] for ring in rings]
                decibels = np.array([[10 * math.log10(max(a / b, 1e-9)) for a, b in zip(means, noise, strict=True)]])
                rows = [f.layer - 0.5, f.layer + 0.5]
                mesh = axis.pcolormesh(edges, rows, decibels, cmap=HEAT, vmin=-10, vmax=10, linewidth=0.5)
                mesh.set_edgecolor("face")  # avoids white seams
            bar = axis.figure.colorbar(mesh, ax=axis, pad=0.02, fraction=0.06, ticks=[-10, -5, 0, 5, 10], extend="both")
            bar.ax.tick_params(length=2)
            bar.set_label("dB")
            bar.outline.set_visible(False)
            integers(axis.yaxis, [f.layer for f in places])
            axis.set(xlabel="frequency", ylabel="layer")
            axis.spines[:].set_visible(False)

        return Panel(model.name, draw)

    return Figure(
        "spectra",
        "Radial spectra",
        "Energy per Fourier coefficient of each layer's tokens (without DC) relative to white noise, in decibels: "
        "bright is more, dark is less. Frequency 1 is the Nyquist frequency of an axis of tokens. The paper's thirst "
        "for high frequencies would move energy to the right with depth."
        + contradiction(models, "the rows of {ours} look like those of {others}"),
        [panel(model) for model in shown],
        [],
    )
