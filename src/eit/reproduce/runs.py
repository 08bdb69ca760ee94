"""The runs of an experiment: train and measure them one after the other, read their results, repeat a run."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from torch import Tensor

from eit import distributed
from eit.analysis.measure import Analysis, CannotMeasure, analyze
from eit.config import Recipe, differences
from eit.console import say, track
from eit.data.datasets import open_data, open_evaluation
from eit.data.images import Images, Preprocessing, normalise
from eit.environment import environment
from eit.errors import UserError, few
from eit.files import read_json, write_file
from eit.inference.evaluate import make_views
from eit.models.complexity import complexity
from eit.models.registry import TIMM
from eit.precision import arithmetic, resolve_precision
from eit.reproduce.experiment import Cell, Experiment, Measure
from eit.training.checkpoint import saved_steps
from eit.training.run_folder import read_log, read_recipe
from eit.training.setup import build_model, resolve_architecture
from eit.training.trainer import train
from eit.weights.load import load

MEASURED, WEIGHTS = "measured.json", "final.safetensors"
BATCH = 64  # images per batch when measuring


class RunFile(BaseModel):
    """A file of a finished run. The values that tables need are checked."""

    model_config = ConfigDict(extra="allow", strict=True)


class Summary(RunFile):
    params: int
    last_top1: FiniteFloat
    last_top5: FiniteFloat
    best_top1: FiniteFloat
    epochs: int
    seconds: FiniteFloat


class Measurements(RunFile):
    macs: int
    published_macs: int
    size: dict[str, FiniteFloat] = {}
    trained: dict[str, list[FiniteFloat] | FiniteFloat | str] = {}
    initial: dict[str, list[FiniteFloat] | FiniteFloat | str] = {}


class Environment(RunFile):
    world_size: int
    threads: int
    device: str
    packages: dict[str, str]
    commit: str | None


FILES: dict[str, type[RunFile]] = {"summary.json": Summary, MEASURED: Measurements, "environment.json": Environment}


@dataclass(frozen=True)
class Result:
    """A finished run, and the contents of its summary.json, measured.json and environment.json."""

    cell: Cell
    summary: dict[str, Any]
    measured: dict[str, Any]
    environment: dict[str, Any]

    def value(self, metric: str) -> float | None:
        """A metric; None if it was not measured.

        Args:
            metric: a key of summary.json, such as `last_top1`, or a path in measured.json, such as `trained.share` or
                `size.150`; of a list, the mean. `gain.X` is trained.X minus initial.X. `kept.X` is size.X minus
                last_top1, both rounded to the four decimals that measured.json has.
        """
        kind, _, rest = metric.partition(".")
        pair = dict(gain=(f"trained.{rest}", f"initial.{rest}"), kept=(f"size.{rest}", "last_top1")).get(kind)
        if pair:
            after, before = map(self.value, pair)
            if after is None or before is None:
                return None
            return round(after, 4) - round(before, 4) if kind == "kept" else after - before
        value: Any = self.summary | self.measured
        for key in metric.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return (fmean(value) if value else None) if isinstance(value, list) else value


def read_result(cell: Cell, results: Path) -> Result | None:
    """The result of a run, read from its folder; None if the run is not finished.

    Raises:
        UserError: the folder has a run of another recipe (the experiment was changed since), or is damaged.
    """
    folder = cell.folder(results)
    if (recipe := recorded_recipe(cell, folder)) is None:
        return None
    files = {}
    for name, kind in FILES.items():
        try:
            files[name] = read_json(folder / name)
            kind.model_validate(files[name])
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{folder / name} is damaged: {where or 'the whole file'}: {first['msg']}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / name} is damaged: {error}") from None
    result = Result(cell, *files.values())
    log, summary = read_log(folder), result.summary
    if len(log) != summary["epochs"] or log[-1].get("val_top1") != summary["last_top1"]:
        raise UserError(
            f"{folder / 'log.jsonl'} does not match summary.json: {summary['epochs']} epochs that end with top-1 "
            f"{summary['last_top1']}% are expected"
        )
    images = recipe.data.batch_size * recipe.train.accumulate * result.environment["world_size"]
    if images != (planned := cell.global_batch):
        raise UserError(f"{folder} has a run with the global batch {images}, not {planned}: give another --results")
    return result


def read_results(experiment: Experiment, budget: str, results: Path) -> list[Result]:
    """The finished runs of a budget."""
    runs = (read_result(cell, results) for cell in experiment.cells(budget))
    return [result for result in runs if result is not None]


def run(cells: Sequence[Cell], measure: Measure, results: Path, roots: Mapping[str, str]) -> list[str]:
    """Train and measure the runs that are not finished. A stopped run is resumed.

    Returns:
        Names of the runs that ended with a non-finite loss or gradient. They do not stop the others.

    Raises:
        UserError: missing data (before anything is trained), a folder with another recipe, and those of
            `eit.training.trainer.train`.
        Stopped: as `eit.training.trainer.train`.
    """
    device = distributed.start(cells[0].values["train"]["device"])
    recipes = [resolve_architecture(cell.recipe(results, roots, distributed.world_size())) for cell in cells]
    left = distributed.on_main(lambda: [i for i, cell in enumerate(cells) if not is_done(cell, measure, results)])
    if not left:
        say(f"finished: all {len(cells)} runs are in {recipes[0].run_folder().parent}; another --results trains again")
    seen: set[str] = set()
    for i in left:
        if cells[i].data not in seen:
            seen.add(cells[i].data)
            try:
                images, _ = open_data(recipes[i].data)
            except UserError as error:
                raise UserError(f"{error}; give --data {cells[i].data}=PATH") from None
            if not isinstance(images, Images):
                raise UserError(f"{cells[i].data}: streamed images cannot be measured; give a folder of images")
    diverged = []
    for number, i in enumerate(left, start=1):
        folder = recipes[i].run_folder()
        say(f"run {number} of {len(left)}: {folder}")
        if not distributed.on_main(partial(reuse_identical_run, recipes[i], results)):
            try:
                distributed.on_main(partial(_drop_log_without_weights, folder))
                train(recipes[i])
            except FloatingPointError as error:  # on every rank
                say(f"{cells[i].name}: {error}")
                diverged.append(cells[i].name)
                continue
        distributed.on_main(partial(measure_run, recipes[i], measure, device))
    return diverged


def is_done(cell: Cell, measure: Measure, results: Path) -> bool:
    """Whether a run is finished, and everything in `measure` was measured."""
    result = read_result(cell, results)
    return result is not None and result.measured.get("measure") == measure.model_dump(mode="json")


def recorded_recipe(cell: Cell, folder: Path) -> Recipe | None:
    """The recipe of the run in a folder; None if the folder has no run.

    Raises:
        UserError: it differs from the cell's recipe.
    """
    if not (folder / "recipe.yaml").exists():
        return None
    recipe = read_recipe(folder)
    different = differences(recipe, cell.recipe(folder.parents[2], {}))
    if cell.values["model"]["name"].startswith(TIMM):  # a run's recipe leaves out arguments that the model lacks
        different = [line for line in different if not line.startswith("model.")]
    if different:
        raise UserError(f"{folder} has a run of another recipe ({few(different)}): give another --results")
    return recipe


def reuse_identical_run(recipe: Recipe, results: Path) -> bool:
    """Whether the run is finished, or was copied from another experiment: a run of the same recipe, data and batch."""
    folder = recipe.run_folder()
    if folder.exists():
        return (folder / "summary.json").exists() and (folder / WEIGHTS).exists()
    own = recipe.model_dump(exclude={"out"})
    for file in sorted(results.glob(f"*/*/*/{WEIGHTS}")):
        other = file.parent
        if other.name.startswith("."):  # an unfinished copy
            continue
        try:
            same = (other / "summary.json").exists() and read_recipe(other).model_dump(exclude={"out"}) == own
        except UserError:  # from another version
            continue
        if same:
            say(f"copied from {other}, which has the same recipe")
            temporary = folder.with_name(f".{folder.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(other, temporary, ignore=shutil.ignore_patterns(".lock*", MEASURED, "checkpoints"))
            temporary.rename(folder)
            return True
    return False


def measure_run(recipe: Recipe, measure: Measure, device: torch.device) -> None:
    """Measure a finished run, and write the result into its folder."""
    measured = measurements(recipe, measure, device)
    write_file(recipe.run_folder() / MEASURED, as_text(measured))


@torch.no_grad()
def measurements(recipe: Recipe, measure: Measure, device: torch.device) -> dict[str, Any]:
    """What `measure` asks of a finished run, from its final weights, on one process; see `Measurements`."""
    folder = recipe.run_folder()
    trained = load(folder / WEIGHTS).to(device)
    images, view = open_evaluation(recipe.data), trained.card.view
    assert isinstance(images, Images)
    initial = build_model(recipe, len(images.classes)).to(device).eval()
    cost = complexity(initial, (view.channels, view.size, view.size))
    measured: dict[str, Any] = dict(macs=cost.macs, published_macs=cost.published_macs)
    if measure.analysis:
        some = images.evenly(measure.analysis)
        measured["images"] = len(some)
        for state, model in (("trained", trained), ("initial", initial)):
            try:
                measured[state] = layer_measures(analyze(model, batches(some, view, device, f"{folder.name}, {state}")))
            except CannotMeasure as error:
                measured[state] = dict(missing=str(error))
    if measure.sizes:
        measured["size"] = {}
        for percent in measure.sizes:
            (seen,) = make_views(view, [view.size * percent // 100]).values()
            right = count = 0
            for start in range(0, len(images), BATCH):
                chosen = images.subset(range(start, min(start + BATCH, len(images))))
                (batch,) = batches(chosen, seen, device)
                with arithmetic(device, resolve_precision(recipe.train.precision, device)):
                    ranked = trained(batch).argmax(dim=1)
                right += int((ranked.cpu() == torch.tensor(chosen.labels)).sum())
                count += len(chosen)
            measured["size"][str(percent)] = 100 * right / count
    return measured | dict(measure=measure.model_dump(mode="json"), environment=environment(device))


def batches(images: Images, view: Preprocessing, device: torch.device, title: str = "") -> Iterator[Tensor]:
    """Normalised batches of all images: unlike `eit.data.loaders`, not divided among processes."""
    starts = range(0, len(images), BATCH)
    for start in track(starts, title, len(starts)) if title else starts:
        some = range(start, min(start + BATCH, len(images)))
        pixels = torch.stack([view.pixels(images.read(i, view.channels)) for i in some]).to(device)
        yield normalise(pixels, view.mean, view.std)


def layer_measures(analysis: Analysis) -> dict[str, Any]:
    """One value per layer of each metric in `LAYER_METRICS`, the shares of white noise, and the spread of the logits.

    Diversity and distance are in pixels, entropy is relative to uniform attention.
    """
    blocks, heads = analysis.layers_at("block"), analysis.attention
    measures: dict[str, list[float]] = {
        key: [getattr(block, key) for block in blocks] for key in ("share", "share_se", "share_with_dc")
    }
    return measures | dict(
        noise_share=blocks[0].noise_share,
        noise_share_with_dc=blocks[0].noise_share_with_dc,
        diversity=[layer.std for layer in heads],
        distance=[fmean(layer.distance) for layer in heads],
        entropy=analysis.relative_entropy,
        class_token=analysis.class_token_share,
        logit_spread=analysis.logit_spread,
    )


def as_text(values: dict[str, Any]) -> str:
    """JSON with six-digit floats, and each list of numbers on one line."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        return [short(inner) for inner in value] if isinstance(value, list) else value

    parts = ",\n".join(f' "{key}": {json.dumps(short(value))}' for key, value in values.items())
    return f"{{\n{parts}\n}}\n"


# -- A run, repeated --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rerun:
    """A run that was trained a second time, compared with the recorded run."""

    identical: bool  # losses and accuracies of every epoch
    top1: float
    recorded_top1: float
    limit: float | None  # points: three standard deviations over seeds; None for a single seed
    changed: list[str]  # differences of the environment: "torch: 2.13 -> 2.14"

    @property
    def agrees(self) -> bool:
        """Whether the runs are identical, or top-1 differs by at most the limit."""
        return self.identical or (self.limit is not None and abs(self.top1 - self.recorded_top1) <= self.limit)

    def __str__(self) -> str:
        """For the terminal."""
        if self.identical:
            return f"top-1 {self.top1:.2f}%: identical in every epoch"
        limit = (
            "no limit: only one seed"
            if self.limit is None
            else f"limit {self.limit:.2f}: 3 standard deviations over seeds"
        )
        word = "agrees" if self.agrees else "does not agree"
        changed = f"\nchanged: {'; '.join(self.changed)}" if self.changed else ""
        return f"top-1 {self.top1:.2f}%, recorded {self.recorded_top1:.2f}% ({limit}): {word}{changed}"


def rerun(cell: Cell, experiment: Experiment, results: Path, roots: Mapping[str, str], out: Path) -> Rerun:
    """Train the recorded recipe of a finished run again in `out`, and compare. The global batch stays, as in `run`.

    Raises:
        UserError: the run is not finished, or `out` is its folder or has a run of another recipe.
    """
    if (recorded := read_result(cell, results)) is None:
        raise UserError(f"{cell.folder(results)} has no finished run to compare with: train it with eit reproduce run")
    folder = cell.folder(results)
    if out.resolve() == folder.resolve():
        raise UserError(f"--out {out} is the recorded run itself: give another folder")
    seeds = [r for r in read_results(experiment, cell.budget, results) if differ_only_in_seed(r.cell, cell)]
    top1s = [float(r.summary["last_top1"]) for r in seeds]
    distributed.start(cell.values["train"]["device"])
    recipe, batch = read_recipe(folder), cell.recipe(results, roots, distributed.world_size())
    data = dict(root=roots.get(cell.data, recipe.data.root), batch_size=batch.data.batch_size)
    recipe = recipe.model_copy(
        update=dict(
            out=str(out),
            data=recipe.data.model_copy(update=data),
            train=recipe.train.model_copy(update=dict(accumulate=batch.train.accumulate)),
        )
    )
    summary = train(recipe)
    old, new = read_log(folder), read_log(out)
    before, after = flatten(recorded.environment), flatten(read_json(out / "environment.json"))
    timed = {"images_per_s"}
    return Rerun(
        identical=[{k: v for k, v in line.items() if k not in timed} for line in old]
        == [{k: v for k, v in line.items() if k not in timed} for line in new],
        top1=summary["last_top1"],
        recorded_top1=recorded.summary["last_top1"],
        limit=3 * stdev(top1s) if len(top1s) > 1 else None,
        changed=[f"{k}: {before.get(k, 'not recorded')} -> {v}" for k, v in after.items() if before.get(k) != v],
    )


def _drop_log_without_weights(folder: Path) -> None:
    """Let a recorded run without weights in results/ be trained again: with its log it would look begun."""
    if (folder / "summary.json").is_file() and not saved_steps(folder) and not (folder / WEIGHTS).exists():
        (folder / "log.jsonl").unlink(missing_ok=True)


def differ_only_in_seed(first: Cell, second: Cell) -> bool:
    """Whether two runs differ at most in their seed."""
    return all(level == second.levels[axis] for axis, level in first.levels.items() if axis != "seed")


def flatten(environment: dict[str, Any]) -> dict[str, str]:
    """The environment as one level of strings, without the command and what belongs to one start."""
    parts = ("gpu", "settings")  # their keys get the part's name as a prefix: both gpu and cpu have a capability
    of_a_start = ("command", "step", "earlier_starts")
    facts = {k: value for k, value in environment.items() if k not in (*of_a_start, "packages", "cpu", *parts)}
    facts |= environment["packages"] | environment.get("cpu", {})
    facts |= {f"{part} {key}": value for part in parts for key, value in environment.get(part, {}).items()}
    return {key: str(value) for key, value in facts.items()}
