"""Images -> ranked labels."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eit.console import say
from eit.data.folders import describe_left_out, list_images
from eit.data.images import UnreadableImage, decode, normalise
from eit.errors import UserError
from eit.precision import float32_products


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    Attributes:
        image: the file, as it was given.
        labels: (class name, probability in 0..1), the most likely first; empty where the image cannot be read.
        fault: why it cannot be read, in one line.
    """

    image: str
    labels: list[tuple[str, float]]
    fault: str | None = None


@torch.no_grad()
def predict(
    model: Any,
    images: Sequence[str | os.PathLike[str]],
    top: int = 5,
    batch_size: int = 32,
    max_pixels: int | None = None,
) -> Iterator[Prediction]:
    """The most likely classes of image files.

    Args:
        model: of `eit.load`, on any device; its `card` says how images are prepared.
        images: files of any size, colour or grey.
        top: classes an image.
        batch_size: images at a time.
        max_pixels: larger images are not read; None takes the run's own cap.

    Yields:
        One `Prediction` an image, in order; of one that cannot be read it has a `fault` and no labels.
    """
    view = model.card.view
    device = next((p.device for p in model.parameters()), torch.device("cpu"))  # exported ones have none
    for start in range(0, len(images), batch_size):
        pixels, predictions = [], []
        for name in map(str, images[start : start + batch_size]):
            try:
                most = max_pixels or model.card.max_pixels
                image = decode(name, view.channels, most, pixel_range=model.card.pixel_range)
                pixels.append(view.pixels(image))
                predictions.append(Prediction(name, []))
            except UnreadableImage as error:
                predictions.append(Prediction(name, [], str(error)))
        ranked: Iterator[list[list[float]]] = iter(())
        if pixels:
            with float32_products("fp32"):
                logits = model(normalise(torch.stack(pixels).to(device), view.mean, view.std))
            values, indices = logits.softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
            ranked = iter(torch.stack((values.cpu().double(), indices.cpu().double()), dim=2).tolist())
        for prediction in predictions:
            labels = [] if prediction.fault else [(model.card.classes[int(i)], p) for p, i in next(ranked)]
            yield replace(prediction, labels=labels)


def expand(paths: Sequence[str]) -> list[str]:
    """Files, and the images below each folder, sorted."""
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            inside, left_out = list_images(Path(path))
            if note := describe_left_out(path, left_out):
                say(note)
            if not inside:
                raise UserError(f"no images below {path}; docs/data.md lists the formats")
            files += sorted(inside)
        elif os.path.exists(path):
            files.append(path)
        else:
            raise UserError(f"no such image: {path}")
    return files
