"""Files of weights: .safetensors, .pth and .pt2. Nothing here unpickles arbitrary objects."""

import argparse
import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from eit.errors import UserError, first_line
from eit.files import write_file
from eit.models.eit import our_names
from eit.weights.card import Card, parse_card, serialize_card

StateDict = Mapping[str, Tensor]


def read_weights(file: Path) -> tuple[dict[str, Tensor], Card | None]:
    """Tensors by our names, and what the file says about itself, if it does."""
    with open(file, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):  # the authors keep theirs in Git LFS
            raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its checkout")
    if file.suffix == ".pt2":
        return read_pt2(file)
    if file.suffix in (".onnx", ".xml"):
        raise UserError(f"{file} is an exported model, which eit eval and eit predict take: give the weights it is of")
    state, card = read_safetensors(file) if file.suffix == ".safetensors" else (_read_pth(file), None)
    return state if card else our_names(state), card


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], Card | None]:
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            metadata = f.metadata() or {}
            state = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
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
        raise UserError(f"{file} is damaged: its weights do not match their checksum")


def read_pt2(file: Path) -> tuple[dict[str, Tensor], Card]:
    """The weights of a program that `eit export` wrote. The program is not loaded, for that could run code."""
    try:
        with zipfile.ZipFile(file) as archive:
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


def _read_pth(file: Path) -> dict[str, Tensor]:
    """The weights of a .pth file. An argparse.Namespace is allowed next to them, as in the authors' files."""
    content = read_pickle(file, argparse.Namespace)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) and v.is_floating_point() for k, v in content.items())
    ):
        raise UserError(f"{file} holds no weights: neither a state dict nor a checkpoint with one under 'model'")
    return content


def read_pickle(file: Path, *allowed: type) -> Any:
    """What torch.save wrote: tensors, plain values and objects of `allowed` classes. Nothing is executed."""
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols, ahead of the refusal
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if file.read_bytes()[:1] not in (b"P", b"\x80"):  # neither a zip archive nor a pickle
            raise UserError(f"{file} is not a checkpoint (.safetensors or .pth)") from None
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {name.group(1)}" if name else "it is not a checkpoint"
        raise UserError(
            f"{file} is refused: {what}; only tensors and plain values are read, for else it could run code"
        ) from None
    except Exception as error:  # the unpickler meets a damaged file with almost any exception
        raise UserError(f"{file} is not a readable checkpoint ({type(error).__name__}: {first_line(error)})") from None


def save_weights(path: Path, state: StateDict, card: Card) -> None:
    write_file(path, weights_bytes(state, card))


def weights_bytes(state: StateDict, card: Card) -> bytes:
    """A safetensors file with its card, and a checksum, for safetensors itself loads flipped bits without a word."""
    plain = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    return safetensors.torch.save(plain, metadata={"format": "pt", "eit": serialize_card(card, digest(plain))})


def digest(state: StateDict) -> str:
    """sha256 of names, types, shapes and values; the tensors may be on any device."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        row = tensor.as_strided((tensor.numel(),), (1,))  # a contiguous tensor of one element may have any stride
        sha.update(row.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()
