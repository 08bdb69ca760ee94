"""From a recipe to the model that is trained: architecture, initial weights, trainable parameters, view and card."""

import copy
import math
from statistics import fmean
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from eit.config import Model, Recipe, differences
from eit.console import say
from eit.data.images import Preprocessing
from eit.errors import UserError, first_line
from eit.models.registry import TIMM, check_timm_name, create_model, head_names
from eit.randomness import Stream, set_seed
from eit.weights.card import LARGEST_RESIZE, LARGEST_SIZE, Card, default_mean_std
from eit.weights.load import load_weights, read_card

RATES = {"drop_rate", "drop_path_rate", "attn_drop_rate", "pos_drop_rate", "proj_drop_rate"}


def resolve_architecture(recipe: Recipe, recorded: Model | None = None) -> Recipe:
    """The recipe with the architecture of `model.pretrained`, and without arguments that its model does not have.

    `recorded` is the model section of the run that continues. It is used in place of the file of the weights, which may
    be gone.
    """
    section = recipe.model
    if recorded is not None and recorded.pretrained != section.pretrained:
        recorded = None
    resolved: dict[str, Any] = {}
    card = read_card(section.pretrained) if isinstance(section.pretrained, str) and recorded is None else None
    if isinstance(section.pretrained, str):
        if recorded is not None:
            resolved = recorded.model_dump(exclude=RATES | {"pretrained", "reset_head"})
        elif card is not None:
            resolved = dict.fromkeys(set(Model.model_fields) - RATES - {"pretrained", "reset_head"})
            resolved |= dict(family="eit", name=card.model) | {
                k: v for k, v in card.arguments.items() if k not in RATES
            }
    if (name := resolved.get("name", section.name)).startswith(TIMM):
        check_timm_name(name)
        resolved |= dict.fromkeys(set(section.arguments()) - {"in_chans", "drop_rate", "drop_path_rate"})
        resolved["family"] = "eit"
    elif section.pretrained is True:
        raise UserError(f"no weights of {name} can be downloaded: give a file, model.pretrained=PATH")
    changed_recipe = recipe.model_copy(update=dict(model=section.model_copy(update=resolved)))
    changes = [change.removeprefix("model.") for change in differences(recipe, changed_recipe)]
    if changes and recorded is None:
        if card is not None:
            replaced = [change for change in changes if ": null -> " not in change]
            say(": ".join([f"the model is that of {section.pretrained}", *([", ".join(replaced)] if replaced else [])]))
        else:
            say(
                f"{name} does not have these arguments, and they are left out: "
                f"{', '.join(change.partition(':')[0] for change in changes)}"
            )
    return changed_recipe


def create_arguments(section: Model) -> dict[str, Any]:
    """What `create_model` takes of a model section besides the name. Models of timm have no family."""
    arguments = section.arguments()
    return arguments if section.name.startswith(TIMM) else arguments | dict(family=section.family)


def build_model(recipe: Recipe, classes: int, initial: bool = True) -> Any:
    """The model with initial values from the seed, or with the weights of `model.pretrained`.

    Without `initial` no weights are read: the caller loads a checkpoint.
    """
    section, size = recipe.model, recipe.data.image_size
    set_seed(Stream.INITIAL_VALUES, recipe.seed)
    arguments = create_arguments(section)
    if section.name.startswith(TIMM):
        arguments["pretrained"] = section.pretrained is True and initial
    model = create_model(section.name, num_classes=classes, img_size=size, **arguments)
    if section.pretrained is True and section.reset_head:
        model.reset_classifier(classes)
    if isinstance(section.pretrained, str) and initial:
        load_weights(model, section.pretrained, reset_head=section.reset_head)
    return model


def choose_trainable(recipe: Recipe, model: Any) -> None:
    """Freeze the parameters that `optim.trainable` and `optim.freeze` exclude from training."""
    config = recipe.optim
    heads = tuple(f"{head}." for head in head_names(model))
    names = [name for name, _ in model.named_parameters()]
    for part in config.freeze:
        if not any(f"{name}.".startswith(f"{part}.") for name in names):
            parts = dict.fromkeys(name.split(".")[0] for name in names)
            raise UserError(f"optim.freeze={part}: the model has no such part ({', '.join(parts)}; blocks.0 and so on)")
    if config.trainable == "attention" and not any(".attn." in name for name in names):
        raise UserError(f"optim.trainable=attention: {recipe.model.name} has no attention layers (named attn)")
    for name, parameter in model.named_parameters():
        learns = {
            "all": True,
            "attention": name.startswith((*heads, "pos_embed")) or (".attn." in name and ".attn.conv" not in name),
            "head": name.startswith(heads),
        }[config.trainable]
        frozen = any(f"{name}.".startswith(f"{part}.") for part in config.freeze)
        parameter.requires_grad_(learns and not frozen)
    if not any(p.requires_grad for p in model.parameters()):
        both = f"optim.trainable={config.trainable} with optim.freeze={list(config.freeze)}"
        raise UserError(f"{both} leaves nothing to learn")


def check_single_images(recipe: Recipe, model: Any, view: Preprocessing) -> None:
    """Raise a UserError if a norm of the model cannot be trained on batches of one image, and the recipe has those."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    if recipe.data.batch_size > 1 or not norms:
        return
    trial = copy.deepcopy(model).train()
    for norm, own in zip(norms, (module for module in trial.modules() if isinstance(module, _NormBase)), strict=True):
        own.train(not norm.affine or norm.weight.requires_grad)  # frozen ones stay as they are
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(torch.zeros(1, view.channels, view.size, view.size))
    except ValueError as error:  # of torch: a mean and variance of one value
        raise UserError(
            f"data.batch_size=1: {recipe.model.name} has batch norms, which need more than one value per channel "
            f"({first_line(error)}); set data.batch_size=2 or more"
        ) from None


def make_view(recipe: Recipe) -> Preprocessing:
    """How the model sees an image: size, crop, interpolation, mean and std."""
    data, channels = recipe.data, recipe.model.in_chans or 3
    if channels not in (1, 3):
        raise UserError(f"model.in_chans={channels}: images are read with 1 or 3 channels")
    mean, std = default_mean_std(channels)
    mean, std = data.mean or mean, data.std or std
    if channels == 1:  # statistics of colour are averaged for grey images, and those of grey are repeated for colour
        mean, std = (fmean(mean),), (fmean(std),)
    else:
        mean, std = (v if len(v) == channels else v * channels for v in (mean, std))
    resize = math.floor(data.image_size / data.crop_ratio)
    if data.image_size > LARGEST_SIZE or resize > LARGEST_RESIZE:
        raise UserError(
            f"data.image_size={data.image_size} with data.crop_ratio={data.crop_ratio:g}: images have at most "
            f"{LARGEST_SIZE} pixels, and {LARGEST_RESIZE} before they are cropped"
        )
    return Preprocessing(data.image_size, resize, data.interpolation, mean, std)


def make_card(recipe: Recipe, view: Preprocessing, classes: list[str]) -> Card:
    """The card that is saved with the weights."""
    return Card(
        model=recipe.model.name,
        arguments=create_arguments(recipe.model),
        classes=classes,
        mean=view.mean,
        std=view.std,
        size=view.size,
        resize=view.resize,
        interpolation=view.interpolation,
        recipe=recipe.model_dump(mode="json"),
    )
