"""Compare a run on ImageNet-1K with the authors' own, epoch by epoch."""

import csv
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from eit.config import Recipe, differences, load_recipe
from eit.errors import UserError, few
from eit.files import read_json
from eit.models.registry import VARIANTS
from eit.training.run_folder import read_log, read_recipe

SHOWN_EPOCHS = (0, 1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 250, 299)
PUBLISHED_BATCH = dict(eit_mini=1024, eit_tiny=1024, eit_base=512, eit_large=512)
TOLERANCE = 0.5  # points; a run that ends at most this far below the published curve is reproduced


def published_curve(model: str) -> list[dict[str, float]]:
    """One row per epoch of the authors' run of a model: lr, train_loss, val_loss, top1, top5.

    Raises:
        UserError: no curve of this model was published.
    """
    text = resources.files("eit.reproduce").joinpath("published_curves.csv").read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(text.splitlines()) if row["model"] == model]
    if not rows:
        raise UserError(f"no training curve of {model} was published; there are curves of {', '.join(VARIANTS)}")
    return [{key: float(value) for key, value in row.items() if key != "model"} for row in rows]


def global_batch(folder: Path, recipe: Recipe) -> int | None:
    """Images per step of the run; None if its environment is not known."""
    try:
        world = read_json(folder / "environment.json")["world_size"]
        return recipe.data.batch_size * recipe.train.accumulate * int(world)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class CurveComparison:
    """A run and the published run of the same model.

    Attributes:
        model: name of the model.
        epochs: number of epochs of the run so far.
        rows: epoch, top1, published_top1 and difference (points), train_loss, published_train_loss of every epoch.
        worst: the smallest difference (points) from epoch 20 on; None before epoch 20.
        verdict: one sentence.
    """

    model: str
    epochs: int
    rows: list[dict[str, Any]]
    worst: float | None
    verdict: str

    def __str__(self) -> str:
        """A table of some epochs, and the verdict."""
        shown = [r for r in self.rows if r["epoch"] in SHOWN_EPOCHS or r is self.rows[-1]]
        lines = [f"{self.model}: {self.epochs} epochs", "epoch   top-1  published    effect   loss  published"]
        for row in shown:
            lines.append(
                f"{row['epoch']:5d} {row['top1']:7.2f} {row['published_top1']:10.2f} {row['difference']:+6.2f} "
                f"{row['train_loss']:6.3f} {row['published_train_loss']:10.3f}"
            )
        return "\n".join([*lines, self.verdict])


def compare_curve(folder: Path) -> CurveComparison:
    """Compare the log of a run folder with the published curve of its model.

    The authors' schedule begins one epoch late (epochs 0 and 1 have the smallest learning rate). So epoch e of the run
    is compared with their epoch e + 1, and the last epoch with their last.

    Raises:
        UserError: the folder has no log, or a damaged one, or its model has no published curve.
    """
    lines = read_log(folder)
    for number, line in enumerate(lines, start=1):
        for key in ("epoch", "val_top1", "train_loss"):
            value = line.get(key)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{folder / 'log.jsonl'} is damaged: line {number} has {key} {value}")
    if not lines:
        raise UserError(f"{folder} has no finished epoch yet: try again after the first epoch")
    recipe = read_recipe(folder)
    curve = published_curve(recipe.model.name)
    name = f"imagenet_{recipe.model.name.removeprefix('eit_')}"
    different = differences(load_recipe(name, [f"name={recipe.name}", f"seed={recipe.seed}"]), recipe)
    if (batch := global_batch(folder, recipe)) != PUBLISHED_BATCH[recipe.model.name]:
        different.append(f"global batch: {PUBLISHED_BATCH[recipe.model.name]} -> {batch}")
    if different:
        raise UserError(f"{folder} was not trained with the published recipe: {few(different)}")
    rows = []
    for line in lines:
        theirs = curve[min(line["epoch"] + 1, len(curve) - 1)]
        top1s = dict(top1=line["val_top1"], published_top1=theirs["top1"], difference=line["val_top1"] - theirs["top1"])
        losses = dict(train_loss=line["train_loss"], published_train_loss=theirs["train_loss"])
        rows.append(dict(epoch=line["epoch"]) | top1s | losses)
    late = [row["difference"] for row in rows if row["epoch"] >= 20]
    worst = min(late, default=None)
    if len(rows) == len(curve):
        effect = rows[-1]["difference"]
        verdict = f"ended {effect:+.2f} points from the published {curve[-1]['top1']:.2f}%: "
        verdict += "reproduced" if effect >= -TOLERANCE else "not reproduced"
    elif worst is None:
        verdict = "too early to compare: the first 20 epochs do not count"
    else:
        verdict = f"at epoch {rows[-1]['epoch']}: {rows[-1]['difference']:+.2f} points from the published curve; "
        verdict += f"worst from epoch 20 on {worst:+.2f}"
    return CurveComparison(recipe.model.name, len(rows), rows, worst, verdict)
