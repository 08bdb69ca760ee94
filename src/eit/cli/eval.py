"""`eit eval CKPT`."""

import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eit.cli.options import (
    Checkpoint,
    Device,
    Json,
    MaxPixels,
    PrecisionOrAuto,
    Workers,
    device_for,
    file_to_write,
    named_file,
)
from eit.cli.output import print_table
from eit.errors import UserError
from eit.files import expand_path
from eit.imports import quick_imports

if TYPE_CHECKING:
    from eit.inference.evaluate import Metrics


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            parser=expand_path,
            help="Evaluate on this data set or folder of classes; default: the run's own data set.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Evaluate on a data set of timm: wds/NAME, hfds/NAME and others, as for data.dataset."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Evaluate on this split of --dataset; default: its validation split."),
    ] = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--size",
            metavar="N",
            min=1,
            max=65536,
            help="Input height and width in pixels; repeatable; default: the model's own.",
        ),
    ] = None,
    crop_ratios: Annotated[
        list[float] | None,
        typer.Option(
            "--crop-ratio",
            metavar="RATIO",
            min=0.1,
            max=1,
            help="Centre crop divided by the resized shorter side; repeatable; default: the model's own.",
        ),
    ] = None,
    flip: Annotated[
        bool, typer.Option("--flip", help="Average probabilities over each image and its mirror image.")
    ] = False,
    precision: Annotated[
        PrecisionOrAuto,
        typer.Option(
            metavar="auto|fp32|tf32|bf16|fp16",
            help="Compute in this precision; auto: bf16 on a GPU that supports it, otherwise fp32.",
        ),
    ] = "fp32",
    confusion: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", parser=expand_path, help="Write the confusion matrix to FILE (.png, .pdf, .svg or .csv)."
        ),
    ] = None,
    mistakes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            parser=expand_path,
            help="Write a page with the most confident mistakes, confusions and calibration to FILE.html.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Images per batch and process; default: 64, on a GPU up to 256."),
    ] = None,
    workers: Workers = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure top-1, top-5, loss, calibration and per-class accuracy.

    \b
    eit eval runs/pets
    eit eval runs/pets --data more-pets --size 224 --size 288
    eit eval runs/pets --confusion confusion.png

    Accuracies are percentages. Each image is counted once, also under torchrun. With several
    sizes and crop ratios, each size is measured with each ratio.
    """
    matrix = file_to_write(confusion, "--confusion", ".csv") if confusion else None
    page = named_file(mistakes, "--mistakes", ".html") if mistakes else None
    views = len(set(sizes or [0])) * len(set(crop_ratios or [0]))
    if views > 1 and (given := f"--confusion {confusion}" if matrix else f"--mistakes {mistakes}" if page else ""):
        raise UserError(f"{given} is for one size and crop ratio, but {views} combinations are given: give one of each")
    with quick_imports(freeze=True):
        from eit import distributed
        from eit.data.datasets import open_evaluation
        from eit.data.loaders import evaluation_batch_size, evaluation_loader
        from eit.inference.confusion import write_confusion
        from eit.inference.evaluate import check_matrix, make_views
        from eit.inference.evaluate import evaluate as run
        from eit.inference.evaluation_data import evaluation_config, match_classes
        from eit.inference.exported_models import load
        from eit.memory import keep_freed
        from eit.precision import resolve_precision

    keep_freed()
    used_device = distributed.start(device_for(checkpoint, device))
    used_precision = resolve_precision(precision, used_device)
    model = load(checkpoint)
    if confusion:
        check_matrix(len(model.card.classes), f"--confusion {confusion}")
    check_model(model, checkpoint, used_precision, sizes or ())
    if split and not dataset:
        raise UserError(f"--split {split} names a split of a data set of timm: give --dataset NAME too")
    config = evaluation_config(model.card, data, dataset, split, max_pixels)
    images = match_classes(model.card, open_evaluation(config))
    model = model.to(used_device)
    batch = min(batch_size or 0, len(images)) or evaluation_batch_size(64, len(images), used_device)
    kept = 0
    if page:
        from eit.report.outcome import MISTAKES

        kept = MISTAKES
    results = []
    for (size, ratio), view in make_views(model.card.view, sizes or (), crop_ratios or ()).items():
        loader = evaluation_loader(images, view, batch, workers, used_device)
        metrics = run(model, loader, used_precision, flip, kept)
        results.append((dict(size=size, resize=view.resize, crop_ratio=ratio), metrics))
    if distributed.is_main():
        settings = dict(checkpoint=checkpoint, data=config.root, precision=used_precision, flip=flip)
        print_metrics(results, settings, as_json)
        if matrix:
            write_confusion(matrix, metrics.confusion, list(metrics.per_class))
        if page:
            from eit.report.mistakes import write_mistakes

            write_mistakes(page, model, metrics, images, view, settings, shlex.join(["eit", *sys.argv[1:]]))


def check_model(model: Any, checkpoint: str, precision: str, sizes: Sequence[int]) -> None:
    """Raise a UserError if the model does not compute in this precision, or does not accept these sizes."""
    from eit.inference.exported_models import ExportedModel
    from eit.models.registry import check_size

    exported = isinstance(model, ExportedModel)
    if exported and precision != "fp32":
        raise UserError(
            f"--precision {precision}: {checkpoint} computes in the precision it was exported in; leave --precision out"
        )
    for size in sizes:
        if exported:
            model.check_size(size)
        else:
            check_size(model, size, model.card.size, model.card.model)


def print_metrics(results: Sequence[tuple[dict[str, Any], "Metrics"]], settings: dict[str, Any], as_json: bool) -> None:
    """The metrics of each view; of a single one with its classes."""
    views = [
        view | {key: value for key, value in vars(metrics).items() if key not in ("pairs", "mistakes")}
        for view, metrics in results
    ]
    if as_json:
        print(json.dumps(views[0] | settings if len(views) == 1 else settings | dict(views=views), indent=2))
    elif len(views) == 1:
        print(metrics_text(results[0][1]))
    else:
        print_views(views)


def metrics_text(metrics: "Metrics") -> str:
    from rich.cells import cell_len

    from eit.errors import shorten

    lines = [
        f"top-1 {metrics.top1:.2f}%  ({metrics.correct1} of {metrics.images})",
        f"top-5 {metrics.top5:.2f}%  ({metrics.correct5} of {metrics.images})",
        f"loss  {metrics.loss:.4f}",
        f"ECE   {metrics.ece:.2f}%  (calibration: mean gap between confidence and accuracy)",
    ]
    if len(metrics.per_class) <= 5:
        del lines[1]  # every class is among the first five
    known = [(shorten(name, 40), c) for name, c in metrics.per_class.items() if c["images"]]
    known.sort(key=lambda item: item[1]["top1"] or 0)
    few = len(known) <= 20
    lines.append("per class, weakest first" if few else f"the 10 weakest of {len(known)} classes (--json has all)")
    shown = known if few else known[:10]
    width = max(5, *(cell_len(name) for name, _ in shown))
    lines.append(f"  {'class':{width}}  images  top-1 (recall)  precision       f1")
    for name, c in shown:
        top1, precision, f1 = ("-" if c[key] is None else f"{c[key]:.2f}%" for key in ("top1", "precision", "f1"))
        pad = " " * (width - cell_len(name))
        lines.append(f"  {name}{pad}  {c['images']:6}  {top1:>14}  {precision:>9}  {f1:>7}")
    return "\n".join(lines)


def print_views(views: Sequence[dict[str, Any]]) -> None:
    columns = {
        "size": lambda v: str(v["size"]),
        "crop": lambda v: f"{v['crop_ratio']:.3f}",
        "top-1": lambda v: f"{v['top1']:.2f}%",
        "top-5": lambda v: f"{v['top5']:.2f}%",
        "loss": lambda v: f"{v['loss']:.4f}",
        "ECE": lambda v: f"{v['ece']:.2f}%",
    }
    if len(views[0]["per_class"]) <= 5:
        del columns["top-5"]  # every class is among the first five
    print_table(list(columns), [[text(view) for text in columns.values()] for view in views])
