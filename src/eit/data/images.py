"""Images -> pixels as a model sees them: decoding, upright, 8 bits, resized, normalised."""

import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import IO, Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

MAX_PIXELS = 89_478_485  # Pillow's own bound on what it decodes without a warning

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `decode` refuses before it decodes


class UnreadableImage(Exception):
    """An image that cannot be decoded, or is too large to be; the message names it and the reason."""


def decode(
    file: str | os.PathLike[str] | IO[bytes],
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    name: str = "",
    load: "Load | None" = None,
) -> Image.Image:
    """An image file -> upright PIL image of mode RGB (3 channels) or L (1), whatever it was stored as.

    `name` stands for the file in messages if it is an open one. `load` decodes instead of `whole`.

    EXIF rotation is applied, 16-bit grey is scaled to 8 bits, transparency is dropped, as torchvision and timm do.

    Raises:
        UnreadableImage: not an image, damaged, or of more than `max_pixels` by its header.
    """
    try:
        if isinstance(file, str | os.PathLike) and not stat.S_ISREG(os.stat(file).st_mode):
            raise UnreadableImage(f"{name or file}: no regular file")  # a pipe would be waited for
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels
        with Image.open(file) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage(
                    f"{name or file}: {width}x{height} is more than the {max_pixels} pixels that data.max_pixels allows"
                )
            return (load or whole)(image, channels)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(f"{name or file}: no image, or of an unknown format") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{name or file}: {error}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(f"{name or file}: {reason or type(error).__name__}") from None


def whole(image: Image.Image, channels: int) -> Image.Image:
    """An opened file -> all of its pixels, upright, of mode RGB or L."""
    return to_mode(ImageOps.exif_transpose(image), channels)


Load = Callable[[Image.Image, int], Image.Image]  # of an image, decoded or not, and the number of channels


class Source(Protocol):
    """Where an image lies, if not in a file of its own."""

    def open(self) -> IO[bytes] | Image.Image: ...


@dataclass
class Images:
    """Labelled images. `classes[labels[i]]` is the class of image i.

    `sources` are paths, uint8 arrays (H, W) or (H, W, 3), or objects of `Source`.
    """

    classes: list[str]
    labels: list[int]
    names: list[str]
    sources: list[Any]
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, channels: int, load: Load | None = None) -> Image.Image:
        """Image `index` as RGB (3 channels) or L (1): whole, or what `load` makes of the file or of the whole image.

        Raises:
            UnreadableImage
        """
        source = self.sources[index]
        if isinstance(source, np.ndarray):
            image = to_mode(Image.fromarray(source), channels)
            return load(image, channels) if load else image
        if isinstance(source, str):
            return decode(source, channels, self.max_pixels, load=load)
        try:
            opened = source.open()
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"{self.names[index]}: {error}") from None
        if isinstance(opened, Image.Image):
            image = to_mode(opened, channels)
            return load(image, channels) if load else image
        with opened:
            return decode(opened, channels, self.max_pixels, self.names[index], load)

    def subset(self, indices: Iterable[int]) -> "Images":
        indices = list(indices)
        return replace(
            self,
            labels=[self.labels[i] for i in indices],
            names=[self.names[i] for i in indices],
            sources=[self.sources[i] for i in indices],
        )

    def evenly(self, count: int) -> "Images":
        """At most `count` images, evenly spaced."""
        count = min(count, len(self))
        return self.subset(i * len(self) // count for i in range(count))

    def digest(self) -> str:
        """A hash of names and labels: two processes with the same one see the same data."""
        lines = "\n".join([*self.classes, *(f"{n} {y}" for n, y in zip(self.names, self.labels, strict=True))])
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("32-bit float pixels have no defined range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert({1: "L", 3: "RGB"}[channels])


def not_a_thread(image: Image.Image) -> Image.Image:
    """The centre of an image that is more than 8 times as long as wide: resized, it would grow without bound."""
    width, height = image.size
    if max(width, height) > 8 * min(width, height):
        image = TF.center_crop(image, [min(height, 4 * width), min(width, 4 * height)])
    return image


def resize_and_crop(image: Image.Image, resize: int, size: int, interpolation: str) -> Image.Image:
    """Shorter side to `resize` pixels, then the centre `size` x `size`: what evaluation and prediction see."""
    image = not_a_thread(image)
    if min(image.size) != resize:
        image = TF.resize(image, [resize], InterpolationMode(interpolation), antialias=True)
    return TF.center_crop(image, [size]) if image.size != (size, size) else image


def to_uint8(image: Image.Image) -> Tensor:
    """PIL image of mode RGB or L -> (channels, height, width) uint8."""
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1).contiguous()


def normalise(images: Tensor, mean: Iterable[float] | Tensor, std: Iterable[float] | Tensor) -> Tensor:
    """(B, channels, height, width) uint8 -> float, (x / 255 - mean) / std; tensors must be on the images' device."""
    given = (v if isinstance(v, Tensor) else _on_device(tuple(v), images.device) for v in (mean, std))
    mean_, std_ = (v.view(-1, 1, 1) for v in given)
    return (images.float() / 255 - mean_) / std_


@cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32, made once: the host waits for each copy to the device."""
    with torch.inference_mode(False):  # of use in a backward pass too
        return torch.tensor(values, dtype=torch.float32, device=device)


class Normaliser:
    """`normalise` of training batches, as they lie in memory: (B, height, width, channels) uint8.

    Its constants wait on the device, so that no step waits for a copy. On the CPU images pass its cache one by one.
    """

    def __init__(self, view: "View", device: torch.device) -> None:
        mean, std = torch.tensor(view.mean), torch.tensor(view.std)
        row = torch.stack((1 / (255 * std), -mean / std)).repeat(1, view.size)  # (2, size * channels)
        self.scale, self.shift = row.to(device)
        self.at_once = device.type != "cpu"

    def __call__(self, images: Tensor) -> Tensor:
        """-> (B, channels, height, width) float, channels last."""
        batch, height, width, channels = images.shape
        rows = images.view(batch, height, width * channels)
        out = torch.empty(rows.shape, device=rows.device)
        step = batch if self.at_once else 1
        for raw, part in zip(rows.split(step), out.split(step), strict=True):
            torch.addcmul(self.shift, raw.float(), self.scale, out=part)
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def denormalise(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """The inverse of `normalise`, to look at: (..., channels, height, width) -> the same in 0..1, on the CPU."""
    mean_, std_ = (torch.tensor(tuple(v)).view(-1, 1, 1) for v in (mean, std))
    return (images.cpu() * std_ + mean_).clamp(0, 1)


@dataclass
class View:
    """What a model sees of an image: channels, pixels, normalisation. Shared by training, evaluation, prediction."""

    size: int
    resize: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)

    def pixels(self, image: Image.Image) -> Tensor:
        """PIL image -> (channels, size, size) uint8, as evaluation sees it."""
        return to_uint8(resize_and_crop(image, self.resize, self.size, self.interpolation))
