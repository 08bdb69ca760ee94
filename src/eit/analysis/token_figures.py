"""Figures of tokens: how much of the class token depends on the image, and the similarity of the grid's tokens."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from eit.analysis.analyzed_model import AnalyzedModel
from eit.analysis.class_token import MIN_SHARE, ClassToken
from eit.analysis.panels import Figure, Panel, Points, contradiction, curve, depth_axis, from_zero, logarithmic
from eit.analysis.smoothing import Smoothing
from eit.pages.render import ink

FLOOR = 1e-12  # smaller shares are drawn here on a logarithmic axis


def _is_known(tokens: Sequence[ClassToken]) -> bool:
    return any(math.isfinite(token.share) for token in tokens)


def class_token(models: Sequence[AnalyzedModel]) -> Figure | None:
    shown = [model for model in models if model.analysis.class_token]
    if not shown or all(model.analysis.images < 2 for model in shown):
        return None

    def panel(
        title: str, where: str, part: str, norm: bool, models_shown: Sequence[AnalyzedModel], limit: bool = False
    ) -> Panel:
        def points(run: AnalyzedModel) -> Points:
            tokens = run.analysis.class_tokens(where, part)
            shares = [t.share if math.isnan(t.share) else max(t.share, FLOOR) for t in tokens]
            return [(t.layer, t.norm if norm else 100 * share) for t, share in zip(tokens, shares, strict=True)]

        def draw(axis: Any) -> None:
            for model in models_shown:
                curve(axis, model, points)
            if norm or min(y for model in models_shown for run in model.runs for _, y in points(run) if y == y) < 1:
                logarithmic(axis)
            else:
                from_zero(axis)
            if limit:
                axis.axhline(100 * MIN_SHARE, linestyle=(0, (1, 4)), linewidth=1.2, color=ink(), zorder=1)
            depth_axis(axis, models_shown)
            axis.set_ylabel("norm" if norm else "image-dependent share (%)")

        return Panel(title, draw)

    having = [model for model in shown if model.analysis.class_tokens("mixer", "attention")]
    convolving = [model for model in having if _is_known(model.analysis.class_tokens("mixer", "conv"))]
    panels = [
        panel("token after the layer", "block", "all", False, shown, limit=True),
        panel("token after the layer: norm", "block", "all", True, shown),
    ]
    if having:
        panels.append(panel("update by attention", "mixer", "attention", False, having))
    if convolving:
        panels.append(panel("update of the convolved channels", "mixer", "conv", False, convolving))
    spread = ", ".join(f"{model.name} {model.mean(lambda a: a.logit_spread):.1e}" for model in shown)
    return Figure(
        "class_token",
        "How much of the class token depends on the image",
        "Share of the class token's energy that differs between images (1 - |mean|² / mean of |x|²), its norm, and "
        "the same share for the mixer's update, separately for attention and convolved channels. Axes are logarithmic "
        f"if values are small; a share of 0 is drawn at {100 * FLOOR:.0e}%, and no point if there is no update. "
        f"Widely dotted: {100 * MIN_SHARE:g}%. A classifier that reads the class token knows only the part that "
        "depends on the image. If a model ends below the dotted line in the first panel, it can hardly distinguish "
        "images, whatever its layers hold, and should not be used in a comparison. Dashed: initial values. Standard "
        f"deviation of the logits over images: {spread}.",
        panels,
        list(shown),
    )


def smoothing(models: Sequence[AnalyzedModel]) -> Figure | None:
    shown = [model for model in models if model.analysis.smoothing]
    if not shown:
        return None

    def panel(title: str, label: str, value: Callable[[Smoothing], float]) -> Panel:
        def draw(axis: Any) -> None:
            for model in shown:
                curve(axis, model, lambda run: [(s.layer, value(s)) for s in run.analysis.smoothing])
            depth_axis(axis, shown, first=0)
            axis.set_ylabel(label)
            from_zero(axis)

        return Panel(title, draw)

    return Figure(
        "smoothing",
        "Oversmoothing",
        "Left: mean cosine of two different tokens of an image, after the stem (0) and each layer; 1 means that all "
        "have the same direction. Right: effective rank of an image's tokens (exp of the entropy of their singular "
        "values), relative to the largest possible, min(h w, C). Dashed: initial values. Attention alone makes tokens "
        "more similar with depth."
        + contradiction(
            shown,
            "the line of {ours} rises on the left, or falls on the right, as that of {others} does",
            "The view that convolution prevents this",
        ),
        [
            panel("similarity of tokens", "mean cosine", lambda s: s.cosine),
            panel("effective rank", "effective rank (% of full)", lambda s: 100 * s.rank / s.full_rank),
        ],
        shown,
    )
