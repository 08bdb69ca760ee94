"""Data sets -> training and validation `Images`, checked before anything starts."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from eit import distributed
from eit.config import Data, data_config
from eit.console import say, track
from eit.data.folders import read_folder
from eit.data.images import Images, UnreadableImage
from eit.data.layouts import LAYOUTS, download, read_digits, read_layout
from eit.data.timm_datasets import ImageStream, read_timm
from eit.errors import UserError, few

DIGITS = "sklearn:digits"
AnyImages = Images | ImageStream


def open_data(config: Data) -> tuple[AnyImages, AnyImages]:
    """Training and validation images of `data.root`, checked before any worker or GPU starts.

    Layouts: `sklearn:digits`; those of `layouts.py` (CIFAR, idx files, Tiny-ImageNet-200, shards); train/CLASS/image
    and val/CLASS/image; train/CLASS/image alone with `data.val_fraction`. `data.dataset` may name one of timm instead.

    Raises:
        UserError: one line that names the folder, file or class at fault.
    """
    train, val = _open(config)
    if train.classes != val.classes:
        raise UserError(f"{config.root}: {_class_difference(train.classes, val.classes)}")
    if len(train.classes) < 2:
        raise UserError(f"{config.root or config.dataset} has one class, {train.classes[0]!r}: at least two are needed")
    return train, val


def _open(config: Data) -> tuple[AnyImages, AnyImages]:
    if config.root == DIGITS:
        return split(read_digits(), config.val_fraction or 0.2)
    if _is_timms(config):
        if config.download and distributed.world_size() > 1:  # once
            distributed.on_main(lambda: _read_timm_pair(config) and None)
        return _read_timm_pair(config)
    root = _folder(config)
    if (pair := read_layout(root, config.max_pixels, config.dataset)) is not None:
        return pair
    if not (root / "train").is_dir():
        hint = "; it has val/ only, which eit eval takes" if (root / "val").is_dir() else ""
        raise UserError(
            f"{root} has no train/ folder (train/CLASS/image.png and val/CLASS/image.png are expected){hint}"
        )
    train = read_folder(root / "train", config.max_pixels)
    if (root / "val").is_dir():
        return train, read_folder(root / "val", config.max_pixels)
    if config.val_fraction is None:
        raise UserError(f"{root} has no val/ folder: set data.val_fraction=0.1 (eit data check: --val-fraction 0.1)")
    return split(train, config.val_fraction)


def _is_timms(config: Data) -> bool:
    return config.dataset is not None and "/" in config.dataset


def _read_timm_pair(config: Data) -> tuple[AnyImages, AnyImages]:
    return read_timm(config, config.train_split), read_timm(config, config.val_split)


def open_evaluation(config: Data) -> AnyImages:
    """The images to evaluate on: the validation images, or if there are none, the class folders of `data.root`."""
    if config.root == DIGITS:
        return _open(config)[1]
    if _is_timms(config):
        return read_timm(config, config.val_split)
    root = _folder(config)
    if (pair := read_layout(root, config.max_pixels, config.dataset)) is not None:
        return pair[1]
    if (root / "val").is_dir():
        return read_folder(root / "val", config.max_pixels)
    if (root / "train").is_dir():
        if config.val_fraction is None:
            raise UserError(f"{root} has train/ but no val/: give the folder to evaluate on, such as {root / 'train'}")
        return split(read_folder(root / "train", config.max_pixels), config.val_fraction)[1]
    return read_folder(root, config.max_pixels)


def split(images: Images, val_fraction: float) -> tuple[Images, Images]:
    """Hold out a stratified part, always the same one."""
    from sklearn.model_selection import train_test_split

    try:
        parts = train_test_split(range(len(images)), test_size=val_fraction, stratify=images.labels, random_state=0)
    except ValueError as error:
        raise UserError(f"data.val_fraction={val_fraction} cannot hold out a part of each class: {error}") from None
    train, val = (images.subset(sorted(part)) for part in parts)
    return train, val


def _folder(config: Data) -> Path:
    """`data.root` as a folder that is there; with `data.download`, filled first."""
    if not config.root:
        raise UserError("data.root is not set: data.root=PATH, a folder with train/ and val/")
    folder = Path(config.root).expanduser()
    if config.download:
        distributed.on_main(lambda: _fetch(config, folder))
    if not folder.is_dir():
        hint = f" ({DIGITS} is the one set of scikit-learn)" if config.root.startswith("sklearn:") else ""
        raise UserError(f"{config.root} is not a folder{hint}")
    return folder


def _fetch(config: Data, folder: Path) -> None:
    """Download `data.dataset` into `folder`, unless it is there and whole."""
    assert config.dataset
    if config.dataset in LAYOUTS and LAYOUTS[config.dataset][0](folder) is not None:
        try:
            read_layout(folder, config.max_pixels, config.dataset)
            return
        except UserError as error:
            say(f"{error}; downloading it")
    download(config.dataset, folder)


def _class_difference(train: list[str], val: list[str]) -> str:
    parts = []
    for where, names in (("train/", sorted(set(train) - set(val))), ("val/", sorted(set(val) - set(train)))):
        if names:
            parts.append(f"only in {where}: {few(names, 5)}")
    return "train/ and val/ have different classes; " + "; ".join(parts)


def check(root: str, max_pixels: int, val_fraction: float | None = None) -> dict[str, Any]:
    """Read every image below `root`, and report counts, classes, sizes and everything that training would trip over."""
    report: dict[str, Any] = dict(root=root, splits={}, problems=[])
    config = data_config(root=root, val_fraction=val_fraction, max_pixels=max_pixels)
    listed: dict[str, Any] = {}
    try:
        listed["train"], listed["val"] = open_data(config)
    except UserError as error:
        folder = _folder(config)
        report["problems"].append(str(error))
        for name in ("train", "val"):  # what is there is read all the same
            if (folder / name).is_dir():
                with suppress(UserError):  # it was reported above
                    listed[name] = read_folder(folder / name, max_pixels)
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
