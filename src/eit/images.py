"""Image files -> pixels as a model sees them: decoding, upright, 8 bits, resized, normalised."""

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

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


def decode(path: str | os.PathLike[str], channels: int = 3, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file -> upright PIL image of mode RGB (3 channels) or L (1), whatever it was stored as.

    EXIF rotation is applied, 16-bit grey is scaled to 8 bits, transparency is dropped, as torchvision and timm do.

    Raises:
        UnreadableImage: not an image, damaged, or of more than `max_pixels` by its header.
    """
    try:
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage(
                    f"{path}: {width}x{height} is more than the {max_pixels} pixels that data.max_pixels allows"
                )
            return to_mode(ImageOps.exif_transpose(image), channels)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(f"{path}: no image, or of an unknown format") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{path}: {error}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(f"{path}: {reason or type(error).__name__}") from None


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("32-bit float pixels have no defined range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert({1: "L", 3: "RGB"}[channels])


def resize_and_crop(image: Image.Image, resize: int, size: int, interpolation: str) -> Image.Image:
    """Shorter side to `resize` pixels, then the centre `size` x `size`: what evaluation and prediction see."""
    width, height = image.size
    # A thread of an image would grow without bound, and only its centre counts.
    if max(width, height) > 8 * min(width, height):
        image = TF.center_crop(image, [min(height, 4 * width), min(width, 4 * height)])
    if min(image.size) != resize:
        image = TF.resize(image, [resize], InterpolationMode(interpolation), antialias=True)
    return TF.center_crop(image, [size]) if image.size != (size, size) else image


def to_uint8(image: Image.Image) -> Tensor:
    """PIL image of mode RGB or L -> (channels, height, width) uint8."""
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1).contiguous()


def normalise(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """(B, channels, height, width) uint8 -> float, (x / 255 - mean) / std."""
    mean_, std_ = (torch.tensor(tuple(v), device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - mean_) / std_


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
