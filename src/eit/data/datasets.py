"""Data sets -> training and validation `Images`, checked before anything starts."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from eit import distributed
from eit.config import AUTO, Data, data_config
from eit.console import say, track
from eit.data.folders import (
    describe_left_out,
    find_parts,
    holds_parts,
    is_class_folder,
    list_images,
    read_folder,
    unused_folders,
)
from eit.data.images import Images, PixelRange, UnreadableImage, compose, pixel_kind
from eit.data.layouts import LAYOUTS, download, read_digits, read_layout
from eit.data.timm_datasets import ImageStream, read_timm
from eit.errors import UserError, few

DIGITS = "sklearn:digits"
AnyImages = Images | ImageStream


def open_data(config: Data) -> tuple[AnyImages, AnyImages]:
    """Training and validation images of `data.root`, checked before any worker or GPU starts.

    Layouts: `sklearn:digits`; those of `layouts.py` (CIFAR, idx files, Tiny-ImageNet-200, shards); train/CLASS/image
    and val/CLASS/image; with `data.val_fraction` train/CLASS/image or CLASS/image alone. `data.dataset` may name one of
    timm instead. A message counts the files of folders that were left out.

    Raises:
        UserError: one line that names the folder, file or class at fault.
    """
    train, val, notes = open_pair(config)
    for note in [*notes, *_class_warnings(train, val)]:
        say(note)
    return train, val


def open_pair(config: Data) -> tuple[AnyImages, AnyImages, list[str]]:
    """`open_data` and what it says."""
    train, val, notes = _open(config)
    for images in (train, val):
        _prepare(images, config)
    if train.classes != val.classes:
        raise UserError(f"{config.root or config.dataset}: {_class_difference(train.classes, val.classes)}")
    if len(train.classes) < 2:
        raise UserError(f"{config.root or config.dataset} has one class, {train.classes[0]!r}: at least two are needed")
    return train, val, notes


def _prepare(images: AnyImages, config: Data) -> None:
    """Compose the names of the classes, and set the range of pixels that `config` gives."""
    images.classes = [compose(name) for name in images.classes]
    if isinstance(images, Images):
        images.pixel_range = config.pixel_range


def _open(config: Data) -> tuple[AnyImages, AnyImages, list[str]]:
    if config.root == DIGITS:
        return *split(read_digits(), _share(config) or AUTO_SHARE), []
    if _is_timms(config):
        if config.download and distributed.world_size() > 1:  # once
            distributed.on_main(lambda: _read_timm_pair(config) and None)
        return *_read_timm_pair(config), []
    root = _folder(config)
    if (pair := read_layout(root, config.max_pixels, config.dataset)) is not None:
        return *pair, [note for images in pair for note in _left_out(root, images)]
    parts = find_parts(root)
    if not parts and is_class_folder(root) and _share(config):
        if holds_parts(root):
            names = few(sorted(path.name for path in root.iterdir() if path.is_dir()))
            raise UserError(f"the folders of {root} ({names}) hold the same class folders: call them train and val")
        parts = {"train": root}  # the class folders are directly inside
    if "train" not in parts:
        raise UserError(f"{root} has no train/ folder ({EXPECTED}){_hint(root, parts)}")
    train = read_folder(parts["train"], config.max_pixels)
    notes = _left_out(parts["train"], train)
    if (part := _validation_part(parts, config)) is None:
        raise UserError(f"{root} has no val/ folder: set data.val_fraction=0.1")
    if part == "train":
        share = _share(config)
        assert share is not None
        pair = split(train, share)
    else:
        pair = train, read_folder(parts[part], config.max_pixels)
        notes += _left_out(parts[part], pair[1])
    if part != "train" and os.path.samefile(parts[part], parts["train"]):
        notes.append(f"{parts[part]} is the same folder as {parts['train']}: accuracy is that of training images")
    if parts["train"] != root and (unused := unused_folders(root, parts)):
        notes.append(f"folders of {root} that have images and are not used: {few(unused)}")
    if part == "test":
        notes.append(f"{root} has no val/ folder: {parts['test'].name}/ has the validation images")
    elif "test" in parts:
        notes.append(f"{parts['test']} is not used in training")
    return *pair, notes


EXPECTED = "expected are train/CLASS/image.png and val/CLASS/image.png, or CLASS/image.png with data.val_fraction"


def _hint(root: Path, parts: dict[str, Path]) -> str:
    if parts and not is_class_folder(root):
        return f"; it has {' and '.join(f'{path.name}/' for path in parts.values())} only, which eit eval takes"
    if not is_class_folder(root):
        files, left_out = list_images(root)
        if files:
            return f"; {len(files):,} image{'s' * (len(files) > 1)} below it are in no class folder"
        return f"; there are no images below it; {describe_left_out(root, left_out)}" if left_out else "; it is empty"
    return f"; move its class folders into {root / 'train'}, or hold out a share of each: data.val_fraction=0.2"


AUTO_SHARE = 0.2


def _share(config: Data) -> float | None:
    """The share of the training images to hold out, if there are no validation images; None: nothing is held out."""
    return AUTO_SHARE if config.val_fraction == AUTO else config.val_fraction


def _validation_part(parts: dict[str, Path], config: Data) -> str | None:
    """The part that the validation images are in: val, a share of train, or test; None if there are none.

    If the share is auto, it is taken only if there is no test/ either.
    """
    if "val" in parts:
        return "val"
    if "test" in parts and config.val_fraction == AUTO:
        return "test"
    if "train" in parts and config.val_fraction is not None:
        return "train"
    return "test" if "test" in parts else None


def _left_out(folder: Path, images: Images) -> list[str]:
    return [text] if (text := describe_left_out(folder, images.left_out)) else []


def _is_timms(config: Data) -> bool:
    return config.dataset is not None and "/" in config.dataset


def _read_timm_pair(config: Data) -> tuple[AnyImages, AnyImages]:
    return read_timm(config, config.train_split), read_timm(config, config.val_split)


def open_evaluation(config: Data) -> AnyImages:
    """The images to evaluate on: the validation images, or if there are none, the class folders of `data.root`.

    Files that were left out of folders are named.
    """
    images = _open_evaluation(config)
    _prepare(images, config)
    if isinstance(images, Images):
        for note in _left_out(Path(config.root), images):
            say(note)
    return images


def _open_evaluation(config: Data) -> AnyImages:
    if config.root == DIGITS:
        return _open(config)[1]
    if _is_timms(config):
        return read_timm(config, config.val_split)
    root = _folder(config)
    if (pair := read_layout(root, config.max_pixels, config.dataset)) is not None:
        return pair[1]
    parts = {} if is_class_folder(root, config.val_fraction is not None) else find_parts(root)
    if not parts:
        images = read_folder(root, config.max_pixels)
        return split(images, share)[1] if (share := _share(config)) else images
    if (part := _validation_part(parts, config)) is None:
        raise UserError(f"{root} has train/ but no val/: give the folder to evaluate on, such as {root / 'train'}")
    images = read_folder(parts[part], config.max_pixels)
    if part == "test":
        say(f"{root} has no val/ folder: {parts['test'].name}/ is evaluated")
    return split(images, share)[1] if part == "train" and (share := _share(config)) else images


def open_unlabelled(config: Data, part: Literal["train", "val"], without: Path | None = None) -> Images:
    """Images whose labels do not matter: those of a part of a data set, else all below `data.root` but for `without`.

    Training images are those that remain after a validation share is held out. A message counts what was left out.

    Raises:
        UserError: no such folder, no images there, or a stream of images.
    """
    divided = config.model_copy(update=dict(val_fraction=config.val_fraction or AUTO_SHARE))
    if config.root == DIGITS or _is_timms(config):
        images = _open(divided)[part == "val"]
    elif (pair := read_layout(root := _folder(config), config.max_pixels, config.dataset)) is not None:
        images = pair[part == "val"]
    else:
        parts = {} if is_class_folder(root) else find_parts(root)
        if part == "train" and part in parts:
            images = _open(divided)[0]
        elif part in parts:
            images = read_folder(parts[part], config.max_pixels)
        else:
            images = _all_below(root, config.max_pixels, without)
    if not isinstance(images, Images):
        raise UserError(f"{config.root}: these images are a stream; give a folder of images")
    for note in _left_out(Path(config.root), images):
        say(note)
    _prepare(images, config)
    return images


def readable_images(images: Images) -> Images:
    """`images` without those that cannot be read: each is named in a line. All are decoded once.

    Raises:
        UserError: none can be read.
    """

    def fault(index: int) -> str | None:
        try:
            images.read(index, 3)
        except UnreadableImage as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = list(track(pool.map(fault, range(len(images))), "reading images", len(images)))
    unreadable = [text for text in faults if text]
    if len(unreadable) == len(images):
        raise UserError(f"none of {len(images)} images can be read; the first: {unreadable[0]}")
    for text in unreadable[:10]:
        say(f"left out: {text}")
    if len(unreadable) > 10:
        say(f"left out: {len(unreadable) - 10} more unreadable images")
    return images.subset(i for i, text in enumerate(faults) if not text) if unreadable else images


def _all_below(root: Path, max_pixels: int, without: Path | None) -> Images:
    """All images below `root`, sorted by path, with one class `unknown`."""
    files, left_out = list_images(root)
    there = describe_left_out(root, left_out)
    if files and without is not None:
        own = without.resolve()
        files = [file for file in files if not Path(file).resolve().is_relative_to(own)]
        there = there or f"but for those in {without}"
    if not files:
        raise UserError(
            f"no images below {root}" + (f"; {there}" if there else "") + "; docs/data.md lists the formats"
        )
    files.sort()
    return Images(["unknown"], [0] * len(files), files, files, max_pixels, left_out=left_out)


def split(images: Images, val_fraction: float) -> tuple[Images, Images]:
    """Hold out a stratified part, always the same one. A class of two images or more has at least one in each part."""
    from sklearn.model_selection import train_test_split

    counts = Counter(images.labels)
    if max(counts.values()) < 2:
        raise UserError(
            f"data.val_fraction={val_fraction} cannot hold out a part of each class: no class has two images; add some"
        )
    try:
        parts = train_test_split(range(len(images)), test_size=val_fraction, stratify=images.labels, random_state=0)
        shared = [{images.labels[i] for i in part} for part in parts]
        is_whole = all(label in shared[0] & shared[1] for label, count in counts.items() if count > 1)
    except ValueError:  # too few images of a class
        is_whole = False
    if not is_whole:
        parts = _split_each_class(images.labels, val_fraction)
    train, val = (images.subset(sorted(part)) for part in parts)
    return train, replace(val, held_out=val_fraction)


def _split_each_class(labels: Sequence[int], val_fraction: float) -> tuple[list[int], list[int]]:
    """Indices of training and validation images. A class of one image has it in training."""
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    train: list[int] = []
    val: list[int] = []
    for label in sorted(set(labels)):
        own = [i for i in order if labels[i] == label]
        count = min(max(round(len(own) * val_fraction), 1), len(own) - 1)
        val += own[:count]
        train += own[count:]
    return train, val


def _folder(config: Data) -> Path:
    """`data.root` as a folder that is there; with `data.download`, filled first."""
    if not config.root:
        raise UserError(
            "data.root is not set: give data.root=FOLDER, with train/ and val/ that have one folder of images per "
            "class; for the recipe photos these may be directly inside"
        )
    folder = Path(config.root).expanduser()
    if config.download:
        distributed.on_main(lambda: _fetch(config, folder))
    if not folder.is_dir():
        hint = f" ({DIGITS} is the one set of scikit-learn)" if config.root.startswith("sklearn:") else ""
        raise UserError(f"data.root={config.root} is not a folder{hint}")
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
    if twice := [name for name, count in Counter(train + val).items() if count > 2]:
        parts.append(f"more than one class is called {few(twice, 5)}")
    return "train/ and val/ have different classes; " + ("; ".join(parts) or "they are in another order")


def _class_warnings(train: AnyImages, val: AnyImages) -> list[str]:
    """Classes without images, and names that differ in case or spaces only, which train all the same."""
    names: dict[str, str] = {}
    warnings = []
    for name in train.classes:
        alike = names.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if alike != name:
            warnings.append(f"classes {alike!r} and {name!r} differ, but look alike: is it one class?")
    warnings = [*warnings[:5], *([f"{len(warnings) - 5} more classes look alike"] if len(warnings) > 5 else [])]
    for images, kind in ((train, "training"), (val, "validation")):
        if isinstance(images, Images):
            used = set(images.labels)
            if missing := [name for label, name in enumerate(images.classes) if label not in used]:
                classes = "1 class has" if len(missing) == 1 else f"{len(missing)} classes have"
                warnings.append(f"{classes} no {kind} images: {few(missing, 5)}")
    return warnings


# -- eit data check ---------------------------------------------------------------------------------------------------


def check(
    root: str, max_pixels: int, val_fraction: float | None = None, pixel_range: PixelRange | None = None
) -> dict[str, Any]:
    """Read every image below `root`, and report counts, classes, sizes, pixel values and what training trips over.

    `problems` are what training stops at; `warnings` are what it does not notice.
    """
    report: dict[str, Any] = dict(root=root, splits={}, problems=[], warnings=[], notes=[])
    config = data_config(root=root, val_fraction=val_fraction, max_pixels=max_pixels, pixel_range=pixel_range)
    folder = Path(root).expanduser()
    if val_fraction is None and folder.is_dir() and not find_parts(folder) and is_class_folder(folder):
        config = config.model_copy(update=dict(val_fraction=AUTO))
    listed: dict[str, Any] = {}
    digests: dict[str, dict[int, bytes]] = {}
    try:
        listed["train"], listed["val"], report["notes"] = open_pair(config)
        if config.val_fraction == AUTO:
            report["notes"].append(
                f"the class folders are directly in {root}: a fifth of each is held out here, as eit finetune does; "
                "other recipes need a val/ folder"
            )
    except UserError as error:
        report["problems"].append(str(error))
        for name, path in find_parts(_folder(config)).items():  # what is there is read all the same
            with suppress(UserError):  # it was reported above
                listed[name] = replace(read_folder(path, max_pixels), pixel_range=pixel_range)
                report["notes"] += _left_out(path, listed[name])
    for name, images in listed.items():
        part, readable, digests[name] = _check_images(name, images)
        report["splits"][name] = part
        if empty := [c for c, count in readable.items() if not count and part["classes"][c]]:
            report["warnings"].append(f"no image of {few(empty, 5)} in {name}/ can be read")
        report["warnings"] += _range_warnings(part["pixels"], pixel_range)
        unreadable = part["unreadable"]
        budget = int(Data().bad_image_budget * len(images)) if name == "train" else 0
        if len(unreadable) > budget:
            allowed = f"; {budget} are tolerated (data.bad_image_budget)" if name == "train" else ""
            report["problems"].append(f"{len(unreadable)} unreadable images in {name}/: {unreadable[0]}{allowed}")
        report["warnings"] += _copies_within(name, images, digests[name])
        if len(digests[name]) < len(images):
            compared = f"{len(digests[name]):,} of {len(images):,} images in {name}/"
            report["notes"].append(f"copies were looked for among {compared}")
    if "train" in listed:
        report["warnings"] += _imbalance(report["splits"]["train"]["classes"])
    if "train" in listed and "val" in listed:
        report["warnings"] += _copies_between(listed, digests)
        report["warnings"] += _class_warnings(listed["train"], listed["val"])
    report["ok"] = not report["problems"]
    return report


COMPARED = 300_000  # images of a part that are compared with each other, evenly spaced
UNEVEN = 4  # from this ratio of the largest to the smallest class on, `check` warns


def _imbalance(counts: dict[str, int]) -> list[str]:
    smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[largest] < UNEVEN * counts[smallest]:
        return []
    return [
        f"classes are out of balance: {largest} has {counts[largest]:,} training images, {smallest} "
        f"{counts[smallest]:,}; set loss.class_weights=balanced, or add images"
    ]


def _copies_within(name: str, images: Images, digests: dict[int, bytes]) -> list[str]:
    """A warning of images that have the pixels of another one in the same part, and one if their classes differ."""
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(digest, i), i) for i, digest in digests.items()]
    copies = [(i, j) for i, j in pairs if i != j]
    others = [(i, j) for i, j in copies if images.labels[i] != images.labels[j]]
    warnings = []
    for found, of_what in ((copies, "another one"), (others, "one of another class")):
        if found:
            shown = few([f"{images.names[j]} = {images.names[i]}" for i, j in found])
            number = "1 image has" if len(found) == 1 else f"{len(found):,} images have"
            warnings.append(f"{number} the same pixels as {of_what} in {name}/: {shown}")
    return warnings


def _copies_between(listed: dict[str, Images], digests: dict[str, dict[int, bytes]]) -> list[str]:
    """A warning of validation images that are training images too."""
    trained = {digest: i for i, digest in reversed(digests["train"].items())}
    both = [(trained[digest], i) for i, digest in digests["val"].items() if digest in trained]
    if not both:
        return []
    shown = few([f"{listed['val'].names[j]} = {listed['train'].names[i]}" for i, j in both])
    is_one = len(both) == 1
    number = (
        "1 validation image is a training image" if is_one else f"{len(both):,} validation images are training images"
    )
    return [f"{number} too, which makes the accuracy too high: {shown}"]


def _pixel_digest(image: Image.Image) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=12, key=f"{image.size}".encode()).digest()


def _check_images(name: str, images: Images) -> tuple[dict[str, Any], dict[str, int], dict[int, bytes]]:
    """What `check` reports of a part, the number of readable images of each class, and digests of pixels by index."""
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable: list[str] = []
    pixels: dict[str, dict[str, float]] = {}
    readable = [0] * len(images.classes)
    digests: dict[int, bytes] = {}
    every = -(-len(images) // COMPARED)

    def read(index: int) -> tuple[tuple[int, int] | None, str, tuple[str, float, float] | None]:
        values: list[tuple[str, float, float]] = []
        try:
            image = images.read(index, 3, examine=lambda image: values.append(_pixel_values(image)))
            if index % every == 0:
                digests[index] = _pixel_digest(image)
            return image.size, "", values[0]
        except UnreadableImage as error:
            return None, str(error), values[0] if values else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = track(pool.map(read, range(len(images))), f"reading {name}", len(images))
        for label, (size, fault, values) in zip(images.labels, results, strict=True):
            if size is None:
                unreadable.append(fault)
            else:
                sizes[size] += 1
                readable[label] += 1
            if values is not None:
                kind, low, high = values
                seen = pixels.setdefault(kind, dict(images=0, lowest=low, highest=high))
                seen |= dict(
                    images=seen["images"] + 1, lowest=min(seen["lowest"], low), highest=max(seen["highest"], high)
                )
    names, per_class = distinct_names(images.classes), Counter(images.labels)
    part = dict(
        images=len(images),
        classes={c: per_class[i] for i, c in enumerate(names)},
        sizes=[dict(width=w, height=h, images=n) for (w, h), n in sizes.most_common(10)],
        smallest=min((min(size) for size in sizes), default=None),
        largest=max((max(size) for size in sizes), default=None),
        pixels=pixels,
        left_out=dict(images.left_out),
        unreadable=unreadable,
    )
    return part, dict(zip(names, readable, strict=True)), dict(sorted(digests.items()))


def distinct_names(classes: Sequence[str]) -> list[str]:
    """Class names. A name that occurs twice, as some of ImageNet's do, has its class number behind it."""
    count = Counter(classes)
    return [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(classes)]


def _pixel_values(image: Image.Image) -> tuple[str, float, float]:
    """Kind, lowest and highest value of the pixels of an opened file."""
    kind = pixel_kind(image)
    if image.mode == "F":
        values = np.asarray(image)
        values = values[np.isfinite(values)]
        return (kind, float(values.min()), float(values.max())) if values.size else (kind, 0, 0)
    image.load()
    extrema: Any = image.getextrema()
    pairs = extrema if isinstance(extrema[0], tuple) else [extrema]
    low, high = min(low for low, _ in pairs), max(high for _, high in pairs)
    return "16 bits" if kind == "32 bits" and 0 <= low <= high <= 65535 else kind, low, high


def _range_warnings(pixels: dict[str, dict[str, float]], pixel_range: PixelRange | None) -> list[str]:
    """A warning if grey images of 16 bits use a small part of the range that is assumed."""
    seen = pixels.get("16 bits")
    if pixel_range is not None or seen is None or not 0 < seen["highest"] < 2**15:
        return []
    white = 2 ** int(seen["highest"]).bit_length() - 1
    return [
        f"16-bit images end at {seen['highest']:,.0f}, but 65,535 is white: {max(white // 257, 1)} of 256 levels are "
        f"left; set data.pixel_range=[0,{white}]"
    ]
