"""What a recipe leaves to the data and the machine: `auto` becomes a value, before anything is written.

Each choice is said in a line with the key that changes it. A run that continues keeps the values of its recipe.yaml.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F

from eit import distributed
from eit.config import AUTO, Recipe, differences, is_extended
from eit.console import say
from eit.data.datasets import AnyImages
from eit.data.images import Images
from eit.errors import UserError, few, is_out_of_memory
from eit.models.registry import TIMM
from eit.precision import Precision, autocast
from eit.training.checkpoint import load_state, saved_steps
from eit.training.run_folder import is_finished, read_summary, resumable_recipe
from eit.training.setup import build_model, make_view
from eit.weights.card import default_mean_std
from eit.weights.load import read_card

LARGEST_ON_CPU, LARGEST_ON_GPU, SMALLEST = 64, 1024, 8  # images in a batch that is chosen
STEPS = 6  # batches that an epoch has at least
SAMPLE = 16  # images that are read to choose a size
IMBALANCE = 1.5  # from this ratio of the largest to the smallest class on, classes are weighed
Choice = tuple[Any, str]  # the value, and why


def resolve_choices(
    recipe: Recipe,
    recorded: Recipe | None,
    train: AnyImages,
    val: AnyImages,
    device: torch.device,
    precision: Precision,
) -> Recipe:
    """The recipe with a value in place of each `auto` that depends on the data, and a batch that the images fill.

    `recorded` is the recipe of the run that continues: its choices are kept, and not said again.
    """
    for key, choose in CHOICES.items():
        if recorded is not None:
            recipe = _with_recorded(recipe, recorded, key)
        if _value(recipe, key) != AUTO:
            continue
        value, text = choose(recipe, train, val, device, precision)
        if text:
            say(f"{text} ({key})")
        recipe = _with(recipe, key, value)
    return _with_fitting_batch(recipe, len(train))


def find_own_run(recipe: Recipe, recorded: Recipe | None, data: str) -> tuple[Recipe, Recipe | None]:
    """The recipe, and the recorded one of its run. The name is NAME-2 if a finished run of NAME has other settings.

    A folder that the user names in `out` is the run's, whatever is in it. `recorded` is the recipe in the run folder,
    and `data` the digest of the images.
    """
    name = recipe.name
    for number in itertools.count(2):
        folder = recipe.run_folder()
        if recipe.out is not None or recorded is None or read_summary(folder) is None:
            break  # what is not finished is compared when the folder is claimed
        kept = recipe
        for key in CHOICES:
            kept = _with_recorded(kept, recorded, key)
        changes = differences(recorded, kept)
        if is_finished(folder, recorded) and is_extended(recorded, kept):
            changes = []
        if not changes and not _has_other_data(folder, data):
            break
        recipe = recipe.model_copy(update=dict(name=f"{name}-{number}"))
        shown = few(changes, separator="; ") or "other data"
        say(f"{folder} is a finished run with other settings ({shown}): this run gets the folder {recipe.run_folder()}")
        recorded = resumable_recipe(recipe.run_folder())
    return recipe, recorded


def _has_other_data(folder: Path, data: str) -> bool:
    try:
        state = load_state(folder / "checkpoints" / f"step-{max(saved_steps(folder))}")
    except (UserError, OSError, ValueError):  # the claim of the folder says what is wrong
        return False
    return state["progress"]["fixed"].get("data", data) != data


def _with_recorded(recipe: Recipe, recorded: Recipe, key: str) -> Recipe:
    """The recipe with the recorded value in place of `auto`."""
    return _with(recipe, key, _value(recorded, key)) if _value(recipe, key) == AUTO else recipe


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _with(recipe: Recipe, key: str, value: Any) -> Recipe:
    section, name = key.split(".")
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={name: value})})


def _with_fitting_batch(recipe: Recipe, images: int) -> Recipe:
    """The recipe with a batch of at most the training images. What cannot be made to fit is left to `check_order`."""
    most = images // (recipe.train.accumulate * distributed.world_size())
    if recipe.augment.mixup or recipe.augment.cutmix:
        most -= most % 2  # pairs are mixed
    if not 0 < most < recipe.data.batch_size:
        return recipe
    say(
        f"batch size {most} instead of {recipe.data.batch_size}, because there are {images} training images "
        "(data.batch_size)"
    )
    return _with(recipe, "data.batch_size", most)


def _val_fraction(recipe: Recipe, train: AnyImages, val: AnyImages, *_: Any) -> Choice:
    share = getattr(val, "held_out", None)
    if share is None or not isinstance(val, Images):
        return None, f"validation on the {len(val):,} validation images of the data set"
    counts = Counter(val.labels)
    few, many = min(counts.values()), max(counts.values())
    each = f"{few}" if few == many else f"{few} to {many}"
    return share, f"held out {len(val):,} of {len(train) + len(val):,} images for validation, {each} of each class"


# Without pretrained weights: pixels of the input -> shorter side of the images from which on this input is chosen
SIZES = {32: 0, 64: 64, 96: 160}


def _image_size(recipe: Recipe, train: AnyImages, *_: Any) -> Choice:
    """The size that the weights were trained at; for new weights, one that the images fill.

    EIT accepts any size, but its filters know the scale that they have seen: docs/training.md has what was measured.
    """
    model = recipe.model
    if model.name.startswith(TIMM):
        size = timm.get_pretrained_cfg(model.name.removeprefix(TIMM)).input_size[-1]
        return size, f"image size {size}, that of {model.name}"
    if isinstance(model.pretrained, str) and (card := read_card(model.pretrained)) is not None:
        return card.size, f"image size {card.size}, at which the weights {model.pretrained} were trained"
    sides = [min(size) for size in train.pixel_sizes(SAMPLE)] if isinstance(train, Images) else []
    if not sides:
        raise UserError("data.image_size=auto needs images that can be read in any order: set a number, such as 64")
    side = median(sides)
    size = max(size for size, least in SIZES.items() if side >= least)
    return size, f"image size {size}, from images of {side:.0f} pixels (median of the shorter side)"


def _statistics(name: str) -> Callable[..., Choice]:
    """The choice of data.mean or data.std, as `name` says."""

    def choose(recipe: Recipe, *_: Any) -> Choice:
        start = recipe.model.pretrained
        own: Any = None
        if isinstance(start, str) and (card := read_card(start)) is not None:
            own, source = getattr(card, name), start
        elif start and recipe.model.name.startswith(TIMM):
            own, source = getattr(timm.get_pretrained_cfg(recipe.model.name.removeprefix(TIMM)), name), "its weights"
        else:
            own, source = default_mean_std(recipe.model.in_chans or 3)[name == "std"], "ImageNet"
        return tuple(own), f"mean and std of the pixels as in {source}" if name == "mean" else ""

    return choose


def _class_weights(recipe: Recipe, train: AnyImages, *_: Any) -> Choice:
    counts = Counter(getattr(train, "labels", [])).values()
    if not counts or max(counts) < IMBALANCE * min(counts):
        return None, "all classes have the same weight: they are about equally large"
    return "balanced", f"classes are weighed, because they have {min(counts):,} to {max(counts):,} training images"


def _batch_size(recipe: Recipe, train: AnyImages, val: AnyImages, device: torch.device, precision: Precision) -> Choice:
    world = recipe.train.accumulate * distributed.world_size()
    most = LARGEST_ON_GPU if device.type == "cuda" else LARGEST_ON_CPU
    size = min(SMALLEST, max(len(train) // world, 1))
    while SMALLEST <= size < most and size * 2 * world * STEPS <= len(train):
        size *= 2
    if device.type == "cuda":
        fitting = largest_batch(recipe, size, train.classes, device, precision)
        fitting = min(distributed.gather(fitting))
        if fitting < size:
            return fitting, f"batch size {fitting}, the largest that fits into the memory of the GPU"
    return size, f"batch size {size}, from {len(train):,} training images"


def largest_batch(recipe: Recipe, most: int, classes: list[str], device: torch.device, precision: Precision) -> int:
    """The largest power of two up to `most` whose training step fits into the memory of the device, by trying."""
    view = make_view(recipe)
    model = build_model(recipe, len(classes), initial=False).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    size = 1
    while size <= most:
        try:
            x = torch.zeros(size, view.channels, view.size, view.size, device=device)
            with autocast(device, precision):
                loss = F.cross_entropy(model(x).float(), torch.zeros(size, dtype=torch.long, device=device))
            loss.backward()
            optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        size *= 2
    if size == 1:
        raise UserError(f"not one image of {view.size} pixels fits into the memory: set a smaller data.image_size")
    return size // 2


# In the order in which they are made: the batch depends on the size
CHOICES: dict[str, Callable[..., Choice]] = {
    "data.val_fraction": _val_fraction,
    "data.image_size": _image_size,
    "data.mean": _statistics("mean"),
    "data.std": _statistics("std"),
    "data.batch_size": _batch_size,
    "loss.class_weights": _class_weights,
}
