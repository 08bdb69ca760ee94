"""Small folders of real images."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

_digits = cache(load_digits)


def save_digits(folder: Path, classes: int = 3, train: int = 12, val: int = 4, size: int = 16) -> Path:
    """A train/ + val/ image folder of scanned digits, named after their number."""
    digits = _digits()
    for label in range(classes):
        pixels = digits.images[digits.target == label]
        for part, chosen in (("train", pixels[:train]), ("val", pixels[train : train + val])):
            target = folder / part / f"digit{label}"
            target.mkdir(parents=True)
            for i, image in enumerate(chosen):
                grey = Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((size, size))
                grey.convert("RGB").save(target / f"{i:03d}.png")
    return folder
