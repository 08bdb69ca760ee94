"""Example pictures of the page, for visitors without one of their own."""

from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_image

from eit.data.datasets import DIGITS, open_evaluation
from eit.data.images import Images, UnreadableImage
from eit.errors import UserError
from eit.inference.evaluation_data import evaluation_config
from eit.weights.card import Card

COUNT = 6
DIGIT_CLASSES = [str(digit) for digit in range(10)]


def write_examples(model: Any, folder: Path, own: bool) -> tuple[str, list[Path]]:
    """What the examples are, and their files, written into `folder`: images of the run's own validation data.

    If those are not on this machine, or `own` is false (for pages that others see), they are scanned digits for a
    model of digits, and otherwise the two photos of scikit-learn.
    """
    card: Card = model.card
    title, pictures = "Validation images of the run", _of_the_run(card) if own else []
    if not pictures and card.classes == DIGIT_CLASSES:
        title, pictures = "Scanned digits, of scikit-learn", _evenly(open_evaluation(evaluation_config(card, DIGITS)))
    if not pictures:
        title = "Photos of scikit-learn"
        pictures = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    files = []
    for number, picture in enumerate(pictures):
        if max(picture.size) < 64:  # pixel art is not shown larger than it is
            scale = -(-64 // max(picture.size))
            picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.BICUBIC)
        picture.thumbnail((640, 640))
        files.append(folder / f"example-{number + 1}.png")
        picture.save(files[-1])
    return title, files


def _of_the_run(card: Card) -> list[Image.Image]:
    try:
        images = open_evaluation(evaluation_config(card))
    except UserError:  # the data are not here
        return []
    return _evenly(images) if isinstance(images, Images) else []


def _evenly(images: Any) -> list[Image.Image]:
    found = []
    for index in range(0, len(images), max(1, len(images) // COUNT)):
        try:
            found.append(images.read(index, 3))
        except UnreadableImage:
            continue
    return found[:COUNT]
