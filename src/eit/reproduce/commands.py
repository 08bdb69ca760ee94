"""An experiment as commands to type elsewhere, with what they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from eit.config import Model, Recipe, changes, load_recipe
from eit.data.datasets import open_data
from eit.models.complexity import training_macs
from eit.models.registry import create_model
from eit.reproduce.experiment import Cell
from eit.training.setup import create_arguments

SETS = {  # training images, classes
    "digits": (1437, 10),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "fashion_mnist": (60_000, 10),
    "tiny_imagenet": (100_000, 200),
    "imagenet": (1_281_167, 1000),
}


@dataclass(frozen=True)
class Planned:
    """A run to come.

    Attributes:
        name: of the run.
        command: that trains it.
        images: that training passes through the model, over all epochs.
        training_macs: of those, forward and backward.
        hours: at the rate that was given for the first of the runs, others in proportion to their MACs.
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
    runs = [planned(cell, cell.recipe(results, roots)) for cell in cells]
    if images_per_s is None:
        return runs
    macs_per_s = images_per_s * runs[0].training_macs / runs[0].images
    return [replace(run, hours=run.training_macs / macs_per_s / 3600) for run in runs]


def planned(cell: Cell, recipe: Recipe) -> Planned:
    """One run."""
    torchrun = f"torchrun --nproc-per-node={cell.processes} -m "
    launcher = ("" if cell.processes == 1 else torchrun) + f"eit train {cell.base}"
    words = " ".join(changes(load_recipe(cell.base), recipe))
    if cell.data in SETS:
        count, classes = SETS[cell.data]
    else:
        train_images, _ = open_data(recipe.data)
        count, classes = len(train_images), len(train_images.classes)
    images = count * recipe.train.epochs
    macs = macs_per_image(recipe.model.model_dump_json(), recipe.data.image_size, classes)
    return Planned(
        name=cell.name,
        command=f"{launcher} {words}",
        images=images,
        training_macs=float(macs) * images,
        hours=None,
    )


@cache
def macs_per_image(section: str, size: int, classes: int) -> int:
    """Multiply-accumulates of a training step, for one image, of the model of a recipe's `model` section as JSON."""
    config = Model.model_validate_json(section)
    with torch.device("meta"):  # shapes are enough
        model = create_model(config.name, num_classes=classes, img_size=size, **create_arguments(config))
    return training_macs(model, (config.in_chans or 3, size, size))


def plan_text(runs: Sequence[Planned]) -> str:
    """For the terminal."""
    lines = [run.command for run in runs]
    total = sum(run.training_macs for run in runs)
    images = sum(run.images for run in runs)
    lines.append(f"# {len(runs)} runs, {images:,} images in all, {total / 1e15:,.1f} P MACs of training")
    hours = [run.hours for run in runs if run.hours is not None]
    if hours:
        each = f"{min(hours):.1f} to {max(hours):.1f} a run"
        lines.append(f"# hours, if {runs[0].name} has this rate and MACs decide: {sum(hours):.1f} ({each})")
    else:
        lines.append(
            "# eit bench MODEL --mode train --batch-size 256 measures images/s; --images-per-s RATE prints the hours"
        )
    return "\n".join(lines)
