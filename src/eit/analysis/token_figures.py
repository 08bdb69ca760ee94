"""Figures of tokens: how much of the class token depends on the image, and how alike those of the grid are."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from eit.analysis.analyzed_model import AnalyzedModel
from eit.analysis.class_token import HARDLY, ClassToken
from eit.analysis.panels import Figure, Panel, Points, curve, depth_axis, from_zero, ink, logarithmic
from eit.analysis.smoothing import Smoothing

FLOOR = 1e-12  # of shares on a logarithmic axis: what is less lies there


def _is_known(tokens: Sequence[ClassToken]) -> bool:
    return any(math.isfinite(token.share) for token in tokens)


def class_token(models: Sequence[AnalyzedModel]) -> Figure | None:
    shown = [model for model in models if model.analysis.class_token]
    if not shown or all(model.analysis.images < 2 for model in shown):
        return None

    def panel(
        title: str, where: str, part: str, norm: bool, ones: Sequence[AnalyzedModel], limit: bool = False
    ) -> Panel:
        def points(run: AnalyzedModel) -> Points:
            tokens = run.analysis.class_tokens(where, part)
            shares = [t.share if math.isnan(t.share) else max(t.share, FLOOR) for t in tokens]
            return [(t.layer, t.norm if norm else 100 * share) for t, share in zip(tokens, shares, strict=True)]

        def draw(axis: Any) -> None:
            for model in ones:
                curve(axis, model, points)
            if norm or min(y for model in ones for run in model.runs for _, y in points(run) if y == y) < 1:
                logarithmic(axis)
            else:
                from_zero(axis)
            if limit:
                axis.axhline(100 * HARDLY, linestyle=(0, (1, 4)), linewidth=1.2, color=ink(), zorder=1)
            depth_axis(axis, ones)
            axis.set_ylabel("norm" if norm else "image-dependent share (%)")

        return Panel(title, draw)

    having = [model for model in shown if model.analysis.class_tokens("mixer", "attention")]
    convolving = [model for model in having if _is_known(model.analysis.class_tokens("mixer", "conv"))]
    found = [
        panel("token after the layer", "block", "all", False, shown, limit=True),
        panel("token after the layer: norm", "block", "all", True, shown),
    ]
    if having:
        found.append(panel("what attention adds to it", "mixer", "attention", False, having))
    if convolving:
        found.append(panel("what its convolved channels receive", "mixer", "conv", False, convolving))
    spread = ", ".join(f"{model.name} {model.mean(lambda a: a.logit_spread):.1e}" for model in shown)
    return Figure(
        "class_token",
        "How much of the class token depends on the image",
        "Share of the class token's energy that differs between images (1 - |mean|² / mean of |x|²), its norm, and the "
        "same share of what the mixer adds to it, attending and convolved channels apart. Logarithmic where values are "
        f"small; a share of 0 is drawn at {100 * FLOOR:.0e}%, none where nothing is added. Widely dotted: "
        f"{100 * HARDLY:g}%. A classifier that reads the class token knows of the image what depends on it: a model "
        "whose first panel ends below the dotted line can hardly tell images apart, whatever its layers hold, and "
        "would count for nothing in a comparison. Dashed: initial values. Standard deviation of the logits over "
        f"images: {spread}.",
        found,
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
        "point the same way. Right: effective rank of an image's tokens (exp of the entropy of their singular values), "
        "by the largest possible, min(h w, C). Dashed: initial values. Attention alone drives tokens together with "
        "depth: against the view that convolution prevents it would count a line of EIT that rises on the left, or "
        "falls on the right, as ViT's does.",
        [
            panel("likeness of tokens", "mean cosine", lambda s: s.cosine),
            panel("effective rank", "effective rank (% of full)", lambda s: 100 * s.rank / s.full_rank),
        ],
        shown,
    )
