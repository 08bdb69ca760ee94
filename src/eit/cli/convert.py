"""`eit convert IN OUT`."""

from pathlib import Path
from typing import Annotated

import typer

from eit.errors import UserError
from eit.files import expand_path


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            parser=expand_path,
            help="Weights of the authors' code or of timm: a .pth or .safetensors file.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(metavar="OUT", parser=expand_path, help="The .safetensors file to write.", show_default=False),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGUMENT=VALUE", help="Set an argument of the model, see eit.EIT.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name the model; default: recognised by the shapes of IN.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Input height and width in pixels; default: 224.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            parser=expand_path,
            help="Read class names from FILE, one per line, in the order of the logits; default: those of IN, else "
            "ImageNet's for 1000 classes, else numbers.",
        ),
    ] = None,
) -> None:
    """Convert the authors' or timm's weights to safetensors.

    Nothing in IN is executed. Where its shapes do not tell the model, name it with its arguments, here timm's ViT-Ti:

    \b
    eit convert IN OUT --model eit_mini family=vit embed_dim=192 depth=12 num_heads=3
    """
    if not target.endswith(".safetensors"):
        raise UserError(f"{target}: give a name that ends in .safetensors for the file to write")
    from eit.config import Model, model_arguments, parse_overrides
    from eit.weights.convert import infer_card
    from eit.weights.formats import read_weights, save_weights
    from eit.weights.load import find_weights

    file = find_weights(source)
    state, card = read_weights(file)
    if card is None:
        card = infer_card(
            state, file, model, model_arguments(parse_overrides(arguments or [], schema=Model)), size or 224
        )
    elif model or arguments or size:
        raise UserError(f"{file} says itself that it is {card.model}: leave out --model, --size and ARGUMENT=VALUE")
    if classes:
        card = card.model_copy(update=dict(classes=read_class_names(classes, len(card.classes))))
    try:
        save_weights(Path(target), state, card)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    changed = "".join(f" {name}={value}" for name, value in card.arguments.items())
    parameters = sum(v.numel() for v in state.values())
    print(f"{target}: {card.model}{changed}, {len(card.classes)} classes, {parameters:,} parameters")
    print(f"images are normalised with mean {card.mean} and std {card.std}, at {card.size} pixels")


def read_class_names(name: str, count: int) -> list[str]:
    """The lines of a file, which must be `count`."""
    try:
        names = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {name} cannot be read: {error}") from None
    if len(names) != count:
        raise UserError(f"--classes {name} has {len(names)} names, the model {count} classes: give one name per line")
    return names
