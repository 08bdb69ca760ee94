"""The random resized crop of a training image that is not decoded yet, so that only what is needed is decoded."""

import importlib
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

from eit.errors import UserError
from eit.images import View, to_mode, whole

ORIENTATION = 0x0112  # EXIF tag; 5 to 8 stand for images that lie on their side


class ResizedCrop:
    """timm's RandomResizedCropAndInterpolation: the same boxes for the same random state, pixels within rounding.

    The box is drawn from the size in the header. Where it is at least twice as large as the output, a JPEG is decoded
    at a half, a quarter or an eighth of its size, never smaller than the output. Resizing is torch's, which computes
    as Pillow does on its 8-bit images, several times as fast.

    Raises:
        UserError: `backend` is not installed.
    """

    def __init__(
        self, view: View, scale: tuple[float, float], ratio: tuple[float, float], backend: str = "pillow"
    ) -> None:
        self.size, self.interpolation, self.scale, self.ratio = view.size, view.interpolation, scale, ratio
        self.backend = backend
        if backend != "pillow":
            _simplejpeg()

    def __call__(self, image: Image.Image, channels: int) -> Image.Image:
        """An opened file, or a decoded image -> (size, size), of mode RGB or L."""
        jpeg = image.format == "JPEG"  # a decoded image has no format any more
        if not jpeg:
            image = whole(image, channels) if image.format else image
        orientation = image.getexif().get(ORIENTATION, 1) if jpeg else 1
        width, height = image.size if orientation not in (5, 6, 7, 8) else image.size[::-1]
        top, left, h, w = RandomResizedCropAndInterpolation.get_params(
            torch.empty(height, width, device="meta"), self.scale, self.ratio
        )
        factor = max(k for k in (1, 2, 4, 8) if k == 1 or min(h, w) >= k * self.size) if jpeg else 1
        if jpeg:
            image = self._decode(image, factor, orientation)
        if factor > 1:  # the box begins and ends within pixels, which torch has no argument for
            box = (left / factor, top / factor, (left + w) / factor, (top + h) / factor)
            resample = Image.Resampling[self.interpolation.upper()]
            return to_mode(image, channels).resize((self.size, self.size), resample, box)
        image = to_mode(image.crop((left, top, left + w, top + h)), channels)
        return resized(image, self.size, self.interpolation)

    def _decode(self, image: Image.Image, factor: int, orientation: Any) -> Image.Image:
        """A JPEG at 1 / factor of its size, rounded up, and upright."""
        if self.backend == "simplejpeg" and orientation == 1 and image.mode in ("RGB", "L"):
            width, height = (-(-side // factor) for side in image.size)
            file = cast(ImageFile.ImageFile, image).fp
            assert file is not None
            file.seek(0)
            colours = {"RGB": "RGB", "L": "GRAY"}[image.mode]
            try:
                pixels = _simplejpeg().decode_jpeg(file.read(), colours, min_height=height, min_width=width)
                return Image.fromarray(pixels if image.mode == "RGB" else pixels[:, :, 0])
            except ValueError:  # damaged, if only a little: Pillow says whether it can be read
                file.seek(0)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        return ImageOps.exif_transpose(image) if orientation != 1 else image


def resized(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """Any RGB or L image -> (size, size), as `Image.resize` within one level."""
    if image.size == (size, size):
        return image
    pixels = to_pixels(image)[None].permute(0, 3, 1, 2)  # channels last, which stays so
    out = F.interpolate(pixels, (size, size), mode=interpolation, antialias=True)
    return Image.fromarray(out.permute(0, 2, 3, 1)[0].squeeze(2).numpy())


def to_pixels(image: Image.Image) -> Tensor:
    """PIL image of mode RGB or L -> (height, width, channels) uint8, as it lies in memory."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _simplejpeg() -> Any:
    try:
        return importlib.import_module("simplejpeg")
    except ImportError as error:
        raise UserError(f"data.backend=simplejpeg: {error}: pip install simplejpeg") from None
