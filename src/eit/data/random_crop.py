"""The random resized crop of a training image, which decodes only as much of the file as it needs."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

from eit.data.images import Preprocessing, orientation, to_mode, whole

Kept = dict[int, Any]  # scale -> the last file, decoded at 1 / scale of its size


class ResizedCrop:
    """timm's RandomResizedCropAndInterpolation: the same boxes for the same random state, pixels within rounding.

    The box is drawn from the size in the file's header. If it is at least twice as large as the output, a JPEG is
    decoded at a half, a quarter or an eighth of its size, never smaller than the output. torch resizes: it computes as
    Pillow does on 8-bit images, several times as fast. Scaled decoding uses other filters than resizing, of about the
    same sharpness: pixels change less than by a shift of half a pixel. An image that its EXIF data rotate or flip is
    never scaled: the stored size is rounded up at the right and the bottom, which would move the upright box.
    """

    def __init__(self, view: Preprocessing, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
        self.size, self.interpolation, self.scale, self.ratio = view.size, view.interpolation, scale, ratio

    def __call__(self, image: Image.Image, channels: int, kept: Kept) -> Image.Image:
        """An opened file, or a decoded image -> (size, size), of mode RGB or L.

        The decoded image is stored in `kept`, for the next copy of this file in repeated augmentation.
        """
        scales = image.format == "JPEG" and orientation(image) == 1
        if not scales:
            image = decoded(image, channels, kept)
        width, height = image.size
        top, left, h, w = RandomResizedCropAndInterpolation.get_params(
            torch.empty(height, width, device="meta"), self.scale, self.ratio
        )
        factor = max(k for k in (1, 2, 4, 8) if k == 1 or min(h, w) >= k * self.size) if scales else 1
        if scales:
            if factor not in kept:
                if factor > 1:
                    image.draft(None, (width // factor, height // factor))
                image.load()
                kept[factor] = image
            image = kept[factor]
        # The smallest box of whole pixels around the crop, and the crop's position in it
        x, y = left // factor, top // factor
        outer = (x, y, -(-(left + w) // factor), -(-(top + h) // factor))
        inner = (left / factor - x, top / factor - y, (left + w) / factor - x, (top + h) / factor - y)
        image = image.crop(outer)
        if image.mode != {1: "L", 3: "RGB"}[channels]:
            image = to_mode(image, channels)
        if factor > 1:  # the crop has fractional borders, which torch's resize does not take
            return image.resize((self.size, self.size), Image.Resampling[self.interpolation.upper()], inner)
        return resized(to_pixels(image), self.size, self.interpolation)


def decoded(image: Image.Image, channels: int, kept: Kept) -> Image.Image:
    """The whole image of an opened file, also stored in `kept`; a decoded image is returned as it is."""
    if not image.format:  # it is decoded already
        return image
    if 1 not in kept:
        kept[1] = whole(image, channels)
    return kept[1]


def resized(pixels: Tensor, size: int, interpolation: str) -> Image.Image:
    """(height, width, channels) uint8 -> PIL image of (size, size), within one level of `Image.resize`."""
    batch = pixels[None].permute(0, 3, 1, 2)  # channels last; resizing keeps it
    out = F.interpolate(batch, (size, size), mode=interpolation, antialias=True)
    return Image.fromarray(out.permute(0, 2, 3, 1)[0].squeeze(2).numpy())


def to_pixels(image: Image.Image) -> Tensor:
    """PIL image of mode RGB or L -> (height, width, channels) uint8, without reordering."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
