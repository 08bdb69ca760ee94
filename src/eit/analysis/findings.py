"""The findings of a comparison: warnings, sentences, and short tables for terminal and page."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from eit.analysis.analyzed_model import AnalyzedModel, claimed_and_others, curves
from eit.analysis.attention import NEAR_UNIFORM
from eit.analysis.class_token import MIN_SHARE
from eit.analysis.groups import MEASURES, paired_differences


def summary(models: Sequence[AnalyzedModel]) -> list[dict[str, Any]]:
    """The main figures of each model, for --json."""
    rows = []
    for model in models:
        analysis, blocks = model.analysis, model.analysis.layers_at("block")
        heads = analysis.attention
        rows.append(
            dict(
                model=model.loaded.label,
                state=model.loaded.state,
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
                divergence=_finite_or_none(layer.mean_divergence for layer in heads),
                class_token_share=_finite_or_none(analysis.class_token_share),
                logit_spread=_finite_or_none([analysis.logit_spread])[0],
                mixer_gain=_finite_or_none(t.gain for t in analysis.transfers("mixer")),
                mlp_gain=_finite_or_none(t.gain for t in analysis.transfers("mlp")),
                cosine=[s.cosine for s in analysis.smoothing],
                effective_rank=[s.rank for s in analysis.smoothing],
                missing=model.missing,
            )
        )
    return rows


def _finite_or_none(values: Iterable[float]) -> list[float | None]:
    """None for values that are not finite, which JSON does not have."""
    return [value if math.isfinite(value) else None for value in values]


def faults(models: Sequence[AnalyzedModel]) -> list[str]:
    """Warnings about models for which other figures mean little.

    Their head reads a class token of which less than `MIN_SHARE` depends on the image, or layers have heads with nearly
    uniform attention.
    """
    lines = []
    for model in curves(models):
        tokens = [run.analysis.class_tokens("block") for run in model.runs if run.analysis.reads_class_token]
        shares = [found[-1].share for found in tokens if found and found[-1].layer == model.analysis.depth]
        if shares and max(shares) < MIN_SHARE:
            lines.append(_class_token_warning(model, fmean(shares)))
    for model in curves(models):
        layers = {a.layer for run in model.runs for a in run.analysis.attention}
        uniform = [n for n in sorted(layers) if all(_is_near_uniform(run, n) for run in model.runs)]
        if uniform:
            numbers = f"layer{'s' * (len(uniform) > 1)} {', '.join(map(str, uniform))}"
            which = "all layers" if len(uniform) == len(layers) > 1 else numbers
            lines.append(
                f"{model.name}: in {which} the attention of all heads has more than {100 * NEAR_UNIFORM:g}% of uniform "
                "entropy. Head diversity is not testable there."
            )
    return lines


def _is_near_uniform(model: AnalyzedModel, layer: int) -> bool:
    return any(a.layer == layer and a.near_uniform for a in model.analysis.attention)


def _class_token_warning(model: AnalyzedModel, share: float) -> str:
    text = (
        f"{model.name}: the class token hardly depends on the image. After the last layer ({model.analysis.depth}), "
        f"{percent(share)} of its energy differs between images. Its norm there is "
        f"{model.mean(lambda a: a.class_tokens('block')[-1].norm):.3g}."
    )
    conv = model.analysis.class_tokens("mixer", "conv")
    largest = max(conv, key=lambda token: token.norm, default=None)
    if largest is not None and largest.norm > 0 and largest.share < MIN_SHARE:
        text += (
            " Its convolved channels receive nearly the same update for every image. In layer "
            f"{largest.layer} this update has the norm {largest.norm:.3g}"
        )
        same = (t for t in model.analysis.class_tokens("mixer", "attention") if t.layer == largest.layer)
        attention = next(same, None)
        text += f", that of attention {attention.norm:.2g}" if attention else ""
        text += ". See the argument cls_conv."
    spread = model.mean(lambda a: a.logit_spread)
    return text if math.isnan(spread) else f"{text} The logits differ between images by {spread:.1e}."


def percent(share: float) -> str:
    """A share 0..1 as percent; small values have two significant digits."""
    value = 100 * share
    return f"{value:.1f}%" if value >= 1 or not value else f"{value:.2g}%" if value >= 1e-4 else f"{value:.1e}%"


def sentences(models: Sequence[AnalyzedModel]) -> list[str]:
    """The paper's two claims tested with these measurements, one sentence per comparison; none without trained models.

    The models that the claims are about (`claimed_and_others`) are compared with each other trained model, each pair
    once. A difference of shares counts if it is larger than two standard errors.
    """
    trained = [model for model in models if model.loaded.state == "trained" and not model.loaded.group]
    claimed, _ = claimed_and_others(trained)
    lines = []
    for number, model in enumerate(claimed):
        others = [other for other in trained if other not in claimed[: number + 1]]  # each pair is told once
        same = [other for other in others if other.analysis.depth == model.analysis.depth]
        for other in same:
            lines += _compare(model, other)
        if names := ", ".join(f"{o.name} ({o.analysis.depth})" for o in others if o not in same):
            lines.append(
                f"{model.name} ({model.analysis.depth} layers) is not compared with models of another depth: {names}."
            )
    if any(line.startswith("High") for line in lines):
        lines.insert(
            0,
            '"More" and "less" mean a difference of over two standard errors of both means, as if the models had seen '
            "different images. They saw the same images, so this is cautious. Diversity has no standard error.",
        )
    for model in trained:
        initial = model.at_initial_values(models)
        if initial:
            rise = [
                100 * (a.share - b.share)
                for a, b in _same_layers(model.analysis.layers_at("block"), initial.analysis.layers_at("block"))
            ]
            text = f"Training changes the share of {model.name} by {min(rise):+.1f} to {max(rise):+.1f} points"
            if model.analysis.attention:
                before, after = (mean_diversity(o) for o in (initial, model))
                text += f", its mean head diversity from {before:.1f} to {after:.1f}% of uniform attention's distance"
            lines.append(text + ".")
    return lines + _compare_groups(models)


def _compare_groups(measured: Sequence[AnalyzedModel]) -> list[str]:
    """Differences of groups of runs, in the mean of the layers."""
    differences, lines = paired_differences(measured)
    words = dict(share="share", share_with_dc="share with DC", relative_std="head diversity")
    words |= dict(class_token_share="class token's share", relative_entropy="entropy")
    assert words.keys() <= MEASURES.keys()
    for pair in differences:
        if pair.layer is None and pair.measure in words:
            low, high = 100 * pair.low, 100 * pair.high
            clear = "" if pair.is_clear else "; undecided"
            lines.append(
                f"{pair.one} minus {pair.other}, {words[pair.measure]}, mean of the layers: "
                f"{100 * pair.difference:+.2f} points "
                f"(95% interval {low:+.2f} to {high:+.2f}, {pair.seeds} seeds{clear})."
            )
    return lines


def _same_layers(these: Iterable[Any], those: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Pairs of measurements in the same layer of both models."""
    by_layer = {layer.layer: layer for layer in those}
    return [(layer, by_layer[layer.layer]) for layer in these if layer.layer in by_layer]


def mean_diversity(model: AnalyzedModel) -> float:
    """Head diversity in percent of the distance of uniform attention, averaged over layers and a group's runs."""
    return 100 * model.mean(lambda a: fmean(layer.relative_std for layer in a.attention))


def layer_table(models: Sequence[AnalyzedModel]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and rows of a table of frequencies and head diversity, one row per curve: means over layers and runs."""
    head = ("model", "tokens", "share", "with DC", "noise", "diversity", "relative")
    rows = []
    for model in curves(models):
        a = model.analysis
        row = [model.name, f"{a.grid[0]}x{a.grid[1]}, {a.pitch:.3g} px"]
        row.append(percent(model.mean(lambda a: fmean(f.share for f in a.layers_at("block")))))
        row.append(percent(model.mean(lambda a: fmean(f.share_with_dc for f in a.layers_at("block")))))
        row.append(percent(a.layers_at("block")[0].noise_share))
        if a.attention:
            diversity = model.mean(lambda a: fmean(layer.std for layer in a.attention))
            rows.append([*row, f"{diversity:.2f} px", f"{mean_diversity(model):.2f}%"])
        else:
            rows.append([*row, "-", "-"])
    return head, rows


LAYER_TABLE = (
    "Means over the layers. tokens: grid, and pixels per token; share: energy of high frequencies, without and with "
    "DC; noise: the share of white noise on this grid; diversity: standard deviation of the heads' attention "
    "distances; relative: divided by the distance of uniform attention."
)


def token_table(models: Sequence[AnalyzedModel]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and rows of a table of class token, attention, transfer and oversmoothing, one row per curve."""
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
    "deviation over images; entropy of attention, relative to uniform attention (!: above 95% in all heads, so "
    "diversity is not testable); divergence of two heads, relative to log 2; gain: high-frequency share of the update "
    "by mixer or MLP, divided by that of its input; cosine and effective rank of the tokens after the last layer."
)


def _compare(model: AnalyzedModel, other: AnalyzedModel) -> list[str]:
    a, b = model.analysis, other.analysis
    if a.images < 2:
        return [f"{model.name} and {other.name} are not compared: one image has no standard error."]
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
            f"Head diversity, in percent of uniform attention's distance: {model.name} {mean_diversity(model):.2f}%, "
            f"{other.name} {mean_diversity(other):.2f}% in the mean; {model.name} is above in {more} of {len(heads)} "
            "layers."
        )
    return lines
