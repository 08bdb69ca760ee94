"""The runs of an experiment: trained one after the other, measured, and read again from their folders."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from eit import distributed
from eit.analysis.measure import Analysis, CannotMeasure, analyze
from eit.checkpoint import load, write_file
from eit.config import Recipe, differences
from eit.console import say, track
from eit.data import open_data, open_evaluation
from eit.errors import UserError, few
from eit.evaluate import evaluate, make_views
from eit.finetune import build_model, settle
from eit.images import Images
from eit.loader import EvaluationLoader, evaluation_loader
from eit.macs import complexity
from eit.reproduce.matrix import Cell, Experiment, Measure
from eit.run import environment, read_recipe
from eit.train import train

MEASURED = "measured.json"


@dataclass(frozen=True)
class Result:
    """A finished run."""

    cell: Cell
    summary: dict[str, Any]  # of the run
    measured: dict[str, Any]  # beside its accuracy
    environment: dict[str, Any]  # of its training

    def value(self, metric: str) -> float | None:
        """`last_top1` and the like of summary.json, or a path in measured.json: trained.share, size.150. Lists: mean.

        `gain.X` is trained.X less initial.X. None where it was not measured.
        """
        if metric.startswith("gain."):
            after, before = (self.value(metric.replace("gain", state)) for state in ("trained", "initial"))
            return None if after is None or before is None else after - before
        found: Any = self.summary | self.measured
        for key in metric.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return fmean(found) if isinstance(found, list) and found else found if found != [] else None


def read_result(cell: Cell, results: Path) -> Result | None:
    """What is known of a run, from its folder alone; None where it is not finished."""
    folder = cell.folder(results)
    try:
        summary = json.loads((folder / "summary.json").read_text())
        measured = json.loads((folder / MEASURED).read_text())
        made = json.loads((folder / "environment.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder} is damaged: {error}") from None
    return Result(cell, summary, measured, made)


def read_results(experiment: Experiment, budget: str, results: Path) -> list[Result]:
    """The finished runs of a budget."""
    found = (read_result(cell, results) for cell in experiment.cells(budget))
    return [result for result in found if result is not None]


def run(cells: Sequence[Cell], measure: Measure, results: Path, roots: Mapping[str, str]) -> None:
    """Train and measure what is not done yet. A stopped run is continued; a folder of another recipe is refused.

    Raises:
        UserError: missing data, before anything is trained; as `eit.train.train`.
        Stopped: as `eit.train.train`; the same command goes on.
    """
    recipes = [cell.recipe(results, roots) for cell in cells]
    for recipe in recipes:
        check_same_recipe(recipe)
    left = distributed.on_main(lambda: [i for i, cell in enumerate(cells) if read_result(cell, results) is None])
    for root, recipe in {recipes[i].data.root: recipes[i] for i in left}.items():
        try:
            open_data(recipe.data)
        except UserError as error:
            raise UserError(f"{error}; --data NAME=PATH says where {Path(root).name} is") from None
    for number, i in enumerate(left, start=1):
        say(f"run {number} of {len(left)}: {cells[i].folder(results)}")
        distributed.on_main(partial(adopt, recipes[i], results))
        if not (recipes[i].run_folder() / "summary.json").exists():
            train(recipes[i])
        found = measurements(recipes[i], measure, distributed.start(recipes[i].train.device))
        distributed.on_main(partial(write_file, recipes[i].run_folder() / MEASURED, as_text(found)))


def check_same_recipe(recipe: Recipe) -> None:
    """Raise a UserError where the folder holds a run of another recipe: an experiment was changed since."""
    folder = recipe.run_folder()
    if (folder / "summary.json").exists() and (different := differences(read_recipe(folder), settle(recipe))):
        raise UserError(f"{folder} holds a run of another recipe ({few(different)}): give another --results")


def adopt(recipe: Recipe, results: Path) -> None:
    """Copy the finished run of the same recipe from another experiment, if there is one: it would come out the same."""
    folder = recipe.run_folder()
    if folder.exists():
        return
    for file in sorted(results.glob(f"*/*/*/{MEASURED}")):
        other = file.parent
        if not differences(read_recipe(other), settle(recipe)):
            say(f"{other} has the same recipe: copied")
            folder.mkdir(parents=True)
            for source in other.iterdir():
                if source.is_file() and source.name not in (".lock", MEASURED):
                    shutil.copy2(source, folder)
            return


@torch.no_grad()
def measurements(recipe: Recipe, measure: Measure, device: torch.device) -> dict[str, Any]:
    """Of a finished run, from its final weights."""
    folder = recipe.run_folder()
    weights = folder / "final.safetensors"
    if not weights.exists() and (measure.analysis or measure.sizes):
        raise UserError(f"{weights} is missing, and is needed to measure: remove {folder} to train again")
    images = open_evaluation(recipe.data)
    size, channels = recipe.data.image_size, recipe.model.in_chans or 3
    initial = build_model(recipe, len(images.classes)).eval()
    cost = complexity(initial, (channels, size, size))
    found: dict[str, Any] = dict(macs=cost.macs, published_macs=cost.published_macs)
    if measure.analysis or measure.sizes:
        trained = load(weights)
        view = trained.card.view
    if measure.analysis:
        assert isinstance(images, Images)
        some = images.evenly(measure.analysis)
        shown = EvaluationLoader(some, view, 50, recipe.data.workers, device)
        for state, model in (("trained", trained), ("initial", initial)):
            try:
                found[state] = layers(analyze(model.to(device), watched(shown, f"{folder.name}, {state}")))
            except CannotMeasure as error:
                found[state] = dict(missing=str(error))
        found["images"] = len(some)
    if measure.sizes:
        found["size"] = {}
        for percent in measure.sizes:
            (seen,) = make_views(view, [size * percent // 100]).values()
            loader = evaluation_loader(images, seen, recipe.data.batch_size, recipe.data.workers, device)
            found["size"][str(percent)] = evaluate(trained.to(device), loader, recipe.train.precision).top1
    return found | dict(environment=environment(device))


def watched(loader: EvaluationLoader, title: str) -> Any:
    """The loader's images, each once, with a progress bar."""
    for _, batch in track(loader, title, loader.blocks):
        yield batch.images[: batch.valid]


def layers(analysis: Analysis) -> dict[str, Any]:
    """A value a layer: shares of high frequencies after it, and the diversity of its heads, in pixels."""
    blocks, heads = analysis.at("block"), analysis.attention
    found: dict[str, list[float]] = {
        key: [getattr(block, key) for block in blocks] for key in ("share", "share_se", "share_with_dc")
    }
    return found | dict(
        noise_share=blocks[0].noise_share,
        noise_share_with_dc=blocks[0].noise_share_with_dc,
        diversity=[layer.std for layer in heads],
        distance=[fmean(layer.distance) for layer in heads],
    )


def as_text(values: dict[str, Any]) -> str:
    """JSON, with floats of six digits, and lists of numbers in a line each."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        return [short(inner) for inner in value] if isinstance(value, list) else value

    parts = ",\n".join(f' "{key}": {json.dumps(short(value))}' for key, value in values.items())
    return f"{{\n{parts}\n}}\n"


# -- A cell, once more ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Again:
    """A run that was trained a second time, against the first."""

    identical: bool  # every epoch's losses and accuracies
    top1: float
    recorded_top1: float
    limit: float | None  # points: three standard deviations over seeds; None where there are fewer than two
    changed: list[str]  # of the environment: "torch: 2.13 -> 2.14"

    @property
    def agrees(self) -> bool:
        """Whether it is the same, or within the limit."""
        return self.identical or (self.limit is not None and abs(self.top1 - self.recorded_top1) <= self.limit)

    def __str__(self) -> str:
        """For the terminal."""
        if self.identical:
            return f"top-1 {self.top1:.2f}%: identical in every epoch"
        limit = "one seed has no spread" if self.limit is None else f"limit {self.limit:.2f}: 3 deviations over seeds"
        word = "agrees" if self.agrees else "does not agree"
        changed = f"\nchanged: {'; '.join(self.changed)}" if self.changed else ""
        return f"top-1 {self.top1:.2f}%, recorded {self.recorded_top1:.2f}% ({limit}): {word}{changed}"


def again(cell: Cell, experiment: Experiment, results: Path, roots: Mapping[str, str], out: Path) -> Again:
    """Train the recorded recipe of a finished run anew in `out`, and compare.

    Raises:
        UserError: the run is not there; `out` holds another one.
    """
    if (recorded := read_result(cell, results)) is None:
        raise UserError(f"{cell.folder(results)} is no finished run: there is nothing to compare with")
    folder = cell.folder(results)
    recipe = read_recipe(folder)
    root = roots.get(cell.data, recipe.data.root)
    recipe = recipe.model_copy(update=dict(out=str(out), data=recipe.data.model_copy(update=dict(root=root))))
    summary = train(recipe)
    seeds = [r for r in read_results(experiment, cell.budget, results) if same_but_seed(r.cell, cell)]
    top1s = [float(r.summary["last_top1"]) for r in seeds]
    old, new = (read_lines(path) for path in (folder, out))
    before, after = (flat(json.loads((path / "environment.json").read_text())) for path in (folder, out))
    timed = {"images_per_s"}
    return Again(
        identical=[{k: v for k, v in line.items() if k not in timed} for line in old]
        == [{k: v for k, v in line.items() if k not in timed} for line in new],
        top1=summary["last_top1"],
        recorded_top1=recorded.summary["last_top1"],
        limit=3 * stdev(top1s) if len(top1s) > 1 else None,
        changed=[f"{k}: {before.get(k)} -> {v}" for k, v in after.items() if before.get(k) != v and k != "command"],
    )


def same_but_seed(one: Cell, other: Cell) -> bool:
    """Whether two runs differ in nothing but their seed."""
    return all(level == other.levels[axis] for axis, level in one.levels.items() if axis != "seed")


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """The environment, with packages by their names."""
    return {k: v for k, v in values.items() if k != "packages"} | values["packages"]
