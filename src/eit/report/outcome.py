"""The part of a page that an evaluation gives: confusions, weakest classes, mistakes as pictures, calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from eit.analysis.image_maps import compute_maps
from eit.console import say
from eit.data.images import Images, Preprocessing, denormalise
from eit.errors import UserError, first_line, is_out_of_memory, shorten
from eit.inference.evaluate import BINS, Metrics, Mistake, evaluation_mode
from eit.pages.render import Drawing, draw_inline, heat_map, heat_over, ink, picture

MISTAKES = 24
MATRIX = 20  # classes of a matrix with counts; more are a picture
LARGEST_PICTURE = 500  # classes
PAIRS = WEAKEST = 10
LONGEST_NAME = 60


class Cell(NamedTuple):
    """A cell of the confusion matrix: images, and their share of the row in percent."""

    images: int
    share: float
    is_right: bool


class Tile(NamedTuple):
    """A mistake: the model's input, and the same with the attention of the class token over it."""

    picture: str
    attention: str | None
    truth: str
    prediction: str
    confidence: str
    name: str

    @property
    def alt(self) -> str:
        return f"{self.name or 'image'}: {self.truth}, predicted as {self.prediction}"


@dataclass
class Outcome:
    """What the template `report/outcome.html.j2` shows."""

    metrics: Metrics
    classes: list[str]
    matrix: list[list[Cell]] | None
    matrix_picture: str | None
    pairs: list[list[str]]
    weakest: list[list[str]]
    calibration: list[Drawing]
    calibration_rows: list[list[str]]
    tiles: list[Tile]
    attention_note: str

    @property
    def wrong(self) -> int:
        return self.metrics.images - self.metrics.correct1


def describe(model: Any, metrics: Metrics, images: Any, view: Preprocessing) -> Outcome:
    """The tables and pictures of an evaluation that kept `MISTAKES` mistakes.

    Args:
        model: the model that was evaluated; if it is a torch module, its attention is looked at.
        metrics: of `evaluate`.
        images: the images that were evaluated, for the names of files; a stream has none.
        view: the model's preprocessing.
    """
    names = [shorten(name, LONGEST_NAME) for name in metrics.per_class]
    attention, note = _attention(model, metrics.mistakes)
    small = len(names) <= MATRIX
    return Outcome(
        metrics=metrics,
        classes=names,
        matrix=_matrix(metrics) if small else None,
        matrix_picture=_matrix_picture(metrics) if not small and len(names) <= LARGEST_PICTURE else None,
        pairs=_pairs(metrics, names),
        weakest=_weakest(metrics, names),
        calibration=_calibration(metrics),
        calibration_rows=[
            [f"{b['low']:.1f} to {b['high']:.1f}%", f"{b['images']:,}", f"{b['confidence']:.1f}%", f"{b['top1']:.1f}%"]
            for b in metrics.calibration
        ],
        tiles=_tiles(metrics, names, images, view, attention),
        attention_note=note,
    )


# -- Confusions -------------------------------------------------------------------------------------------------------


def _matrix(metrics: Metrics) -> list[list[Cell]]:
    rows = []
    for truth, counts in enumerate(metrics.confusion):
        total = max(sum(counts), 1)
        rows.append([Cell(n, round(100 * n / total, 1), i == truth) for i, n in enumerate(counts)])
    return rows


def _matrix_picture(metrics: Metrics) -> str:
    """One cell of 1 to 8 pixels per pair of classes, bright where many of the row are."""
    import numpy as np

    table = np.array(metrics.confusion, dtype=float)
    shares = np.sqrt(table / np.maximum(table.sum(axis=1, keepdims=True), 1))  # a few percent stay visible
    cell = max(1, 320 // len(shares))
    return picture(heat_map(shares).repeat(cell, axis=0).repeat(cell, axis=1), exact=True)


def _pairs(metrics: Metrics, names: Sequence[str]) -> list[list[str]]:
    wrong = sorted(((-n, truth, p) for (truth, p), n in metrics.pairs.items() if truth != p))[:PAIRS]
    images = [c["images"] or 1 for c in metrics.per_class.values()]
    return [[names[t], names[p], f"{-n:,}", f"{-100 * n / images[t]:.1f}%"] for n, t, p in wrong]


def _weakest(metrics: Metrics, names: Sequence[str]) -> list[list[str]]:
    known = [(c["top1"], name, c) for name, c in zip(names, metrics.per_class.values(), strict=True) if c["images"]]
    known.sort(key=lambda row: row[0] or 0.0)
    return [
        [name, f"{c['images']:,}", *("-" if c[k] is None else f"{c[k]:.1f}%" for k in ("top1", "precision", "f1"))]
        for _, name, c in known[:WEAKEST]
    ]


# -- Mistakes ---------------------------------------------------------------------------------------------------------


def _attention(model: Any, mistakes: Sequence[Mistake]) -> tuple[list[Any] | None, str]:
    """Where the class token attends in the last layer, (h, w) in 0..1 for each image; or None, and why."""
    if not mistakes:
        return None, ""
    if not isinstance(model, nn.Module):
        return None, "The pictures are without attention: an exported file does not show it."
    batch = torch.stack([mistake.image for mistake in mistakes])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with evaluation_mode(model):
            maps = [one.class_attention for one in compute_maps(model, batch.to(device))[0]]
    except UserError as error:
        return None, f"The pictures are without attention: {error}."
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        say(f"the attention of mistakes is left out: {first_line(error)}")
        return None, "The pictures are without attention: there was not enough memory for it."
    if any(one is None for one in maps):
        return (
            None,
            f"The pictures are without attention: {type(model).__name__} has none from a class token that can be read.",
        )
    return [one.numpy() for one in maps if one is not None], ""


def _tiles(
    metrics: Metrics, names: Sequence[str], images: Any, view: Preprocessing, attention: Sequence[Any] | None
) -> list[Tile]:
    tiles = []
    for i, mistake in enumerate(metrics.mistakes):
        pixels = denormalise(mistake.image, view.mean, view.std).expand(3, -1, -1).permute(1, 2, 0).numpy()
        file = images.names[mistake.number] if isinstance(images, Images) and mistake.number is not None else ""
        tiles.append(
            Tile(
                picture=picture(pixels),
                attention=None if attention is None else picture(heat_over(pixels, attention[i])),
                truth=names[mistake.truth],
                prediction=names[mistake.prediction],
                confidence=f"{100 * mistake.confidence:.1f}%",
                name=_end(file),
            )
        )
    return tiles


def _end(path: str) -> str:
    """The end of a path, which differs between files more than its start."""
    return path if len(path) <= LONGEST_NAME else f"...{path[3 - LONGEST_NAME :]}"


# -- Calibration ------------------------------------------------------------------------------------------------------


def _calibration(metrics: Metrics) -> list[Drawing]:
    bins, width = metrics.calibration, 100 / BINS
    centres = [(b["low"] + b["high"]) / 2 for b in bins]

    def reliability(axis: Any) -> None:
        axis.bar(centres, [b["top1"] for b in bins], 0.9 * width, color="#0072b2", alpha=0.75)
        axis.plot([0, 100], [0, 100], ":", color=ink(), linewidth=1.2)
        axis.plot([b["confidence"] for b in bins], [b["top1"] for b in bins], "o", color="#d55e00", markersize=4)
        axis.set(xlim=(0, 100), ylim=(0, 103), xlabel="confidence (%)", ylabel="top-1 (%)")

    def histogram(axis: Any) -> None:
        axis.bar(centres, [100 * b["images"] / metrics.images for b in bins], 0.9 * width, color="#0072b2", alpha=0.75)
        axis.set(xlim=(0, 100), xlabel="confidence (%)", ylabel="images (%)")

    read = f"ECE {metrics.ece:.1f}%, in {len(bins)} of {BINS} bins. The numbers are in the table below."
    return [
        draw_inline("reliability", reliability, "reliability", "Reliability diagram: top-1 by confidence", read),
        draw_inline("confidences", histogram, "how often", "Share of the images by confidence", read),
    ]
