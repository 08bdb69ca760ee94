"""`eit report RUN`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from eit.cli.options import Device, Json, named_file, start_alone
from eit.errors import printable
from eit.files import expand_path
from eit.imports import quick_imports


def report(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", parser=expand_path, help="A run folder, such as runs/pets.", show_default=False),
    ],
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", parser=expand_path, help="Write the page to FILE.html; default: RUN/report.html."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            parser=expand_path,
            help="Read the images from this data set or folder of classes; default: the run's own data set.",
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(metavar="N", min=1, help="Look at no more than N validation images, evenly spaced.")
    ] = 5000,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write a page about a run: curves, mistakes, advice.

    \b
    eit report runs/pets
    eit report runs/pets --data pets --out pets.html

    It also has confusions, calibration, data, recipe and machine. The page is one file that needs no
    other. eit train writes it too, unless train.report=false.
    """
    file = named_file(out, "--out", ".html") if out else None
    with quick_imports(freeze=True):
        from eit.report.run import write_report

    written = write_report(Path(run), file, data, images, start_alone(device, "eit report"))
    if as_json:
        advice = [one._asdict() for one in written.advice]
        print(json.dumps(dict(report=str(written.page), missing=written.missing, advice=advice), indent=2))
        return
    for line in written.missing:
        print(printable(line))
    for one in written.advice:
        print(printable(f"{one.finding} {one.advice}"))
    print(printable(f"report {written.page}"))
