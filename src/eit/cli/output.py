"""What several commands print: errors, tables, JSON, and the name that the user called the program by."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from eit.errors import printable

if TYPE_CHECKING:
    from eit.training.trainer import Stopped


def print_error(error: Exception) -> None:
    """One line; if every rank has the same error, only from rank 0."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"eit: {printable(str(error))}", file=sys.stderr)
    elif not getattr(error, "__notes__", []):
        print(f"eit [rank {rank}]: {printable(str(error))}", file=sys.stderr)


def print_result(result: Any, as_json: bool, text: str) -> None:
    """`result` as JSON, or `text`, whose lines may hold names of files and classes."""
    print(json.dumps(result, indent=2) if as_json else "\n".join(map(printable, text.split("\n"))))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of numbers behind a column of names. The cells are rich markup: escape names."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eit.console import out

    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    if not out.is_terminal:  # in a file nothing is cut
        table.width = out.measure(table, options=out.options.update(max_width=1000)).maximum
    out.print(table, crop=False)


def program() -> str:
    """How the user called this command."""
    called = Path(sys.argv[0])
    return "python -m eit" if called.name == "__main__.py" else called.name if shutil.which("eit") else str(called)


def exit_stopped(stop: "Stopped") -> NoReturn:
    """End a run that a signal stopped, and that is saved."""
    from eit.distributed import is_main

    if is_main():
        print_error(stop)
    # torchrun would restart a process that ends with another status
    raise typer.Exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + stop.signum) from None
