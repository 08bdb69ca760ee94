"""What was found, as tables and in sentences."""

import itertools
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from eit.analysis.figures import Measured
from eit.analysis.frequency import diagonal_frequencies

TABLES = ("models", "images", "frequency", "amplitude", "spectrum", "heads", "diversity", "robustness")


def tables(measured: Sequence[Measured], images: Sequence[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """The numbers as tidy tables, a row a measurement: what is written as csv/NAME.csv."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    found["images"] = [dict(image=name) for name in images]
    for one in measured:
        subject, analysis = one.subject, one.analysis
        key = dict(model=subject.label, state=subject.state)
        found["models"].append(
            key
            | dict(
                source=subject.source,
                sha256=subject.sha256,
                images=analysis.images,
                image_size="x".join(map(str, analysis.image_size)),
                grid="x".join(map(str, analysis.grid)),
                pitch=analysis.pitch,
                layers=analysis.depth,
                rho=analysis.rho,
                renormalize=analysis.renormalize,
                missing="; ".join(one.missing),
            )
        )
        for f in analysis.frequency:
            place = key | dict(layer=f.layer, where=f.where)
            found["frequency"].append(
                place
                | dict(
                    grid="x".join(map(str, f.grid)),
                    channels=f.channels,
                    share=f.share,
                    share_se=f.share_se,
                    share_with_dc=f.share_with_dc,
                    share_with_dc_se=f.share_with_dc_se,
                    noise_share=f.noise_share,
                    noise_share_with_dc=f.noise_share_with_dc,
                )
            )
            for frequency, value in zip(diagonal_frequencies(f.grid), f.log_amplitude, strict=True):
                found["amplitude"].append(place | dict(frequency=frequency, relative_log_amplitude=value))
            for low, high, share, noise in f.radial():
                found["spectrum"].append(
                    place | dict(frequency_from=low, frequency_to=high, share=share, noise_share=noise)
                )
        for layer in analysis.attention:
            heads = zip(layer.distance, layer.distance_se, layer.class_mass, layer.entropy, strict=True)
            for number, (distance, se, mass, entropy) in enumerate(heads, start=1):
                found["heads"].append(
                    key
                    | dict(
                        layer=layer.layer,
                        head=number,
                        distance_px=distance,
                        distance_px_se=se,
                        relative_distance=distance / layer.uniform,
                        class_mass=mass,
                        entropy_nats=entropy,
                    )
                )
            found["diversity"].append(
                key
                | dict(
                    layer=layer.layer,
                    heads=len(layer.distance),
                    std_px=layer.std,
                    range_px=layer.range,
                    pair_gap_px=layer.gap,
                    relative_std=layer.relative_std,
                    uniform_px=layer.uniform,
                )
            )
        for band in one.bands or []:
            found["robustness"].append(
                key | dict(frequency_from=band.low, frequency_to=band.high, top1=band.top1, images=band.images)
            )
    return {name: rows for name, rows in found.items() if rows}


def summary(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The figures of each model that a table of a few columns has room for."""
    rows = []
    for one in measured:
        analysis, blocks = one.analysis, one.analysis.at("block")
        heads = analysis.attention
        rows.append(
            dict(
                model=one.subject.label,
                state=one.subject.state,
                images=analysis.images,
                grid=list(analysis.grid),
                pitch=analysis.pitch,
                share=[f.share for f in blocks],
                share_with_dc=[f.share_with_dc for f in blocks],
                noise_share=blocks[0].noise_share,
                noise_share_with_dc=blocks[0].noise_share_with_dc,
                diversity_px=[layer.std for layer in heads],
                relative_diversity=[layer.relative_std for layer in heads],
                missing=one.missing,
            )
        )
    return rows


def sentences(measured: Sequence[Measured]) -> list[str]:
    """The paper's two claims in the numbers of this report, a sentence a comparison; none where nothing was trained.

    Each model whose convolution decreases with depth stands against each other trained one, or, where there is none,
    each that convolves. A difference of shares counts where it is more than two standard errors.
    """
    trained = [one for one in measured if one.subject.state == "trained"]
    mixed = [one for one in trained if one.analysis.at("conv")]
    decreasing = [one for one in mixed if _decreases([f.channels for f in one.analysis.at("conv")])]
    lines = []
    for one in decreasing or mixed:
        others = [other for other in trained if other is not one]
        same = [other for other in others if other.analysis.depth == one.analysis.depth]
        for other in same:
            lines += _against(one, other)
        if names := ", ".join(f"{o.name} ({o.analysis.depth})" for o in others if o not in same):
            lines.append(f"Of another depth than {one.name} ({one.analysis.depth} layers), so not compared: {names}.")
    if any(line.startswith("High") for line in lines):
        lines.insert(
            0,
            "More and less: by over two standard errors of both means, as if the images differed; they are the same, "
            "so this is cautious. For diversity no error is known.",
        )
    for one in trained:
        twin = one.twin(measured)
        if twin:
            rise = [
                100 * (a.share - b.share) for a, b in _same_layers(one.analysis.at("block"), twin.analysis.at("block"))
            ]
            text = f"Training moves the share of {one.name} by {min(rise):+.1f} to {max(rise):+.1f} points"
            if one.analysis.attention:
                before, after = (mean_diversity(o) for o in (twin, one))
                text += f", its mean head diversity from {before:.1f} to {after:.1f}% of uniform attention's distance"
            lines.append(text + ".")
    return lines


def _decreases(channels: Sequence[int]) -> bool:
    return all(a > b for a, b in itertools.pairwise(channels))


def _same_layers(these: Iterable[Any], those: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Pairs of what was measured in the same layer of both."""
    by_layer = {found.layer: found for found in those}
    return [(found, by_layer[found.layer]) for found in these if found.layer in by_layer]


def mean_diversity(one: Measured) -> float:
    """Percent of the distance of uniform attention."""
    return 100 * fmean(layer.relative_std for layer in one.analysis.attention)


def _against(one: Measured, other: Measured) -> list[str]:
    a, b = one.analysis, other.analysis
    if a.images < 2:
        return [f"{one.name} and {other.name}: one image has no standard error, so they are not compared."]
    lines = []
    for kind, word in (("share", "share"), ("share_with_dc", "share with DC")):
        pairs = _same_layers(a.at("block"), b.at("block"))
        gaps = [getattr(x, kind) - getattr(y, kind) for x, y in pairs]
        errors = [math.hypot(getattr(x, kind + "_se"), getattr(y, kind + "_se")) for x, y in pairs]
        more = sum(gap > 2 * error for gap, error in zip(gaps, errors, strict=True))
        less = sum(gap < -2 * error for gap, error in zip(gaps, errors, strict=True))
        lines.append(
            f"High frequencies, {word}: {one.name} has more than {other.name} in "
            f"{more} of {len(pairs)} layers and less in {less}."
        )
    if heads := _same_layers(a.attention, b.attention):
        more = sum(x.relative_std > y.relative_std for x, y in heads)
        lines.append(
            f"Head diversity: {one.name} {mean_diversity(one):.2f}, {other.name} {mean_diversity(other):.2f}% of "
            f"uniform attention's distance in the mean; {one.name} is above in {more} of {len(heads)} layers."
        )
    return lines
