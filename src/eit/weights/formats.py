"""Files of weights: .safetensors, .pth and .pt2. Nothing here unpickles arbitrary objects."""

import argparse
import datetime
import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from eit.console import say
from eit.errors import UserError, few, first_line
from eit.files import write_file
from eit.models.eit import our_names
from eit.weights.card import Card, parse_card, serialize_card

StateDict = Mapping[str, Tensor]

KEYS = ("model", "state_dict", "model_state_dict", "net", "state_dict_ema", "model_ema", "ema")  # of checkpoints
PREFIXES = ("model.", "module.", "net.", "network.", "_orig_mod.", "backbone.")  # of wrappers: Lightning, DDP, compile

# What checkpoints hold next to tensors: values without code. torch's unpickler makes these and refuses all else.
_RENAMED: dict[str, Any] = {
    "numpy._core.multiarray.scalar": np.float64(0).__reduce__()[0],
    "numpy._core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
    "pathlib.PosixPath": PurePosixPath,
    "pathlib.WindowsPath": PureWindowsPath,
    "pathlib.PurePosixPath": PurePosixPath,
    "pathlib.PureWindowsPath": PureWindowsPath,
}
HARMLESS: list[Any] = [
    *(argparse.Namespace, SimpleNamespace, np.ndarray, np.dtype),
    *(datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone),
    *(kind for name in np.dtypes.__all__ if (kind := getattr(np.dtypes, name)) is not np.dtypes.ObjectDType),
    *((made, name) for name, made in _RENAMED.items()),
    *((made, name.replace("_core", "core")) for name, made in _RENAMED.items()),  # of NumPy 1
    *((made, name.replace("pathlib.", "pathlib._local.")) for name, made in _RENAMED.items()),  # of Python 3.13
]


def read_weights(file: Path) -> tuple[dict[str, Tensor], Card | None]:
    """Tensors by our names, and what the file says about itself, if it does. The content decides, not the suffix."""
    with open(file, "rb") as f:
        start = f.read(40)
    if start.startswith(b"version https://git-lfs"):  # the authors keep theirs in Git LFS
        raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its checkout")
    if file.suffix == ".pt2":
        return read_pt2(file)
    if file.suffix in (".onnx", ".xml"):
        raise UserError(
            f"{file} is an exported model, which only eit eval and eit predict read: give the weights "
            "that were exported"
        )
    is_archive, is_pickle = start.startswith(b"PK\x03\x04"), start.startswith(b"\x80")
    is_safetensors = start[8:9] == b"{" or (file.suffix == ".safetensors" and not is_pickle)  # a length, then JSON
    state, card = read_safetensors(file) if is_safetensors and not is_archive else (_read_pth(file), None)
    return state if card else our_names(strip_prefixes(state)), card


def strip_prefixes(state: StateDict) -> dict[str, Tensor]:
    """`state` without the prefixes that wrappers give to every name, and without the counters of torch and thop.

    A module of a training loop keeps its loss and its metrics next to the model: those are left out, and this is said.
    """
    counters = ("n_averaged", "total_ops", "total_params")
    state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in counters}
    while state:
        shared = [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)]
        prefixes = shared or [prefix for prefix in PREFIXES if _holds_classifier(state, prefix)]
        if not shared and len(prefixes) != 1:
            break
        prefix = prefixes[0]
        if others := [name for name in state if not name.startswith(prefix)]:
            say(f"only the weights under {prefix[:-1]} are used; left out: {few(others)}")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return state


def _holds_classifier(state: StateDict, prefix: str) -> bool:
    """Whether a linear layer, such as model.head, is directly below `prefix`, and none is at the top outside of it."""
    linear = {name for name, tensor in state.items() if name.endswith(".weight") and tensor.ndim == 2}
    inside = {
        re.sub(f"^({'|'.join(map(re.escape, PREFIXES))})+", "", name) for name in linear if name.startswith(prefix)
    }
    outside = {name for name in linear if not name.startswith(prefix)}
    return any(name.count(".") == 1 for name in inside) and not any(name.count(".") == 1 for name in outside)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], Card | None]:
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            metadata = f.metadata() or {}
            # Copied: results depend on the alignment of weights, which in the file depends on the length of its header
            state = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # of the library, of torch for a type that it lacks, of memory
        raise UserError(f"{file} is not a readable safetensors file: {first_line(error)}") from None
    if "eit" not in metadata:
        return state, None
    header, said = _read_header(metadata["eit"], file)
    _check_digest(state, said, file)
    return state, parse_card(header, str(file))


def _read_header(text: str | bytes, file: Path) -> tuple[dict[str, Any], str]:
    """What `serialize_card` wrote: the card, and the checksum of the weights."""
    try:
        header = json.loads(text)
        return header, header.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{file}: its description of the model is damaged") from None


def _check_digest(state: StateDict, said: str, file: Path) -> None:
    if said != digest(state):
        raise UserError(f"{file} is damaged: its weights do not match their checksum; copy or download it again")


def read_pt2(file: Path) -> tuple[dict[str, Tensor], Card]:
    """The weights of a program that `eit export` wrote. The program is not loaded, for that could run code."""
    try:
        with zipfile.ZipFile(file) as archive:
            _check_archive(archive)
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            described = [names["extra/eit"], names["data/weights/model_weights_config.json"]]
            if any(archive.getinfo(name).file_size > 1 << 26 for name in described):
                raise ValueError("its description is too long")
            header, said = _read_header(archive.read(described[0]), file)
            card = parse_card(header, str(file))
            with torch.device("meta"):
                own = card.create_model().state_dict()
            listed = json.loads(archive.read(described[1]))["config"]
            state = {}
            for name, like in own.items():
                member = archive.getinfo(names[f"data/weights/{listed[name]['path_name']}"])
                if member.file_size != like.nbytes:
                    raise ValueError(f"{name} has {member.file_size} bytes instead of {like.nbytes}")
                content = torch.frombuffer(bytearray(archive.read(member)), dtype=like.dtype)
                state[name] = content.view(like.shape)
    except UserError:
        raise
    except Exception as error:  # zipfile meets a damaged file with almost any exception
        raise UserError(f"{file} is not a program that eit export wrote: {first_line(error)}") from None
    _check_digest(state, said, file)
    return state, card


def _check_archive(archive: zipfile.ZipFile) -> None:
    """Raise a ValueError if members unpack to more than the file: torch writes them as they are."""
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed, which torch.save never does: they may unpack to any size")
    if sum(member.file_size for member in members) > Path(str(archive.filename)).stat().st_size:
        raise ValueError("its members claim to be larger than the file")
    if any(member.filename.partition("/")[2] == "constants.pkl" for member in members):
        raise ValueError(
            "it is a TorchScript program, which would run. Save its weights: "
            "torch.save(model.state_dict(), 'weights.pth')"
        )


def _read_pth(file: Path) -> dict[str, Tensor]:
    """The weights of a .pth file: a state dict, alone or in a checkpoint of some training loop."""
    content = read_pickle(file)
    state = _find_state_dict(content, file)
    if state is None:
        keys = list(content) if isinstance(content, dict) else []
        tensors = [key for key in keys if isinstance(content[key], Tensor)]
        if len(tensors) > len(keys) / 2:
            odd = [f"{k} ({type(content[k]).__name__})" for k in keys if k not in tensors or not isinstance(k, str)]
            what = f"these are no tensors: {few(odd)}" if odd else "none of its tensors has floating-point numbers"
            kept = "{k: v for k, v in checkpoint.items() if torch.is_tensor(v)}"
            raise UserError(
                f"{file} holds more than weights, or none: {what}. To save the tensors alone: "
                f"torch.save({kept}, 'weights.pth')"
            )
        found = (
            f"its keys are {few(list(map(str, keys)), 8)}" if keys else f"it is of the type {type(content).__name__}"
        )
        source = next((f"checkpoint[{key!r}]" for key in keys if _is_state_dict(content[key])), "model.state_dict()")
        raise UserError(
            f"{file} holds no weights: {found}; a state dict is expected, alone or under {', '.join(KEYS)}. "
            f"To save the weights alone: torch.save({source}, 'weights.pth')"
        )
    check_dense(state, str(file))
    size, taken = file.stat().st_size, sum(v.nbytes for v in state.values())
    if taken > 2 * size + (1 << 20):  # tied weights are in the file once
        raise UserError(f"{file} is refused: its {size:,} bytes stand for tensors of {taken:,} bytes")
    return state


def check_dense(state: StateDict, source: str) -> None:
    """Raise a UserError if some values are not tensors, or not ones that a model can hold."""
    if odd := [str(k) for k, v in state.items() if not isinstance(k, str) or not isinstance(v, Tensor)]:
        raise UserError(f"{source}: each entry must be a name and a tensor; these are not: {few(odd)}")
    if odd := [k for k, v in state.items() if v.layout is not torch.strided or v.is_meta or v.is_quantized]:
        raise UserError(f"{source}: {few(odd)} {'is' if len(odd) == 1 else 'are'} sparse, quantised or without values")


def _find_state_dict(content: Any, file: Path) -> dict[str, Tensor] | None:
    """The state dict in what torch.load gave: under a usual key, or the one that there is."""
    for _ in range(4):
        if not isinstance(content, dict) or _is_state_dict(content):
            break
        inner = [key for key, value in content.items() if _is_state_dict(value)]
        known = [key for key in KEYS if key in inner]
        nested = [key for key in KEYS if isinstance(content.get(key), dict)]
        chosen = known or (inner if len(inner) == 1 else nested)
        if not chosen:
            break
        if len(known) > 1:
            advice = f"for others: torch.save(checkpoint[{known[1]!r}], 'weights.pth')"
            say(f"{file} has weights under {', '.join(known)}: those under {known[0]} are used; {advice}")
        content = content[chosen[0]]
    return content if _is_state_dict(content) else None


def _is_state_dict(value: Any) -> bool:
    """Names and tensors, integer counters among them."""
    return (
        isinstance(value, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        and any(v.is_floating_point() for v in value.values())
    )


def read_pickle(file: Path) -> Any:
    """What torch.save wrote: tensors, plain values and `HARMLESS` ones. Nothing is executed."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                _check_archive(archive)
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings(), open(file, "rb") as f:
            warnings.simplefilter("ignore")  # on pickle protocols, ahead of the refusal
            return torch.load(f, map_location="cpu", weights_only=True)  # given a name, it would judge by the suffix
    except pickle.UnpicklingError as error:
        with open(file, "rb") as f:
            start = f.read(1)
        if start not in (b"P", b"\x80"):  # neither a zip archive nor a pickle
            raise UserError(f"{file} is not a checkpoint (.safetensors or .pth)") from None
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {name.group(1)}" if name else "it is not a checkpoint"
        if "Unsupported operand" in str(error):
            what = "it was not written by torch.save, or with another pickle_protocol than 2, its default"
        raise UserError(
            f"{file} is refused: {what}; only tensors and plain values are read, because other content could run code. "
            "To save the weights alone where it was made: torch.save(model.state_dict(), 'weights.pth')"
        ) from None
    except Exception as error:  # the unpickler meets a damaged file with almost any exception
        if not file.stat().st_size:
            raise UserError(f"{file} is empty") from None
        raise UserError(f"{file} is not a readable checkpoint ({type(error).__name__}: {first_line(error)})") from None


def save_weights(path: Path, state: StateDict, card: Card) -> None:
    write_file(path, weights_bytes(state, card))


def weights_bytes(state: StateDict, card: Card) -> bytes:
    """A safetensors file with its card, and a checksum, for safetensors itself loads flipped bits without a word."""
    plain = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    return safetensors.torch.save(plain, metadata={"format": "pt", "eit": serialize_card(card, sha256=digest(plain))})


def digest(state: StateDict) -> str:
    """sha256 of names, types, shapes and values; the tensors may be on any device."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        row = tensor.as_strided((tensor.numel(),), (1,))  # a contiguous tensor of one element may have any stride
        sha.update(row.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()
