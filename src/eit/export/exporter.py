"""Export weights to ONNX, OpenVINO or torch.export. Each file is run by its runtime and compared with torch.

The batch size is dynamic; so are height and width for this package's models, unless they are asked to be fixed. The
file's metadata hold the card (classes, preprocessing).
"""

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.export import Dim, ExportedProgram

from eit.config import Data, data_config
from eit.data.datasets import DIGITS, AnyImages, open_evaluation, open_unlabelled, readable_images
from eit.data.images import Images, Preprocessing, normalise, to_mode, to_uint8
from eit.data.loaders import evaluation_loader
from eit.errors import UserError, first_line
from eit.export.hub import without_paths
from eit.files import temporary_folder, write_file
from eit.inference.evaluate import evaluate
from eit.inference.evaluation_data import evaluation_config, match_classes
from eit.inference.exported_models import INPUT, KEY, OUTPUT, RUNTIMES, batches, import_runtime
from eit.models import ops
from eit.models.eit import EIT
from eit.weights.card import Card, serialize_card
from eit.weights.formats import digest
from eit.weights.load import find_weights

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
NEEDED["openvino"] = (*NEEDED["onnx"], "openvino")  # it converts the ONNX file
AXES = dict(batch=0, height=2, width=3)  # axes of the images that may be dynamic
TOLERANCE = 1e-4  # relative to the largest logit: sums in single precision, in another order
ROUNDING = 1e-6  # absolute, for small logits
INT8_OPERATORS = ["Conv", "MatMul", "Gemm"]  # norms, softmax and sums stay in fp32
MAX_DROP = 2.0  # points of top-1 that int8 may cost
PHOTOS = 8  # per size, for the comparison


@dataclass(frozen=True)
class Parity:
    """Comparison of an exported file with torch, on `images` photos of each of `sizes` (height, width)."""

    sizes: list[tuple[int, int]]
    images: int
    max_error: float  # largest difference of a logit
    ties: int  # photos whose two best classes differ by less than that and swap places


@dataclass(frozen=True)
class Int8:
    """The cost of quantisation: top-1 (percent) on `images` labelled images with and without it, and the fp32 size."""

    images: int
    top1: float
    fp32_top1: float
    fp32_bytes: int
    calibrated_on: int


@dataclass(frozen=True)
class Export:
    """A file that was written and agrees with the model."""

    file: Path
    bytes: int
    dynamic: list[str]  # some of batch, height, width
    runtime: str  # name and version of the runtime that ran it
    parity: Parity  # comparison of the fp32 file
    int8: Int8 | None
    fixed: int | None = None  # the batch, if the file takes no other


@dataclass(frozen=True)
class Calibration:
    """Images that set the ranges of int8, and images labelled with the model's classes that measure its accuracy."""

    images: Images
    labelled: AnyImages


def default_file(checkpoint: str, format: str, int8: bool = False, fixed: int | None = None) -> Path:
    """Next to the weights, with their name, and -int8 or -batch1; in the working folder for included weights and the
    hub's."""
    ending = ("-int8" if int8 else "") + (f"-batch{fixed}" if fixed else "") + _suffix(format)
    if Path(checkpoint).expanduser().exists():
        weights = find_weights(checkpoint)
        return weights.with_name(weights.stem + ending)
    return Path(Path(checkpoint.partition("@")[0]).name + ending)


def check_request(format: str, file: Path, int8: bool) -> None:
    """Raise a UserError, before anything is computed, if `export` could not write `file`."""
    if file.suffix != _suffix(format):
        raise UserError(f"--out {file}: give a name that ends in {_suffix(format)} for --format {format}")
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: there is no folder {file.parent}; make it, or give another one")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        reason = "it is a folder" if file.is_dir() else f"{file.parent} is read-only"
        raise UserError(f"--out {file}: {reason}; give another file")
    if not file.exists() and any(part.exists() for part in _parts(file)):
        raise UserError(f"--out {file}: {_parts(file)[1].name} next to it belongs to another file; give another name")
    if int8 and format == "torch":
        raise UserError("--int8 is for --format onnx and openvino")
    if int8 and file.exists() and not any(mark in file.read_bytes() for mark in (b"QuantizeLinear", b"FakeQuantize")):
        raise UserError(f"--out {file}: this file is not in int8, and would be lost; give another name")
    for module in NEEDED[format]:
        import_runtime(module, f"--format {format}")


def export(
    model: Any,
    file: Path,
    format: str,
    calibration: Calibration | None = None,
    max_drop: float = MAX_DROP,
    fixed: int | None = None,
) -> Export:
    """Write a model of `eit.load`, on any device, to `file` in the format `format`; in int8 if `calibration` is given.

    `fixed`: the batch is fixed at so many images, and height and width at the size of the card; some runtimes are
    faster then.

    The file is kept only if its runtime runs it and no logit differs from torch's by more than 1e-4 times the largest
    logit, so that top-1 is equal except for ties; in int8 only if top-1 falls by at most `max_drop` points. Paths of
    this machine in its recipe are shortened to their last part. The caller's model stays as it is.

    Raises:
        UserError: no model with a card, a missing runtime, an architecture that cannot be exported, or int8 that costs
            more accuracy than `max_drop`.
        FloatingPointError: the file's logits differ from torch's.
    """
    if not isinstance(getattr(model, "card", None), Card):
        raise UserError(
            f"export takes a model of eit.load, whose card names classes and preprocessing, not {model!r:.60}"
        )
    file = Path(file)
    check_request(format, file, calibration is not None)
    model = copy.deepcopy(model).cpu().eval()  # the caller's model stays on its device
    model.card = without_paths(model.card)
    dynamic = [] if fixed else list(AXES) if _takes_any_size(model, format) else ["batch"]
    with temporary_folder() as folder, _quiet():
        written = folder / file.name
        graph = folder / "graph.onnx"  # the source of ONNX and OpenVINO files
        with fold_strides() if format == "openvino" else nullcontext():
            program = _program(model, dynamic, fixed or 2)
        if format == "torch":
            torch.export.save(
                program, written, extra_files={KEY: serialize_card(model.card, sha256=digest(model.state_dict()))}
            )
            run: Callable[[Tensor], Tensor] = _in_batches(torch.export.load(written).module(), fixed)
        else:
            _write_onnx(program, graph, model.card, dynamic)
            run = _convert(graph, written, model.card)
        parity = compare(model, run, "height" in dynamic)
        int8 = None
        if calibration is not None:
            fp32_bytes = _size(written)
            quantised = folder / "int8.onnx"
            _quantise(graph, quantised, calibration.images, model.card.view, fixed)
            run = _convert(quantised, written, model.card)
            int8 = _measure_int8(model, run, calibration, fp32_bytes)
            if int8.fp32_top1 - int8.top1 > max_drop:
                raise UserError(
                    f"int8 is not kept: top-1 falls from {int8.fp32_top1:.2f}% to {int8.top1:.2f}% on {int8.images:,} "
                    f"images, by more than {max_drop:g} points; give --int8 other images, or a larger --max-drop"
                )
        size = _size(written)
        for part in _parts(written)[::-1]:  # the files that it refers to come first
            write_file(file.with_suffix(part.suffix), part.read_bytes())
    return Export(file, size, dynamic, _runtime(format), parity, int8, fixed)


def compare(model: Any, run: Callable[[Tensor], Tensor], any_size: bool) -> Parity:
    """Compare logits of photos by torch and by `run`, at the model's size and, with `any_size`, at a non-square size.

    Raises:
        FloatingPointError: they differ.
    """
    view = model.card.view
    pitch = model.patch_embed.pitch if isinstance(model, EIT) else 1
    sizes = [(view.size, view.size)] + ([(view.size + 2 * pitch + 1, view.size + 5 * pitch)] if any_size else [])
    largest, ties = 0.0, 0
    for size in sizes:
        x = photos(view, size)
        with torch.no_grad():
            expected, actual = model(x), torch.cat((run(x[:1]), run(x[1:])))
        error = float((actual - expected).abs().max())
        differ = int((actual.argmax(1) != expected.argmax(1)).sum())
        bound = TOLERANCE * float(expected.abs().max()) + ROUNDING
        if not error <= bound < math.inf:  # false for NaN
            raise FloatingPointError(
                f"the exported file is not kept: at {size[0]}x{size[1]} its logits differ from torch's by up to "
                f"{error:.3g}, and top-1 in {differ} of {len(x)} photos"
            )
        largest, ties = max(largest, error), ties + differ
    return Parity(sizes, PHOTOS, largest, ties)


def photos(view: Preprocessing, size: tuple[int, int]) -> Tensor:
    """Eight crops of scikit-learn's two photos, (8, channels, height, width), normalised for the model."""
    images = []
    whole = [Image.fromarray(photo) for photo in load_sample_images().images]
    for i in range(PHOTOS):
        photo = whole[i % 2]
        left, top = 60 * (i // 2), 35 * (i // 2)
        part = photo.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + 400, top + 300))
        images.append(to_uint8(to_mode(part, view.channels)))
    return normalise(torch.stack(images), view.mean, view.std)


def open_calibration(
    card: Card, path: str, count: int, data: str | None = None, max_pixels: int | None = None
) -> Calibration:
    """Images of `path` that set the ranges of int8, and labelled images that measure its accuracy; none is both.

    The labelled ones are those of `data`; by default the validation images of the run, or of `path` if the run's data
    are not here.

    Raises:
        UserError: no such path, no images there, or no labelled images.
    """
    own = str(card.data.get("root") or "")
    is_here = own == DIGITS or (own and not card.data.get("dataset") and Path(own).expanduser().is_dir())
    config = evaluation_config(card, data or (None if is_here else path), max_pixels=max_pixels)
    chosen = readable_images(calibration_images(path, count, config))
    try:
        labelled = match_classes(card, open_evaluation(config))
    except UserError as error:
        raise UserError(f"{error}; --int8 needs labelled images, to measure its accuracy: give --data PATH") from None
    if isinstance(labelled, Images) and not (held_out := _without(labelled, chosen)):
        chosen = chosen.evenly(len(chosen) // 2)
        if not chosen or not (held_out := _without(labelled, chosen)):
            raise UserError(f"--int8 {path}: no image is left to measure accuracy: give more images, or --data PATH")
    return Calibration(chosen, held_out if isinstance(labelled, Images) else labelled)


def _without(images: Images, others: Images) -> Images:
    """`images` but the files of `others`."""
    used = {os.path.realpath(source) for source in others.sources if isinstance(source, str)}
    kept = [i for i, s in enumerate(images.sources) if not isinstance(s, str) or os.path.realpath(s) not in used]
    return images.subset(kept)


def calibration_images(path: str, count: int, config: Data) -> Images:
    """At most `count` images, evenly spaced: a data set's training images, or otherwise all below the folder.

    `config` says how they are read. It is the data section of what int8 is measured on.

    Raises:
        UserError: no such path, or no images there.
    """
    if path != DIGITS and not Path(path).expanduser().exists():
        raise UserError(f"--int8 {path}: no such folder, image or data set")
    settings = dict(max_pixels=config.max_pixels, val_fraction=config.val_fraction, pixel_range=config.pixel_range)
    return open_unlabelled(data_config(root=path, **settings), "train").evenly(count)


def _suffix(format: str) -> str:
    if format not in SUFFIXES:
        raise UserError(f"--format {format} is not one of {', '.join(SUFFIXES)}")
    return SUFFIXES[format]


def _takes_any_size(model: Any, format: str) -> bool:
    if (
        not isinstance(model, EIT) or min(model.grid_size) < 2
    ):  # the exporter would fix a grid of one token as a constant
        return False
    return format != "openvino" or model.pos_embed is None  # OpenVINO interpolates position tables differently


@contextmanager
def fold_strides() -> Iterator[None]:
    """Programs that are exported here have the form of the stem without strides, which OpenVINO runs faster."""
    before = ops.FOLD_STRIDES_ON
    ops.FOLD_STRIDES_ON = before | {"cpu"}
    try:
        yield
    finally:
        ops.FOLD_STRIDES_ON = before


def _in_batches(run: Callable[[Tensor], Tensor], size: int | None) -> Callable[[Tensor], Tensor]:
    """`run` on any number of images, if it takes `size` images alone."""

    def whole(x: Tensor) -> Tensor:
        parts = [run(torch.from_numpy(part)) for part in batches(x.numpy(), size)]
        return torch.cat(parts)[: len(x)]

    return whole


def _program(model: Any, dynamic: list[str], batch: int) -> ExportedProgram:
    card = model.card
    x = torch.zeros(batch, card.in_chans, card.size, card.size)
    try:
        program = torch.export.export(model, (x,), dynamic_shapes=({AXES[name]: Dim.DYNAMIC for name in dynamic},))
    except Exception as error:  # each architecture raises its own errors
        raise UserError(f"{card.model} cannot be exported: {first_line(error)}") from None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def _write_onnx(program: ExportedProgram, file: Path, card: Card, dynamic: list[str]) -> None:
    import onnx

    exported = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False, optimize=True
    )
    assert exported is not None
    proto = exported.model_proto
    view = card.view
    proto.doc_string = (
        f"{card.model}: images (batch, {card.in_chans}, height, width) -> logits of {len(card.classes)} classes. "
        f"{'RGB' if card.in_chans == 3 else 'Grey'} images in 0..1, shorter side {view.interpolation} to {view.resize} "
        f"pixels, centre {view.size}x{view.size}, minus {card.mean}, divided by {card.std}."
    )
    proto.producer_name, proto.producer_version = "eit", card.version
    onnx.helper.set_model_props(proto, {KEY: serialize_card(card)})
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    names = {shape[AXES[name]].dim_param: name for name in dynamic}
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names[dim.dim_param]
    del proto.graph.value_info[:]  # it has the exporter's names
    for node in proto.graph.node:
        del node.metadata_props[:]  # it has folders of this machine
    assert [d.dim_param for d in shape if d.dim_param] == dynamic
    onnx.save(proto, file)


def _convert(graph: Path, file: Path, card: Card) -> Callable[[Tensor], Tensor]:
    """Write an ONNX graph in the format of the file's suffix, and open it as users do."""
    if file.suffix == ".onnx":
        file.write_bytes(graph.read_bytes())
    else:
        import openvino as ov

        model = ov.convert_model(graph)
        model.set_rt_info(serialize_card(card), KEY)
        ov.save_model(model, file, compress_to_fp16=False)
    return RUNTIMES[file.suffix](file)


def _quantise(graph: Path, file: Path, images: Images, view: Preprocessing, fixed: int | None) -> None:
    """Static quantisation: activation ranges from `images`, weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    loader = evaluation_loader(images, view, fixed or 32, 0, torch.device("cpu"))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(loader)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batches(batch.images[: batch.valid].numpy(), fixed)[0]}

    quantize_static(graph, file, Reader(), op_types_to_quantize=INT8_OPERATORS, per_channel=True)


def _measure_int8(model: Any, run: Callable[[Tensor], Tensor], calibration: Calibration, fp32_bytes: int) -> Int8:
    loader = evaluation_loader(calibration.labelled, model.card.view, 64, None, torch.device("cpu"))
    before, after = evaluate(model, loader), evaluate(run, loader)
    return Int8(after.images, after.top1, before.top1, fp32_bytes, len(calibration.images))


def _parts(file: Path) -> list[Path]:
    """The file, and the file of weights that OpenVINO writes next to it."""
    return [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]


def _size(file: Path) -> int:
    return sum(part.stat().st_size for part in _parts(file))


def _runtime(format: str) -> str:
    if format == "torch":
        return f"torch.export {torch.__version__.partition('+')[0]}"
    name, module = dict(onnx=("ONNX Runtime", "onnxruntime"), openvino=("OpenVINO", "openvino"))[format]
    return f"{name} {import_runtime(module, '').__version__.partition('-')[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' warnings, about which a user can do nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
