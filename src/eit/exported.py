"""Exported files as models: what `eit export` writes, run by ONNX Runtime or OpenVINO.

A .pt2 file is a program that torch.export would run on loading, whatever it holds. So only its weights are read, by
`eit.checkpoint`, and the model is built from its card.
"""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eit import checkpoint
from eit.checkpoint import Card
from eit.errors import UserError
from eit.zoo import check_size

KEY = "eit"  # of the metadata that holds the card
INPUT, OUTPUT = "images", "logits"
Run = Callable[[np.ndarray], np.ndarray]


class ExportedModel(nn.Module):
    """An exported file in evaluation: images (B, in_chans, height, width) -> logits (B, num_classes), on the CPU.

    `card` is what the file says about classes and preprocessing. `fixed_size`: height and width are those of the card.
    """

    def __init__(self, file: Path, card: Card, run: Run, fixed_size: bool) -> None:
        super().__init__()
        self.file, self.card, self.fixed_size, self._run = file, card, fixed_size, run

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self._run(np.ascontiguousarray(x.numpy(force=True)))).to(x.device)

    def check_size(self, size: int) -> None:
        """Raise a UserError where images of `size` pixels are not taken."""
        if self.fixed_size and size != self.card.size:
            raise UserError(f"--size {size}: {self.file} was exported for {self.card.size} pixels alone")
        with torch.device("meta"):
            check_size(self.card.create_model(), size, self.card.size, str(self.file))


def load(path: str | os.PathLike[str]) -> Any:
    """A self-describing checkpoint (a file or a run folder), the authors' .pth, or an exported file -> its model.

    The model is in evaluation mode; its `card` says which model it is, its classes and its preprocessing. A .onnx file
    needs ONNX Runtime, a .xml file OpenVINO (the extra `export`); both give an `ExportedModel`. All else gives an
    `eit.EIT`, or a model of timm.

    Raises:
        UserError: no such file, damaged, untrusted, or one that does not say which model it is.
    """
    file = Path(path)
    if file.suffix not in RUNTIMES or file.is_dir():
        return checkpoint.load(path)
    if not file.is_file():
        raise UserError(f"no exported model at {file}")
    return RUNTIMES[file.suffix](file)


def need(module: str, what: str) -> ModuleType:
    """The module of a runtime.

    Raises:
        UserError: it is not installed; the line names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{what} needs {package}, which is not installed: pip install 'eit[export]'") from None


def _open_onnx(file: Path) -> ExportedModel:
    ort = need("onnxruntime", f"running {file}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which are raised as well
    try:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds, which have no common base
        raise UserError(f"{file} is not a readable ONNX file: {_line(error)}") from None
    card = _read_card(file, session.get_modelmeta().custom_metadata_map.get(KEY))
    inputs, outputs = session.get_inputs(), session.get_outputs()
    _check_signature(file, [i.name for i in inputs], [o.name for o in outputs])
    fixed = not isinstance(inputs[0].shape[2], str)
    return ExportedModel(file, card, lambda x: session.run([OUTPUT], {INPUT: x})[0], fixed)


def _open_openvino(file: Path) -> ExportedModel:
    ov = need("openvino", f"running {file}")
    try:
        core = ov.Core()
        model = core.read_model(file)
        card = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
        fixed = model.input(0).partial_shape[2].is_static if card else True
        names = [sorted(port.names) for port in (*model.inputs, *model.outputs)]
        settings = dict(INFERENCE_PRECISION_HINT="f32", INFERENCE_NUM_THREADS=torch.get_num_threads())
        compiled = core.compile_model(model, "CPU", settings)
    except Exception as error:  # RuntimeError in most cases, of several lines
        raise UserError(f"{file} is not a readable OpenVINO model: {_line(error)}") from None
    read = _read_card(file, card)
    _check_signature(file, names[0], names[-1])
    return ExportedModel(file, read, lambda x: compiled([x])[0], fixed)


RUNTIMES = {".onnx": _open_onnx, ".xml": _open_openvino}


def _read_card(file: Path, text: str | None) -> Card:
    if text is None:
        raise UserError(f"{file} was not written by eit export: it lacks the metadata {KEY!r} (classes, preprocessing)")
    try:
        return checkpoint.known_card(json.loads(text), str(file))
    except json.JSONDecodeError:
        raise UserError(f"{file}: its metadata {KEY!r} is damaged") from None


def _check_signature(file: Path, inputs: list[str], outputs: list[str]) -> None:
    if inputs != [INPUT] or outputs != [OUTPUT]:
        raise UserError(f"{file} takes {inputs} and gives {outputs}, instead of {[INPUT]} and {[OUTPUT]}")


def _line(error: Exception) -> str:
    """What an error of several lines says: the last one that is not empty."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
