"""Data sets: a folder, or the digits of scikit-learn -> `Images`, checked before anything starts."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eit.config import Data
from eit.console import track
from eit.errors import UserError
from eit.images import MAX_PIXELS, UnreadableImage, decode, to_mode

DIGITS = "sklearn:digits"
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass
class Images:
    """Labelled images. `sources` are file paths, or uint8 arrays; `classes[labels[i]]` is the class of image i."""

    classes: list[str]
    labels: list[int]
    names: list[str]
    sources: list[Any]
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, channels: int) -> Image.Image:
        """Image `index` as RGB (3 channels) or L (1).

        Raises:
            UnreadableImage
        """
        source = self.sources[index]
        if isinstance(source, np.ndarray):
            return to_mode(Image.fromarray(source), channels)
        return decode(source, channels, self.max_pixels)

    def subset(self, indices: Iterable[int]) -> "Images":
        indices = list(indices)
        return replace(
            self,
            labels=[self.labels[i] for i in indices],
            names=[self.names[i] for i in indices],
            sources=[self.sources[i] for i in indices],
        )

    def digest(self) -> str:
        """A hash of names and labels: two processes with the same one see the same data."""
        lines = "\n".join([*self.classes, *(f"{n} {y}" for n, y in zip(self.names, self.labels, strict=True))])
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]


def open_data(config: Data) -> tuple[Images, Images]:
    """Training and validation images of `data.root`, checked before any worker or GPU starts.

    Layouts: `sklearn:digits`; train/CLASS/image and val/CLASS/image; train/CLASS/image alone with `data.val_fraction`.

    Raises:
        UserError: one line that names the folder, file or class at fault.
    """
    if config.root == DIGITS:
        return _digits(config.val_fraction or 0.2)
    root = _folder(config.root)
    if not (root / "train").is_dir():
        hint = "; it has val/ only, which eit eval takes" if (root / "val").is_dir() else ""
        raise UserError(
            f"{root} has no train/ folder (train/CLASS/image.png and val/CLASS/image.png are expected){hint}"
        )
    train = list_images(root / "train", config.max_pixels)
    if (root / "val").is_dir():
        val = list_images(root / "val", config.max_pixels)
        if train.classes != val.classes:
            raise UserError(f"{root}: {_class_difference(train.classes, val.classes)}")
    elif config.val_fraction is None:
        raise UserError(f"{root} has no val/ folder: set data.val_fraction=0.1 (eit data check: --val-fraction 0.1)")
    else:
        train, val = split(train, config.val_fraction)
    if len(train.classes) < 2:
        raise UserError(f"{root / 'train'} has one class, {train.classes[0]!r}: at least two are needed")
    return train, val


def open_evaluation(root: str, val_fraction: float | None, max_pixels: int) -> Images:
    """What to evaluate on: val/, else what `val_fraction` holds out of train/, else the class folders of `root`."""
    if root == DIGITS:
        return _digits(val_fraction or 0.2)[1]
    folder = _folder(root)
    if (folder / "val").is_dir():
        return list_images(folder / "val", max_pixels)
    if (folder / "train").is_dir():
        if val_fraction is None:
            raise UserError(
                f"{folder} has train/ but no val/: give the folder to evaluate on, such as {folder / 'train'}"
            )
        return split(list_images(folder / "train", max_pixels), val_fraction)[1]
    return list_images(folder, max_pixels)


def list_images(folder: Path, max_pixels: int) -> Images:
    """CLASS/**/image files below `folder`, sorted by name."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders (CLASS/image.png is expected)")
    labels, names, sources, empty = [], [], [], []
    for label, name in enumerate(classes):
        found = _files(folder / name)
        if not found:
            empty.append(name)
        labels += [label] * len(found)
        names += [os.path.relpath(file, folder) for file in found]
        sources += found
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise UserError(f"{folder}: no images in class {', '.join(empty[:3])}{more} (read are {' '.join(EXTENSIONS)})")
    return Images(classes, labels, names, sources, max_pixels)


def split(images: Images, val_fraction: float) -> tuple[Images, Images]:
    """Hold out a stratified part, always the same one."""
    from sklearn.model_selection import train_test_split

    try:
        parts = train_test_split(range(len(images)), test_size=val_fraction, stratify=images.labels, random_state=0)
    except ValueError as error:
        raise UserError(f"data.val_fraction={val_fraction} cannot hold out a part of each class: {error}") from None
    train, val = (images.subset(sorted(part)) for part in parts)
    return train, val


def _digits(val_fraction: float) -> tuple[Images, Images]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = Images(
        classes=[str(name) for name in digits.target_names],
        labels=digits.target.tolist(),
        names=[f"digit-{i:04d}" for i in range(len(pixels))],
        sources=list(pixels),
    )
    return split(images, val_fraction)


def _folder(root: str) -> Path:
    if not root:
        raise UserError("data.root is not set: data.root=PATH, a folder with train/ and val/")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"{root} is not a folder")
    return folder


def _files(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        found += [os.path.join(parent, f) for f in sorted(files) if f.lower().endswith(EXTENSIONS) and f[0] != "."]
    return found


def _class_difference(train: list[str], val: list[str]) -> str:
    parts = []
    for where, names in (("train/", sorted(set(train) - set(val))), ("val/", sorted(set(val) - set(train)))):
        if names:
            parts.append(
                f"only in {where}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            )
    return "train/ and val/ have different classes; " + "; ".join(parts)


def check(root: str, max_pixels: int, val_fraction: float | None = None) -> dict[str, Any]:
    """Read every image below `root`, and report counts, classes, sizes and everything that training would trip over."""
    report: dict[str, Any] = dict(root=root, splits={}, problems=[])
    listed: dict[str, Images] = {}
    try:
        listed["train"], listed["val"] = open_data(Data(root=root, val_fraction=val_fraction, max_pixels=max_pixels))
    except UserError as error:
        folder = _folder(root)
        report["problems"].append(str(error))
        for name in ("train", "val"):  # what is there is read all the same
            with suppress(UserError, FileNotFoundError):  # it was reported above
                listed[name] = list_images(folder / name, max_pixels)
    for name, images in listed.items():
        sizes: Counter[tuple[int, int]] = Counter()
        unreadable = []

        def size_of(index: int, images: Images = images) -> tuple[int, int] | str:
            try:
                return images.read(index, 3).size
            except UnreadableImage as error:
                return str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for result in track(pool.map(size_of, range(len(images))), f"reading {name}", len(images)):
                if isinstance(result, str):
                    unreadable.append(result)
                else:
                    sizes[result] += 1
        per_class = Counter(images.labels)
        report["splits"][name] = dict(
            images=len(images),
            classes={c: per_class[i] for i, c in enumerate(images.classes)},
            sizes=[dict(width=w, height=h, images=n) for (w, h), n in sizes.most_common(10)],
            smallest=min((min(size) for size in sizes), default=None),
            largest=max((max(size) for size in sizes), default=None),
            unreadable=unreadable,
        )
        budget = int(Data().bad_image_budget * len(images)) if name == "train" else 0
        if len(unreadable) > budget:
            allowed = f"; {budget} are tolerated (data.bad_image_budget)" if name == "train" else ""
            report["problems"].append(f"{len(unreadable)} unreadable images in {name}/: {unreadable[0]}{allowed}")
    report["ok"] = not report["problems"]
    return report
