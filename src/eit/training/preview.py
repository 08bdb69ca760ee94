"""What the model will see: the first training batch as the recipe augments and mixes it, and validation images."""

from typing import Any

import torch
from torch import Tensor

from eit.config import Recipe
from eit.data.datasets import open_data
from eit.data.images import Images, denormalise
from eit.data.loaders import evaluation_loader, train_loader
from eit.data.order import Plan
from eit.plots import Tile
from eit.randomness import Stream, set_seed
from eit.training.setup import settle
from eit.training.trainer import check_plan, make_mixup, make_view


def tiles(recipe: Recipe, count: int, epoch: int = 0) -> tuple[list[Tile], list[Tile]]:
    """`count` images of the first training step of `epoch`, and as many for validation, each with its classes."""
    device = torch.device("cpu")
    recipe = settle(recipe)
    train, val = open_data(recipe.data)
    view = make_view(recipe)
    size = recipe.data.batch_size
    plan = Plan(len(train), size, recipe.train.accumulate, 1, recipe.augment.repeats, recipe.seed)
    check_plan(recipe, plan)
    loader = train_loader(train, view, plan, recipe.data, recipe.augment, device)
    loader.prepare()
    x, y, _ = next(iter(loader.epoch(epoch)))
    target = torch.nn.functional.one_hot(y, len(train.classes)).float()
    if mix := make_mixup(recipe, len(train.classes)):
        set_seed(Stream.STEP, recipe.seed, epoch * plan.steps, 0, 0)  # as the training loop does
        x, target = mix(x, y)
    floor = recipe.augment.smoothing / len(train.classes)
    trained = [_tile(x[i], view, _classes(target[i], train.classes, floor)) for i in range(min(count, size))]
    if isinstance(val, Images):  # from all classes
        val = val.subset(range(0, len(val), max(len(val) // count, 1)))
    batch = next(iter(evaluation_loader(val, view, min(count, len(val)), 0, device)))
    shown = [_tile(x, view, val.classes[y]) for x, y in zip(batch.images, batch.labels.tolist(), strict=True)]
    return trained, shown[: batch.valid]


def _tile(x: Tensor, view: Any, label: str) -> Tile:
    return Tile(denormalise(x, view.mean, view.std).permute(1, 2, 0).numpy(), label)


def _classes(target: Tensor, classes: list[str], floor: float) -> str:
    """The classes of a mixed target with their shares, the largest first; one class alone without a share."""
    shares = [(float(t), classes[i]) for i, t in enumerate(target) if t > floor + 1e-4]
    if len(shares) == 1:
        return shares[0][1]
    return " + ".join(f"{share:.2f} {name}" for share, name in sorted(shares, reverse=True))
