"""What weights say about themselves, as they say it in their file."""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eit import __version__
from eit.config import model_arguments, split_name
from eit.data.images import MAX_PIXELS, View
from eit.errors import UserError
from eit.models.eit import EIT
from eit.models.registry import FAMILIES, TIMM, create_model, is_model


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
        if (pair := self.data.get("pixel_range")) is not None:
            low, high = pair
            if not float(low) < float(high):
                raise ValueError("the range of pixels is none")
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
    def pixel_range(self) -> tuple[float, float] | None:
        """The values of grey images of more than 8 bits that the run took for black and white; None: the default."""
        pair = self.data.get("pixel_range")
        return None if pair is None else (float(pair[0]), float(pair[1]))

    @property
    def max_pixels(self) -> int:
        """The cap on an image's pixels that the run had."""
        return int(self.data.get("max_pixels", MAX_PIXELS))


def parse_card(header: dict[str, Any], source: str) -> Card:
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


def serialize_card(card: Card, sha256: str) -> str:
    """The card as files hold it, with the checksum of the weights and the whole preset, which may change later."""
    header = card.model_dump(mode="json")
    if not card.model.startswith(TIMM):
        header["arguments"] = _preset(card) | card.arguments
    return json.dumps(header | {"sha256": sha256})
