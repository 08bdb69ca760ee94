"""The page of a run: curves, mistakes, calibration, data, recipe, machine, and what to try next."""

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eit import distributed
from eit.config import Recipe, changes
from eit.console import quiet, say
from eit.data.datasets import DIGITS, open_data, open_evaluation
from eit.data.images import Images
from eit.data.loaders import evaluation_batch_size, evaluation_loader
from eit.errors import UserError, first_line
from eit.files import read_json
from eit.inference.evaluate import Metrics, evaluate
from eit.inference.evaluation_data import evaluation_config, match_classes
from eit.pages.render import Drawing, draw_inline, ink, preformatted, write_page
from eit.report.advice import Advice, Facts, advise
from eit.report.outcome import MISTAKES, Outcome, describe
from eit.training.run_folder import best_line, read_log, read_recipe, read_summary
from eit.weights.load import load

NAME = "report.html"
MOST_IMAGES = 5000  # validation images that are looked at, so that the page costs little next to training
SIZED = 100  # images of each part whose size is read
MARKER_EPOCHS = 40  # lines of fewer epochs have a marker at each


@dataclass
class Report:
    """What was written: the page, the advice on it, and what is missing there and why."""

    page: Path
    advice: list[Advice]
    missing: list[str]


def write_report(
    run: Path,
    out: Path | None = None,
    data: str | None = None,
    most_images: int = MOST_IMAGES,
    device: torch.device | None = None,
) -> Report:
    """Write the page of the run in the folder `run`. What the folder and the data do not have is named on the page.

    Args:
        out: the file; None: report.html in the run folder.
        data: the data set or a folder of classes; None: where the recipe read it.
        most_images: largest number of validation images to look at, evenly spaced.
        device: on which the weights are evaluated; None: the CPU.

    Raises:
        UserError: `run` is not a run folder, `data` cannot be opened, or the page cannot be written.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run folder (it has no recipe.yaml): give runs/NAME")
    recipe = read_recipe(run)
    log = [line for line in read_log(run) if line.get("val_top1") is not None]
    if not log:
        raise UserError(f"{run}: its log has no epoch with a validation top-1; there is nothing to report yet")
    missing: list[str] = []
    model, parts = None, Parts()
    weights = next((name for name in ("best.safetensors", "final.safetensors") if (run / name).is_file()), None)
    try:
        if weights is None:
            raise UserError("the run folder has no best.safetensors or final.safetensors")
        model = load(run / weights)
        parts = _open_parts(recipe, model.card, data)
    except (UserError, OSError) as error:
        if data is not None:
            raise
        hint = f"; to add them: eit report {shlex.quote(str(run))} --data PATH" if model is not None else ""
        missing.append(f"Confusions, mistakes, calibration and images: {first_line(error)}{hint}")
    outcome = None
    if model is not None and parts.val is not None:
        outcome, loss = _evaluate(model, parts.val, most_images, device or torch.device("cpu"))
        missing += [loss] if loss else []
    metrics = outcome.metrics if outcome else None
    facts = Facts(recipe, log, _counts(parts.train), _counts(parts.val), metrics)
    advice = advise(facts)
    file = out or run / NAME
    write_page(
        file,
        "report/run.html.j2",
        name=recipe.name,
        folder=str(run),
        summary=_summary(run, recipe, log),
        cards=_cards(run, recipe, log, metrics),
        missing=missing,
        advice=advice,
        curves=_curves(recipe, log),
        epochs=_epoch_table(log),
        outcome=outcome,
        notes=_notes(parts, metrics, model),
        counts=_count_table(facts),
        sizes=[_sizes(name, part) for name, part in (("training", parts.train), ("validation", parts.val)) if part],
        changed=changes(Recipe(), recipe),
        whole_recipe=preformatted(recipe.explained()),
        machine=_machine(run),
        again=_command(run, recipe),
        weights=weights,
    )
    return Report(file, advice, missing)


def write_after_training(run: Path, device: torch.device | None = None) -> Path | None:
    """Write the page of a run that has ended, on rank 0 alone; its path, or None if there is none.

    A page that is newer than the run's summary stays. If the page cannot be made, one line says so: the run is saved.
    """
    page = run / NAME
    if not distributed.is_main():
        return None
    try:
        if not read_recipe(run).train.report:
            return None
        if page.is_file() and page.stat().st_mtime >= (run / "summary.json").stat().st_mtime:
            return page
        with distributed.alone():
            return write_report(run, device=device).page
    except Exception as error:  # of anything that the page needs: the run itself is finished and saved
        say(f"{page} cannot be made ({first_line(error)}); the run is saved without it")
        return None


# -- The data ---------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """Training and validation images, as far as they are there."""

    train: Images | None = None
    val: Images | None = None


def _open_parts(recipe: Recipe, card: Any, data: str | None) -> Parts:
    """The images of the run, or of `data`, which may have validation images alone.

    Raises:
        UserError: they are not there, or are of another package, whose addresses may run commands.
    """
    config = recipe.data.model_copy(update=dict(download=False))
    if data is None and "/" in (config.dataset or ""):
        raise UserError(
            f"data.dataset={config.dataset} is not opened for a page: eit eval --mistakes FILE.html does it"
        )
    if data is None and config.root != DIGITS and not (config.root and Path(config.root).expanduser().is_dir()):
        raise UserError(f"the data set {config.root or '(none)'} is not here")
    with quiet():  # training has said what it left out
        if data is not None:
            config = config.model_copy(update=dict(root=data, dataset=None))
        try:
            train, val = open_data(config)
        except UserError:
            if data is None:
                raise
            train, val = None, open_evaluation(evaluation_config(card, data))
        val = match_classes(card, val)
    return Parts(train if isinstance(train, Images) else None, val if isinstance(val, Images) else None)


def _evaluate(model: Any, images: Images, most: int, device: torch.device) -> tuple[Outcome | None, str]:
    """The outcome of at most `most` images; or None, and why."""
    images = images.evenly(most)
    try:
        loader = evaluation_loader(
            images, model.card.view, evaluation_batch_size(64, len(images), device), None, device
        )
        metrics = evaluate(model.to(device), loader, mistakes=MISTAKES)
        return describe(model, metrics, images, model.card.view), ""
    except (UserError, FloatingPointError) as error:
        return None, f"Confusions, mistakes and calibration: {first_line(error)}"


def _counts(images: Images | None) -> dict[str, int]:
    if images is None:
        return {}
    counts = Counter(images.labels)
    return {name: counts[label] for label, name in enumerate(images.classes)}


def _count_table(facts: Facts) -> list[list[str]]:
    """Class, training images, validation images; the classes with the fewest training images first."""
    names = [*facts.train_counts] or [*facts.val_counts]
    names.sort(key=lambda name: facts.train_counts.get(name, facts.val_counts.get(name, 0)))
    shown = [facts.train_counts, facts.val_counts]
    return [[name, *(f"{counts.get(name, 0):,}" if counts else "-" for counts in shown)] for name in names]


def _sizes(part: str, images: Images) -> str:
    """Sizes of a sample of the images, as they are stored. Only their headers are read."""
    sizes = images.pixel_sizes(SIZED)
    about = f"{len(images):,} {part} images"
    if not sizes:
        return about
    widths, heights = zip(*sizes, strict=True)
    same = len(set(sizes)) == 1
    text = (
        f"{widths[0]}x{heights[0]} pixels"
        if same
        else f"{min(widths)} to {max(widths)} pixels wide (median {median(widths):.0f}), {min(heights)} to "
        f"{max(heights)} high (median {median(heights):.0f})"
    )
    seen = "all" if len(sizes) == len(images) else f"{len(sizes)} of them, evenly spaced,"
    return f"{about}; {seen} looked at: {text}"


def _notes(parts: Parts, metrics: Metrics | None, model: Any) -> list[str]:
    """What to know of the evaluation."""
    if metrics is None or parts.val is None:
        return []
    whole = len(parts.val)
    notes = [
        f"Looked at {metrics.images:,} of {whole:,} validation images"
        + (", evenly spaced." if metrics.images < whole else ".")
    ]
    logged = (model.card.metrics or {}).get("val_top1")
    if metrics.images == whole and logged is not None and abs(metrics.top1 - logged) > 0.5:
        notes.append(
            f"Here top-1 is {metrics.top1:.2f}%, in training it was {logged:.2f}% for these weights. These may not be "
            "the validation images of the run."
        )
    return notes


# -- The run ----------------------------------------------------------------------------------------------------------


def _summary(run: Path, recipe: Recipe, log: Sequence[dict[str, Any]]) -> str:
    best, last = best_line(log, recipe), log[-1]
    text = (
        f"{recipe.model.name} ({recipe.model.family}) on {_data_name(recipe)}. Best top-1 "
        f"{best['val_top1']:.2f}% after epoch {best['epoch'] + 1}; {last['val_top1']:.2f}% after the last, "
        f"{last['epoch'] + 1}."
    )
    if read_summary(run) is None:
        text += f" The run is not finished: {last['epoch'] + 1} of {recipe.train.epochs} epochs."
    return text


def _data_name(recipe: Recipe) -> str:
    """The data set of another package, or the folder."""
    dataset = recipe.data.dataset or ""
    return dataset if "/" in dataset or not recipe.data.root else recipe.data.root


def _cards(run: Path, recipe: Recipe, log: Sequence[dict[str, Any]], metrics: Metrics | None) -> list[tuple[str, str]]:
    best, last, summary = best_line(log, recipe), log[-1], read_summary(run) or {}
    cards = [
        ("best top-1", f"{best['val_top1']:.2f}%"),
        ("after epoch", f"{best['epoch'] + 1} of {recipe.train.epochs}"),
    ]
    cards.append(("last top-1", f"{last['val_top1']:.2f}%"))
    if last.get("ema_top1") is not None:
        cards.append(("moving average", f"{last['ema_top1']:.2f}%"))
    if metrics:
        cards.append(("calibration error", f"{metrics.ece:.1f}%"))
    if "params" in summary:
        cards.append(("parameters", f"{summary['params']:,}"))
    if "seconds" in summary:
        cards.append(("training time", _duration(summary["seconds"])))
    return cards


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _curves(recipe: Recipe, log: Sequence[dict[str, Any]]) -> list[Drawing]:
    best = best_line(log, recipe)
    marker = "." if len(log) < MARKER_EPOCHS else None

    def draw(series: Iterable[tuple[str, str, str]], label: str) -> Any:
        def on_axis(axis: Any) -> None:
            for key, name, colour in series:
                known = [(line["epoch"] + 1, line[key]) for line in log if line.get(key) is not None]
                if known:
                    axis.plot(*zip(*known, strict=True), label=name, color=colour, marker=marker, linewidth=1.6)
            axis.axvline(best["epoch"] + 1, linestyle=":", linewidth=1.2, color=ink(), label="best epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set(xlabel="epoch", ylabel=label)
            axis.legend(frameon=False, fontsize=9)

        return on_axis

    text = f"Best epoch {best['epoch'] + 1}. The numbers are in the table below."
    return [
        draw_inline(
            "loss",
            draw([("train_loss", "training", "#0072b2"), ("val_loss", "validation", "#d55e00")], "loss"),
            "loss",
            f"Loss of training and validation in {len(log)} epochs",
            text,
        ),
        draw_inline(
            "top1",
            draw([("val_top1", "weights", "#d55e00"), ("ema_top1", "moving average", "#009e73")], "top-1 (%)"),
            "validation top-1",
            f"Validation top-1 in {len(log)} epochs, at best {best['val_top1']:.2f}%",
            text,
        ),
        draw_inline(
            "rate",
            draw([("lr", "rate", "#0072b2")], "learning rate"),
            "learning rate",
            f"Largest learning rate in {len(log)} epochs",
            text,
        ),
    ]


def _epoch_table(log: Sequence[dict[str, Any]]) -> list[list[str]]:
    columns = (
        ("lr", "{:.2e}"),
        ("train_loss", "{:.4f}"),
        ("val_loss", "{:.4f}"),
        ("val_top1", "{:.2f}%"),
        ("val_top5", "{:.2f}%"),
        ("ema_top1", "{:.2f}%"),
        ("images_per_s", "{:.0f}"),
    )
    rows = []
    for line in log:
        cells = [text.format(line[key]) if isinstance(line.get(key), int | float) else "-" for key, text in columns]
        rows.append([str(line["epoch"] + 1), *cells])
    return rows


def _machine(run: Path) -> list[tuple[str, str]]:
    """The lines of environment.json that a reader asks for; empty if it is not there."""
    try:
        found = read_json(run / "environment.json")
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError):
        return []
    packages = found.get("packages")
    rows = [
        ("device", found.get("device")),
        ("processes", found.get("world_size")),
        ("precision", found.get("precision")),
        ("cores, threads", f"{found['cores']}, {found['threads']}" if {"cores", "threads"} <= found.keys() else None),
        ("system", found.get("system")),
        ("eit", found.get("eit")),
        ("commit", found.get("commit")),
        ("Python", found.get("python")),
        ("packages", ", ".join(f"{k} {v}" for k, v in packages.items()) if isinstance(packages, dict) else None),
        ("starts", len(found.get("earlier_starts", ())) + 1),
        ("started by", found.get("command")),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _command(run: Path, recipe: Recipe) -> str:
    """The command that trains the same again, next to the run."""
    return shlex.join(["eit", "train", str(run / "recipe.yaml"), f"out={run}-again"])
