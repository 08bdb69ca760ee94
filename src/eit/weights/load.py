"""Weights by name: a file, a run folder, one of those that are included, or one of the hub."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from eit.console import say
from eit.errors import UserError
from eit.hub_access import hub_reason, prepare_hub
from eit.models.eit import EIT, our_names
from eit.models.registry import head_names
from eit.weights.card import Card
from eit.weights.compatibility import check_compatible, resample_positions
from eit.weights.convert import TIMM_FILES, infer_card
from eit.weights.formats import StateDict, check_dense, read_weights, strip_prefixes

HUB = "hf-hub:"

# The included weights: name -> what they are for. NAME is eit_NAME.safetensors next to this file, sample images are
# samples/NAME-*. A name whose file is not there, as in a checkout before its training, is not included.
FOR = {
    "digits": "digits 0 to 9, typed or written by hand, in any colours",
    "cifar10": "photos of ten kinds of animals and vehicles; to fine-tune from",
}
_FOLDER = Path(__file__).parent
_FILES = {name: file for name in FOR if (file := _FOLDER / f"eit_{name}.safetensors").is_file()}
INCLUDED = _FILES | {file.stem: file for file in _FILES.values()}


def load(path: str | os.PathLike[str]) -> EIT:
    """A self-describing checkpoint, or weights of another training loop -> model in evaluation mode.

    What weights do not say (class names, mean, std ...) is assumed, printed in one line, and listed in `card.guessed`.

    Args:
        path: a weights file, a run folder (its best.safetensors, else final.safetensors), a folder of
            `timm.models.save_for_hf`, or the name of included weights, such as `digits`.

    Returns:
        The model, on the CPU and in float32; for weights of timm's models, timm's class. Its `Card` is the attribute
        `card`; what timm reads of it, for `timm.data.resolve_data_config`, is in `pretrained_cfg`.

    Raises:
        UserError: no such file, damaged, untrusted, or one that does not say which model it is.
    """
    file = find_weights(path)
    state, card = read_weights(file)
    if card is None:
        card = infer_card(state, file)
    with torch.device("meta"):  # nothing is allocated before the shapes are known to agree
        model: Any = card.create_model()  # timm's classes too
    check_compatible(model, state, str(file))
    if isinstance(model, EIT):
        model.load_state_dict(state, strict=True, assign=True)
    else:  # models of timm keep buffers that are not in the file
        model = card.create_model()
        model.load_state_dict(state, strict=True)
    model.requires_grad_(True).float().eval()
    model.card = card
    say_assumptions(card, str(path))
    model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | card.timm_cfg
    return model


def say_assumptions(card: Card, source: str) -> None:
    """Print what is guessed about weights, and which options set it; nothing if all is known."""
    if card.guessed:
        say(
            f"{source} does not say how it was trained; assumed: {card.assumptions}. If that is wrong, set it with "
            "eit convert (--classes, --size, --mean, --std, --crop-ratio, --interpolation, or --like timm/NAME)"
        )


def load_weights(model: Any, source: str | os.PathLike[str] | StateDict, reset_head: bool = False) -> Any:
    """Load our weights, timm's, or the authors' into `model`, strictly, and return it.

    A position table of another resolution is interpolated.

    Args:
        model: of `create_model`, or of timm.
        source: a file, a run folder, or a state dict.
        reset_head: whether the head keeps the model's own initial values, as other classes need it.

    Raises:
        UserError: names or shapes differ (both are named), or the file cannot be trusted.

    Examples:
        >>> from eit import create_model
        >>> trained = create_model("eit_mini", num_classes=2, depth=1)
        >>> model = load_weights(create_model("eit_mini", num_classes=2, depth=1), trained.state_dict())
        >>> bool((model.head.weight == trained.head.weight).all())
        True
    """
    if isinstance(source, Mapping):
        check_dense(source, "the state dict")
        state, name = our_names(strip_prefixes(source)), "the state dict"
    elif not isinstance(source, str | os.PathLike):
        raise UserError(f"load_weights takes a file, a run folder or a state dict, not {type(source).__name__}")
    else:
        file = find_weights(source)
        state, name = read_weights(file)[0], str(file)
    if reset_head:
        heads = tuple(f"{head}." for head in head_names(model))
        own = {k: v for k, v in model.state_dict().items() if k.startswith(heads)}
        state = {k: v for k, v in state.items() if not k.startswith(heads)} | own
    state = resample_positions(model, dict(state), name)
    check_compatible(model, state, name)
    model.load_state_dict(state, strict=True)
    return model


def find_weights(path: str | os.PathLike[str]) -> Path:
    """A weights file: the path itself, that of a folder, an included one, or one of the hub (hf-hub:USER/NAME).

    Of a run folder it is `best.safetensors` (else `final`), of one that `eit push` or `timm.models.save_for_hf` wrote
    `model.safetensors` (else `pytorch_model.bin`).
    """
    if str(path).startswith(HUB):
        return _fetch(str(path))
    if not str(path).strip():  # a variable that is not set; it is not the folder that the process is in
        raise UserError("no weights are named: give a weights file, a run folder, or included weights such as digits")
    path = Path(path).expanduser()
    if found := _weights_in(path):
        return found
    if _is_included(str(path)):
        return INCLUDED[str(path)]
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is not a run folder (it has no recipe.yaml): give runs/NAME, or a weights file")
        raise UserError(f"{path} holds neither best.safetensors nor final.safetensors: no epoch of this run has ended")
    if not path.is_file():
        raise UserError(
            f"no weights at {path}: a .safetensors or .pth file, a run folder, or {' or '.join(_FILES)} is expected"
        )
    return path


def _is_included(name: str) -> bool:
    """Whether included weights are meant: no file or run has the name. A folder of images may have it."""
    path = Path(name)
    return name in INCLUDED and not (path.is_file() or (path / "recipe.yaml").is_file() or _weights_in(path))


def _weights_in(folder: Path) -> Path | None:
    names = ("best.safetensors", "final.safetensors", *TIMM_FILES)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def sample_images(name: str) -> list[str]:
    """The images that are included to try the included weights `name` on; empty for other weights."""
    own = name.removeprefix("eit_") if _is_included(name) else None
    return [str(file) for file in sorted((_FOLDER / "samples").glob(f"{own}-*"))] if own else []


def is_weights_name(name: str) -> bool:
    """Whether `name` is an existing path, included weights, or an address on the hub."""
    return Path(name).expanduser().exists() or name in INCLUDED or name.startswith(HUB)


def _fetch(name: str) -> Path:
    """The weights of a repository on the Hugging Face hub, kept in its cache; a revision stands behind an @."""
    repo, _, revision = name.removeprefix(HUB).partition("@")
    prepare_hub()
    weights, *others = TIMM_FILES
    try:
        try:
            file = hf_hub_download(repo, weights, revision=revision or None)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # no network
                raise
            file = hf_hub_download(repo, others[0], revision=revision or None)
    except Exception as error:  # of the hub, of its HTTP library, of the network
        raise UserError(f"{name} cannot be fetched: {hub_reason(error)}") from None
    with suppress(Exception):  # weights of eit push do not need it
        hf_hub_download(repo, "config.json", revision=revision or None)
    return Path(file)


def read_card(path: str | os.PathLike[str]) -> Card | None:
    """What a weights file, or a run folder's, says about itself; None if it says nothing."""
    file = find_weights(path)
    return read_weights(file)[1] if file.suffix == ".safetensors" else None
