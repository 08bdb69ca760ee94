"""Images -> ranked labels."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eit.console import say
from eit.data.folders import describe_left_out, list_images
from eit.data.images import UnreadableImage, declared_range, decode, normalise, to_mode, upright
from eit.errors import UserError
from eit.inference.evaluate import check_weights, evaluation_mode
from eit.inference.exported_models import load
from eit.precision import float32_products
from eit.weights.card import Card

BATCH_PIXELS = 1 << 24  # of the model's inputs at a time: weights may ask for large ones


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    Attributes:
        image: the file, as it was given; `image N` for the N-th of images in memory, from 0.
        labels: (class name, probability in 0..1), the most likely first; empty if the image has a fault.
        fault: why it cannot be read, or that the model's output is not finite, in one line.
    """

    image: str
    labels: list[tuple[str, float]]
    fault: str | None = None


def predict(
    model: Any, images: Any, top: int = 5, batch_size: int = 32, max_pixels: int | None = None
) -> Iterator[Prediction]:
    """The most likely classes of images.

    The model runs in evaluation mode, and is left as it was; so are the images.

    Args:
        model: of `eit.load`, on any device; its `card` says how images are prepared. Or the name of weights.
        images: a file, a folder, a PIL image, pixels, or a list of these, of any size, colour or grey. Pixels are
            uint8, 0..255: arrays (height, width) or (height, width, channels), tensors (channels, height, width), or
            a batch of these.
        top: classes per image.
        batch_size: images at a time.
        max_pixels: larger files are not read; None: the limit of the run.

    Returns:
        An iterator of one `Prediction` per image, in order; of an image that cannot be read it has a `fault` and no
        labels.

    Raises:
        UserError: at once, if the model has no card, an image is not of these types, or there is no such file.
    """
    if isinstance(model, str | os.PathLike):
        model = load(model)
    if not hasattr(model, "card"):
        raise UserError(f"predict takes a model of eit.load, or the name of weights, not {type(model).__name__}")
    check_weights(model)
    for name, number in dict(top=top, batch_size=batch_size, max_pixels=max_pixels).items():
        if number is None and name == "max_pixels":
            continue
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < 1:
            raise UserError(f"{name}={number!r}: give a whole number, at least 1")
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        images = list(images)
    single = isinstance(images, str | os.PathLike | Image.Image | np.ndarray | Tensor)
    if not single and (not isinstance(images, Iterable) or isinstance(images, bytes | dict) or hasattr(images, "read")):
        raise UserError(f"predict takes images ({_KINDS}), or a list of these, not {type(images).__name__}")
    named = [pair for i, image in enumerate([images] if single else images) for pair in _named(image, i)]
    _check_paths([image for _, image in named])
    return _predict(model, named, top, batch_size, max_pixels)


_KINDS = "files, folders, PIL images, uint8 arrays or tensors"


def _named(image: Any, number: int) -> list[tuple[str, Any]]:
    """The name and the content of an image, of each in a folder: a path, a PIL image, or an array."""
    if isinstance(image, str | os.PathLike):
        path = os.path.expanduser(os.fspath(image))
        return [(file, file) for file in (expand([path]) if os.path.isdir(path) else [path])]
    name = f"image {number}"
    if isinstance(image, Image.Image):
        return [(name, image)]
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise UserError(
                f"{name}: tensors are (channels, height, width) with 1 or 3 channels, not {tuple(image.shape)}"
            )
        if image.dtype != torch.uint8:
            raise UserError(f"{name} has pixels of {image.dtype}: uint8, 0..255, are expected")
        if image.is_meta or image.layout is not torch.strided:
            raise UserError(f"{name} is a sparse tensor, or one without values: give a dense one")
        image = image.numpy(force=True).transpose(1, 2, 0)
    if not isinstance(image, np.ndarray):
        raise UserError(f"{name} is of the type {type(image).__name__}: {_KINDS} are expected")
    if image.dtype != np.uint8:
        raise UserError(f"{name} has pixels of {image.dtype}: uint8, 0..255, are expected")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if 0 in image.shape or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        raise UserError(f"{name}: arrays are (height, width) or (height, width, channels), not {image.shape}")
    return [(name, image)]


@torch.no_grad()
def _predict(
    model: Any, images: Sequence[tuple[str, Any]], top: int, batch_size: int, max_pixels: int | None
) -> Iterator[Prediction]:
    card: Card = model.card
    view, limit = card.view, max_pixels or card.max_pixels
    device = next((p.device for p in model.parameters()), torch.device("cpu"))  # exported ones have none
    batch_size = max(1, min(batch_size, BATCH_PIXELS // view.size**2))
    for start in range(0, len(images), batch_size):
        pixels, predictions = [], []
        for name, image in images[start : start + batch_size]:
            try:
                if isinstance(image, str):
                    decoded = decode(image, view.channels, limit, pixel_range=card.pixel_range)
                else:
                    decoded = _in_memory(name, image, card, limit)
                pixels.append(view.pixels(decoded))
                predictions.append(Prediction(name, []))
            except UnreadableImage as error:
                predictions.append(Prediction(name, [], str(error)))
        rows: Iterator[tuple[list[int], list[float]]] = iter(())
        if pixels:
            with float32_products("fp32"), evaluation_mode(model):
                logits = model(normalise(torch.stack(pixels).to(device), view.mean, view.std))
            values, indices = logits.softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
            rows = zip(indices.tolist(), values.cpu().double().tolist(), strict=True)  # MPS has no float64
        for prediction in predictions:
            if prediction.fault is None:
                best, probabilities = next(rows)
                if math.isnan(probabilities[0]):
                    fault = f"{prediction.image}: the model's outputs are NaN or infinite"
                    prediction = replace(prediction, fault=fault)
                else:
                    labels = [(card.classes[i], p) for i, p in zip(best, probabilities, strict=True)]
                    prediction = replace(prediction, labels=labels)
            yield prediction


def _in_memory(name: str, image: Any, card: Card, limit: int) -> Image.Image:
    """A uint8 array, or a PIL image, which may be a file that is not yet decoded -> upright, of mode RGB or L."""
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    if not 0 < width * height <= limit:
        raise UnreadableImage(f"{name}: {width}x{height} pixels; 1 to {limit} are read (max_pixels)")
    try:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return to_mode(upright(image.copy()), card.in_chans, declared_range(image, card.pixel_range))
    except Exception as error:  # of Pillow's decoders
        raise UnreadableImage(f"{name}: {str(error) or type(error).__name__}") from None


def expand(paths: Sequence[str]) -> list[str]:
    """Files, and the images below each folder, sorted. A missing file is left to be reported, if others are there.

    Raises:
        UserError: a folder without images, or none of the files is there.
    """
    files: list[str] = []
    for path in map(os.path.expanduser, paths):
        if os.path.isdir(path):
            inside, left_out = list_images(Path(path))
            if note := describe_left_out(path, left_out):
                say(note)
            if not inside:
                raise UserError(f"no images below {path}; docs/data.md lists the formats")
            files += sorted(inside)
        else:
            files.append(path)
    _check_paths(files)
    return files


def _check_paths(images: Sequence[Any]) -> None:
    """Raise a UserError if there are only paths and none of them exists."""
    if images and not any(not isinstance(image, str) or os.path.exists(image) for image in images):
        raise UserError(f"no such image: {images[0]}")
