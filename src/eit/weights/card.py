"""What weights say about themselves, as they say it in their file."""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo

from eit import __version__
from eit.config import Recipe, Section, model_arguments, split_name
from eit.data.images import MAX_PIXELS, Preprocessing
from eit.errors import UserError, few
from eit.models.eit import EIT
from eit.models.registry import FAMILIES, TIMM, create_model, is_model

LARGEST_SIZE, LARGEST_RESIZE = 4096, 8192  # pixels: what untrusted weights may ask for
SECTIONS = [name for name, field in Recipe.model_fields.items() if isinstance(field.default, Section)]


class Card(BaseModel):
    """What weights say about themselves: enough to build the model and to feed it.

    Attributes:
        model: a name of the zoo, or timm/NAME. A card made for eit_plus_mini has eit_mini of the family eit_plus.
        arguments: of `eit.create_model`: family and all but num_classes and img_size.
        classes: names, in the order of the logits.
        mean: of pixels in 0..1, one value per channel.
        std: of pixels in 0..1, one value per channel.
        size: pixels of the model's square input.
        resize: pixels of the shorter side before the centre crop.
        interpolation: of the resize.
        version: of this package, that wrote the weights.
        recipe: that of the run, section by section; None of converted weights.
        metrics: on the validation images of the run, percentages.
        guessed: fields that are assumed, because the weights came without them. They are not facts: guessed classes are
            matched with those of a data set by position, not by name.

    Examples:
        >>> import eit
        >>> card = eit.load("digits").card
        >>> card.classes[:3], card.size, card.guessed
        (['0', '1', '2'], 32, ())
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    arguments: dict[str, Any]
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]
    size: Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
    resize: Annotated[int, Field(ge=1, le=LARGEST_RESIZE)]
    interpolation: Literal["bilinear", "bicubic"]
    version: str = __version__
    recipe: dict[str, Any] | None = None
    metrics: dict[str, float] | None = None
    guessed: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """In one line; `print(card.model_dump_json(indent=2))` shows all of it."""
        top1 = (self.metrics or {}).get("val_top1")
        parts = [
            " ".join([self.model, *(f"{key}={value}" for key, value in self.arguments.items() if key == "family")]),
            f"{len(self.classes)} classes ({few(self.classes)})",
            f"{self.in_chans}x{self.size}x{self.size}",
            *([] if top1 is None else [f"top-1 {top1:.2f}%"]),
            *([f"guessed: {', '.join(self.guessed)}"] if self.guessed else []),
        ]
        return f"Card({', '.join(parts)})"

    __str__ = __repr__

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
        if not set(self.guessed) <= {"classes", "mean", "std", "size", "resize", "interpolation"}:
            raise ValueError("an unknown field is guessed")
        if any(not isinstance((self.recipe or {}).get(name, {}), dict) for name in SECTIONS):
            raise ValueError("a section of the recipe has no keys")
        if not isinstance(self.data.get("max_pixels", 1), int):
            raise ValueError("data.max_pixels is not a number")
        if (pair := self.data.get("pixel_range")) is not None:
            low, high = pair
            if not float(low) < float(high):
                raise ValueError("data.pixel_range is not LOW below HIGH")
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
    def view(self) -> Preprocessing:
        """What the model sees of an image."""
        return Preprocessing(self.size, self.resize, self.interpolation, self.mean, self.std)

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
        """The recipe's section on data; empty if there is none."""
        return (self.recipe or {}).get("data") or {}

    @property
    def pixel_range(self) -> tuple[float, float] | None:
        """The values of grey images of more than 8 bits that the run took for black and white; None: the default."""
        pair = self.data.get("pixel_range")
        return None if pair is None else (float(pair[0]), float(pair[1]))

    @property
    def max_pixels(self) -> int:
        """The limit on an image's pixels that the run had. Untrusted weights can lower the default, not raise it."""
        return min(int(self.data.get("max_pixels", MAX_PIXELS)), MAX_PIXELS)

    @property
    def assumptions(self) -> str:
        """What is guessed, as `name value`; an empty string if nothing is."""
        shown = self.model_dump(include=set(self.guessed)) | dict(classes=few(self.classes))
        return ", ".join(f"{name} {shown[name]}" for name in self.guessed)


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


def assumed(classes: int, channels: int, size: int) -> dict[str, Any]:
    """The fields of a card for weights that came without them: a guess, to be named in `Card.guessed`."""
    mean, std = default_mean_std(channels)
    resize = round(size * 256 / 224) if size > 64 else size
    return dict(classes=default_class_names(classes), mean=mean, std=std, resize=resize, interpolation="bicubic")


def parse_card(header: dict[str, Any], source: str) -> Card:
    """The card of `source`, of a model that this version can make.

    Raises:
        UserError: it is damaged, or of a model or with arguments that are unknown here.
    """
    try:
        card = Card.model_validate(header)
    except (ValueError, TypeError, RecursionError, OverflowError):
        raise UserError(f"{source}: its description of the model is damaged") from None
    if card.recipe is None and "guessed" not in header:  # converted by a version that did not mark its guesses
        guesses = assumed(len(card.classes), card.in_chans, card.size)
        same = tuple(name for name in guesses if getattr(card, name) == guesses[name])
        card.guessed = (
            same if {"mean", "std", "resize", "interpolation"} <= set(same) else ()
        )  # it guessed all of these
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


def serialize_card(card: Card, **more: str) -> str:
    """The card as ASCII text for a file. It has all arguments of the preset, which may change later, and `more`."""
    header = card.model_dump(mode="json", exclude={"guessed"} if card.recipe is not None else None)
    if not card.model.startswith(TIMM):
        header["arguments"] = _preset(card) | card.arguments
    return json.dumps(header | more)
