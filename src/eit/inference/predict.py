"""Images -> ranked labels."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
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
from eit.inference import exported_models
from eit.inference.evaluate import check_weights, evaluation_mode
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

    def __str__(self) -> str:
        return self.fault or f"{self.image}: " + ", ".join(f"{name} {100 * p:.1f}%" for name, p in self.labels)

    def __repr__(self) -> str:
        return f"<{self}>"


class Predictions(Iterator[Prediction]):
    """An iterator of `Prediction`s, made as they are asked for; printed, it shows the next few."""

    SHOWN = 5

    def __init__(self, predictions: Iterator[Prediction], count: int) -> None:
        self._next, self._left = predictions, count

    def __next__(self) -> Prediction:
        prediction = next(self._next)
        self._left -= 1
        return prediction

    def __len__(self) -> int:
        """How many are left."""
        return self._left

    def __repr__(self) -> str:
        shown = list(itertools.islice(self._next, self.SHOWN))
        self._next = itertools.chain(shown, self._next)
        more = [f"... and {self._left - len(shown)} more"] if self._left > len(shown) else []
        return "\n".join([*map(repr, shown), *more]) or "<no predictions are left>"


def load(path: str | os.PathLike[str]) -> Any:
    """Weights -> their model, ready to predict.

    Args:
        path: a weights file of this package, of timm or of another training loop, a run folder (its best.safetensors,
            else final.safetensors), a folder that `eit push` or `timm.models.save_for_hf` wrote, an exported .onnx or
            .xml file (with the extra `export`), hf-hub:USER/NAME, or the name of included weights: `digits`.

    Returns:
        The model in evaluation mode, on the CPU, in float32: an `eit.EIT`, a model of timm, or one that ONNX Runtime or
        OpenVINO runs. It has four attributes more than its class:

        - `card`: an `eit.Card`, what the weights say of the model, its classes and its preprocessing
        - `predict(images, top=5)`: `eit.predict` with this model
        - `transform(image)`: an image as `eit.predict` takes it -> the normalised tensor that `predict` uses
        - `pretrained_cfg`: the preprocessing as `timm.data.resolve_data_config` reads it (exported files have none)

    Raises:
        UserError: no such file, damaged, untrusted, or one that does not say which model it is.

    Examples:
        >>> import eit
        >>> model = eit.load("digits")
        >>> from PIL import Image
        >>> image = Image.new("L", (200, 100))
        >>> model.transform(image).shape
        torch.Size([3, 32, 32])
        >>> len(next(model.predict(image)).labels)
        5
    """
    model = exported_models.load(path)
    model.transform = Transform(model.card)
    # A partial, not a bound method: torch.save and copies of the model keep it
    model.predict = update_wrapper(partial(predict, model), predict)
    return model


@dataclass(frozen=True)
class Transform:
    """One image, as `predict` takes it -> a normalised tensor (channels, size, size). Raises a UserError for others."""

    card: Card

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, str | os.PathLike) and os.path.isdir(image):
            raise UserError(f"transform takes one image, {image} is a folder")
        ((name, opened),) = _named(image, 0)
        try:
            pixels = _pixels(name, opened, self.card, self.card.max_pixels)
        except UnreadableImage as error:
            raise UserError(str(error)) from None
        return normalise(pixels[None], self.card.view.mean, self.card.view.std)[0]

    def __repr__(self) -> str:
        view = self.card.view
        steps = f"shorter side {view.resize} ({view.interpolation}), centre {view.size}x{view.size}"
        return f"Transform({steps}, mean {view.mean}, std {view.std})"


def predict(model: Any, images: Any, top: int = 5, batch_size: int = 32, max_pixels: int | None = None) -> Predictions:
    """The most likely classes of images.

    The model runs in evaluation mode, and is left as it was; so are the images.

    Args:
        model: of `eit.load`, on any device; its `card` says how images are prepared. Or the name or path of weights.
        images: a file, a folder, a PIL image, pixels, or a list of these, of any size, colour or grey. Pixels are
            arrays (height, width) or (height, width, channels), tensors (channels, height, width), or a batch of these:
            uint8 in 0..255, or float in 0..1, as scikit-image and torchvision's `ToTensor` give them, which are rounded
            to 8 bits. They are not normalised: the model's own mean and standard deviation are applied here.
        top: classes per image.
        batch_size: images at a time.
        max_pixels: larger files are not read; None: the limit of the run.

    Returns:
        An iterator of one `Prediction` per image, in order; of an image that cannot be read it has a `fault` and no
        labels. Images are read as predictions are asked for. Printed, it shows the first few.

    Raises:
        UserError: at once, if the model has no card, an image is not of these types, or there is no such file.

    Examples:
        >>> import eit
        >>> from PIL import Image, ImageDraw
        >>> image = Image.new("RGB", (100, 100), "white")
        >>> ImageDraw.Draw(image).line([(30, 20), (70, 20), (45, 80)], fill="blue", width=8)
        >>> (prediction,) = eit.predict("digits", image, top=3)
        >>> prediction.labels[0][0]
        '7'
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
    return Predictions(_predict(model, named, top, batch_size, max_pixels), len(named))


_KINDS = "files, folders, PIL images, arrays or tensors"


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
        if image.is_meta or image.layout is not torch.strided:
            raise UserError(f"{name} is a sparse tensor, or one without values: give a dense one")
        image = image.float() if image.dtype is torch.bfloat16 else image  # NumPy has no bfloat16
        image = image.numpy(force=True).transpose(1, 2, 0)
    if not isinstance(image, np.ndarray):
        raise UserError(f"{name} is of the type {type(image).__name__}: {_KINDS} are expected")
    if image.size and image.dtype.kind == "f":
        low, high = float(image.min()), float(image.max())
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"{name} has float pixels from {low:.3g} to {high:.3g}: give them in 0..1, not normalised, or as uint8"
            )
        image = (image * 255).round().astype(np.uint8)
    if image.dtype != np.uint8:
        raise UserError(f"{name} has pixels of {image.dtype}: uint8 in 0..255 or float in 0..1 are expected")
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
                pixels.append(_pixels(name, image, card, limit))
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


def _pixels(name: str, image: Any, card: Card, limit: int) -> Tensor:
    """A file, a PIL image or a uint8 array -> (channels, size, size) uint8.

    Raises:
        UnreadableImage
    """
    if isinstance(image, str):
        return card.view.pixels(decode(image, card.in_chans, limit, pixel_range=card.pixel_range))
    return card.view.pixels(_in_memory(name, image, card, limit))


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
    """Files, and the images below each folder, sorted. If some files exist, missing ones stay in the list.

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
