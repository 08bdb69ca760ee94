"""`eit analyze MODEL... --data PATH`."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eit.cli.options import Device, Json, MaxPixels, Size, Workers, folder_to_write, start_alone
from eit.cli.output import print_table
from eit.errors import printable
from eit.files import expand_path
from eit.imports import quick_imports

if TYPE_CHECKING:
    from eit.analysis.compare import Comparison


def analyze(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            parser=expand_path,
            help="Weights files, run folders, the included weights digits; eit_mini, lsra/eit_mini; timm/NAME, "
            "torchvision/NAME. A quoted pattern ('runs/eit*') stands for several runs, which are shown as one curve.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            parser=expand_path,
            help="Analyse the images below this folder, or those of a data set.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(metavar="FOLDER", parser=expand_path, help="Write report.html, figures/ and csv/ into FOLDER."),
    ] = "analysis",
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Use at most N images, evenly spaced.")] = 1000,
    pictures: Annotated[int, typer.Option(metavar="N", min=0, max=8, help="Number of images to show one by one.")] = 4,
    bands: Annotated[
        bool, typer.Option("--bands", help="Also measure accuracy with noise in each frequency band.")
    ] = False,
    filters: Annotated[
        bool,
        typer.Option("--filters", help="Also measure accuracy with each layer's tokens low-passed and high-passed."),
    ] = False,
    rollout: Annotated[bool, typer.Option("--rollout", help="Also show attention rollout.")] = False,
    grad_cam: Annotated[
        bool, typer.Option("--grad-cam", help="Also show Grad-CAM; needs pip install 'eit[analysis]'.")
    ] = False,
    initial: Annotated[
        bool,
        typer.Option("--initial/--no-initial", help="Show each trained model next to its initial values."),
    ] = True,
    rho: Annotated[
        float, typer.Option(metavar="RHO", help="Count frequencies above RHO as high; 1 is the Nyquist frequency.")
    ] = 0.5,
    renormalize: Annotated[
        bool,
        typer.Option(
            "--renormalize/--no-renormalize",
            help="Leave attention to the class token out of the heads' attention distances.",
        ),
    ] = True,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images per batch.")] = 16,
    workers: Workers = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure frequencies, attention and class token of models.

    \b
    eit analyze runs/eit runs/vit --data photos
    eit analyze timm/vit_tiny_patch16_224 --data photos --out report
    eit analyze 'runs/eit*' 'runs/vit*' --data photos

    A quoted pattern groups runs. The report shows their mean with a band of one standard deviation.
    Groups are compared by the differences between runs trained with the same seed.
    """
    with quick_imports(freeze=True):
        from eit.analysis.compare import Options, compare
        from eit.analysis.findings import faults, summary
        from eit.analysis.inputs import check_names, choose_images
        from eit.analysis.report import write
        from eit.data.images import MAX_PIXELS

    used_device = start_alone(device, "eit analyze")
    folder = folder_to_write(out, "--out")
    check_names(names)
    labelled = "--bands" if bands else "--filters" if filters else False
    chosen = choose_images(data, images, labelled, max_pixels or MAX_PIXELS, without=folder / "figures")
    options = Options(
        size, initial, rho, renormalize, bands, filters, pictures, rollout, grad_cam, min(batch_size, images), workers
    )
    compared = compare(names, chosen, used_device, options)
    page = write(folder, compared, data, shlex.join(["eit", *sys.argv[1:]]))
    if as_json:
        found = dict(report=str(page), faults=faults(compared.measured), models=summary(compared.measured))
        print(json.dumps(found, indent=2))
    else:
        print_comparison(compared, page)


def print_comparison(compared: "Comparison", page: Path) -> None:
    from rich.markup import escape

    from eit.analysis.findings import LAYER_TABLE, TOKEN_TABLE, faults, layer_table, token_table

    measured = compared.measured
    for (head, rows), legend in ((layer_table(measured), LAYER_TABLE), (token_table(measured), TOKEN_TABLE)):
        print_table(head, [[escape(cell) for cell in row] for row in rows])
        print(legend)
    for line in faults(measured):
        print(printable(line))
    count = len(compared.images)
    print(printable(f"{page}: figures and numbers of {count:,} image{'s' if count > 1 else ''}"))
