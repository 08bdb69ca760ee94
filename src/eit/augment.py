"""Augmentation: of whole batches on the device, and of single images with the transforms of timm."""

import math
import random

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize
from torchvision.transforms import functional as TF

from eit.config import Augment
from eit.errors import UserError
from eit.images import View, not_a_thread, resize_and_crop


def shift_and_flip(x: Tensor, pad: int, hflip: float, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Crop each (B, C, H, W) image out of its zero-padded self, and mirror some; draws are (B,) in [0, 1)."""
    batch, _, height, width = x.shape
    x = F.pad(x, (pad,) * 4)
    rows = torch.arange(height, device=x.device) + (dy * (2 * pad + 1)).long()[:, None]  # (B, H)
    columns = torch.arange(width, device=x.device).expand(batch, -1)
    columns = torch.where(flip[:, None] < hflip, columns.flip(1), columns) + (dx * (2 * pad + 1)).long()[:, None]
    one = torch.arange(batch, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[one, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


NOISE_FIELDS = 64  # of erasing, an epoch


def erase(x: Tensor, probability: float, noise: Tensor, *draws: Tensor) -> Tensor:
    """Random erasing (Zhong et al. 2020) of (B, C, H, W): a box of 2 to 33% of the area becomes noise.

    `noise` is (fields, C, H, W), of which each image uses one; `draws` are five (B,) tensors in [0, 1).
    """
    height, width = x.shape[2:]
    chosen, area, aspect, top, left = draws
    field_ = (chosen / probability * len(noise)).long().clamp(max=len(noise) - 1)  # uniform where it matters
    area = (0.02 + area * (1 / 3 - 0.02)) * height * width
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / 0.3))
    h = (area * aspect).sqrt().round().clamp(1, height - 1)
    w = (area / aspect).sqrt().round().clamp(1, width - 1)
    top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    y, x_ = (torch.arange(n, device=x.device) for n in (height, width))
    inside_y = (y >= top[:, None]) & (y < (top + h)[:, None])
    inside_x = (x_ >= left[:, None]) & (x_ < (left + w)[:, None])
    box = inside_y[:, None, :, None] & inside_x[:, None, None, :] & (chosen < probability)[:, None, None, None]
    return torch.where(box, noise[field_], x)


class PadCrop:
    """PIL image -> its evaluation view, padded and cropped at random. A class, for worker processes to be sent it."""

    def __init__(self, view: View, pad: int) -> None:
        self.view, self.pad = view, pad

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self.view.size
        image = resize_and_crop(image, size, size, self.view.interpolation)
        if self.pad:
            top, left = random.randint(0, 2 * self.pad), random.randint(0, 2 * self.pad)
            image = TF.crop(TF.pad(image, self.pad), top, left, size, size)
        return image


def simple_crop(view: View) -> Compose:
    """DeiT III's simple random crop: the shorter side to the size, 4 pixels reflected around, a random square."""
    mode = InterpolationMode(view.interpolation)
    crop = RandomCrop(view.size, padding=4, padding_mode="reflect")
    return Compose([not_a_thread, Resize(view.size, mode), crop])


def image_transform(view: View, augment: Augment) -> Compose:
    """PIL image -> normalised, augmented (channels, size, size) float.

    Raises:
        UserError: a policy that timm does not know, or that needs colour.
    """
    key, policy = augment.policy or ("", None)
    if policy and view.channels != 3:
        raise UserError(f"augment.{key} needs colour images: model.in_chans=3")
    begins = {"rand_augment": ("rand",), "augmix": ("augmix",), "auto_augment": ("original", "v0")}.get(key)
    try:
        if policy and begins and not policy.startswith(begins):
            raise ValueError("of another kind")
        transform = create_transform(
            input_size=view.size,
            is_training=True,
            color_jitter=augment.color_jitter or None,
            auto_augment=policy,
            interpolation=view.interpolation,
            hflip=augment.hflip,
            re_prob=augment.erasing,
            re_mode="pixel",
            mean=view.mean,
            std=view.std,
            scale=augment.crop_scale,
            ratio=augment.crop_aspect,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        of_auto = "original, originalr, v0 or v0r"
        such = {"augmix": "augmix-m5-w4-d2", "auto_augment": of_auto}.get(key, "rand-m9-mstd0.5-inc1")
        raise UserError(f"augment.{key}={policy}: timm does not know this policy ({error}), such as {such}") from None
    if augment.simple_crop:
        transform.transforms[0] = simple_crop(view)
    elif augment.crop_scale is None:
        transform.transforms[0] = PadCrop(view, augment.pad_crop)  # instead of timm's random resized crop
    return transform
