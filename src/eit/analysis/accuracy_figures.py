"""Figures of accuracy with filtered tokens and with noise, and of differences between groups of runs."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from eit.analysis.analyzed_model import AnalyzedModel
from eit.analysis.groups import CONFIDENCE, paired_differences
from eit.analysis.panels import MARKERS, PALETTE, Figure, Panel, Points, contradiction, curve, integers
from eit.pages.render import ink

MORE_HIGH = "The claim that decreasing convolution uses more high frequencies"


def filtered_accuracy(models: Sequence[AnalyzedModel]) -> Figure | None:
    """Which frequencies the prediction uses."""
    shown = [model for model in models if model.runs[0].filters]
    if not shown:
        return None

    def panel(kept: str, title: str) -> Panel:
        def points(run: AnalyzedModel) -> Points:
            return [(f.layer, -f.cost) for f in run.filters or [] if f.kept == kept]

        def draw(axis: Any) -> None:
            for model in shown:
                curve(axis, model, points)
                if not model.members:
                    filtered = [f for f in model.filters or [] if f.kept == kept]
                    errors = [f.standard_error for f in filtered]
                    axis.errorbar(
                        [f.layer for f in filtered],
                        [-f.cost for f in filtered],
                        errors,
                        fmt="none",
                        ecolor=model.colour,
                    )
            axis.axhline(0, linestyle=":", linewidth=1.2, color=ink())
            depth = max(model.analysis.depth for model in shown)
            integers(axis.xaxis, range(depth))
            axis.set_xlim(-0.5, depth - 0.5)
            axis.set(xlabel="filtered after layer", ylabel="change of top-1 (points)")

        return Panel(title, draw)

    rho = shown[0].analysis.rho
    images = (shown[0].runs[0].filters or [])[0].images
    return Figure(
        "uses",
        "Which frequencies the prediction uses",
        f"Change of top-1 if the grid's tokens lose their frequencies above rho = {rho:g} (left), or those up to rho "
        "except the mean (right), after the stem (0) or after one layer. The class token does not change, and the rest "
        f"of the model runs. Bars: one standard error over {images:,} images; each image is compared with itself. A "
        "layer may hold high frequencies that later layers do not use."
        + contradiction(shown, "the line of {ours} on the left is not below that of {others}", MORE_HIGH),
        [panel("low", "high frequencies removed"), panel("high", "low frequencies removed")],
        shown,
    )


def paired(measured: Sequence[AnalyzedModel]) -> Figure | None:
    """Differences of two groups, paired by seed."""
    differences, _ = paired_differences(measured)
    names = list(dict.fromkeys((p.one, p.other) for p in differences if p.layer is not None))
    kinds = dict(
        share=("share", 100, "points"),
        relative_std=("head diversity", 100, "points of uniform"),
        class_token_share=("class token", 100, "points"),
    )
    kinds = {
        kind: v for kind, v in kinds.items() if any(p.measure == kind and p.layer is not None for p in differences)
    }
    if not names or not kinds:
        return None

    def panel(kind: str, title: str, scale: float, unit: str) -> Panel:
        def draw(axis: Any) -> None:
            for number, pair in enumerate(names):
                ours = [
                    p for p in differences if (p.one, p.other) == pair and p.measure == kind and p.layer is not None
                ]
                shift = 0.16 * (number - (len(names) - 1) / 2)
                x = [(p.layer or 0) + shift for p in ours]
                y = [scale * p.difference for p in ours]
                half = [scale * (p.high - p.difference) for p in ours]
                style = dict(color=PALETTE[number % len(PALETTE)], marker=MARKERS[number % len(MARKERS)], markersize=4)
                axis.errorbar(x, y, half, linestyle="none", elinewidth=1.2, **style)
            axis.axhline(0, linewidth=0.8, color=ink(), alpha=0.5)
            depth = max(p.layer or 0 for p in differences)
            integers(axis.xaxis, range(1, depth + 1))
            axis.set_xlim(0.5, depth + 0.5)
            axis.set(xlabel="layer", ylabel=f"difference ({unit})")

        return Panel(title, draw)

    seeds = ", ".join(sorted({str(p.seeds) for p in differences}))
    order = "; ".join(" minus ".join(pair) for pair in names)
    which = f"Differences, in each layer from left to right: {order}" if len(names) > 1 else f"Difference {order}"
    return Figure(
        "paired",
        "Differences paired by seed",
        f"{which}. Mean over pairs of runs that were trained with the same seed ({seeds} pairs), by layer. Bars: "
        f"{100 * CONFIDENCE:g}% interval by Student's t, not corrected for the number of layers. If an interval "
        "contains 0, it does not support a claim of a difference.",
        [panel(kind, *values) for kind, values in kinds.items()],
        [],
    )


def band_noise_cost(models: Sequence[AnalyzedModel]) -> Figure | None:
    shown = [model for model in models if model.runs[0].bands]
    if not shown:
        return None

    def points(run: AnalyzedModel) -> Points:
        clean, *noisy = run.bands or []
        return [(((band.low or 0) + (band.high or 0)) / 2, band.top1 - clean.top1) for band in noisy]

    def draw(axis: Any) -> None:
        for model in shown:
            if model.members:
                curve(axis, model, points)
                continue
            clean, *noisy = model.bands or []
            x = [((band.low or 0) + (band.high or 0)) / 2 for band in noisy]
            axis.errorbar(x, [b.top1 - clean.top1 for b in noisy], [b.standard_error for b in noisy], **model.style())
        axis.axhline(0, linestyle=":", linewidth=1.2, color=ink())
        axis.set(xlabel="frequency of the noise in pixels", ylabel="change of top-1 (points)")

    clean = ", ".join(f"{model.name} {fmean((run.bands or [])[0].top1 for run in model.runs):.1f}%" for model in shown)
    return Figure(
        "robustness",
        "Accuracy with noise in one frequency band",
        "Change of top-1 if noise in one ring of frequencies (1 is the Nyquist frequency of the pixels) is added to "
        f"the pixels (Park & Kim 2022). Bars: one standard error of top-1. Without noise: {clean}. The line of a model "
        "that uses high frequencies falls on the right, that of a model that uses low ones on the left."
        + contradiction(shown, "the line of {ours} on the right is not below that of {others}", MORE_HIGH),
        [Panel("", draw)],
        shown,
    )
