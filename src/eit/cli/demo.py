"""`eit demo [MODEL...]`."""

from typing import Annotated

import typer

from eit.cli.options import Device, MaxPixels, start_alone
from eit.files import expand_path
from eit.imports import quick_imports


def demo(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            parser=expand_path,
            help="Weights files, run folders, names of included weights, or hf-hub:USER/NAME; "
            "default: the included weights.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Listen at this address; 0.0.0.0 lets other machines use the page.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=65535, help="Listen at this port; default: the first free from 7860 on."),
    ] = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
) -> None:
    """Try models on a local page, and look into their layers.

    \b
    eit demo
    eit demo runs/pets
    eit demo runs/eit runs/vit --port 8000

    Drop a picture, take one with the camera, draw, or pick an example. The page shows the most likely classes, the
    attention of the class token in each layer and head, and the frequencies of each layer; several models are shown
    next to each other. It needs pip install 'eit[demo]'.
    """
    with quick_imports(freeze=True):
        from eit.demo.page import serve

    serve(names or (), host, port, max_pixels, start_alone(device, "eit demo"))
