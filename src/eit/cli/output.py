"""What several commands print: errors, tables, JSON, and the name that the user called the program by."""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from eit.errors import printable

if TYPE_CHECKING:
    from eit.training.trainer import Stopped


def prepare_streams() -> None:
    """Let stdin, stdout and stderr accept any file name: characters that the encoding lacks are printed as \\u72ac.

    What is written to a closed stream is lost, and a closed stdin is empty.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the whole process)
        elif hasattr(stream, "reconfigure"):  # not a replacement, as notebooks and test tools have
            stream.reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")


def drop_output() -> None:
    """Discard what is left to write to stdout when the process ends: its reader is gone, or its disk is full."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_options: set[str] = set()  # of the command that runs; none if it takes the keys of a recipe


def use_options_of(command: Any) -> None:
    """Let messages name the options of this command in place of recipe keys, unless it takes recipe keys."""
    global _options
    _options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    if any(parameter.name == "overrides" for parameter in command.params):
        _options = set()


def has_option(option: str) -> bool:
    return option in _options


def name_options(text: str) -> str:
    """`text` with the command's options in place of recipe keys.

    data.max_pixels=9 becomes --max-pixels 9, and data.pixel_range=[0,9] becomes --pixel-range 0 9.
    """

    def option(match: re.Match[str]) -> str:
        key, value = match[1].replace("_", "-"), match[2]
        name = "--data" if key == "root" else f"--{key}"
        if name not in _options:
            return value if key == "root" and value and _options else match[0]  # the argument PATH, not an option
        if value and value.startswith("[") and key != "root":
            value = value.strip("[]").replace(",", " ")
        return name if value is None else f"{name} {value}"

    return re.sub(r"(?<![\w.])(?:data|train)\.(\w+)(?:=(\[[\w.+-]+,[\w.+-]+\](?!\w)|[^\s:;,)]+))?", option, text)


def print_error(error: Exception) -> None:
    """One line; if every rank has the same error, only from rank 0."""
    rank = os.environ.get("RANK", "0")
    text = printable(name_options(str(error)))
    with suppress(OSError):  # nobody reads it any more
        if rank == "0":
            print(f"eit: {text}", file=sys.stderr)
        elif not getattr(error, "__notes__", []):
            print(f"eit [rank {rank}]: {text}", file=sys.stderr)


def print_result(result: Any, as_json: bool, text: str) -> None:
    """`result` as JSON, or `text`, whose lines may hold names of files and classes."""
    print(json.dumps(result, indent=2) if as_json else "\n".join(map(printable, name_options(text).split("\n"))))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[str] = ()) -> None:
    """Columns of numbers (or `text`) behind a column of names. The cells are rich markup: escape names."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eit.console import out

    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "left" if column.header in text else "right"
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
