"""Augmentation of whole batches on the device, and of single images with timm's transforms."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import AugmentOp
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize
from torchvision.transforms import functional as TF

from eit.config import Augment
from eit.data.images import Preprocessing, limit_aspect_ratio, resize_and_crop
from eit.data.random_crop import Kept, ResizedCrop, decoded, to_pixels
from eit.data.shear import FASTER
from eit.errors import UserError
from eit.randomness import Stream, generator


def shift_and_flip(x: Tensor, pad: int, hflip: float, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Pad each (B, C, H, W) image with zeros, crop it at random, and flip some; draws are (B,) in [0, 1)."""
    batch, _, height, width = x.shape
    x = F.pad(x, (pad,) * 4)
    rows = torch.arange(height, device=x.device) + (dy * (2 * pad + 1)).long()[:, None]  # (B, H)
    columns = torch.arange(width, device=x.device).expand(batch, -1)
    columns = torch.where(flip[:, None] < hflip, columns.flip(1), columns) + (dx * (2 * pad + 1)).long()[:, None]
    image = torch.arange(batch, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


NOISE_FIELDS = 64  # noise images per epoch, for erasing


def noise_fields(shape: tuple[int, ...], seed: int, epoch: int, device: torch.device) -> Tensor:
    """(NOISE_FIELDS, *shape) of N(0, 1), a function of seed and epoch."""
    return torch.randn(NOISE_FIELDS, *shape, generator=generator(Stream.NOISE, seed, epoch)).to(device)


def erase(x: Tensor, probability: float, noise: Tensor, *draws: Tensor) -> Tensor:
    """Random erasing (Zhong et al. 2020) of (B, C, H, W): noise replaces a box of 2 to 33% of the area.

    `noise` is (fields, C, H, W), of which each image uses one; `draws` are five (B,) tensors in [0, 1).
    """
    height, width = x.shape[2:]
    chosen, area, aspect, top, left = draws
    field_ = (chosen / probability * len(noise)).long().clamp(max=len(noise) - 1)  # uniform among the chosen images
    area = (0.02 + area * (1 / 3 - 0.02)) * height * width
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / 0.3))
    h = (area * aspect).sqrt().round().clamp(1, height - 1)
    w = (area / aspect).sqrt().round().clamp(1, width - 1)
    top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    box = _inside(top, left, h, w, height, width) & (chosen < probability)[:, None, None]
    return torch.where(box[:, None], noise[field_], x)


def _inside(top: Tensor, left: Tensor, h: Tensor, w: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width): whether a pixel is inside its image's box, given as four (B,) tensors."""
    y, x = (torch.arange(n, device=top.device) for n in (height, width))
    inside_y = (y >= top[:, None]) & (y < (top + h)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + w)[:, None])
    return inside_y[:, :, None] & inside_x[:, None, :]


def erasing_box(probability: float, height: int, width: int) -> list[int]:
    """Top, left, height, width and a noise seed, drawn from `random` as in timm's RandomErasing; zeros for no box.

    For images that are too large for `erase`, whose mask is as large as the batch.
    """
    if random.random() > probability:
        return [0] * 5
    for _ in range(10):
        area = random.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return [random.randint(0, height - h), random.randint(0, width - w), h, w, random.getrandbits(62)]
    return [0] * 5


def erase_boxes(x: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
    """(B, C, H, W) with the (B, 5) boxes of `erasing_box` filled with noise; `x` itself may change.

    `noise` is (fields, H, W, C), of which each image uses the one that its seed chooses. All are on one device.
    """
    return erase_one_by_one(x, boxes, noise) if x.device.type == "cpu" else erase_at_once(x, boxes, noise)


def erase_one_by_one(x: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
    """`erase_boxes` for the CPU, where skipping the three quarters of images without a box saves time."""
    for image, (top, left, h, w, seed) in zip(x, boxes.tolist(), strict=True):
        if h:
            box = noise[seed % len(noise), top : top + h, left : left + w]
            image[:, top : top + h, left : left + w] = box.permute(2, 0, 1)
    return x


def erase_at_once(x: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
    """`erase_boxes` for GPUs: a few kernel launches for the whole batch, and no wait for the device."""
    height, width = x.shape[2:]
    top, left, h, w, seed = boxes.unbind(1)
    box = _inside(top, left, h, w, height, width)
    filled = torch.where(
        box[..., None], noise[seed % len(noise)], x.permute(0, 2, 3, 1)
    )  # channels last, as the images are
    return filled.permute(0, 3, 1, 2)


class PadCrop:
    """PIL image -> its evaluation view, padded and cropped at random. A class, so that it can be sent to workers."""

    def __init__(self, view: Preprocessing, pad: int) -> None:
        self.view, self.pad = view, pad

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self.view.size
        image = resize_and_crop(image, size, size, self.view.interpolation)
        if self.pad:
            top, left = random.randint(0, 2 * self.pad), random.randint(0, 2 * self.pad)
            image = TF.crop(TF.pad(image, self.pad), top, left, size, size)
        return image


def simple_crop(view: Preprocessing) -> Compose:
    """DeiT III's simple random crop: resize the shorter side, pad 4 pixels by reflection, crop a random square."""
    mode = InterpolationMode(view.interpolation)
    crop = RandomCrop(view.size, padding=4, padding_mode="reflect")
    return Compose([limit_aspect_ratio, Resize(view.size, mode), crop])


class Whole:
    """A crop that needs the whole image decoded. A class, so that it can be sent to workers."""

    def __init__(self, crop: Callable[[Image.Image], Image.Image]) -> None:
        self.crop = crop

    def __call__(self, image: Image.Image, channels: int, kept: Kept) -> Image.Image:
        """See `eit.data.random_crop.ResizedCrop`."""
        return self.crop(decoded(image, channels, kept))


class ImageTransform:
    """An image -> augmented pixels (size, size, channels) uint8, and the box of `erasing_box`.

    `crop` is a step of its own: it takes an opened file and decodes only what it needs.
    """

    def __init__(self, view: Preprocessing, augment: Augment, crop: Whole | ResizedCrop, steps: list[Any]) -> None:
        self.crop, self.steps, self.size, self.erasing = crop, steps, view.size, augment.erasing

    def __call__(self, image: Image.Image) -> tuple[Tensor, list[int]]:
        """The result of `crop` -> (pixels, box)."""
        for step in self.steps:
            image = step(image)
        return to_pixels(image), erasing_box(self.erasing, self.size, self.size)


def speed_up_shears(step: Any) -> None:
    """Replace operations of a timm policy by faster ones with the same result; the random draws stay the same."""
    nested = getattr(step, "policy", [getattr(step, "ops", [])])
    for op in (op for ops in nested for op in ops):
        if isinstance(op, AugmentOp):
            op.aug_fn = FASTER.get(op.name, op.aug_fn)


def image_transform(view: Preprocessing, augment: Augment) -> ImageTransform:
    """The recipe's augmentation of single images, without normalising and filling of erased boxes.

    Raises:
        UserError: a policy that timm does not know, or that needs colour images.
    """
    key, policy = augment.policy or ("", None)
    if policy and view.channels != 3:
        raise UserError(f"augment.{key} needs colour images: model.in_chans=3")
    begins = {"rand_augment": ("rand",), "augmix": ("augmix",), "auto_augment": ("original", "v0")}.get(key)
    try:
        if policy and begins and not policy.startswith(begins):
            raise ValueError(f"it does not begin with {' or '.join(begins)}")
        transform = create_transform(
            input_size=view.size,
            is_training=True,
            color_jitter=augment.color_jitter or None,
            auto_augment=policy,
            interpolation=view.interpolation,
            hflip=augment.hflip,
            mean=view.mean,
            use_prefetcher=True,  # returns uint8 pixels
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        of_auto = "original, originalr, v0 or v0r"
        such = {"augmix": "augmix-m5-w4-d2", "auto_augment": of_auto}.get(key, "rand-m9-mstd0.5-inc1")
        raise UserError(
            f"augment.{key}={policy} is not a policy that timm knows ({error}): give one such as {such}"
        ) from None
    _, *steps, _ = transform.transforms  # without timm's crop and its conversion to a tensor
    for step in steps:
        speed_up_shears(step)
    crop: Whole | ResizedCrop
    if augment.crop_scale:
        crop = ResizedCrop(view, augment.crop_scale, augment.crop_aspect)
    else:
        crop = Whole(simple_crop(view) if augment.simple_crop else PadCrop(view, augment.pad_crop))
    return ImageTransform(view, augment, crop, steps)


def make_mixup(config: Augment, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """(images, labels) -> mixed images, targets (B, classes), by mixup or cutmix; None if both are off."""
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.smoothing,
        num_classes=classes,
    )
