"""Which images weights are evaluated on, with the class numbers of the weights."""

from dataclasses import replace
from typing import Any, TypeVar

from eit.config import Data, data_config
from eit.console import say
from eit.data.datasets import AnyImages
from eit.data.timm_datasets import ImageStream
from eit.errors import UserError, few
from eit.weights.card import Card

ImageSet = TypeVar("ImageSet", bound=AnyImages)


def evaluation_config(
    card: Card,
    data: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    max_pixels: int | None = None,
) -> Data:
    """Where to read images for `eit.data.datasets.open_evaluation`; default: where the weights' recipe read them.

    Of the recipe in untrusted weights only a folder is believed: addresses of data sets can run commands.

    Raises:
        UserError: `dataset` is not a name of timm; or nothing is given and the weights name no trusted data set.
    """
    own = card.data
    if dataset and "/" not in dataset:
        raise UserError(
            f"--dataset {dataset}: a name of timm is expected, such as wds/NAME; for a folder give --data {dataset}"
        )
    given: dict[str, Any] = dict(root=data, dataset=dataset, val_split=split)
    if not (data or dataset):
        if "/" in str(own.get("dataset") or ""):
            name, root = own["dataset"], own.get("root") or "ROOT"
            raise UserError(
                f"these weights name data.dataset={name}, which is not opened unless you ask for it: "
                f"give --dataset {name} --data {root}"
            )
        given |= dict(root=own.get("root"), dataset=own.get("dataset"))
        if not own.get("root"):
            raise UserError("these weights do not name a data set: give --data PATH")
    given |= dict(val_fraction=own.get("val_fraction"), pixel_range=card.pixel_range)
    return data_config(max_pixels=max_pixels or card.max_pixels, **{k: v for k, v in given.items() if v is not None})


def match_classes(card: Card, images: ImageSet) -> ImageSet:
    """`images` with the model's class numbers: by name, or by order where converted weights have names of their own.

    Raises:
        UserError: the images have classes that the model does not know, or come in turn with other class numbers.
    """
    unknown = [name for name in images.classes if name not in card.classes]
    if isinstance(images, ImageStream):
        if images.classes == card.classes:
            return images
        if not unknown:
            raise UserError(
                f"the data have the model's classes in another order or number ({len(images.classes)} classes, the "
                f"model {len(card.classes)}), and are read in turn, where they cannot be renumbered"
            )
    elif not unknown:
        number = {name: i for i, name in enumerate(card.classes)}
        return replace(images, classes=card.classes, labels=[number[images.classes[y]] for y in images.labels])
    if card.recipe is None and len(images.classes) == len(card.classes):
        say("class names differ from the model's; matched by order")
        return images
    raise UserError(
        f"the data have classes that the model does not know: {few(unknown, 5)} "
        f"(the model's {len(card.classes)} classes: {few(card.classes, 5)})"
    )
