"""`eit predict CKPT IMAGE...`."""

import json
import sys
from typing import Annotated

import typer

from eit.cli.options import Checkpoint, Device, MaxPixels, device_for
from eit.cli.output import print_error
from eit.errors import UserError, printable
from eit.files import expand_path


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

    eit predict digits 7.png

    An image that cannot be read gets an error line and exit status 2; the other images are still predicted.
    """
    from eit.distributed import start
    from eit.inference.exported_models import load
    from eit.inference.predict import expand
    from eit.inference.predict import predict as run

    listed = [line for name in images for line in (sys.stdin.read().splitlines() if name == "-" else [name]) if line]
    files = expand(listed)
    if not files:
        raise UserError("no images: the list on stdin is empty; give one file per line")
    model = load(checkpoint).to(start(device_for(checkpoint, device)))
    unreadable = 0
    for prediction in run(model, files, top, max_pixels=max_pixels):
        if prediction.fault:
            unreadable += 1
            print_error(UserError(prediction.fault))
        elif as_json:
            labels = [dict(label=name, probability=p) for name, p in prediction.labels]
            print(json.dumps(dict(image=prediction.image, labels=labels)))
        else:
            text = "  ".join(f"{name} {100 * p:.1f}%" for name, p in prediction.labels)
            print(printable(prediction.image) + "  " + printable(text), flush=True)
    if unreadable:
        raise typer.Exit(2)
