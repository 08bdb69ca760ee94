"""Figures of attention: distances, head diversity, attention as a filter, class-token mass."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from eit.analysis.analyzed_model import AnalyzedModel
from eit.analysis.attention import NEAR_UNIFORM, Attention
from eit.analysis.panels import Figure, Panel, Points, contradiction, curve, depth_axis, from_zero, logarithmic
from eit.pages.render import ink


def distances(models: Sequence[AnalyzedModel]) -> Figure | None:
    shown = [model for model in models if model.analysis.attention and not model.is_initial]
    if not shown:
        return None
    same_size = len({model.analysis.image_size for model in shown}) == 1

    def span(group: Sequence[AnalyzedModel]) -> tuple[float, float]:
        """Limits of the y axis, in pixels, for all dots and dotted lines."""
        layers = [layer for model in group for run in model.runs for layer in run.analysis.attention]
        values = [value for layer in layers for value in (*layer.distance, layer.uniform)]
        margin = 0.08 * (max(values) - min(values))
        return min(values) - margin, max(values) + margin

    def panel(model: AnalyzedModel) -> Panel:
        initial = model.at_initial_values(models)

        def draw(axis: Any) -> None:
            for layer in model.analysis.attention:
                axis.plot(
                    [layer.layer - 0.32, layer.layer + 0.32], [layer.uniform] * 2, ":", color=ink(), linewidth=1.2
                )
            for source in (initial, model) if initial else (model,):
                for layer in (layer for run in source.runs for layer in run.analysis.attention):
                    x = [layer.layer + (-0.16 if source.is_initial else 0.1)] * len(layer.distance)
                    face = "none" if source.is_initial else model.colour
                    axis.scatter(
                        x, layer.distance, s=16, facecolors=face, edgecolors=model.colour, linewidths=0.8, alpha=0.85
                    )
            depth_axis(axis, [model])
            axis.set_ylabel("mean attention distance (px)")
            axis.set_ylim(*span([o for o in models if o.analysis.attention] if same_size else [model]))

        return Panel(model.name, draw)

    return Figure(
        "distances",
        "Attention distance of each head",
        "Mean attention distance in pixels (Dosovitskiy et al. 2021, figure 11), one dot per head and run. Filled: "
        "the given weights; hollow: initial values; dotted line: uniform attention. The axis does not begin at 0. The "
        "paper claims that decreasing convolution makes heads more diverse, so that dots spread more within a layer."
        + contradiction(models, "the dots of {ours} spread as little as those of {others}"),
        [panel(model) for model in shown],
        [],
    )


def head_diversity(models: Sequence[AnalyzedModel]) -> Figure | None:
    """Head diversity, and the entropy that decides whether it can be tested."""
    shown = [model for model in models if model.analysis.attention]
    if not shown:
        return None
    marked = any(layer.near_uniform for model in shown for run in model.runs for layer in run.analysis.attention)

    def panel(title: str, label: str, value: Callable[[Attention], float], limit: float | None = None) -> Panel:
        def points(run: AnalyzedModel) -> Points:
            return [(layer.layer, value(layer)) for layer in run.analysis.attention]

        def crosses(run: AnalyzedModel) -> Points:
            return [(x, y) for (x, y), a in zip(points(run), run.analysis.attention, strict=True) if a.near_uniform]

        def draw(axis: Any) -> None:
            for model in shown:
                curve(axis, model, points)
                for x, y in [] if model.members else crosses(model):
                    axis.plot(x, y, "x", color=ink(), markersize=6, markeredgewidth=1.2, zorder=5)
            depth_axis(axis, shown)
            axis.set_ylabel(label)
            if limit is None:
                from_zero(axis)
            else:
                axis.axhline(limit, linestyle=(0, (1, 4)), linewidth=1.2, color=ink(), zorder=1)

        return Panel(title, draw)

    crossed = (
        f" Crosses: layers in which all heads are above {100 * NEAR_UNIFORM:g}% of uniform entropy (widely dotted "
        "line). Their attention is nearly uniform, so their diversity is not testable."
    )
    return Figure(
        "diversity",
        "Head diversity over depth",
        "Top: standard deviation of the mean attention distance over a layer's heads, in pixels and relative to the "
        "distance of uniform attention, which allows comparing grids of different pitch. Bottom left: Jensen-Shannon "
        "divergence of two heads' attention, query by query, averaged over pairs, relative to its maximum log 2; it "
        "also separates heads with equal distances and different directions. Bottom right: entropy of a token's "
        "attention over the grid relative to its maximum log(h w), averaged over heads; its axis does not begin at "
        f"0.{crossed if marked else ''} Dashed: initial values, about which the paper claims nothing."
        + contradiction(shown, "the line of {ours} is not above that of {others} after training", "The paper's claim"),
        [
            panel("diversity in pixels", "diversity (px)", lambda layer: layer.std),
            panel("relative to uniform attention", "diversity (% of uniform)", lambda layer: 100 * layer.relative_std),
            panel(
                "divergence of heads",
                "divergence (% of log 2)",
                lambda layer: 100 * layer.mean_divergence / math.log(2) if layer.divergence else 0.0,
            ),
            panel(
                "entropy",
                "entropy (% of uniform)",
                lambda layer: 100 * fmean(layer.relative_entropy),
                limit=100 * NEAR_UNIFORM,
            ),
        ],
        shown,
    )


def attention_filter(models: Sequence[AnalyzedModel]) -> Figure | None:
    """Attention as a filter of the frequencies of the grid."""
    shown = [model for model in models if model.analysis.attention]
    if not shown or not all(math.isfinite(v) for model in shown for a in model.analysis.attention for v in _gains(a)):
        return None

    def panel(title: str, label: str, value: Callable[[tuple[float, float]], float], log: bool) -> Panel:
        def points(run: AnalyzedModel) -> Points:
            return [(layer.layer, value(_gains(layer))) for layer in run.analysis.attention]

        def draw(axis: Any) -> None:
            for model in shown:
                curve(axis, model, points)
            if log:
                logarithmic(axis)
            else:
                axis.axhline(1, linewidth=0.8, color=ink(), alpha=0.5, zorder=1)
            depth_axis(axis, shown)
            axis.set_ylabel(label)

        return Panel(title, draw)

    rho = shown[0].analysis.rho
    return Figure(
        "filter",
        "Attention as a filter",
        "The factor by which the attention matrix A of the grid's tokens changes the energy of Fourier modes: |A m|² "
        "for modes m of unit energy (columns of F A F⁻¹), averaged over modes, heads and images. Low: 0 < f <= "
        f"{rho:g}; high: f > {rho:g}. The identity has the gain 1 at all frequencies, uniform attention 0; frequency "
        "0 always has the gain 1. Right: high divided by low; below 1, attention is a low-pass filter. Dashed: "
        "initial values. The view of attention as a low-pass filter is contradicted if lines on the right are at 1 "
        "while the others are not near 0.",
        [
            panel("low frequencies", "energy gain", lambda gains: gains[0], log=True),
            panel("high frequencies", "energy gain", lambda gains: gains[1], log=True),
            panel("high / low", "ratio", lambda gains: gains[1] / gains[0] if gains[0] else 0.0, log=False),
        ],
        shown,
    )


def _gains(layer: Attention) -> tuple[float, float]:
    """Gain at low and at high frequencies, averaged over heads."""
    return fmean(layer.low_gain), fmean(layer.high_gain)


def class_mass(models: Sequence[AnalyzedModel]) -> Figure | None:
    shown = [model for model in models if model.analysis.attention]
    if not shown:
        return None

    def draw(axis: Any) -> None:
        for model in shown:
            curve(axis, model, lambda run: [(a.layer, 100 * fmean(a.class_mass)) for a in run.analysis.attention])
        depth_axis(axis, shown)
        axis.set_ylabel("attention to class token (%)")
        from_zero(axis)

    counted = "excluded from" if shown[0].analysis.renormalize else "counted as 0 in"
    return Figure(
        "attention",
        "Class-token mass",
        f"Share of the grid tokens' attention that goes to the class token and registers, averaged over heads. It is "
        f"{counted} the attention distances; if it is large, the distances describe little of the attention. Dashed: "
        "initial values. The paper claims nothing about it. If it differs much between models, their distances should "
        "not be compared.",
        [Panel("", draw)],
        shown,
    )
