"""`eit data check | show | prepare | shard`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from eit.cli.help import Program
from eit.cli.options import (
    Json,
    MaxPixels,
    Overrides,
    RecipeName,
    ValFraction,
    file_to_write,
)
from eit.cli.output import print_result
from eit.files import expand_path
from eit.imports import quick_imports

PixelRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="The values of black and white in grey images of more than 8 bits, as data.pixel_range sets them; "
        "default: 0 and 65535, and float images are refused.",
    ),
]

data = Program(
    help="""Check, show, prepare or shard a data set.

    \b
    eit data check pets
    eit data show cifar10 data.root=pets
    eit data shard imagenet shards
    """
)


@data.command()
def check(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            parser=expand_path,
            help="A data set folder in any layout that eit train reads, or sklearn:digits.",
            show_default=False,
        ),
    ],
    val_fraction: ValFraction = None,
    max_pixels: MaxPixels = None,
    pixel_range: PixelRange = None,
    as_json: Json = False,
) -> None:
    """Check every image of a data set for problems.

    \b
    eit data check pets
    eit data check scans --pixel-range 0 4095

    The exit status is 1 if training would fail. Warnings are about problems that do not stop training.
    """
    with quick_imports(freeze=True):
        from eit.data.datasets import check as run
        from eit.data.images import MAX_PIXELS

    report = run(path, max_pixels or MAX_PIXELS, val_fraction, pixel_range)
    print_result(report, as_json, check_text(report))
    if not report["ok"]:
        raise typer.Exit(1)


@data.command()
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        str, typer.Option(metavar="FILE", parser=expand_path, help="Write the picture to FILE (.png, .pdf or .svg).")
    ] = "grid.png",
    images: Annotated[
        int, typer.Option(metavar="N", min=1, max=400, help="Number of training images, and of validation images.")
    ] = 24,
    epoch: Annotated[int, typer.Option(metavar="N", min=0, help="Show the first batch of epoch N, from 0 on.")] = 0,
) -> None:
    """Draw training and validation images as the model sees them.

    \b
    eit data show digits
    eit data show cifar10 data.root=PATH --out grid.png

    The picture has images of the first training batch, augmented and mixed, and validation images.
    """
    with quick_imports(freeze=True):
        from eit.config import load_recipe
        from eit.plots import grid
        from eit.training.preview import tiles

    file = file_to_write(out, "--out")
    trained, validated = tiles(load_recipe(recipe, overrides or ()), images, epoch)
    grid([(f"training, first step of epoch {epoch + 1}", trained), ("validation", validated)], file)
    print(f"{out}: {len(trained)} training and {len(validated)} validation images")


@data.command()
def prepare(
    name: Annotated[
        Literal["imagenet"], typer.Argument(metavar="NAME", help="The data set: imagenet.", show_default=False)
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="ARCHIVES", parser=expand_path, help="The folder of the ILSVRC2012 archives.", show_default=False
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", parser=expand_path, help="The folder to write train/ and val/ into.", show_default=False
        ),
    ],
    as_json: Json = False,
) -> None:
    """Unpack the ILSVRC2012 archives into class folders.

    \b
    eit data prepare imagenet DOWNLOADS imagenet
    eit data prepare imagenet ~/Downloads /data/imagenet

    Needed, as downloaded, are ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz. Run
    the same command again to resume; the images of every class are counted against the devkit.
    """
    with quick_imports(freeze=True):
        from eit.data.prepare_imagenet import prepare_imagenet

    done = prepare_imagenet(Path(source), Path(target))
    text = f"{done['folder']}: {done['train']:,} training and {done['val']:,} validation images of {done['classes']}"
    print_result(done, as_json, f"{text} classes")


@data.command()
def shard(
    path: Annotated[
        str, typer.Argument(metavar="PATH", parser=expand_path, help="A data set, as in data.root.", show_default=False)
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", parser=expand_path, help="A new folder to write the shards into.", show_default=False
        ),
    ],
    count: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of training shards; best a multiple of the number of loader processes on all ranks together.",
        ),
    ] = 64,
    val_count: Annotated[int, typer.Option(metavar="N", min=1, help="Number of validation shards.")] = 16,
    val_fraction: ValFraction = None,
    max_pixels: MaxPixels = None,
    pixel_range: PixelRange = None,
    as_json: Json = False,
) -> None:
    """Pack a data set into webdataset shards.

    \b
    eit data shard imagenet shards
    eit data shard pets shards --count 4 --val-count 1

    With data.root=FOLDER training reads the shards in the same batches as the data set. With data.dataset=wds/NAME it
    streams them, which also works from an object store.
    """
    with quick_imports(freeze=True):
        from eit.config import data_config
        from eit.data.datasets import open_data
        from eit.data.images import MAX_PIXELS
        from eit.data.shards import write_shards

    most = max_pixels or MAX_PIXELS
    config = data_config(root=path, val_fraction=val_fraction, max_pixels=most, pixel_range=pixel_range)
    train_images, val_images = open_data(config)
    done = write_shards(train_images, val_images, Path(out), count, val_count)
    print_result(done, as_json, f"{out}: {done['shards']} shards of {done['train']:,} + {done['val']:,} images")


def check_text(report: dict[str, Any]) -> str:
    lines = []
    for name, part in report["splits"].items():
        counts = part["classes"].values()
        lines.append(
            f"{name}: {part['images']:,} images of {len(counts)} classes, {min(counts)} to {max(counts)} per class"
        )
        lines.append("  sizes: " + ", ".join(f"{s['width']}x{s['height']} ({s['images']:,})" for s in part["sizes"]))
        ranges = [
            f"{kind}: {seen['lowest']:,.6g} to {seen['highest']:,.6g} ({seen['images']:,})"
            for kind, seen in part["pixels"].items()
        ]
        lines.append("  pixel values: " + "; ".join(ranges))
        lines += [f"  unreadable: {fault}" for fault in part["unreadable"][:20]]
        if len(part["unreadable"]) > 20:
            lines.append(f"  and {len(part['unreadable']) - 20} more unreadable (--json has all)")
    for kind in ("note", "warning", "problem"):
        lines += [f"{kind}: {text}" for text in report[f"{kind}s"]]
    verdict = "can be trained on, but see the warnings" if report["warnings"] else "ready to train"
    return "\n".join([*lines, verdict if report["ok"] else "not ready to train"])
