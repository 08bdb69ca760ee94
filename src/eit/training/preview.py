"""Images as the model will see them: the first training batch, augmented and mixed, and validation images."""

import torch
from torch import Tensor

from eit.config import Recipe
from eit.data.augment import make_mixup
from eit.data.datasets import open_data
from eit.data.images import Images, Preprocessing, denormalise
from eit.data.loaders import evaluation_loader, train_loader
from eit.data.order import SampleOrder
from eit.plots import Tile
from eit.randomness import Stream, set_seed
from eit.training.choices import resolve_choices
from eit.training.global_batch import check_order
from eit.training.setup import make_view, resolve_architecture


def tiles(recipe: Recipe, count: int, epoch: int = 0) -> tuple[list[Tile], list[Tile]]:
    """`count` images of the first training step of `epoch`, and as many for validation, each with its classes."""
    device = torch.device("cpu")
    recipe = resolve_architecture(recipe)
    train, val = open_data(recipe.data)
    recipe = resolve_choices(recipe, None, train, val, device, "fp32")
    view = make_view(recipe)
    size = recipe.data.batch_size
    order = SampleOrder(len(train), size, recipe.train.accumulate, 1, recipe.augment.repeats, recipe.seed)
    check_order(recipe, order)
    loader = train_loader(train, view, order, recipe.data, recipe.augment, device)
    loader.prepare()
    x, y, _ = next(iter(loader.epoch(epoch)))
    target = torch.nn.functional.one_hot(y, len(train.classes)).float()
    if mix := make_mixup(recipe.augment, len(train.classes)):
        set_seed(Stream.STEP, recipe.seed, epoch * order.steps, 0, 0)  # as the training loop does
        x, target = mix(x, y)
    floor = recipe.augment.smoothing / len(train.classes)
    train_tiles = [_tile(x[i], view, _shares(target[i], train.classes, floor)) for i in range(min(count, size))]
    if isinstance(val, Images):  # evenly spaced, so that all classes are shown
        val = val.subset(range(0, len(val), max(len(val) // count, 1)))
    batch = next(iter(evaluation_loader(val, view, min(count, len(val)), 0, device)))
    labelled = zip(batch.images, batch.labels.tolist(), strict=True)
    val_tiles = [_tile(image, view, val.classes[label]) for image, label in labelled]
    return train_tiles, val_tiles[: batch.valid]


def _tile(x: Tensor, view: Preprocessing, label: str) -> Tile:
    return Tile(denormalise(x, view.mean, view.std).permute(1, 2, 0).numpy(), label)


def _shares(target: Tensor, classes: list[str], floor: float) -> str:
    """The classes of a mixed target with their shares, the largest first. A single class has no share."""
    shares = [(float(t), classes[i]) for i, t in enumerate(target) if t > floor + 1e-4]
    if len(shares) == 1:
        return shares[0][1]
    return " + ".join(f"{share:.2f} {name}" for share, name in sorted(shares, reverse=True))
