"""`eit export CKPT --format FORMAT`."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eit.cli.options import Checkpoint, Json, MaxPixels
from eit.cli.output import print_result, program
from eit.errors import UserError
from eit.files import expand_path
from eit.imports import quick_imports

if TYPE_CHECKING:
    from eit.export.exporter import Export
    from eit.weights.card import Card

Format = Literal["onnx", "openvino", "torch"]


def export(
    checkpoint: Checkpoint,
    format: Annotated[
        Format, typer.Option(metavar="onnx|openvino|torch", help="Write this format; torch: a torch.export program.")
    ] = "onnx",
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            parser=expand_path,
            help="Write to FILE; default: next to the weights, with their name; -int8 is added for --int8, and -batchN "
            "for --fixed N.",
        ),
    ] = None,
    fixed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=4096,
            help="Fix the batch at N images, and height and width at the model's size: faster in OpenVINO.",
        ),
    ] = None,
    int8: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            parser=expand_path,
            help="Quantise to int8, with the images of this folder or data set to choose value ranges; default: fp32.",
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of calibration images for --int8, evenly spaced.")
    ] = 256,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            parser=expand_path,
            help="Measure the accuracy of --int8 on this data set or folder of classes; default: the run's own; if "
            "that is not on this machine, the images of --int8 that were not used for the ranges of activations.",
        ),
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option(
            metavar="POINTS", min=0, max=100, help="Keep --int8 only if it costs at most so many points of top-1."
        ),
    ] = 2.0,
    max_pixels: MaxPixels = None,
    as_json: Json = False,
) -> None:
    """Write weights as an ONNX, OpenVINO or torch.export file.

    \b
    eit export runs/pets
    eit export runs/pets --format openvino --fixed 1 --out pets.xml
    eit export runs/pets --int8 pets/train

    The file is kept only if its results match torch's. eit predict and eit eval accept it. Batch,
    height and width are dynamic, unless --fixed is given; classes and preprocessing are in the metadata.
    """
    if data and not int8:
        raise UserError(f"--data {data} is for --int8, whose accuracy is measured on it: give --int8 PATH too")
    with quick_imports(freeze=True):
        from eit.export import exporter
        from eit.weights.load import load

    file = Path(out) if out else exporter.default_file(checkpoint, format, int8 is not None, fixed)
    exporter.check_request(format, file, int8 is not None)
    model = load(checkpoint)
    calibration = exporter.open_calibration(model.card, int8, images, data, max_pixels) if int8 else None
    done = exporter.export(model, file, format, calibration, max_drop, fixed)
    print_result(json.loads(json.dumps(asdict(done), default=str)), as_json, export_text(done, model.card))


def export_text(done: "Export", card: "Card") -> str:
    parity = done.parity
    sizes = " and ".join(f"{height}x{width}" for height, width in parity.sizes)
    top1 = f"top-1 equal on {parity.images} photos"
    if parity.ties:
        shown = parity.images * len(parity.sizes)
        top1 = f"top-1 equal on {shown - parity.ties} of {shown} photos, tied on the others,"
    lines = [
        f"{done.file}: {card.model}, {len(card.classes)} classes, {done.bytes / 1e6:.2f} MB; "
        + (f"dynamic: {', '.join(done.dynamic)}" if done.dynamic else f"fixed batch of {done.fixed}"),
        f"{done.runtime} and torch agree: {top1} at {sizes}, logits within {parity.max_error:.1e}",
    ]
    if "height" not in done.dynamic:
        lines.insert(1, f"height and width are fixed at {card.size}")
    if int8 := done.int8:
        lines[-1] = f"before int8: {lines[-1]}"
        lines.append(
            f"int8: top-1 {int8.top1:.2f}%, fp32 {int8.fp32_top1:.2f}%, on {int8.images:,} images; "
            f"{int8.fp32_bytes / 1e6:.2f} MB in fp32; ranges of activations from {int8.calibrated_on} images"
        )
    return "\n".join([*lines, f"next: {program()} predict {shlex.quote(str(done.file))} IMAGE..."])
