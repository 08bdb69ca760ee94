"""An experiment as `eit train` commands to run elsewhere, with their cost."""

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

DATA_SETS = {  # (training images, classes); other data sets are opened to count them
    "digits": (1437, 10),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "fashion_mnist": (60_000, 10),
    "tiny_imagenet": (100_000, 200),
    "imagenet": (1_281_167, 1000),
}


@dataclass(frozen=True)
class PlannedRun:
    """The command of a run, and its cost.

    Attributes:
        name: name of the run.
        command: the command that trains it.
        images: training images over all epochs.
        training_macs: multiply-accumulates of forward and backward passes over these images.
        hours: estimated from the rate of the first run, in proportion to the MACs; None without a rate.
    """

    name: str
    command: str
    images: int
    training_macs: float
    hours: float | None


def plan_runs(
    cells: Sequence[Cell], results: Path, roots: Mapping[str, str], images_per_s: float | None
) -> list[PlannedRun]:
    """Plan the runs in the order in which `eit reproduce run` would train them."""
    runs = [plan_run(cell, cell.recipe(results, roots)) for cell in cells]
    if images_per_s is None:
        return runs
    macs_per_s = images_per_s * runs[0].training_macs / runs[0].images
    return [replace(run, hours=run.training_macs / macs_per_s / 3600) for run in runs]


def plan_run(cell: Cell, recipe: Recipe) -> PlannedRun:
    """Plan one run, without hours."""
    torchrun = f"torchrun --nproc-per-node={cell.processes} -m "
    launcher = ("" if cell.processes == 1 else torchrun) + f"eit train {cell.base}"
    words = " ".join(changes(load_recipe(cell.base), recipe))
    if cell.data in DATA_SETS:
        count, classes = DATA_SETS[cell.data]
    else:
        train_images, _ = open_data(recipe.data)
        count, classes = len(train_images), len(train_images.classes)
    images = count * recipe.train.epochs
    macs = macs_per_image(recipe.model.model_dump_json(), recipe.data.image_size, classes)
    return PlannedRun(
        name=cell.name, command=f"{launcher} {words}", images=images, training_macs=float(macs) * images, hours=None
    )


@cache
def macs_per_image(section: str, size: int, classes: int) -> int:
    """Multiply-accumulates of a training step for one image. `section` is the recipe's `model` section as JSON."""
    config = Model.model_validate_json(section)
    with torch.device("meta"):  # shapes are enough
        model = create_model(config.name, num_classes=classes, img_size=size, **create_arguments(config))
    return training_macs(model, (config.in_chans or 3, size, size))


def plan_text(runs: Sequence[PlannedRun]) -> str:
    """The commands and their total cost, for the terminal."""
    lines = [run.command for run in runs]
    total = sum(run.training_macs for run in runs)
    images = sum(run.images for run in runs)
    lines.append(f"# {len(runs)} runs, {images:,} images in total, {total / 1e15:,.1f} P MACs of training")
    hours = [run.hours for run in runs if run.hours is not None]
    if hours:
        each = f"{min(hours):.1f} to {max(hours):.1f} per run"
        lines.append(f"# hours, if {runs[0].name} runs at this rate and time follows MACs: {sum(hours):.1f} ({each})")
    else:
        lines.append(
            "# eit bench MODEL --mode train --batch-size 256 measures images/s; --images-per-s RATE prints the hours"
        )
    return "\n".join(lines)
