"""Weights on disk. Nothing here unpickles arbitrary objects.

Weights (`*.safetensors`) describe themselves in their metadata, see `Card`.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import logging as hub_logging
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor

from eit import __version__
from eit.config import model_arguments, split_name
from eit.data.images import MAX_PIXELS, View
from eit.errors import UserError, first_line
from eit.files import write_file
from eit.models.eit import EIT, our_names
from eit.models.registry import FAMILIES, TIMM, VARIANTS, create_model, head_names, is_model

StateDict = Mapping[str, Tensor]


class Card(BaseModel):
    """What weights say about themselves: enough to build the model and to feed it.

    Attributes:
        model: a name of the zoo, or timm/NAME. A card made for eit_plus_mini has eit_mini of the family eit_plus.
        arguments: of `eit.create_model`: family and all but num_classes and img_size.
        classes: names, in the order of the logits.
        mean: of pixels in 0..1, one a channel.
        std: of pixels in 0..1, one a channel.
        size: pixels of the model's square input.
        resize: pixels of the shorter side before the centre crop.
        interpolation: of the resize.
        version: of this package, that wrote the weights.
        recipe: that of the run, section by section; None of converted weights.
        metrics: on the validation images of the run, percentages.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    arguments: dict[str, Any]
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]
    size: Annotated[int, Field(ge=1, le=65536)]
    resize: Annotated[int, Field(ge=1, le=65536)]
    interpolation: Literal["bilinear", "bicubic"]
    version: str = __version__
    recipe: dict[str, Any] | None = None
    metrics: dict[str, float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _size_and_family(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name, arguments = str(values.get("model")), values.get("arguments")
        size, family = split_name(name)
        if family is None or not is_model(name) or not isinstance(arguments, dict):
            return values
        if arguments.get("family", family) != family:
            return values
        return values | dict(model=size, arguments=arguments | dict(family=family))

    @model_validator(mode="after")
    def _together(self) -> "Card":
        if not len(self.mean) == len(self.std) == self.arguments.get("in_chans", 3) in (1, 3):
            raise ValueError("mean and std do not fit the model's channels")
        if not isinstance(self.data, dict) or not isinstance(self.data.get("max_pixels", 1), int):
            raise ValueError("the recipe is none")
        return self

    def create_model(self) -> EIT:
        """The model, with initial values.

        Raises:
            UserError: a name or arguments that this version does not know.
        """
        return create_model(self.model, num_classes=len(self.classes), img_size=self.size, **self.arguments)

    @property
    def in_chans(self) -> int:
        """Image channels: 1 or 3."""
        return len(self.mean)

    @property
    def view(self) -> View:
        """What the model sees of an image."""
        return View(self.size, self.resize, self.interpolation, self.mean, self.std)

    @property
    def timm_cfg(self) -> dict[str, Any]:
        """The same for timm, as part of a model's `pretrained_cfg`: what `timm.data.resolve_data_config` reads."""
        crop = self.size / self.resize
        while math.floor(self.size / crop) < self.resize:  # timm resizes to this floor: 28 / (28 / 50) is below 50
            crop = math.nextafter(crop, 0)
        look = dict(mean=self.mean, std=self.std, interpolation=self.interpolation, crop_pct=crop, crop_mode="center")
        return dict(num_classes=len(self.classes), input_size=(self.in_chans, self.size, self.size), **look)

    @property
    def data(self) -> dict[str, Any]:
        """The recipe's section on data; empty where there is none."""
        return (self.recipe or {}).get("data") or {}

    @property
    def max_pixels(self) -> int:
        """The cap on an image's pixels that the run had."""
        return int(self.data.get("max_pixels", MAX_PIXELS))


HUB = "hf-hub:"
SHIPPED = {name: Path(__file__).with_name("eit_digits.safetensors") for name in ("digits", "eit_digits")}


# -- Reading ----------------------------------------------------------------------------------------------------------


def find_weights(path: str | os.PathLike[str]) -> Path:
    """A weights file: the path itself, that of a folder, one that ships, or one of the hub (hf-hub:USER/NAME).

    Of a run folder it is `best.safetensors` (else `final`), of one that `eit push` wrote `model.safetensors`.
    """
    if str(path).startswith(HUB):
        return _fetch(str(path))
    path = Path(path)
    if str(path) in SHIPPED and not path.exists():
        return SHIPPED[str(path)]
    if path.is_dir():
        for name in ("best.safetensors", "final.safetensors", "model.safetensors"):
            if (path / name).is_file():
                return path / name
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is no run folder (it has no recipe.yaml): give runs/NAME, or a weights file")
        raise UserError(f"{path} holds neither best.safetensors nor final.safetensors: no epoch of this run has ended")
    if not path.is_file():
        raise UserError(
            f"no weights at {path}: a .safetensors or .pth file, a run folder, or {' or '.join(SHIPPED)} is expected"
        )
    return path


def names_weights(name: str) -> bool:
    """Whether `find_weights` has a place to look for `name`."""
    return Path(name).exists() or name in SHIPPED or name.startswith(HUB)


def _fetch(name: str) -> Path:
    """The weights of a repository on the Hugging Face hub, kept in its cache; a revision stands behind an @."""
    repo, _, revision = name.removeprefix(HUB).partition("@")
    hub_logging.set_verbosity_error()  # its retries; what it fails by is said below
    try:
        return Path(hf_hub_download(repo, "model.safetensors", revision=revision or None))
    except Exception as error:  # of the hub, of its HTTP library, of the network
        raise UserError(f"{name} cannot be fetched: {first_line(error)}") from None


def load(path: str | os.PathLike[str]) -> EIT:
    """A self-describing checkpoint, or the authors' .pth -> model in evaluation mode.

    Args:
        path: a weights file, a run folder (its best.safetensors, else final.safetensors), or `digits`, which ships.

    Returns:
        The model, on the CPU and in float32; for weights of timm's models, timm's class. Its `Card` is the attribute
        `card`; what timm reads of it, for `timm.data.resolve_data_config`, is in `pretrained_cfg`.

    Raises:
        UserError: no such file, damaged, untrusted, or one that does not say which model it is.
    """
    file = find_weights(path)
    state, card = read_weights(file)
    if card is None:
        card = recognise(state, file)
    with torch.device("meta"):  # nothing is allocated before the shapes are known to agree
        model: Any = card.create_model()  # timm's classes too
    check_fit(model, state, str(file))
    if isinstance(model, EIT):
        model.load_state_dict(state, strict=True, assign=True)
    else:  # models of timm keep buffers that are not in the file
        model = card.create_model()
        model.load_state_dict(state, strict=True)
    model.requires_grad_(True).float().eval()
    model.card = card
    model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | card.timm_cfg
    return model


def load_weights(model: Any, source: str | os.PathLike[str] | StateDict, reset_head: bool = False) -> Any:
    """Load our weights, timm's, or the authors' into `model`, strictly, and return it.

    A position table of another resolution is interpolated.

    Args:
        model: of `create_model`, or of timm.
        source: a file, a run folder, or a state dict.
        reset_head: whether the head keeps the model's own initial values, as other classes need it.

    Raises:
        UserError: names or shapes differ (both are named), or the file cannot be trusted.
    """
    if isinstance(source, Mapping):
        state, name = our_names(source), "the state dict"
    else:
        file = find_weights(source)
        state, name = read_weights(file)[0], str(file)
    if reset_head:
        heads = tuple(f"{head}." for head in head_names(model))
        own = {k: v for k, v in model.state_dict().items() if k.startswith(heads)}
        state = {k: v for k, v in state.items() if not k.startswith(heads)} | own
    state = _resampled(model, dict(state), name)
    check_fit(model, state, name)
    model.load_state_dict(state, strict=True)
    return model


def _resampled(model: Any, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """`state` with its tables of positions interpolated to the model's resolution."""
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # by timm's conventions
    own = model.state_dict()
    if fit is None or all(k not in own or own[k].shape == v.shape for k, v in state.items()):
        return state
    try:
        return fit(state, model)
    except Exception as error:
        raise UserError(f"{source} does not fit the model: {first_line(error)}") from None


def read_card(path: str | os.PathLike[str]) -> Card | None:
    """What a weights file, or a run folder's, says about itself; None where it says nothing."""
    file = find_weights(path)
    return read_weights(file)[1] if file.suffix == ".safetensors" else None


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


def check_fit(model: Any, state: StateDict, source: str) -> None:
    """Raise a UserError that says how `state` differs from what `model` needs."""
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    heads = tuple(f"{head}." for head in head_names(model))
    if shapes and all(k.startswith(heads) for k in shapes) and not missing and not extra:
        have, want = len(state[shapes[0]]), len(own[shapes[0]])
        raise UserError(
            f"{source} has a head for {have} classes, {want} are needed; model.reset_head=true makes a new one"
        )
    faults = [
        *(f"{k} is {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in shapes),
        *(f"{k} is missing" for k in missing),
        *(f"{k} is unknown" for k in extra),
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{source} does not fit the model: {', '.join(faults[:3])}{more}")


def recognise(
    state: StateDict, file: Path, model: str | None = None, arguments: Mapping[str, Any] | None = None, size: int = 224
) -> Card:
    """A card for weights without one: their shapes are matched to the four published models.

    `model` and `arguments` (of `eit.EIT`) say what the weights are where the shapes alone do not.
    """
    arguments = dict(arguments or {})
    if "pre_logits.fc.weight" in state and state["pre_logits.fc.weight"].ndim == 2:
        arguments["representation_size"] = len(state["pre_logits.fc.weight"])
    if "head.weight" not in state or state["head.weight"].ndim != 2:
        raise UserError(f"{file} holds no weights of an EIT classifier (head.weight is missing)")
    classes = len(state["head.weight"])
    shapes = {k: v.shape for k, v in state.items()}
    for name in [model] if model else VARIANTS:
        with torch.device("meta"):
            twin = create_model(name, num_classes=classes, img_size=size, **arguments)
        if model:
            check_fit(twin, state, str(file))
        if {k: v.shape for k, v in twin.state_dict().items()} == shapes:
            channels = twin.patch_embed.proj.in_channels
            mean, std = default_mean_std(channels)
            return Card(
                model=name,
                arguments=arguments,
                classes=default_class_names(classes),
                mean=mean,
                std=std,
                size=size,
                resize=round(size * 256 / 224) if size > 64 else size,
                interpolation="bicubic",
            )
    raise UserError(
        f"{file} does not say which model it is and fits none of {', '.join(VARIANTS)}: name it, "
        "eit convert IN OUT --model eit_mini --size 32 kernel_size=3 ..."
    )


def default_mean_std(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's for colour, 0.5 otherwise."""
    if channels == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (0.5,) * channels, (0.5,) * channels


def default_class_names(count: int) -> list[str]:
    """ImageNet-1K's for 1000 classes, numbers otherwise."""
    if count != 1000:
        return [str(i) for i in range(count)]
    info = ImageNetInfo()
    return [info.index_to_description(i) for i in range(count)]


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
    return state, known_card(header, str(file))


def _read_header(text: str | bytes, file: Path) -> tuple[dict[str, Any], str]:
    """What `card_text` wrote: the card, and the checksum of the weights."""
    try:
        header = json.loads(text)
        return header, header.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{file}: its description of the model is damaged") from None


def _check_digest(state: StateDict, said: str, file: Path) -> None:
    if said != digest(state):
        raise UserError(f"{file} is damaged: its weights do not match their checksum")


def known_card(header: dict[str, Any], source: str) -> Card:
    """The card of `source`, of a model that this version can make.

    Raises:
        UserError: it is damaged, or of a model or with arguments that are unknown here.
    """
    try:
        card = Card.model_validate(header)
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{source}: its description of the model is damaged") from None
    try:
        card.arguments = model_arguments(card.arguments)
        if not card.model.startswith(TIMM):
            card.arguments.setdefault("cls_conv", "identity")  # files without the key are older than it
            preset = _preset(card)
            card.arguments = {k: v for k, v in card.arguments.items() if preset.get(k) != v}
        if not is_model(card.model):
            raise UserError(f"unknown model {card.model!r}")
    except UserError as error:
        here = f"this version ({__version__}) does not know; it was made by {card.version}"
        raise UserError(f"{source} is of a model that {here}: {error}") from None
    return card


def _preset(card: Card) -> dict[str, str]:
    return FAMILIES[card.arguments.get("family", "eit")]


def read_pt2(file: Path) -> tuple[dict[str, Tensor], Card]:
    """The weights of a program that `eit export` wrote. The program is not loaded, for that could run code."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            described = [names["extra/eit"], names["data/weights/model_weights_config.json"]]
            if any(archive.getinfo(name).file_size > 1 << 26 for name in described):
                raise ValueError("its description is too long")
            header, said = _read_header(archive.read(described[0]), file)
            card = known_card(header, str(file))
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
    """The weights of a .pth file. An argparse.Namespace is allowed beside them, as the authors' files have one."""
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
            raise UserError(f"{file} is no checkpoint (.safetensors or .pth)") from None
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {name.group(1)}" if name else "it is no checkpoint"
        raise UserError(
            f"{file} is refused: {what}; only tensors and plain values are read, for else it could run code"
        ) from None
    except Exception as error:  # the unpickler meets a damaged file with almost any exception
        raise UserError(f"{file} is not a readable checkpoint ({type(error).__name__}: {first_line(error)})") from None


# -- Writing ----------------------------------------------------------------------------------------------------------


def weights_bytes(state: StateDict, card: Card) -> bytes:
    """A safetensors file with its card, and a checksum, for safetensors itself loads flipped bits without a word."""
    plain = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    return safetensors.torch.save(plain, metadata={"format": "pt", "eit": card_text(plain, card)})


def card_text(state: StateDict, card: Card) -> str:
    """The card as files hold it, with the checksum of the weights and all of the preset, which may change later."""
    header = card.model_dump(mode="json")
    if not card.model.startswith(TIMM):
        header["arguments"] = _preset(card) | card.arguments
    return json.dumps(header | {"sha256": digest(state)})


def save_weights(path: Path, state: StateDict, card: Card) -> None:
    write_file(path, weights_bytes(state, card))


def digest(state: StateDict) -> str:
    """sha256 of names, types, shapes and values; the tensors may be on any device."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        row = tensor.as_strided((tensor.numel(),), (1,))  # a contiguous tensor of one element may have any stride
        sha.update(row.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()
