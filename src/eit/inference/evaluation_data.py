"""Which images weights are evaluated on, with the class numbers of the weights."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from eit.config import Data, data_config
from eit.console import say
from eit.data.datasets import DIGITS, AnyImages
from eit.data.folders import is_class_folder
from eit.data.timm_datasets import ImageStream
from eit.errors import UserError, few
from eit.weights.card import Card

ImageSet = TypeVar("ImageSet", bound=AnyImages)
# What tools/make_digits.py writes; it has the digits of scikit-learn that are not held out
IN_THE_WILD = "digits_in_the_wild"


def evaluation_config(
    card: Card,
    data: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    max_pixels: int | None = None,
) -> Data:
    """Where to read images for `eit.data.datasets.open_evaluation`; default: where the weights' recipe read them.

    Of the recipe in untrusted weights only a folder is used, because addresses of data sets can run commands.

    Raises:
        UserError: `dataset` is not a name of timm; or nothing is given and the weights name no trusted data set.
    """
    own = card.data
    for option, text in (("--data", data), ("--dataset", dataset)):
        if text is not None and not text.strip():  # a variable that is not set
            raise UserError(f"{option} '': it is empty; leave it out for the data of the weights")
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
        if own["root"] != DIGITS and not own.get("dataset") and not Path(str(own["root"])).expanduser().is_dir():
            if own["root"] != IN_THE_WILD:
                raise UserError(f"the data set that these weights name, {own['root']}, is not here: give --data PATH")
            say(f"{IN_THE_WILD}/ is not here: evaluating digits of scikit-learn that the weights were not trained on")
            given["root"] = DIGITS
    share, folder = own.get("val_fraction"), Path(data or "").expanduser()
    if data and share and folder.is_dir() and is_class_folder(folder, True) and not _is_same(folder, own.get("root")):
        share = None
        say(
            f"all images of {data} are evaluated. If the weights were trained on some of them, give the data folder of "
            "that training: then its held-out images are found"
        )
    given |= dict(val_fraction=share, pixel_range=card.pixel_range)
    return data_config(max_pixels=max_pixels or card.max_pixels, **{k: v for k, v in given.items() if v is not None})


def _is_same(folder: Path, root: Any) -> bool:
    """Whether `root` is a path of the folder too."""
    return isinstance(root, str) and Path(root).expanduser().resolve() == folder.resolve()


def match_classes(card: Card, images: ImageSet) -> ImageSet:
    """`images` with the model's class numbers.

    Equal lists of classes are matched by position. So are weights whose class names are guessed, with a line that says
    so: most training loops number the folders in the order of their names. Other classes are matched by name.

    Raises:
        UserError: the images have classes that the model does not know, a name that several classes have, or
            other class numbers in a stream.
    """
    if images.classes == card.classes:
        return images
    if "classes" in card.guessed:
        if len(images.classes) != len(card.classes):
            raise UserError(
                f"these weights do not name their {len(card.classes)} classes, the data have {len(images.classes)}; "
                "name them in the order of the logits: eit convert IN OUT --classes FILE"
            )
        say(
            "these weights do not name their classes: matched by position, the first logit is "
            f"{images.classes[0]!r}, the last {images.classes[-1]!r}; if that is wrong, name them in the order of the "
            "logits: eit convert IN OUT --classes FILE"
        )
        return images
    unknown = [name for name in images.classes if name not in card.classes]
    if unknown:
        raise UserError(
            f"the data have classes that the model does not know: {few(unknown, 5)} (the model's {len(card.classes)} "
            f"classes: {few(card.classes, 5)}); classes are matched by name"
            + ("; to name them like the folders: eit convert IN OUT --classes FILE" if card.recipe is None else "")
        )
    if isinstance(images, ImageStream):
        raise UserError(
            f"the data have the model's classes in another order or number ({len(images.classes)} classes, the "
            f"model {len(card.classes)}), and classes of a stream cannot be renumbered"
        )
    counts = Counter(card.classes), Counter(images.classes)
    if twice := [name for name in counts[1] if max(count[name] for count in counts) > 1]:
        raise UserError(
            f"{few(twice)} is the name of several classes, and the lists of model and data differ: they cannot be "
            "matched by name; give the data all classes of the model, in its order"
        )
    number = {name: i for i, name in enumerate(card.classes)}
    return replace(images, classes=card.classes, labels=[number[images.classes[y]] for y in images.labels])
