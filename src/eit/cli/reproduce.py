"""`eit reproduce list | run | plan | tables | again | curve`."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from eit.cli.help import Program
from eit.cli.options import Json, RedirectingGroup, refuse_before_command
from eit.cli.output import exit_stopped, print_error, print_result
from eit.errors import UserError, few
from eit.files import expand_path
from eit.imports import quick_imports

if TYPE_CHECKING:
    from eit.reproduce.experiment import Cell, Experiment

T = TypeVar("T")


class ReproduceGroup(RedirectingGroup):
    """Answers old spellings, `eit reproduce NAME [--plan]`, with the command that replaced them."""

    def redirect(self, words: list[str]) -> list[str] | None:
        for number, word in enumerate(words):
            option, given, value = word.partition("=")
            if (command := option.removeprefix("--")) in (
                "list",
                "plan",
                "tables",
                "again",
                "curve",
            ) and option != command:
                rest = words[:number] + words[number + 1 :]
                if command in ("again", "curve") and not given:
                    value = rest.pop(number) if number < len(rest) else "RUN"
                name = rest.pop(0) if rest and not rest[0].startswith("-") else "NAME"
                right = dict(list=[], curve=[value], again=[name, value, *rest])
                return ["reproduce", command, *right.get(command, [name, *rest])]
        if words[0].startswith("-"):
            return None if words[0] in ("-h", "--help", "--json") else ["reproduce", "run", "NAME", *words]
        from eit.reproduce.experiment import experiment_names

        is_experiment = words[0] in experiment_names() or words[0].endswith((".yaml", ".yml"))
        return ["reproduce", "run", *words] if is_experiment else None


reproduce = Program(cls=ReproduceGroup, invoke_without_command=True)


# -- Options ----------------------------------------------------------------------------------------------------------


def complete_experiment(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from eit.reproduce.experiment import experiment_names

    return [name for name in experiment_names() if name.startswith(incomplete)]


Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        parser=expand_path,
        help="An included experiment (eit reproduce list), or PATH.yaml.",
        show_default=False,
        autocompletion=complete_experiment,
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="BUDGET",
        help="Choose how much is trained (eit reproduce list); default: short, or the experiment's first.",
    ),
]
Results = Annotated[
    str,
    typer.Option(
        metavar="FOLDER", parser=expand_path, help="Keep the runs in FOLDER: each is in FOLDER/NAME/BUDGET/RUN."
    ),
]
Roots = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=PATH",
        help="Read the data set NAME from PATH; repeatable; default: the path in the experiment.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="PART", help="Choose runs with PART in their name; repeatable; default: all runs."),
]


def _load(name: str, budget: str | None) -> tuple["Experiment", str, list["Cell"]]:
    """The experiment, the budget, and the runs of this budget."""
    from eit.reproduce.experiment import load

    experiment = load(name)
    chosen = budget or experiment.default_budget
    return experiment, chosen, experiment.cells(chosen)


def _choose(cells: Sequence["Cell"], only: Sequence[str], name: str) -> list["Cell"]:
    """The runs with one of the texts `only` in their name; without texts, all of them."""
    chosen = [cell for cell in cells if not only or any(text in cell.name for text in only)]
    if not chosen:
        raise UserError(f"--only {' '.join(only)}: no run of {name} has this in its name; a name is {cells[0].name}")
    return chosen


def _roots(words: Sequence[str], cells: Sequence["Cell"]) -> dict[str, str]:
    """Data set -> folder, of words NAME=PATH."""
    known = list(dict.fromkeys(cell.data for cell in cells))
    roots: dict[str, str] = {}
    for word in words:
        key, _, path = word.partition("=")
        path = expand_path(path)
        if not (key and path):
            raise UserError(f"--data {word} is not NAME=PATH, such as --data {known[0]}=PATH")
        if roots.setdefault(key, path) != path:
            raise UserError(f"--data {key}=... is given twice, with {roots[key]} and {path}: give one of them")
    if unknown := set(roots) - set(known):
        raise UserError(f"--data {min(unknown)}=... is not a data set of this experiment; they are {', '.join(known)}")
    return roots


# -- Commands ---------------------------------------------------------------------------------------------------------


@reproduce.callback()
def group(context: typer.Context, as_json: Json = False) -> None:
    """Test the paper's claims with training experiments.

    \b
    eit reproduce list
    eit reproduce run small_data --budget smoke
    """
    refuse_before_command(context, json=as_json)
    if context.invoked_subcommand is None:
        list_experiments(as_json)


@reproduce.command(name="list")
def list_experiments(as_json: Json = False) -> None:
    """List the included experiments.

    \b
    eit reproduce list
    eit reproduce list --json

    Each has what it shows, what it costs, and which results would refute the claim.
    """
    from eit.reproduce.experiment import experiment_names, load

    experiments = [load(name) for name in experiment_names()]
    if as_json:
        keys = ("name", "shows", "refuted")
        rows = [
            {key: getattr(e, key) for key in keys} | dict(budgets={n: b.cost for n, b in e.runs.budgets.items()})
            for e in experiments
        ]
        print(json.dumps(rows, indent=2))
        return
    for e in experiments:
        print(f"{e.name}\n    shows: {e.shows}\n    refuted if: {e.refuted}")
        if e.of:
            print(f"    uses the runs of {e.of}, with their budgets")
        else:
            for budget in e.budgets:
                print(f"    --budget {budget}: {len(e.cells(budget))} runs; {e.budgets[budget].cost}")
    print("run one with: eit reproduce run NAME --budget BUDGET")


@reproduce.command()
def run(
    name: Name,
    budget: BudgetOption = None,
    results: Results = "results",
    data: Roots = None,
    only: Only = None,
    as_json: Json = False,
) -> None:
    """Train and judge an experiment.

    \b
    eit reproduce run small_data --budget smoke --results mine
    eit reproduce run ablation --data cifar10=PATH --only vit

    Its runs are trained and measured; tables, a figure and verdicts are written to FOLDER/NAME/BUDGET. Finished runs
    are kept, a stopped run is resumed. The tables use only the runs in --results.
    """
    experiment, budget, cells = _load(name, budget)
    roots = _roots(data or (), cells)
    chosen = _choose(cells, only or (), name)
    with quick_imports(freeze=True):
        from eit import distributed
        from eit.reproduce import runs

    diverged = _train(lambda: runs.run(chosen, experiment.runs.measure, Path(results), roots))
    _print_tables(experiment, budget, Path(results), as_json, diverged)
    if diverged:
        if distributed.is_main():
            what = "was not finite; the lines above say where, and the same command tries again"
            print_error(FloatingPointError(f"{len(diverged)} of {len(chosen)} runs: {few(diverged)}: the loss {what}"))
        raise typer.Exit(1)


@reproduce.command()
def plan(
    name: Name,
    budget: BudgetOption = None,
    results: Results = "results",
    data: Roots = None,
    only: Only = None,
    images_per_s: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            min=0.001,
            help="Estimate hours from this number of images per second, all processes together; default: no hours.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the runs as eit train commands, with their cost.

    \b
    eit reproduce plan small_data --budget smoke
    eit reproduce plan imagenet --images-per-s 8000

    Nothing is trained.
    """
    if images_per_s is not None and not math.isfinite(images_per_s):
        raise UserError(f"--images-per-s {images_per_s} is not a rate: give a number, such as 8000")
    _, _, cells = _load(name, budget)
    roots = _roots(data or (), cells)
    from eit.reproduce.plan import plan_runs, plan_text

    rows = plan_runs(_choose(cells, only or (), name), Path(results), roots, images_per_s)
    print_result(dict(runs=[asdict(row) for row in rows]), as_json, plan_text(rows))


@reproduce.command()
def tables(name: Name, budget: BudgetOption = None, results: Results = "results", as_json: Json = False) -> None:
    """Write tables, figure and verdicts of finished runs.

    \b
    eit reproduce tables frequency --budget smoke
    eit reproduce tables small_data --results mine

    Nothing is trained; weights are not needed.
    """
    with quick_imports(freeze=True):
        from eit import distributed

    experiment, budget, _ = _load(name, budget)
    distributed.start()
    _print_tables(experiment, budget, Path(results), as_json)


@reproduce.command()
def again(
    name: Name,
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="The run to repeat, such as digits-eit-seed-0.", show_default=False),
    ],
    budget: BudgetOption = None,
    results: Results = "results",
    data: Roots = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", parser=expand_path, help="Train in this run folder; default: runs/again/RUN."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a finished run a second time, and compare.

    \b
    eit reproduce again small_data digits-vit-seed-0 --budget smoke
    eit reproduce again small_data digits-vit-seed-0 --out runs/second

    On the same machine and versions, both runs are identical. Elsewhere, top-1 may differ by three standard deviations
    over seeds; the exit status is 1 if it differs by more.
    """
    experiment, budget, cells = _load(name, budget)
    roots = _roots(data or (), cells)
    cell = next((cell for cell in cells if cell.name == run), None)
    if cell is None:
        raise UserError(f"RUN {run}: {name} has no run of this name with --budget {budget}; a name is {cells[0].name}")
    with quick_imports(freeze=True):
        from eit import distributed
        from eit.reproduce import runs

    second = _train(lambda: runs.rerun(cell, experiment, Path(results), roots, Path(out or f"runs/again/{run}")))
    if distributed.is_main():
        print_result(asdict(second) | dict(agrees=second.agrees), as_json, str(second))
    raise typer.Exit(0 if second.agrees else 1)


@reproduce.command()
def curve(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="RUN_FOLDER",
            parser=expand_path,
            help="A run of the experiment imagenet, finished or not.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Compare an ImageNet run with the published epochs.

    \b
    eit reproduce curve results/imagenet/full/imagenet-mini
    eit reproduce curve runs/imagenet --json
    """
    from eit.reproduce.published import compare_curve

    compared = compare_curve(Path(folder))
    print_result(asdict(compared), as_json, str(compared))


def _train(function: Callable[[], T]) -> T:
    """Call a function that trains; a signal ends the process with the run saved."""
    with quick_imports(freeze=True):
        from eit import distributed
        from eit.memory import keep_freed
        from eit.training.trainer import Stopped

    keep_freed()
    distributed.start()
    try:
        return function()
    except Stopped as stop:
        exit_stopped(stop)


def _print_tables(
    experiment: "Experiment", budget: str, results: Path, as_json: bool, diverged: Sequence[str] = ()
) -> None:
    """Build the page of an experiment from its finished runs, and print it."""
    with quick_imports(freeze=True):
        from eit import distributed
        from eit.reproduce.runs import read_results
        from eit.reproduce.tables import build, verdicts

    if not read_results(experiment, budget, results) and not diverged:
        folder = results / experiment.runs.name / budget
        raise UserError(f"{folder} has no finished run: train some with eit reproduce run, or give another --results")
    if distributed.is_main():
        page = build(experiment, budget, results)
        print_result(
            verdicts(experiment, budget, results) if as_json else None,
            as_json,
            f"{page.read_text(encoding='utf-8')}\n{page}",
        )
