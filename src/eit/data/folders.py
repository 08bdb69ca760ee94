"""Folders of images: which files below a folder are images, and of which class."""

import os
from collections.abc import Iterator
from pathlib import Path

from eit.data.images import MAX_PIXELS, Images
from eit.errors import UserError, few

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


def read_folder(folder: Path, max_pixels: int = MAX_PIXELS) -> Images:
    """CLASS/**/image files below `folder`, sorted by name."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders (CLASS/image.png is expected)")
    labels, names, sources, empty = [], [], [], []
    for label, name in enumerate(classes):
        files = image_files(folder / name)
        if not files:
            empty.append(name)
        labels += [label] * len(files)
        names += [os.path.relpath(file, folder) for file in files]
        sources += files
    if empty:
        raise UserError(f"{folder}: no images in class {few(empty)} (read are {' '.join(EXTENSIONS)})")
    return Images(classes, labels, names, sources, max_pixels)


def image_files(folder: Path) -> list[str]:
    """Paths of the images below `folder`, in a fixed order. Links are followed, but none back to where it came from."""

    def walk(here: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.join(os.path.realpath(here), "")
        if any(ancestor.startswith(real) for ancestor in above):
            return
        folders = []
        for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS) and entry.name[0] != ".":
                yield entry.path
        for inner in folders:
            yield from walk(inner, (*above, real))

    return list(walk(str(folder), ()))
