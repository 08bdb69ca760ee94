"""`eit train RECIPE [KEY=VALUE...]` and `eit finetune FOLDER [KEY=VALUE...]`."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from eit.cli.options import Json, Overrides, complete_recipe
from eit.cli.output import exit_stopped, print_result, program
from eit.cli.recipes import list_recipes
from eit.errors import UserError
from eit.files import expand_path
from eit.imports import quick_imports

Root = Annotated[
    str | None, typer.Option("--data", metavar="FOLDER", parser=expand_path, help="The data set: data.root=FOLDER.")
]
Epochs = Annotated[int | None, typer.Option(metavar="N", help="Passes over the training images: train.epochs=N.")]
TrainDevice = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="auto, cpu, mps, cuda or cuda:N: train.device=DEVICE.")
]
Out = Annotated[str | None, typer.Option(metavar="FOLDER", parser=expand_path, help="The run folder: out=FOLDER.")]
Baseline = Annotated[
    bool,
    typer.Option(
        "--baseline", help="Also print the accuracy of two simple methods on the same images, to compare with."
    ),
]


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            parser=expand_path,
            help="An included recipe, or PATH.yaml; default: print the included recipes.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Overrides = None,
    data: Root = None,
    epochs: Epochs = None,
    device: TrainDevice = None,
    out: Out = None,
    baseline: Baseline = False,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe, or resume a stopped run.

    \b
    eit train digits
    eit train cifar10 data.root=PATH name=mine train.epochs=100

    The run folder is runs/NAME, or out=FOLDER. Its recipe.yaml has every key with its value. Copy it and change its
    name to make a recipe of your own.
    """
    if recipe is None:
        list_recipes(as_json)
        return
    run(recipe, _words(overrides, data, epochs, device, out), baseline, as_json)


def finetune(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            parser=expand_path,
            help="A folder with one folder of images per class, or with train/ and val/ that have those.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    epochs: Epochs = None,
    device: TrainDevice = None,
    out: Out = None,
    baseline: Baseline = False,
    as_json: Json = False,
) -> None:
    """Train on your own photos, from the included weights.

    \b
    eit finetune pets
    eit finetune pets train.epochs=20 data.image_size=64

    Short for eit train photos data.root=FOLDER name=FOLDER. Each setting that is chosen to suit the photos
    is printed, with the key that changes it.
    """
    if not Path(folder).is_dir():
        what = "is a file" if Path(folder).exists() else "does not exist"
        raise UserError(f"{folder} {what}: give a folder with one folder of images per class")
    words = _words(overrides, folder, epochs, device, out)
    if not any(word.startswith(("name=", "out=")) for word in words):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(folder).resolve().name).strip("-._")
        words.append(f"name={name or 'photos'}")
    run("photos", words, baseline, as_json)


def _words(
    overrides: Sequence[str] | None, data: str | None, epochs: int | None, device: str | None, out: str | None
) -> list[str]:
    """The `key=value` words, with those that options stand for."""
    words = list(overrides or ())
    options = (
        ("--data", "data.root", data),
        ("--epochs", "train.epochs", epochs),
        ("--device", "train.device", device),
        ("--out", "out", out),
    )
    for option, key, value in options:
        if value is None:
            continue
        if other := next((word for word in words if word.startswith(f"{key}=")), None):
            raise UserError(f"{value if option == '--data' else option} and {other}: give one of the two")
        words.append(f"{key}={value}")
    return words


def run(recipe: str, words: Sequence[str], baseline: bool, as_json: bool) -> None:
    """Train, and print the result."""
    from eit.config import load_recipe
    from eit.console import say

    resolved = load_recipe(recipe, words, say)
    with quick_imports(freeze=True):
        from eit import distributed
        from eit.memory import keep_freed
        from eit.training.trainer import Stopped
        from eit.training.trainer import train as run_recipe

    keep_freed()
    try:
        summary = run_recipe(resolved)
    except Stopped as stop:
        exit_stopped(stop)
    if not distributed.is_main():
        return
    from eit.report.run import write_after_training

    folder = Path(summary["folder"])
    page = write_after_training(folder, distributed.start(resolved.train.device))
    summary["report"] = page and str(page)
    if baseline:
        from eit.training.baselines import measure_baselines
        from eit.training.run_folder import read_recipe

        summary["baselines"] = measure_baselines(read_recipe(folder))
    print_result(summary, as_json, summary_text(summary))


def summary_text(summary: dict[str, Any]) -> str:
    quoted = shlex.quote(summary["folder"])
    lines = [
        f"top-1 {summary['last_top1']:.2f}% after the last of {summary['epochs']} epochs "
        f"(best {summary['best_top1']:.2f}% after epoch {summary['best_epoch'] + 1})"
        f"{', stopped early' if summary.get('stopped_early') else ''}",
        *([baseline_text(summary)] if "baselines" in summary else []),
        f"run folder {summary['folder']}",
        *([f"report {summary['report']}"] if summary["report"] else []),
        f"next: {program()} eval {quoted}    {program()} predict {quoted} IMAGE...",
    ]
    return "\n".join(lines)


def baseline_text(summary: dict[str, Any]) -> str:
    rows = {"this run, best epoch": summary["best_top1"], **summary["baselines"]}
    return "\n".join(f"  {name:<38} {top1:6.2f}%" for name, top1 in rows.items())
