"""What a run starts from: the model, the weights of another run or of timm, and what of it learns."""

from typing import Any

from eit.config import Model, Recipe, differences
from eit.console import say
from eit.errors import UserError
from eit.models.registry import TIMM, check_timm_name, create_model, head_names
from eit.randomness import Stream, set_seed
from eit.training.checkpoint import saved_steps
from eit.training.run_folder import read_recipe
from eit.weights.load import load_weights, read_card

RATES = {"drop_rate", "drop_path_rate", "attn_drop_rate", "pos_drop_rate", "proj_drop_rate"}


def model_of_begun(recipe: Recipe) -> Model | None:
    """The model section of the run in the recipe's folder, if it has a checkpoint: it needs no other weights then."""
    folder = recipe.run_folder()
    if not saved_steps(folder) or not (folder / "recipe.yaml").is_file():
        return None
    return read_recipe(folder).model


def settle(recipe: Recipe, begun: Model | None = None) -> Recipe:
    """The recipe with the architecture of the weights that it starts from, and without what its model does not have.

    `begun` is the model of a run that continues from the same weights, which may be gone.
    """
    section = recipe.model
    if begun is not None and begun.pretrained != section.pretrained:
        begun = None
    given: dict[str, Any] = {}
    card = read_card(section.pretrained) if isinstance(section.pretrained, str) and begun is None else None
    if isinstance(section.pretrained, str):
        if begun is not None:
            given = begun.model_dump(exclude=RATES | {"pretrained", "reset_head"})
        elif card is not None:
            given = dict.fromkeys(set(Model.model_fields) - RATES - {"pretrained", "reset_head"})
            given |= dict(family="eit", name=card.model) | {k: v for k, v in card.arguments.items() if k not in RATES}
    if (name := given.get("name", section.name)).startswith(TIMM):
        check_timm_name(name)
        given |= dict.fromkeys(set(section.arguments()) - {"in_chans", "drop_rate", "drop_path_rate"})
        given["family"] = "eit"
    elif section.pretrained is True:
        raise UserError(f"no weights of {name} can be downloaded: model.pretrained=PATH")
    settled = recipe.model_copy(update=dict(model=section.model_copy(update=given)))
    changed = [change.removeprefix("model.") for change in differences(recipe, settled)]
    if changed and begun is None:
        if card is not None:
            say(f"the model is that of {section.pretrained}: {', '.join(changed)}")
        else:
            say(f"{name} has no such arguments: {', '.join(change.partition(':')[0] for change in changed)}")
    return settled


def build_model(recipe: Recipe, classes: int, initial: bool = True) -> Any:
    """The model with its initial values, a function of the seed, or those of `model.pretrained`.

    Without `initial` a checkpoint replaces the values, and nothing is read.
    """
    section, size = recipe.model, recipe.data.image_size
    set_seed(Stream.INITIAL_VALUES, recipe.seed)
    arguments = section.arguments()
    if section.name.startswith(TIMM):
        arguments["pretrained"] = section.pretrained is True and initial
    else:
        arguments["family"] = section.family
    model = create_model(section.name, num_classes=classes, img_size=size, **arguments)
    if section.pretrained is True and section.reset_head:
        model.reset_classifier(classes)
    if isinstance(section.pretrained, str) and initial:
        load_weights(model, section.pretrained, reset_head=section.reset_head)
    return model


def choose_trainable(recipe: Recipe, model: Any) -> None:
    """Fix the parameters that `optim.trainable` and `optim.freeze` do not let learn."""
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
