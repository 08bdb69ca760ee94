"""Export weights to ONNX, OpenVINO or torch.export. Each file is run by its runtime and compared with torch.

The batch size is dynamic; so are height and width for this package's models. The file's metadata hold the card
(classes, preprocessing).
"""

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from eit.data.datasets import AnyImages, open_unlabelled
from eit.data.images import Images, View, normalise, to_mode, to_uint8
from eit.data.loaders import evaluation_loader
from eit.errors import UserError, first_line
from eit.files import temporary_folder, write_file
from eit.inference.evaluate import evaluate
from eit.inference.exported_models import INPUT, KEY, OUTPUT, RUNTIMES, import_runtime
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


@dataclass(frozen=True)
class Calibration:
    """Images that set the ranges of int8, and images labelled with the model's classes that measure its accuracy."""

    images: Images
    labelled: AnyImages


def default_file(checkpoint: str, format: str) -> Path:
    """Next to the weights, with their name; in the working folder for included weights and those of the hub."""
    if Path(checkpoint).exists():
        return find_weights(checkpoint).with_suffix(_suffix(format))
    return Path(Path(checkpoint.partition("@")[0]).name + _suffix(format))


def check_request(format: str, file: Path, int8: bool) -> None:
    """Raise a UserError, before anything is computed, if `export` could not write `file`."""
    if file.suffix != _suffix(format):
        raise UserError(f"--out {file}: a file of --format {format} ends in {_suffix(format)}")
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: there is no folder {file.parent}")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--out {file}: {'it is a folder' if file.is_dir() else f'{file.parent} is read-only'}")
    if not file.exists() and any(part.exists() for part in _parts(file)):
        raise UserError(f"--out {file}: {_parts(file)[1].name} next to it belongs to another file; give another name")
    if int8 and format == "torch":
        raise UserError("--int8 is for --format onnx and openvino")
    for module in NEEDED[format]:
        import_runtime(module, f"--format {format}")


def export(model: Any, file: Path, format: str, calibration: Calibration | None = None) -> Export:
    """Write a model of `eit.load`, on any device, to `file` in the format `format`; in int8 if `calibration` is given.

    The file is kept only if its runtime runs it and every logit is within 1e-4 of the largest logit of torch's value,
    so that top-1 is equal except for ties.

    Raises:
        UserError: a missing runtime, or an architecture that cannot be exported.
        FloatingPointError: the file's logits differ from torch's.
    """
    check_request(format, file, calibration is not None)
    model = copy.deepcopy(model).cpu().eval()  # the caller's model stays on its device
    dynamic = list(AXES) if _takes_any_size(model, format) else ["batch"]
    with temporary_folder() as folder, _quiet():
        written = folder / file.name
        graph = folder / "graph.onnx"  # the source of ONNX and OpenVINO files
        program = _program(model, dynamic)
        if format == "torch":
            torch.export.save(
                program, written, extra_files={KEY: serialize_card(model.card, digest(model.state_dict()))}
            )
            run: Callable[[Tensor], Tensor] = torch.export.load(written).module()
        else:
            _write_onnx(program, graph, model.card, dynamic)
            run = _convert(graph, written, model.card)
        parity = compare(model, run, "height" in dynamic)
        int8 = None
        if calibration is not None:
            fp32_bytes = _size(written)
            quantised = folder / "int8.onnx"
            _quantise(graph, quantised, calibration.images, model.card.view)
            run = _convert(quantised, written, model.card)
            int8 = _judge(model, run, calibration, fp32_bytes)
        size = _size(written)
        for part in _parts(written)[::-1]:  # the files that it refers to come first
            write_file(file.with_suffix(part.suffix), part.read_bytes())
    return Export(file, size, dynamic, _runtime(format), parity, int8)


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


def photos(view: View, size: tuple[int, int]) -> Tensor:
    """Eight crops of scikit-learn's two photos, (8, channels, height, width), normalised for the model."""
    images = []
    whole = [Image.fromarray(photo) for photo in load_sample_images().images]
    for i in range(PHOTOS):
        photo = whole[i % 2]
        left, top = 60 * (i // 2), 35 * (i // 2)
        part = photo.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + 400, top + 300))
        images.append(to_uint8(to_mode(part, view.channels)))
    return normalise(torch.stack(images), view.mean, view.std)


def calibration_images(path: str, count: int, config: Data) -> Images:
    """At most `count` images, evenly spaced: a data set's training images, or otherwise all below the folder.

    They are read as `config` says, the section of the data that int8 is measured on.

    Raises:
        UserError: no such path, or no images there.
    """
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


def _program(model: Any, dynamic: list[str]) -> ExportedProgram:
    card = model.card
    x = torch.zeros(2, card.in_chans, card.size, card.size)
    try:
        return torch.export.export(model, (x,), dynamic_shapes=({AXES[name]: Dim.DYNAMIC for name in dynamic},))
    except Exception as error:  # each architecture raises its own errors
        raise UserError(f"{card.model} cannot be exported: {first_line(error)}") from None


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
    onnx.helper.set_model_props(proto, {KEY: _card_json(card)})
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    names = {shape[axis].dim_param: name for name, axis in AXES.items()}
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names[dim.dim_param]
    del proto.graph.value_info[:]  # it has the exporter's names
    assert [d.dim_param for d in shape if d.dim_param] == dynamic
    onnx.save(proto, file)


def _card_json(card: Card) -> str:
    """The card in ASCII, because folder names need not be valid text."""
    return json.dumps(card.model_dump(mode="json"))


def _convert(graph: Path, file: Path, card: Card) -> Callable[[Tensor], Tensor]:
    """Write an ONNX graph in the format of the file's suffix, and open it as users do."""
    if file.suffix == ".onnx":
        file.write_bytes(graph.read_bytes())
    else:
        import openvino as ov

        model = ov.convert_model(graph)
        model.set_rt_info(_card_json(card), KEY)
        ov.save_model(model, file, compress_to_fp16=False)
    return RUNTIMES[file.suffix](file)


def _quantise(graph: Path, file: Path, images: Images, view: View) -> None:
    """Static quantisation: activation ranges from `images`, weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    loader = evaluation_loader(images, view, 32, 0, torch.device("cpu"))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(loader)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.images[: batch.valid].numpy()}

    quantize_static(graph, file, Reader(), op_types_to_quantize=INT8_OPERATORS, per_channel=True)


def _judge(model: Any, run: Callable[[Tensor], Tensor], calibration: Calibration, fp32_bytes: int) -> Int8:
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
