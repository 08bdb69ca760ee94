"""`eit train RECIPE [KEY=VALUE...]`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from eit.cli.options import Json, Overrides, complete_recipe
from eit.cli.output import exit_stopped, print_result, program
from eit.cli.recipes import list_recipes
from eit.files import expand_path


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
    as_json: Json = False,
) -> None:
    """Train a model from a recipe, or resume a stopped run.

    eit train cifar10 data.root=PATH name=mine train.epochs=100

    The run folder is runs/NAME, or out=FOLDER. Its recipe.yaml has every key with its value. Copy it and change its
    name to make a recipe of your own.
    """
    if recipe is None:
        list_recipes(as_json)
        return
    from eit.config import load_recipe

    resolved = load_recipe(recipe, overrides or ())
    from eit import distributed
    from eit.memory import keep_freed
    from eit.training.trainer import Stopped
    from eit.training.trainer import train as run

    keep_freed()
    try:
        summary = run(resolved)
    except Stopped as stop:
        exit_stopped(stop)
    if distributed.is_main():
        from eit.report.run import write_after_training

        folder = str(resolved.run_folder())
        page = write_after_training(Path(folder), distributed.start(resolved.train.device))
        print_result(
            summary | dict(folder=folder, report=page and str(page)), as_json, summary_text(summary, folder, page)
        )


def summary_text(summary: dict[str, Any], folder: str, page: Path | None = None) -> str:
    quoted = shlex.quote(folder)
    return (
        f"top-1 {summary['last_top1']:.2f}% after the last of {summary['epochs']} epochs "
        f"(best {summary['best_top1']:.2f}% after epoch {summary['best_epoch'] + 1})\n"
        f"run folder {folder}\n"
        + (f"report {page}\n" if page else "")
        + f"next: {program()} eval {quoted}    {program()} predict {quoted} IMAGE..."
    )
