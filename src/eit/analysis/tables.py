"""The measurements as tidy tables with one measurement per row, written to csv/NAME.csv."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from eit.analysis.analyzed_model import AnalyzedModel
from eit.analysis.frequency import RHOS, diagonal_frequencies, noise_shares
from eit.analysis.groups import paired_differences, spreads

Row = dict[str, Any]


def columns(item: Any, *names: str, **attributes: str) -> Row:
    """Attributes of `item` as columns: those in `names`, then column=attribute."""
    return {name: getattr(item, name) for name in names} | {n: getattr(item, a) for n, a in attributes.items()}


def model_rows(model: AnalyzedModel) -> Iterator[Row]:
    loaded, analysis = model.loaded, model.analysis
    yield dict(
        group=loaded.group,
        seed=math.nan if loaded.seed is None else loaded.seed,
        source=loaded.source,
        sha256=loaded.sha256,
        images=analysis.images,
        image_size="x".join(map(str, analysis.image_size)),
        grid="x".join(map(str, analysis.grid)),
        pitch=analysis.pitch,
        layers=analysis.depth,
        rho=analysis.rho,
        renormalize=analysis.renormalize,
        logit_spread=analysis.logit_spread,
        missing="; ".join(model.missing),
    )


def class_token_rows(model: AnalyzedModel) -> Iterator[Row]:
    for token in model.analysis.class_token:
        place = dict(layer=token.layer, where=token.where, part=token.part, channels=token.channels)
        yield place | dict(norm=token.norm, image_share=token.share)


def frequency_rows(model: AnalyzedModel) -> Iterator[Row]:
    for f in model.analysis.frequency:
        place = dict(layer=f.layer, where=f.where, grid="x".join(map(str, f.grid)), channels=f.channels)
        shares = columns(f, "share", "share_se", "share_with_dc", "share_with_dc_se")
        yield place | shares | columns(f, "noise_share", "noise_share_with_dc")


def amplitude_rows(model: AnalyzedModel) -> Iterator[Row]:
    for f in model.analysis.frequency:
        for frequency, value in zip(diagonal_frequencies(f.grid), f.log_amplitude, strict=True):
            yield dict(layer=f.layer, where=f.where, frequency=frequency, relative_log_amplitude=value)


def spectrum_rows(model: AnalyzedModel) -> Iterator[Row]:
    for f in model.analysis.frequency:
        for low, high, share, noise in f.radial():
            ring = dict(frequency_from=low, frequency_to=high)
            yield dict(layer=f.layer, where=f.where) | ring | dict(share=share, noise_share=noise)


def sweep_rows(model: AnalyzedModel) -> Iterator[Row]:
    for f in model.analysis.frequency:
        for rho, share, with_dc in zip(RHOS, f.sweep, f.sweep_with_dc, strict=True):
            noise, noise_with_dc = noise_shares(f.grid, rho)
            place = dict(layer=f.layer, where=f.where, rho=rho)
            yield place | dict(share=share, share_with_dc=with_dc, noise_share=noise, noise_share_with_dc=noise_with_dc)


def transfer_rows(model: AnalyzedModel) -> Iterator[Row]:
    for t in model.analysis.transfer:
        place = dict(layer=t.layer, where=t.where, channels=t.update.channels)
        shares = columns(t.input, input_share="share", input_share_se="share_se")
        shares |= columns(t.update, update_share="share", update_share_se="share_se")
        yield place | shares | dict(gain=t.gain)


def head_rows(model: AnalyzedModel) -> Iterator[Row]:
    for layer in model.analysis.attention:
        for i, distance in enumerate(layer.distance):
            yield dict(
                layer=layer.layer,
                head=i + 1,
                distance_px=distance,
                distance_px_se=layer.distance_se[i],
                relative_distance=distance / layer.uniform,
                class_mass=layer.class_mass[i],
                entropy_nats=layer.entropy[i],
                relative_entropy=layer.relative_entropy[i],
                low_gain=layer.low_gain[i],
                high_gain=layer.high_gain[i],
            )


def diversity_rows(model: AnalyzedModel) -> Iterator[Row]:
    for layer in model.analysis.attention:
        pixels = columns(layer, std_px="std", range_px="range", pair_gap_px="gap", relative_std="relative_std")
        others = columns(layer, uniform_px="uniform", divergence_nats="mean_divergence")
        entropy = dict(relative_entropy=fmean(layer.relative_entropy), near_uniform=layer.near_uniform)
        yield dict(layer=layer.layer, heads=len(layer.distance)) | pixels | others | entropy


def filter_rows(model: AnalyzedModel) -> Iterator[Row]:
    for layer in model.analysis.attention:
        for low, high, gain in layer.radial_gain():
            yield dict(layer=layer.layer, frequency_from=low, frequency_to=high, energy_gain=gain)


def smoothing_rows(model: AnalyzedModel) -> Iterator[Row]:
    for s in model.analysis.smoothing:
        ranks = columns(s, effective_rank="rank", effective_rank_se="rank_se", full_rank="full_rank")
        yield columns(s, "layer", "where", "cosine", "cosine_se") | ranks


def robustness_rows(model: AnalyzedModel) -> Iterator[Row]:
    for band in model.bands or []:
        yield dict(frequency_from=band.low, frequency_to=band.high, top1=band.top1, images=band.images)


def uses_rows(model: AnalyzedModel) -> Iterator[Row]:
    for use in model.filters or []:
        place = dict(layer=use.layer, kept=use.kept, top1=use.top1)
        yield place | dict(cost=use.cost, cost_se=use.standard_error, lost=use.lost, won=use.won, images=use.images)


PER_MODEL: dict[str, Callable[[AnalyzedModel], Iterator[Row]]] = {
    "models": model_rows,
    "class_token": class_token_rows,
    "frequency": frequency_rows,
    "amplitude": amplitude_rows,
    "spectrum": spectrum_rows,
    "sweep": sweep_rows,
    "transfer": transfer_rows,
    "heads": head_rows,
    "diversity": diversity_rows,
    "filter": filter_rows,
    "smoothing": smoothing_rows,
    "robustness": robustness_rows,
    "uses": uses_rows,
}
TABLES = ("models", "images", *list(PER_MODEL)[1:], "groups", "paired")


def tables(models: Sequence[AnalyzedModel], images: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Table -> its rows, without empty tables. `images` are the names of the images."""
    rows: dict[str, list[Row]] = {name: [] for name in TABLES}
    rows["images"] = [dict(image=name) for name in images]
    for name, rows_of in PER_MODEL.items():
        for model in models:
            key = dict(model=model.loaded.label, state=model.loaded.state)
            rows[name] += [key | row for row in rows_of(model)]
    rows["groups"] = [asdict(spread) for spread in spreads(models)]
    rows["paired"] = [
        asdict(pair) | dict(layer="mean" if pair.layer is None else pair.layer)
        for pair in paired_differences(models)[0]
    ]
    return {name: content for name, content in rows.items() if content}
