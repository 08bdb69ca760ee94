"""Weights without a card: which model they are of, by their shapes or timm's config.json; what else is guessed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError

from eit.config import model_arguments
from eit.errors import UserError, few, first_line, shorten
from eit.models.registry import MODELS, TIMM, VARIANTS, check_timm_name, create_model
from eit.weights.card import Card, assumed
from eit.weights.compatibility import check_compatible
from eit.weights.formats import StateDict

TIMM_FILES = ("model.safetensors", "pytorch_model.bin")  # of timm.models.save_for_hf, next to config.json


def infer_card(
    state: StateDict,
    file: Path,
    model: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    size: int | None = None,
) -> Card:
    """A card for weights without one: their shapes are matched to the four published models.

    What neither the weights nor the caller say is assumed, and named in the card's `guessed`.

    Args:
        state: the weights.
        file: where they come from. If timm's `config.json` is next to it, that says the model and its preprocessing.
        model: which model the weights are of, if the shapes alone do not tell; a name of `list_models()` or timm/NAME.
        arguments: of the model, checked.
        size: pixels of the model's input; None: 224, as a guess.

    Raises:
        UserError: the weights fit no model, or one whose images have neither 1 nor 3 channels.
    """
    config = file.with_name("config.json")
    if model is None and not arguments and file.name in TIMM_FILES and config.is_file() and _is_timms(config):
        return _card_of_timm(state, config, size)
    arguments = dict(arguments or {})
    head = "head"
    if model is not None and model.startswith(TIMM):
        check_timm_name(model)
        head = str(timm.get_pretrained_cfg(model.removeprefix(TIMM)).classifier)
    weight, stem = state.get(f"{head}.weight"), state.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 2:
        if inner := next((name for name in state if name.endswith(f".{head}.weight")), None):
            prefix = inner.removesuffix(f"{head}.weight")
            alone = f"{{k.removeprefix({prefix!r}): v for k, v in weights.items() if k.startswith({prefix!r})}}"
            raise UserError(
                f"{file} holds several models: its names are {few(list(state), 3)}. To save the one under "
                f"{prefix[:-1]}: torch.save({alone}, 'weights.pth')"
            )
        raise UserError(
            f"{file} holds no weights of an EIT classifier ({head}.weight is missing; its names are "
            f"{few(list(state), 3) or 'none'})" + ("" if model else "; for a model of timm give --model timm/NAME")
        )
    if (table := state.get("pre_logits.fc.weight")) is not None and table.ndim == 2:
        arguments["representation_size"] = len(table)
    if stem is not None and stem.ndim == 4 and stem.shape[1] != 3:
        arguments.setdefault("in_chans", stem.shape[1])
    channels = arguments.get("in_chans", 3)
    if channels not in (1, 3):
        raise UserError(
            f"{file} takes images of {channels} channels (in_chans): images are read with 1 (grey) or 3 (RGB). For "
            "tensors, load it in Python: eit.load_weights(eit.create_model(NAME, in_chans=...), FILE)"
        )
    classes, shapes = len(weight), {k: v.shape for k, v in state.items()}
    pixels = 224 if size is None else size
    near: tuple[Any, str] | None = None
    for name in [model] if model else VARIANTS:
        with torch.device("meta"):
            twin = create_model(name, num_classes=classes, img_size=pixels, **arguments)
        if model:
            check_compatible(twin, state, str(file))
        if model or {k: v.shape for k, v in twin.state_dict().items()} == shapes:
            guesses = assumed(classes, channels, pixels)
            guessed = (*guesses, *(("size",) if size is None else ()))
            return _card(file, model=name, arguments=arguments, size=pixels, guessed=guessed, **guesses)
        if weight.shape[1] == VARIANTS[name].embed_dim:
            near = twin, name
    advice = "name it, eit convert IN OUT --model eit_mini --size 32 kernel_size=3 ..."
    if near:
        try:
            check_compatible(near[0], state, f"{file} does not say which model it is; taken for {near[1]}, it")
        except UserError as error:
            raise UserError(f"{error}; {advice}") from None
    raise UserError(f"{file} does not say which model it is and fits none of {', '.join(VARIANTS)}: {advice}")


def _is_timms(config: Path) -> bool:
    """Whether a config.json is of timm, and not of transformers; a damaged one may be of timm."""
    try:
        content = json.loads(config.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(content, dict) or {"architectures", "model_type"}.isdisjoint(content)


def _card_of_timm(state: StateDict, file: Path, size: int | None) -> Card:
    """The card of a folder that `timm.models.save_for_hf` wrote."""
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
        name, cfg = config["architecture"], config["pretrained_cfg"]
        arguments = {k: v for k, v in config.get("model_args", {}).items() if k not in ("num_classes", "img_size")}
        names = config.get("label_names")
        if isinstance(names, dict):
            names = [names[key] for key in sorted(names, key=int)]
        if names and not isinstance(names, list):
            raise ValueError(f"label_names is of the type {type(names).__name__}")
        if names and len(names) != int(config["num_classes"]):
            raise ValueError(f"{len(names)} label_names for {config['num_classes']} classes")
        channels, height, width = cfg["input_size"]
        if height != width:
            raise ValueError(f"images of {width}x{height} pixels: square ones are read")
        pixels = size or int(width)
        guesses = assumed(int(config["num_classes"]), int(channels), pixels)
        known = _preprocessing(cfg, pixels) | (dict(classes=list(map(str, names))) if names else {})
    except Exception as error:  # a JSON file of anything
        raise UserError(
            f"{file} is not of timm.models.save_for_hf: {type(error).__name__}: {first_line(error)}"
        ) from None
    model = name if name in MODELS else f"{TIMM}{name}"
    if channels != 3:
        arguments.setdefault("in_chans", channels)
    fields = guesses | known
    return amend(
        _card(file, model=model, arguments=model_arguments(arguments), size=pixels, guessed=tuple(guesses), **guesses),
        str(file),
        **{name: fields[name] for name in known},
    )


def preprocessing_of_timm(name: str, size: int) -> dict[str, Any]:
    """mean, std, resize and interpolation of a model of timm (timm/NAME, with or without a tag), for `size` pixels.

    Raises:
        UserError: timm has no such model, or it prepares images in a way that this package does not.
    """
    if not name.startswith(TIMM):
        raise UserError(f"--like {name}: give timm/NAME, such as timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    check_timm_name(name)
    try:
        cfg = timm.get_pretrained_cfg(name.removeprefix(TIMM)).to_dict()
    except RuntimeError as error:  # an unknown tag
        raise UserError(f"--like {name}: {first_line(error)}") from None
    if cfg.get("crop_mode", "center") != "center":
        raise UserError(
            f"--like {name}: its images are not cropped from the centre (crop_mode={cfg['crop_mode']}); give --mean, "
            "--std, --crop-ratio and --interpolation"
        )
    return _preprocessing(cfg, size)


def _preprocessing(cfg: Mapping[str, Any], size: int) -> dict[str, Any]:
    """What timm's configuration says of images. Without `resize` if they are not cropped from the centre."""
    known = dict(mean=cfg["mean"], std=cfg["std"], interpolation=cfg["interpolation"])
    if max(map(float, [*cfg["mean"], *cfg["std"]])) > 1:
        raise ValueError(f"mean={cfg['mean']} and std={cfg['std']} are not of pixels in 0..1")
    if (cfg.get("crop_mode") or "center") != "center":
        return known
    return known | dict(resize=math.floor(size / float(cfg.get("crop_pct") or 0.875)))


def amend(card: Card, source: str, **known: Any) -> Card:
    """`card` with fields that are `known` now, and no longer guessed.

    Raises:
        UserError: a value that does not fit the model.
    """
    guessed = tuple(name for name in card.guessed if name not in known)
    return _card(source, **card.model_dump() | known | dict(guessed=guessed))


def _card(source: str | Path, **fields: Any) -> Card:
    try:
        return Card.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"]))
        given = f"{what}={shorten(str(first['input']), 60)}: " if what else ""
        raise UserError(f"{source}: {given}{first['msg'].removeprefix('Value error, ')}") from None
