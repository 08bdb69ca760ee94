"""Shears and translations of an image with Pillow's results, three times as fast.

Pillow interpolates each pixel in two dimensions and in double precision. A shear or a translation shifts whole rows (or
columns), so four taps in one dimension are enough, for the whole image at once. Kernels, border and fill are the same;
pixels may differ by one level because of rounding. It makes loading 9 to 15% faster (docs/performance.md).
"""

from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

EDGE = 2  # pixels that the taps reach beyond the border, where the last pixel is repeated


def shift_rows(image: Image.Image, shift: np.ndarray, fillcolor: Any, resample: int) -> Image.Image:
    """RGB image with pixel (x + shift[y], y) of `image` at (x, y); `fillcolor` beyond the border."""
    pixels = np.asarray(image)
    height, width, channels = pixels.shape
    first = np.floor(shift).astype(np.int64)
    taps = torch.from_numpy(_taps(shift - first, resample)).float()[:, :, None]  # (height, 4, 1)
    first = first.clip(-width, width)  # anything further away is fill
    left, right = max(1 - first.min(), EDGE), max(first.max() + 2, EDGE)
    wide = np.empty((height, left + width + right, channels), np.uint8)  # beyond EDGE: never shown
    wide[:, left - EDGE : left] = pixels[:, :1]
    wide[:, left : left + width] = pixels
    wide[:, left + width : left + width + EDGE] = pixels[:, -1:]
    line = channels * width
    windows = sliding_window_view(wide.reshape(height, -1), line + 3 * channels, axis=1)
    moved = torch.from_numpy(windows[np.arange(height), channels * (left + first - 1)]).float()
    out = moved[:, :line] * taps[:, 0]
    for k in (1, 2, 3):
        out.addcmul_(moved[:, k * channels : k * channels + line], taps[:, k])
    out.add_(1e-3)  # Pillow truncates: an exact 100 must not become 99.9999
    out = out.clamp_(0, 255).to(torch.uint8).view(height, width, channels)
    result = Image.fromarray(out.numpy())
    x = np.arange(width) + 0.5 + shift[:, None]
    result.paste(fillcolor, mask=Image.fromarray((x < 0) | (x >= width)))
    return result


def _taps(d: np.ndarray, resample: int) -> np.ndarray:
    """(rows, 4) weights of the pixels at -1, 0, 1, 2, for a position d in [0, 1) between 0 and 1."""
    if resample == Image.Resampling.BILINEAR:
        return np.stack((0 * d, 1 - d, d, 0 * d), axis=1)
    assert resample == Image.Resampling.BICUBIC
    e = 1 - d
    return np.stack((-d * e * e, 1 - 2 * d**2 + d**3, d * (1 + d - d**2), -d * d * e), axis=1)  # Keys, a = -1


def _shift_columns(image: Image.Image, shift: np.ndarray, fillcolor: Any, resample: int) -> Image.Image:
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    return shift_rows(turned, shift, fillcolor, resample).transpose(Image.Transpose.TRANSPOSE)


# Signatures as in timm.data.auto_augment


def shear_x(image: Image.Image, factor: float, fillcolor: Any, resample: int) -> Image.Image:
    return shift_rows(image, factor * (np.arange(image.height) + 0.5), fillcolor, resample)


def shear_y(image: Image.Image, factor: float, fillcolor: Any, resample: int) -> Image.Image:
    return _shift_columns(image, factor * (np.arange(image.width) + 0.5), fillcolor, resample)


def translate_x_rel(image: Image.Image, pct: float, fillcolor: Any, resample: int) -> Image.Image:
    return shift_rows(image, np.full(image.height, pct * image.width), fillcolor, resample)


def translate_y_rel(image: Image.Image, pct: float, fillcolor: Any, resample: int) -> Image.Image:
    return _shift_columns(image, np.full(image.width, pct * image.height), fillcolor, resample)


FASTER = {"ShearX": shear_x, "ShearY": shear_y, "TranslateXRel": translate_x_rel, "TranslateYRel": translate_y_rel}
