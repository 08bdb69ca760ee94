"""`eit convert IN OUT`."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from eit.errors import UserError
from eit.files import expand_path, text_lines
from eit.imports import quick_imports


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
        str | None, typer.Option(metavar="NAME", help="Name the model; default: it is recognised by the shapes of IN.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Input height and width in pixels; default: 224.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            parser=expand_path,
            help="Read class names from FILE, one per line, in the order of the logits; default: those of IN, "
            "otherwise assumed: ImageNet's for 1000 classes, or numbers.",
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="Mean of pixels in 0..1, one number or one per channel (0.5,0.5,0.5); default: that of IN, otherwise "
            "assumed: ImageNet's.",
        ),
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="S", help="Standard deviation of pixels in 0..1, like --mean.")
    ] = None,
    crop_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            min=0.1,
            max=1,
            help="Centre crop divided by the resized shorter side; default: that of IN; "
            "without one it is assumed and printed.",
        ),
    ] = None,
    interpolation: Annotated[
        Literal["bilinear", "bicubic"] | None,
        typer.Option(
            metavar="bilinear|bicubic",
            help="Interpolation of resizing; default: that of IN, otherwise assumed: bicubic.",
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(metavar="timm/NAME", help="Take mean, std, crop ratio and interpolation of this model of timm."),
    ] = None,
) -> None:
    """Convert weights of other code to safetensors.

    \b
    eit convert best_checkpoint.pth eit.safetensors
    eit convert mine.pth mine.safetensors --classes names.txt
    eit convert vit_tiny.pth vit_tiny.safetensors --model eit_mini family=vit \\
        embed_dim=192 depth=12 num_heads=3 --like timm/vit_tiny_patch16_224

    IN may come from the authors' code, from timm, or from a training loop of your own. Code in it is never executed. If
    its shapes do not identify the model, name it with its arguments, as in the last example. What neither IN nor an
    option gives is assumed, printed, and marked as assumed in OUT.
    """
    if not target.endswith(".safetensors"):
        raise UserError(f"{target}: give a name that ends in .safetensors for the file to write")
    with quick_imports(freeze=True):
        from eit.config import Model, model_arguments, parse_overrides
        from eit.weights.convert import amend, infer_card, preprocessing_of_timm
        from eit.weights.formats import read_weights, save_weights
        from eit.weights.load import find_weights

    file = find_weights(source)
    state, card = read_weights(file)
    if card is None:
        card = infer_card(state, file, model, model_arguments(parse_overrides(arguments or [], schema=Model)), size)
    elif model or arguments or size:
        raise UserError(f"{file} already names its model, {card.model}: leave out --model, --size and ARGUMENT=VALUE")
    known: dict[str, Any] = preprocessing_of_timm(like, card.size) if like else {}
    if classes:
        known["classes"] = read_class_names(classes, len(card.classes))
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            known[name] = read_numbers(text, f"--{name}", card.in_chans)
    if crop_ratio:
        known["resize"] = math.floor(card.size / crop_ratio)
    if interpolation:
        known["interpolation"] = interpolation
    if known:
        card = amend(card, target, **known)
    try:
        save_weights(Path(target), state, card)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    changed = "".join(f" {name}={value}" for name, value in card.arguments.items())
    parameters = sum(v.numel() for v in state.values())
    print(f"{target}: {card.model}{changed}, {len(card.classes)} classes, {parameters:,} parameters")
    print(f"images are normalised with mean {card.mean} and std {card.std}, at {card.size} pixels")
    if card.guessed:
        options = dict(mean="--mean", std="--std", resize="--crop-ratio", interpolation="--interpolation")
        missing = [options.get(name, f"--{name}") for name in card.guessed]
        print(f"assumed, as {file.name} does not say it: {card.assumptions}; if it is wrong, give {', '.join(missing)}")


def read_numbers(text: str, option: str, channels: int) -> tuple[float, ...]:
    """One number, or one per channel."""
    try:
        numbers = tuple(float(word) for word in re.split(r"[\s,]+", text.strip("[]() ")))
    except ValueError:
        raise UserError(f"{option} {text}: give one number, or one per channel, such as 0.5,0.5,0.5") from None
    if not all(0 <= number <= 1 for number in numbers):
        raise UserError(f"{option} {text}: give numbers for pixels in 0..1; divide numbers for pixels in 0..255 by 255")
    if len(numbers) not in (1, channels):
        raise UserError(f"{option} {text}: the model has {channels} channels; give one number, or one per channel")
    return numbers if len(numbers) == channels else numbers * channels


def read_class_names(name: str, count: int) -> list[str]:
    """The lines of a file, which must be `count`."""
    try:
        names = text_lines(Path(name).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {name} cannot be read: {error}") from None
    if len(names) != count:
        raise UserError(f"--classes {name} has {len(names)} names, the model {count} classes: give one name per line")
    return names
