"""An experiment as commands to type elsewhere, with what they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eit.config import Recipe, changes, load_recipe, recipe_header
from eit.macs import complexity
from eit.reproduce.matrix import Cell
from eit.zoo import TIMM, create_model

IMAGES = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000, "fashion_mnist": 60_000, "tiny_imagenet": 100_000}
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "fashion_mnist": 10, "tiny_imagenet": 200}
IMAGENET = 1_281_167, 1000


@dataclass(frozen=True)
class Planned:
    """A run to come.

    Attributes:
        name: of the run.
        command: that trains it.
        images: that training passes through the model, over all epochs.
        training_macs: of those, forward and backward.
        hours: at the rate that was given.
    """

    name: str
    command: str
    images: int
    training_macs: float
    hours: float | None


def commands(
    cells: Sequence[Cell], results: Path, roots: Mapping[str, str], images_per_s: float | None
) -> list[Planned]:
    """The runs as commands of `eit train`, in the order in which they would be trained."""
    return [planned(cell, cell.recipe(results, roots), images_per_s) for cell in cells]


def planned(cell: Cell, recipe: Recipe, images_per_s: float | None) -> Planned:
    """One run."""
    launcher = recipe_header(cell.base).partition(" train ")[0]  # eit, or torchrun with as many processes as it is for
    words = " ".join(changes(load_recipe(cell.base), recipe))
    count, classes = (IMAGES[cell.data], CLASSES[cell.data]) if cell.data in IMAGES else IMAGENET
    images = count * recipe.train.epochs
    arguments = recipe.model.arguments()
    if not recipe.model.name.startswith(TIMM):
        arguments |= dict(family=recipe.model.family)
    size, channels = recipe.data.image_size, recipe.model.in_chans or 3
    model = create_model(recipe.model.name, num_classes=classes, img_size=size, **arguments)
    macs = 3 * complexity(model, (channels, size, size)).macs
    return Planned(
        name=cell.name,
        command=f"{launcher} train {cell.base} {words}",
        images=images,
        training_macs=float(macs) * images,
        hours=None if images_per_s is None else images / images_per_s / 3600,
    )


def plan_text(runs: Sequence[Planned]) -> str:
    """For the terminal."""
    lines = [run.command for run in runs]
    total = sum(run.training_macs for run in runs)
    images = sum(run.images for run in runs)
    lines.append(f"# {len(runs)} runs, {images:,} images in all, {total / 1e15:,.1f} P MACs of training")
    hours = [run.hours for run in runs if run.hours is not None]
    if hours:
        lines.append(f"# hours at this rate: {sum(hours):.1f} ({min(hours):.1f} to {max(hours):.1f} a run)")
    else:
        lines.append("# eit bench MODEL --mode train --batch-size 256 measures images/s; --images-per-s says the hours")
    return "\n".join(lines)
