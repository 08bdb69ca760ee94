"""Exported files as models: what `eit export` writes, run by ONNX Runtime or OpenVINO.

A .pt2 file is a program that torch.export would run on loading, whatever it holds. So only its weights are read, by
`eit.weights`, and the model is built from its card.
"""

import importlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eit.errors import UserError, first_line
from eit.models.registry import check_size
from eit.weights.card import Card, parse_card
from eit.weights.load import load as load_model
from eit.weights.load import say_assumptions

KEY = "eit"  # of the metadata that holds the card
INPUT, OUTPUT = "images", "logits"
MOST_FIXED = 4096  # images of a fixed batch: a single image is filled up to it
Run = Callable[[np.ndarray], np.ndarray]
Port = tuple[str, list[Any]]  # name and shape of an input or output; a dynamic axis is not an int


class ExportedModel(nn.Module):
    """An exported file in evaluation: images (B, in_chans, height, width) -> logits (B, num_classes), on the CPU.

    `card` is what the file says about classes and preprocessing. `fixed_size`: height and width are those of the card.
    A file with a fixed batch takes any number of images too: they are run in batches, and the last one is filled up.
    """

    def __init__(self, file: Path, card: Card, run: Run, fixed_size: bool) -> None:
        super().__init__()
        self.file, self.card, self.fixed_size, self._run = file, card, fixed_size, run

    def forward(self, x: Tensor) -> Tensor:
        try:
            logits = self._run(np.ascontiguousarray(x.numpy(force=True)))
        except Exception as error:  # of a runtime, which have no common base
            raise UserError(f"{self.file} cannot be run on {tuple(x.shape)}: {_line(error)}") from None
        return torch.from_numpy(logits).to(x.device)

    def check_size(self, size: int) -> None:
        """Raise a UserError if images of `size` pixels are not accepted."""
        if self.fixed_size and size != self.card.size:
            raise UserError(f"--size {size}: {self.file} was exported for {self.card.size} pixels alone")
        with torch.device("meta"):
            check_size(self.card.create_model(), size, self.card.size, str(self.file))


def load(path: str | os.PathLike[str]) -> Any:
    """A self-describing checkpoint (a file or a run folder), weights of another loop, or an exported file -> its model.

    The model is in evaluation mode; its `card` says which model it is, its classes and its preprocessing, and which of
    these are `guessed`. A .onnx file
    needs ONNX Runtime, a .xml file OpenVINO (the extra `export`); both give an `ExportedModel`. All else gives an
    `eit.EIT`, or a model of timm.

    Raises:
        UserError: no such file, damaged, untrusted, or one that does not say which model it is.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"eit.load takes the name of weights, or their path, not {type(path).__name__}")
    file = Path(path).expanduser()
    if not is_exported(file):
        return load_model(path)
    if not file.is_file():
        raise UserError(f"no exported model at {file}")
    model = RUNTIMES[file.suffix.lower()](file)
    say_assumptions(model.card, str(path))
    return model


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether `load` gives an `ExportedModel`, by the name."""
    return Path(path).suffix.lower() in RUNTIMES and not Path(path).is_dir()


def import_runtime(module: str, what: str, extra: str = "export") -> ModuleType:
    """A module that `what` needs, of an extra of this package.

    Raises:
        UserError: it is not installed, or broken; the line names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError(f"{what} needs {module}, which is not installed: pip install 'eit[{extra}]'") from None
    except ImportError as error:
        raise UserError(f"{what} needs {module}, which cannot be imported: {first_line(error)}") from None


def open_onnx(file: Path) -> ExportedModel:
    """A .onnx file, run by ONNX Runtime on as many threads as torch has."""
    ort = import_runtime("onnxruntime", f"running {file}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its errors are raised as well, and reported in one line
    try:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds, which have no common base
        raise UserError(f"{file} is not a readable ONNX file: {_line(error)}") from None
    ports = [(port.name, list(port.shape)) for port in (*session.get_inputs(), *session.get_outputs())]
    card = session.get_modelmeta().custom_metadata_map.get(KEY)

    fixed = _fixed_batch(ports)

    def run(x: np.ndarray) -> np.ndarray:
        parts = batches(x, fixed)
        return _joined([session.run([OUTPUT], {INPUT: part})[0] for part in parts], len(x))

    return _model(file, card, ports, run)


@cache
def openvino_core() -> Any:
    """The one `Core` of this process. OpenVINO's plugin gives the main thread a stack for signals, and frees it with
    the last `Core`: the next signal would then end the process."""
    return importlib.import_module("openvino").Core()


def open_openvino(file: Path, precision: str = "f32") -> ExportedModel:
    """A .xml file, run by OpenVINO on as many threads as torch has, in `f32` or `bf16`.

    One image has all threads. More images are divided among streams of one thread each, which is faster.
    """
    openvino = import_runtime("openvino", f"running {file}")
    threads = torch.get_num_threads()
    try:
        core = openvino_core()
        model = core.read_model(file)
        card = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
        ports = [
            (port.any_name, [dim.get_length() if dim.is_static else None for dim in port.partial_shape])
            for port in (*model.inputs, *model.outputs)
        ]
        settings = dict(INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=threads)
        compiled = core.compile_model(model, "CPU", settings | dict(NUM_STREAMS=1))
    except Exception as error:  # RuntimeError in most cases, of several lines
        raise UserError(f"{file} is not a readable OpenVINO model: {_line(error)}") from None

    one_at_a_time, fixed = Lock(), _fixed_batch(ports)

    @cache
    def streams() -> Any:
        return openvino.AsyncInferQueue(core.compile_model(model, "CPU", settings | dict(NUM_STREAMS=threads)), threads)

    def run(x: np.ndarray) -> np.ndarray:
        parts = batches(x, fixed or -(-len(x) // threads))
        if len(parts) == 1:
            return _joined([compiled([parts[0]])[0]], len(x))
        logits: list[np.ndarray] = [np.empty(0)] * len(parts)
        with one_at_a_time:
            queue = streams()
            queue.set_callback(lambda request, i: logits.__setitem__(i, request.get_output_tensor().data.copy()))
            for i, part in enumerate(parts):
                queue.start_async([part], i)
            queue.wait_all()
        return _joined(logits, len(x))

    return _model(file, card, ports, run)


def batches(x: np.ndarray, size: int | None) -> list[np.ndarray]:
    """`x` in batches of `size` images, the last one filled up with copies of the first images; None: whole."""
    if not size or not len(x):
        return [x]
    if missing := -len(x) % size:
        x = np.concatenate((x, np.resize(x, (missing, *x.shape[1:]))))
    return [x[start : start + size] for start in range(0, len(x), size)]


def _joined(logits: list[np.ndarray], images: int) -> np.ndarray:
    return (np.concatenate(logits) if len(logits) > 1 else logits[0])[:images]


def _fixed_batch(ports: list[Port]) -> int | None:
    """The number of images that a file takes; None for any."""
    size = ports[0][1][0]
    return size if isinstance(size, int) else None


RUNTIMES = {".onnx": open_onnx, ".xml": open_openvino}


def _model(file: Path, card_text: str | None, ports: list[Port], run: Run) -> ExportedModel:
    card = _read_card(file, card_text)
    _check_signature(file, card, ports)
    return ExportedModel(file, card, run, fixed_size=isinstance(ports[0][1][2], int))


def _read_card(file: Path, text: str | None) -> Card:
    if text is None:
        raise UserError(f"{file} was not written by eit export: it lacks the metadata {KEY!r} (classes, preprocessing)")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{file}: its metadata {KEY!r} is damaged") from None
    return parse_card(header, str(file))


def _check_signature(file: Path, card: Card, ports: list[Port]) -> None:
    """Raise a UserError if inputs and outputs are not those of the card's model."""
    if [name for name, _ in ports] != [INPUT, OUTPUT]:
        raise UserError(
            f"{file} has inputs and outputs {', '.join(name for name, _ in ports)} instead of {INPUT} and {OUTPUT}: "
            "export the weights with eit export"
        )
    images, logits = (shape for _, shape in ports)
    wanted = ["batch", card.in_chans, "height", "width"], ["batch", len(card.classes)]
    if (len(images), len(logits)) != (4, 2) or (images[1], logits[1]) != (card.in_chans, len(card.classes)):
        raise UserError(f"{file} takes {images} and gives {logits}, but its card says {wanted[0]} and {wanted[1]}")
    if (fixed := _fixed_batch(ports) or 1) > MOST_FIXED:
        raise UserError(f"{file} takes batches of {fixed:,} images; more than {MOST_FIXED:,} are not supported")


def _line(error: Exception) -> str:
    """What an error of several lines says: the last one that is not empty."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
