"""What was found, in sentences and in short tables for the terminal."""

import itertools
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from eit.analysis.analyzed_model import AnalyzedModel, curves
from eit.analysis.attention import NEAR_UNIFORM
from eit.analysis.class_token import HARDLY
from eit.analysis.groups import MEASURES, pairs


def summary(models: Sequence[AnalyzedModel]) -> list[dict[str, Any]]:
    """The figures of each model that a table of a few columns has room for."""
    rows = []
    for model in models:
        analysis, blocks = model.analysis, model.analysis.layers_at("block")
        heads = analysis.attention
        rows.append(
            dict(
                model=model.subject.label,
                state=model.subject.state,
                images=analysis.images,
                grid=list(analysis.grid),
                pitch=analysis.pitch,
                share=[f.share for f in blocks],
                share_with_dc=[f.share_with_dc for f in blocks],
                noise_share=blocks[0].noise_share,
                noise_share_with_dc=blocks[0].noise_share_with_dc,
                diversity_px=[layer.std for layer in heads],
                relative_diversity=[layer.relative_std for layer in heads],
                relative_entropy=analysis.relative_entropy,
                divergence=_known(layer.mean_divergence for layer in heads),
                class_token_share=_known(analysis.class_token_share),
                logit_spread=_known([analysis.logit_spread])[0],
                mixer_gain=_known(t.gain for t in analysis.transfers("mixer")),
                mlp_gain=_known(t.gain for t in analysis.transfers("mlp")),
                cosine=[s.cosine for s in analysis.smoothing],
                effective_rank=[s.rank for s in analysis.smoothing],
                missing=model.missing,
            )
        )
    return rows


def _known(values: Iterable[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [value if math.isfinite(value) else None for value in values]


def faults(models: Sequence[AnalyzedModel]) -> list[str]:
    """What makes a model, or a comparison, worth little, in plain words; none where all is well.

    A class token after the last layer of which less than `HARDLY` depends on the image, where the head reads it; layers
    whose heads look almost everywhere alike.
    """
    lines = []
    for model in curves(models):
        tokens = [run.analysis.class_tokens("block") for run in model.runs if run.analysis.reads_class_token]
        shares = [found[-1].share for found in tokens if found and found[-1].layer == model.analysis.depth]
        if shares and max(shares) < HARDLY:
            lines.append(_hardly(model, fmean(shares)))
    for model in curves(models):
        layers = {a.layer for run in model.runs for a in run.analysis.attention}
        alike = [n for n in sorted(layers) if all(_is_near_uniform(run, n) for run in model.runs)]
        if alike:
            which = "all layers" if len(alike) == len(layers) > 1 else f"layer{'s' * (len(alike) > 1)} {_listed(alike)}"
            lines.append(
                f"{model.name}: in {which} each head has more than {100 * NEAR_UNIFORM:g}% of uniform entropy. "
                "Near uniform: diversity is not testable."
            )
    return lines


def _is_near_uniform(model: AnalyzedModel, layer: int) -> bool:
    return any(a.layer == layer and a.near_uniform for a in model.analysis.attention)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _hardly(model: AnalyzedModel, share: float) -> str:
    text = (
        f"{model.name}: the class token hardly depends on the image. {percent(share)} of its energy differs between "
        f"images after layer {model.analysis.depth}, the last; its norm there is "
        f"{model.mean(lambda a: a.class_tokens('block')[-1].norm):.3g}."
    )
    conv = model.analysis.class_tokens("mixer", "conv")
    written = max(conv, key=lambda token: token.norm, default=None)
    if written is not None and written.norm > 0 and written.share < HARDLY:
        text += (
            f" Its convolved channels receive nearly the same for every image, in layer {written.layer} an update of "
            f"norm {written.norm:.3g}"
        )
        same = (t for t in model.analysis.class_tokens("mixer", "attention") if t.layer == written.layer)
        attention = next(same, None)
        text += f", where attention adds one of norm {attention.norm:.2g}" if attention else ""
        text += ": see the argument cls_conv."
    spread = model.mean(lambda a: a.logit_spread)
    return text if math.isnan(spread) else f"{text} Its logits differ between images by {spread:.1e}."


def percent(share: float) -> str:
    """0..1 as percent, with two digits where it is small."""
    value = 100 * share
    return f"{value:.1f}%" if value >= 1 or not value else f"{value:.2g}%" if value >= 1e-4 else f"{value:.1e}%"


def sentences(models: Sequence[AnalyzedModel]) -> list[str]:
    """The paper's two claims in the numbers of this report, a sentence a comparison; none where nothing was trained.

    Each model whose convolution decreases with depth stands against each other trained one, or, where there is none,
    each that convolves. A difference of shares counts where it is more than two standard errors.
    """
    trained = [model for model in models if model.subject.state == "trained" and not model.subject.group]
    mixed = [model for model in trained if model.analysis.layers_at("conv")]
    decreasing = [model for model in mixed if _decreases([f.channels for f in model.analysis.layers_at("conv")])]
    lines = []
    for model in decreasing or mixed:
        others = [other for other in trained if other is not model]
        same = [other for other in others if other.analysis.depth == model.analysis.depth]
        for other in same:
            lines += _against(model, other)
        if names := ", ".join(f"{o.name} ({o.analysis.depth})" for o in others if o not in same):
            lines.append(
                f"Of another depth than {model.name} ({model.analysis.depth} layers), so not compared: {names}."
            )
    if any(line.startswith("High") for line in lines):
        lines.insert(
            0,
            "More and less: by over two standard errors of both means, as if the images differed; they are the same, "
            "so this is cautious. For diversity no error is known.",
        )
    for model in trained:
        twin = model.twin(models)
        if twin:
            rise = [
                100 * (a.share - b.share)
                for a, b in _same_layers(model.analysis.layers_at("block"), twin.analysis.layers_at("block"))
            ]
            text = f"Training moves the share of {model.name} by {min(rise):+.1f} to {max(rise):+.1f} points"
            if model.analysis.attention:
                before, after = (mean_diversity(o) for o in (twin, model))
                text += f", its mean head diversity from {before:.1f} to {after:.1f}% of uniform attention's distance"
            lines.append(text + ".")
    return lines + _paired(models)


def _paired(measured: Sequence[AnalyzedModel]) -> list[str]:
    """Groups of runs against each other, in the mean of the layers."""
    differences, lines = pairs(measured)
    words = dict(share="share", share_with_dc="share with DC", relative_std="head diversity")
    words |= dict(class_token_share="class token's share", relative_entropy="entropy")
    assert words.keys() <= MEASURES.keys()
    for pair in differences:
        if pair.layer is None and pair.measure in words:
            low, high = 100 * pair.low, 100 * pair.high
            clear = "" if pair.is_clear else "; undecided"
            lines.append(
                f"{pair.one} less {pair.other}, {words[pair.measure]}, mean of the layers: "
                f"{100 * pair.difference:+.2f} points "
                f"(95% interval {low:+.2f} to {high:+.2f}, {pair.seeds} seeds{clear})."
            )
    return lines


def _decreases(channels: Sequence[int]) -> bool:
    return all(a > b for a, b in itertools.pairwise(channels))


def _same_layers(these: Iterable[Any], those: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Pairs of what was measured in the same layer of both."""
    by_layer = {layer.layer: layer for layer in those}
    return [(layer, by_layer[layer.layer]) for layer in these if layer.layer in by_layer]


def mean_diversity(model: AnalyzedModel) -> float:
    """Percent of the distance of uniform attention; of a group its runs' mean."""
    return 100 * model.mean(lambda a: fmean(layer.relative_std for layer in a.attention))


def layer_table(models: Sequence[AnalyzedModel]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and rows of a table of frequencies and head diversity, one row per model: means over its layers."""
    head = ("model", "tokens", "share", "with DC", "noise", "diversity", "relative")
    rows = []
    for model in models:
        layers, heads = model.analysis.layers_at("block"), model.analysis.attention
        rows.append(
            [
                model.name,
                "x".join(map(str, model.analysis.grid)),
                f"{100 * fmean(layer.share for layer in layers):.1f}%",
                f"{100 * fmean(layer.share_with_dc for layer in layers):.1f}%",
                f"{100 * layers[0].noise_share:.1f}%",
                f"{fmean(layer.std for layer in heads):.2f} px" if heads else "-",
                f"{mean_diversity(model):.1f}%" if heads else "-",
            ]
        )
    return head, rows


LAYER_TABLE = (
    "Means over the layers. share: energy of high frequencies; noise: that of white noise on as many tokens.\n"
    "diversity: standard deviation of the heads' attention distances; relative: to uniform attention."
)


def token_table(models: Sequence[AnalyzedModel]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and rows of a table of what else matters, a row a curve: means of the layers, or after the last one."""
    head = ("model", "class token", "logit spread", "entropy", "divergence", "mixer gain", "MLP gain", "cosine", "rank")
    rows = []
    for model in curves(models):
        a = model.analysis
        cells = [
            model.mean(lambda a: a.class_token_share[-1]) if a.class_token_share else None,
            model.mean(lambda a: a.logit_spread),
            model.mean(lambda a: fmean(a.relative_entropy)) if a.attention else None,
            model.mean(lambda a: fmean(h.mean_divergence for h in a.attention) / math.log(2)) if a.attention else None,
            model.mean(lambda a: fmean(t.gain for t in a.transfers("mixer"))) if a.transfers("mixer") else None,
            model.mean(lambda a: fmean(t.gain for t in a.transfers("mlp"))) if a.transfers("mlp") else None,
            model.mean(lambda a: a.smoothing[-1].cosine) if a.smoothing else None,
            model.mean(lambda a: a.smoothing[-1].rank / a.smoothing[-1].full_rank) if a.smoothing else None,
        ]
        texts = (percent, "{:.2g}".format, percent, percent, "{:.2f}".format, "{:.2f}".format, "{:.2f}".format, percent)
        known = [v is not None and not math.isnan(v) for v in cells]
        row = [text(v or 0.0) if there else "-" for text, v, there in zip(texts, cells, known, strict=True)]
        row[2] += (
            " !" if a.attention and all(h.near_uniform for run in model.runs for h in run.analysis.attention) else ""
        )
        rows.append([model.name, *row])
    return head, rows


TOKEN_TABLE = (
    "class token: share of its energy that depends on the image, after the last layer; logit spread: standard "
    "deviation over images. entropy of attention, of uniform (! above 95% in all heads: diversity is not testable); "
    "divergence of heads, of log 2. gain: high-frequency share of what mixers and MLPs add, by that of what they take. "
    "cosine and effective rank of the tokens after the last layer."
)


def _against(model: AnalyzedModel, other: AnalyzedModel) -> list[str]:
    a, b = model.analysis, other.analysis
    if a.images < 2:
        return [f"{model.name} and {other.name}: one image has no standard error, so they are not compared."]
    lines = []
    for kind, word in (("share", "share"), ("share_with_dc", "share with DC")):
        pairs = _same_layers(a.layers_at("block"), b.layers_at("block"))
        gaps = [getattr(x, kind) - getattr(y, kind) for x, y in pairs]
        errors = [math.hypot(getattr(x, kind + "_se"), getattr(y, kind + "_se")) for x, y in pairs]
        more = sum(gap > 2 * error for gap, error in zip(gaps, errors, strict=True))
        less = sum(gap < -2 * error for gap, error in zip(gaps, errors, strict=True))
        lines.append(
            f"High frequencies, {word}: {model.name} has more than {other.name} in "
            f"{more} of {len(pairs)} layers and less in {less}."
        )
    if heads := _same_layers(a.attention, b.attention):
        more = sum(x.relative_std > y.relative_std for x, y in heads)
        lines.append(
            f"Head diversity: {model.name} {mean_diversity(model):.2f}, {other.name} {mean_diversity(other):.2f}% of "
            f"uniform attention's distance in the mean; {model.name} is above in {more} of {len(heads)} layers."
        )
    return lines
