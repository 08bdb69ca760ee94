"""`eit predict CKPT IMAGE...`."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eit.cli.options import Checkpoint, Device, MaxPixels, device_for, named_file
from eit.cli.output import name_options, print_error
from eit.errors import UserError, printable
from eit.files import expand_path, text_lines
from eit.imports import quick_imports

if TYPE_CHECKING:
    from eit.inference.predict import Prediction


def predict(
    checkpoint: Checkpoint,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE...",
            parser=expand_path,
            help="Image files, folders of images, or - to read a list of files from stdin; default: the sample images "
            "of included weights.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Number of classes to print per image.")] = 5,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            parser=expand_path,
            help="Write a table to FILE (.csv: image, class1, probability1, ..., fault) or the JSON lines of --json "
            "(.jsonl), instead of printing.",
        ),
    ] = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image, one per line.")] = False,
) -> None:
    """Print the most likely classes of images.

    \b
    eit predict digits 7.png
    eit predict runs/pets photos --top 3 --out predictions.csv
    eit predict hf-hub:USER/pets cat.jpg --json

    If an image cannot be read, a line says so (with --json an object with `fault`) and the exit status is 2. The other
    images are still predicted.
    """
    table = table_to_write(out) if out else None
    if table and as_json:
        raise UserError(
            f"--out {out} and --json cannot be combined: --json prints; give --out a file that "
            "ends in .jsonl, or leave one out"
        )
    with quick_imports(freeze=True):
        from eit.distributed import start
        from eit.inference.exported_models import load
        from eit.inference.predict import expand
        from eit.inference.predict import predict as run
        from eit.weights.load import sample_images

    if not images and not (images := sample_images(checkpoint)):
        raise UserError(f"no images: name files or folders after {checkpoint}; only included weights have samples")
    listed = [file for name in images for file in (files_in_list(sys.stdin.buffer.read()) if name == "-" else [name])]
    files = expand(listed)
    if not files:
        raise UserError("no images: the list on stdin is empty; give one file per line")
    model = load(checkpoint).to(start(device_for(checkpoint, device)))
    faults = 0
    show = print_json if as_json else print_line
    with write_table(table, min(top, len(model.card.classes))) if table else nullcontext(show) as report:
        for prediction in run(model, files, top, max_pixels=max_pixels):
            if prediction.fault:
                faults += 1
                print_error(UserError(prediction.fault))
            report(prediction)
    if table:
        print(f"{out}: {len(files)} images" + (f", {faults} of them could not be read" if faults else ""))
    if faults:
        raise typer.Exit(2)


def print_line(prediction: "Prediction") -> None:
    if not prediction.fault:
        text = "  ".join(f"{name} {100 * p:.1f}%" for name, p in prediction.labels)
        print(printable(prediction.image) + "  " + printable(text), flush=True)


def print_json(prediction: "Prediction") -> None:
    print(json_line(prediction), flush=True)


def json_line(prediction: "Prediction") -> str:
    labels = [dict(label=name, probability=p) for name, p in prediction.labels]
    fault = dict(fault=name_options(prediction.fault)) if prediction.fault else {}
    return json.dumps(dict(image=prediction.image, labels=labels) | fault)


def table_to_write(name: str) -> Path:
    """The file of --out: its ending and its folder are checked before anything is computed."""
    file = named_file(name, "--out", ".csv", ".jsonl")
    if file.is_dir():
        raise UserError(f"--out {name}: it is a folder; give another name")
    return file


@contextmanager
def write_table(file: Path, top: int) -> Iterator[Callable[["Prediction"], None]]:
    """A function that adds a prediction to a .csv or .jsonl file.

    A row of a .csv has image, class1, probability1 (in 0..1), ..., classN, probabilityN, and fault, empty if there is
    none.
    """
    # Names of files need not be UTF-8, but tables are read as it
    with open(file, "w", encoding="utf-8", errors="backslashreplace", newline="") as opened:
        if file.suffix.lower() == ".jsonl":
            yield lambda prediction: print(json_line(prediction), file=opened, flush=True)
            return
        table = csv.writer(opened)
        table.writerow(
            ["image", *(f"{name}{i}" for i in range(1, top + 1) for name in ("class", "probability")), "fault"]
        )

        def add(prediction: "Prediction") -> None:
            cells = [cell for pair in prediction.labels for cell in pair] or [""] * (2 * top)
            table.writerow([prediction.image, *cells, name_options(prediction.fault or "")])
            opened.flush()

        yield add


def files_in_list(content: bytes) -> list[str]:
    """The names in a list of files, one per line, in quotes or not."""
    lines = (line.strip() if line.strip()[0] in "\"'" else line for line in text_lines(content))
    return [line[1:-1] if len(line) > 2 and line[0] == line[-1] and line[0] in "\"'" else line for line in lines]
