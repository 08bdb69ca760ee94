"""`eit predict CKPT IMAGE...`."""

import json
import sys
from typing import Annotated

import typer

from eit.cli.options import Checkpoint, Device, MaxPixels, device_for
from eit.cli.output import name_options, print_error
from eit.errors import UserError, printable
from eit.files import expand_path, text_lines


def predict(
    checkpoint: Checkpoint,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            parser=expand_path,
            help="Image files, folders of images, or - to read a list of files from stdin.",
            show_default=False,
        ),
    ],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Number of classes to print per image.")] = 5,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image, one per line.")] = False,
) -> None:
    """Print the most likely classes of images.

    \b
    eit predict digits 7.png
    eit predict runs/pets photos/ --top 3
    eit predict hf-hub:USER/pets cat.jpg --json

    If an image cannot be read, a line says so (with --json an object with `fault`) and the exit status is 2. The other
    images are still predicted.
    """
    from eit.distributed import start
    from eit.inference.exported_models import load
    from eit.inference.predict import expand
    from eit.inference.predict import predict as run

    listed = [file for name in images for file in (files_in_list(sys.stdin.buffer.read()) if name == "-" else [name])]
    files = expand(listed)
    if not files:
        raise UserError("no images: the list on stdin is empty; give one file per line")
    model = load(checkpoint).to(start(device_for(checkpoint, device)))
    faults = 0
    for prediction in run(model, files, top, max_pixels=max_pixels):
        if prediction.fault:
            faults += 1
            print_error(UserError(prediction.fault))
        if as_json:
            labels = [dict(label=name, probability=p) for name, p in prediction.labels]
            fault = dict(fault=name_options(prediction.fault)) if prediction.fault else {}
            print(json.dumps(dict(image=prediction.image, labels=labels) | fault), flush=True)
        elif not prediction.fault:
            text = "  ".join(f"{name} {100 * p:.1f}%" for name, p in prediction.labels)
            print(printable(prediction.image) + "  " + printable(text), flush=True)
    if faults:
        raise typer.Exit(2)


def files_in_list(content: bytes) -> list[str]:
    """The names in a list of files, one per line, in quotes or not."""
    lines = (line.strip() if line.strip()[0] in "\"'" else line for line in text_lines(content))
    return [line[1:-1] if len(line) > 2 and line[0] == line[-1] and line[0] in "\"'" else line for line in lines]
