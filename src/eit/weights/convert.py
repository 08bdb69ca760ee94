"""Weights without a card: which model they are of, by their shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo

from eit.errors import UserError
from eit.models.registry import VARIANTS, create_model
from eit.weights.card import Card
from eit.weights.compatibility import check_compatible
from eit.weights.formats import StateDict


def infer_card(
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
            check_compatible(twin, state, str(file))
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
