"""Layouts of data sets on disk, and the data sets of timm -> `Images`. What is missing is named in one line.

A layout is a pair of functions in `LAYOUTS`: one finds it below a folder, one reads its training and validation images.
"""

import gzip
import hashlib
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from eit.config import Data
from eit.console import track
from eit.data.images import MAX_PIXELS, Images
from eit.errors import UserError, few, first_line, nearest

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
Pair = tuple[Images, Images]  # training, validation


# -- Class folders ----------------------------------------------------------------------------------------------------


def read_folder(folder: Path, max_pixels: int = MAX_PIXELS) -> Images:
    """CLASS/**/image files below `folder`, sorted by name."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders (CLASS/image.png is expected)")
    labels, names, sources, empty = [], [], [], []
    for label, name in enumerate(classes):
        found = image_files(folder / name)
        if not found:
            empty.append(name)
        labels += [label] * len(found)
        names += [os.path.relpath(file, folder) for file in found]
        sources += found
    if empty:
        raise UserError(f"{folder}: no images in class {few(empty)} (read are {' '.join(EXTENSIONS)})")
    return Images(classes, labels, names, sources, max_pixels)


def image_files(folder: Path) -> list[str]:
    """Paths of the images below `folder`, in a fixed order. Links are followed, but none back to where it came from."""

    def walk(here: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.join(os.path.realpath(here), "")
        if any(one.startswith(real) for one in above):
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


# -- The digits of scikit-learn ---------------------------------------------------------------------------------------


def read_digits() -> Images:
    """1,797 scanned digits of 8x8 pixels, white on black."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    return Images(
        classes=[str(name) for name in digits.target_names],
        labels=digits.target.tolist(),
        names=[f"digit-{i:04d}" for i in range(len(pixels))],
        sources=list(pixels),
    )


# -- CIFAR, as torchvision unpacks it ---------------------------------------------------------------------------------


def _find_folder(*names: str) -> Callable[[Path], Path | None]:
    """Finds the first of `names` below a folder, or the folder itself by its name."""

    def find(root: Path) -> Path | None:
        if root.name in names:
            return root
        return next((root / name for name in names if (root / name).is_dir()), None)

    return find


def _read_cifar(folder: Path, max_pixels: int) -> Pair:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind: Any = CIFAR100 if folder.name == CIFAR100.base_folder else CIFAR10
    # torchvision unpickles these files; the checksums are what makes that safe, and it checks them again.
    for name, md5 in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]:
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: unpack {kind.filename} again in {folder.parent}")
        with open(file, "rb") as f:
            if hashlib.file_digest(f, "md5").hexdigest() != md5:
                raise UserError(f"{file} is damaged, or not of {kind.__name__}: its checksum is not the published one")
    parts = []
    for name, train in (("train", True), ("val", False)):
        found = kind(folder.parent, train=train)
        names = [f"{name}-{i:05d}" for i in range(len(found.targets))]
        parts.append(Images(list(found.classes), list(found.targets), names, list(found.data), max_pixels))
    return parts[0], parts[1]


# -- idx files (MNIST, Fashion-MNIST), plain or gzipped ---------------------------------------------------------------

IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FASHION_LABELS = "3d0e6c6ea990b53b"  # sha256 of Fashion-MNIST's test labels: the files do not say what they are


def _find_idx(*folders: str) -> Callable[[Path], Path | None]:
    """Finds the first of `folders` below a folder that has one of the four files."""
    files = [name + ending for pair in IDX.values() for name in pair for ending in ("", ".gz")]

    def find(root: Path) -> Path | None:
        return next((root / f for f in folders if any((root / f / name).is_file() for name in files)), None)

    return find


def _read_idx(folder: Path, max_pixels: int) -> Pair:
    parts: dict[str, tuple[Any, Any]] = {}
    for part, (images, labels) in IDX.items():
        x, y = read_idx(_plain_or_gz(folder, images), axes=3), read_idx(_plain_or_gz(folder, labels), axes=1)
        if len(x) != len(y):
            raise UserError(f"{folder}: {images} has {len(x)} images, {labels} has {len(y)} labels")
        parts[part] = x, y
    y = parts["val"][1]
    if hashlib.sha256(y.tobytes()).hexdigest().startswith(FASHION_LABELS):
        classes = FASHION
    else:
        classes = [str(i) for i in range(int(max(y.max(), parts["train"][1].max())) + 1)]
    found = [
        Images(classes, y.tolist(), [f"{part}-{i:05d}" for i in range(len(x))], list(x), max_pixels)
        for part, (x, y) in parts.items()
    ]
    return found[0], found[1]


def read_idx(file: Path, axes: int) -> Any:
    """The uint8 array of an idx file (the format stands on the MNIST page): 0, 0, type, axes, sizes, values."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    start = 4 + 4 * axes
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) < start:
        raise UserError(f"{file} is no idx file of {axes}-dimensional bytes")
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) - start != shape.prod() or not shape.all():
        raise UserError(f"{file} has {len(content) - start:,} bytes of values, its header says {shape.prod():,}")
    return np.frombuffer(content[start:], np.uint8).reshape(shape)


def _plain_or_gz(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise UserError(f"{folder / name} is missing (or {name}.gz)")


# -- Tiny-ImageNet-200, as it unpacks ---------------------------------------------------------------------------------


def _find_tiny(root: Path) -> Path | None:
    marks = ("wnids.txt", "val/val_annotations.txt")
    return next((f for f in (root, root / "tiny-imagenet-200") if any((f / mark).is_file() for mark in marks)), None)


def _read_tiny(root: Path, max_pixels: int) -> Pair:
    again = "unpack tiny-imagenet-200.zip again"
    for part in ("wnids.txt", "words.txt", "train", "val"):
        if not (root / part).exists():
            raise UserError(f"{root / part} is missing: {again}")
    expected = sorted((root / "wnids.txt").read_text().split())
    train = read_folder(root / "train", max_pixels)
    if missing := sorted(set(expected) - set(train.classes)):
        what = f"{len(missing)} of {len(expected)} classes of wnids.txt: {few(missing)}"
        raise UserError(f"{root / 'train'} lacks {what}; {again}")
    counts = Counter(train.labels)
    for label, wnid in enumerate(train.classes):
        boxes = root / "train" / wnid / f"{wnid}_boxes.txt"  # a line an image
        if boxes.is_file() and (said := len(boxes.read_text().split("\n")) - 1) > counts[label]:
            raise UserError(f"{boxes.parent} has {counts[label]} images, {boxes.name} lists {said}: {again}")
    if (root / "val" / "images").is_dir():
        val = _read_tiny_val(root / "val", train.classes, max_pixels)
    else:  # sorted into class folders, as many do
        val = read_folder(root / "val", max_pixels)
        if val.classes != train.classes:
            raise UserError(f"{root / 'val'} has neither images/ with val_annotations.txt, nor the classes of train/")
    names = class_names(root / "words.txt", train.classes)
    train.classes, val.classes = names, list(names)
    return train, val


def _read_tiny_val(folder: Path, wnids: list[str], max_pixels: int) -> Images:
    file = folder / "val_annotations.txt"
    if not file.is_file():
        raise UserError(f"{file} is missing: it has the classes of val/images")
    number = {wnid: i for i, wnid in enumerate(wnids)}
    labels, names, sources = [], [], []
    for line in sorted(file.read_text().splitlines()):
        name, wnid = [*line.split("\t"), "", ""][:2]
        source = folder / "images" / name
        if wnid not in number or Path(name).name != name:
            raise UserError(f"{file}: {line[:60]!r} is no line of an image and a class of train/")
        if not source.is_file():
            raise UserError(f"{source} is missing: val_annotations.txt names it")
        labels.append(number[wnid])
        names.append(f"images/{name}")
        sources.append(str(source))
    if not labels:
        raise UserError(f"{file} is empty")
    return Images(wnids, labels, names, sources, max_pixels)


def class_names(words: Path, wnids: Sequence[str]) -> list[str]:
    """The first word of each WordNet id of a words.txt (`id<TAB>word, word`), all and the id where two share it."""
    lines = (line.partition("\t") for line in words.read_text().splitlines())
    said = {wnid: text for wnid, _, text in lines}
    first = [said.get(wnid, wnid).split(",")[0] for wnid in wnids]
    pairs = zip(wnids, first, strict=True)
    return [f"{said.get(wnid, wnid)} ({wnid})" if first.count(name) > 1 else name for wnid, name in pairs]


# -- Shards: tar files of webdataset, with random access --------------------------------------------------------------

INFO = "_info.json"  # what timm's reader looks for; `eit data shard` adds the class names
SHARDING = ".sharding.json"  # there while shards are being written
SPLITS = {"train": "train", "val": "validation"}  # our names -> those in the info


class Member(NamedTuple):
    """A file inside a tar file that is not compressed."""

    tar: str
    offset: int
    size: int

    def open(self) -> IO[bytes]:
        with open(self.tar, "rb") as f:
            f.seek(self.offset)
            return BytesIO(f.read(self.size))


def _find_shards(root: Path) -> Path | None:
    begun = (root / INFO).is_file() or (root / SHARDING).is_file() or any(root.glob("train-*.tar"))
    return root if begun else None


def _read_shards(root: Path, max_pixels: int) -> Pair:
    file = root / INFO
    if not file.is_file():
        raise UserError(f"{file} is missing: eit data shard, which writes it last, did not end; run it again")
    try:
        info = json.loads(file.read_text())
        splits = {name: info["splits"][split]["filenames"] for name, split in SPLITS.items()}
        lengths = {name: list(info["splits"][split]["shard_lengths"]) for name, split in SPLITS.items()}
        classes = [str(name) for name in info["classes"]]
        if any(len(splits[name]) != len(lengths[name]) for name in splits):
            raise ValueError("filenames and shard_lengths differ in number")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not describe train and validation shards with classes, as eit data shard does ({error!r}); "
            "other shards are read with data.dataset=wds/NAME"
        ) from None
    found = []
    for name, files in splits.items():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(track(pool.map(index_shard, [root / f for f in files]), f"indexing {name} shards", len(files)))
        for shard, part, length in zip(files, parts, lengths[name], strict=True):
            if len(part) != length:
                raise UserError(f"shard {root / shard} has {len(part)} samples, {INFO} says {length}")
        samples = sorted(sample for part in parts for sample in part)
        if wrong := next((s for s in samples if s.label >= len(classes)), None):
            raise UserError(f"{wrong.member.tar}: {wrong.key} is of class {wrong.label}, {INFO} has {len(classes)}")
        found.append(
            Images(
                classes, [s.label for s in samples], [s.name for s in samples], [s.member for s in samples], max_pixels
            )
        )
    return found[0], found[1]


class Sample(NamedTuple):
    key: str
    label: int
    name: str
    member: Member


def index_shard(file: Path) -> list[Sample]:
    """The samples of a webdataset shard (KEY.png and so on, KEY.cls, optionally KEY.json with a name)."""
    parts: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                key, _, kind = os.path.basename(member.name).partition(".")
                one = parts.setdefault(os.path.join(os.path.dirname(member.name), key), {})
                if kind in ("cls", "json"):
                    content = tar.extractfile(member)
                    one[kind] = json.loads(content.read()) if content else None
                elif f".{kind}" in EXTENSIONS:
                    one["image"] = Member(str(file), member.offset_data, member.size)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"shard {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    samples = []
    for key, one in parts.items():
        if "image" not in one or not isinstance(one.get("cls"), int) or one["cls"] < 0:
            raise UserError(f"shard {file}: sample {key} has no image, or no class number in {key}.cls")
        note = one.get("json")
        name = note.get("name", key) if isinstance(note, dict) else key
        samples.append(Sample(key, one["cls"], str(name), one["image"]))
    return samples


# -- What can be recognised -------------------------------------------------------------------------------------------

# name -> how it is found below a folder, and read. The names are those of data.dataset.
LAYOUTS: dict[str, tuple[Callable[[Path], Path | None], Callable[[Path, int], Pair]]] = {
    "shards": (_find_shards, _read_shards),
    "cifar10": (_find_folder("cifar-10-batches-py"), _read_cifar),
    "cifar100": (_find_folder("cifar-100-python"), _read_cifar),
    "fashion_mnist": (_find_idx("FashionMNIST/raw"), _read_idx),
    "mnist": (_find_idx("MNIST/raw"), _read_idx),
    "idx": (_find_idx(".", "raw"), _read_idx),
    "tiny_imagenet": (_find_tiny, _read_tiny),
}
ARCHIVES = {
    "cifar-10-python.tar.gz": "tar xzf",
    "cifar-100-python.tar.gz": "tar xzf",
    "tiny-imagenet-200.zip": "unzip",
    "ILSVRC2012_img_train.tar": "eit data prepare imagenet",
}


def read_layout(root: Path, max_pixels: int, dataset: str | None = None) -> Pair | None:
    """Training and validation images of a published layout below `root`; None where there is none.

    Where several lie there, `dataset` says which is meant.
    """
    if dataset is not None and dataset not in LAYOUTS:
        raise UserError(
            f"data.dataset={dataset}{nearest(dataset, LAYOUTS)} (known: {', '.join(LAYOUTS)}, and timm's wds/NAME, ...)"
        )
    found = {name: folder for name, (find, _) in LAYOUTS.items() if (folder := find(root)) is not None}
    if len(found) > 1 and dataset not in found:
        raise UserError(f"{root} holds several data sets: say which with data.dataset={' or '.join(found)}")
    if found:
        name = dataset if dataset in found else next(iter(found))
        return LAYOUTS[name][1](found[name], max_pixels)
    for archive, command in ARCHIVES.items():
        if (root / archive).is_file() and not (root / "train").is_dir():
            what = f"{root} FOLDER" if command.startswith("eit") else archive
            raise UserError(f"{root} holds {archive}, not unpacked: {command} {what}")
    return None


# -- Downloads --------------------------------------------------------------------------------------------------------

DOWNLOADS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def download(name: str, root: Path) -> None:
    """Fetch a data set of torchvision into `root`, unless it is there already."""
    from torchvision import datasets

    if name not in DOWNLOADS:
        raise UserError(
            f"data.dataset={name} cannot be downloaded{nearest(name, DOWNLOADS)} "
            f"(can be: {', '.join(DOWNLOADS)}, and timm's torch/, hfds/, tfds/)"
        )
    try:
        getattr(datasets, DOWNLOADS[name])(root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"downloading {name} into {root} failed: {' '.join(str(error).split())}") from None


# -- Data sets of timm ------------------------------------------------------------------------------------------------

TIMM_PREFIXES = ("hfds", "hfids", "tfds", "torch", "wds")


class Item(NamedTuple):
    """An item of a timm or torchvision data set with random access."""

    dataset: Any
    row: int

    def open(self) -> IO[bytes] | Image.Image:
        reader = getattr(self.dataset, "reader", None)
        return (reader if reader is not None else self.dataset)[self.row][0]


@dataclass
class ImageStream:
    """Labelled images that can only be read in turn: shards or a service behind a reader of timm."""

    classes: list[str]
    length: int
    config: Data
    split: str
    shards: int  # webdataset's tar files; 0 where a reader has none

    def __len__(self) -> int:
        return self.length

    def open(self, training: bool, batch_size: int, seed: int) -> Any:
        """timm's IterableImageDataset of (PIL image, label). Under DDP each rank reads a part in training."""
        return _create_timm(self.config, self.split, training, batch_size, seed)

    def digest(self) -> str:
        text = json.dumps([self.classes, self.length, self.config.dataset, self.split])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_timm(config: Data, split: str) -> Images | ImageStream:
    """A split of `data.dataset`, a name of `timm.data.create_dataset`."""
    dataset = _create_timm(config, split)
    classes = _timm_classes(dataset, config)
    reader = getattr(dataset, "reader", None)
    if isinstance(dataset, IterableDataset):
        if not (length := getattr(reader, "num_samples", 0)):
            raise UserError(f"data.dataset={config.dataset}: its {split} split does not say how many samples it has")
        return ImageStream(classes, int(length), config, split, _check_shards(reader, config))
    labels = _timm_labels(dataset)
    if not labels:
        raise UserError(f"data.dataset={config.dataset}: split {split} has no images")
    if max(labels) >= len(classes) or min(labels) < 0:
        raise UserError(
            f"data.dataset={config.dataset}: {split} has labels {min(labels)}..{max(labels)} for {len(classes)} classes"
        )
    names = [f"{split}/{i:07d}" for i in range(len(labels))]
    return Images(classes, labels, names, [Item(dataset, i) for i in range(len(labels))], config.max_pixels)


def _refuse_commands(config: Data, *names: str) -> None:
    """Raise a UserError for what webdataset, which hands addresses to a shell, would run."""
    remote = "://" in config.root
    for text in (config.root, *names):
        if text.startswith("pipe:") or (remote and re.search(r"['\"`$;&<>\\\s]", text)):
            raise UserError(f"data.dataset={config.dataset}: {text!r} is refused, for a shell would see it")


def shard_names(reader: Any) -> list[str]:
    """The shards that a reader of timm reads, below its root; none where it reads something else.

    Only webdataset's: the reader of `tfds/` has file names too, but of TFRecord files in a cache of its own.
    """
    from timm.data.readers.reader_wds import ReaderWds

    return list(reader.split_info.filenames) if isinstance(reader, ReaderWds) else []


def one_shard(dataset: Any, name: str) -> Any:
    """A copy of a timm data set of webdataset shards, not read yet, that reads shard `name` alone in this process."""
    info = get_worker_info()
    one = copy(dataset)
    one.reader = copy(dataset.reader)
    one.reader.dist_rank, one.reader.dist_num_replicas = 0, 1
    # timm gives worker i the files i, i + workers, ...: with as many as there are workers, each has one.
    names = (name,) * (info.num_workers if info else 1)
    one.reader.split_info = replace(dataset.reader.split_info, filenames=names)
    return one


def _check_shards(reader: Any, config: Data) -> int:
    """Count them. Raise a UserError where one is not there, which timm would replace by the others, or is a command."""
    names = shard_names(reader)
    for name in names:
        _refuse_commands(config, name)
        if "://" not in config.root:
            _check_end(Path(config.root, name))
    return len(names)


def _check_end(shard: Path) -> None:
    """Raise a UserError where a tar file is missing, or does not end as one: cut between two members it looks whole."""
    if not shard.is_file():
        raise UserError(f"shard {shard} is missing: {INFO} names it")
    with open(shard, "rb") as f:
        f.seek(max(os.path.getsize(shard) - 1024, 0))
        end = f.read()
    if end != bytes(1024):
        raise UserError(f"shard {shard} is cut: it has no end of a tar file")


def _create_timm(config: Data, split: str, training: bool = False, batch_size: int = 1, seed: int = 0) -> Any:
    from timm.data import create_dataset

    assert config.dataset
    prefix = config.dataset.partition("/")[0].lower()
    if prefix not in TIMM_PREFIXES:
        raise UserError(
            f"data.dataset={config.dataset}{nearest(prefix, TIMM_PREFIXES)} "
            f"(timm's begin with {', '.join(p + '/' for p in TIMM_PREFIXES)})"
        )
    if prefix == "wds":
        if not config.root:
            raise UserError(f"data.dataset={config.dataset} needs data.root, the folder or address of the shards")
        _refuse_commands(config, split)
    given: dict[str, Any] = dict(input_key=config.input_key, target_key=config.target_key)  # None: timm's own
    if prefix != "hfds":
        given |= dict(is_training=training, batch_size=batch_size, seed=seed, input_img_mode="")  # as they are
    try:
        return create_dataset(
            config.dataset,
            root=config.root or None,
            split=split,
            download=config.download,
            **({} if prefix == "torch" else given),
        )
    except Exception as error:  # readers of many libraries, each with errors of its own
        line = first_line(error)
        need = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets"}.get(prefix)
        missing = isinstance(error, ImportError) or "Please install" in line
        hint = f"; it needs: pip install {need}" if missing and need else ""
        where = f"data.dataset={config.dataset}, split {split}" + (f", data.root={config.root}" if config.root else "")
        raise UserError(f"{where} cannot be opened: {line}{hint}") from None


def _timm_classes(dataset: Any, config: Data) -> list[str]:
    reader = getattr(dataset, "reader", dataset)
    index = getattr(reader, "class_to_idx", None) or getattr(dataset, "class_to_idx", None)
    if isinstance(config.classes, int):
        return [str(i) for i in range(config.classes)]
    if config.classes is not None:
        try:
            names = Path(config.classes).read_text(encoding="utf-8").rstrip().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.classes={config.classes} cannot be read: {error}") from None
        if not all(names) or not names:
            raise UserError(f"data.classes={config.classes} has an empty line: a class name a line is expected")
        return names
    if index and sorted(index.values()) == list(range(len(index))):  # torchvision's ImageNet has several names a class
        return [str(name) for name, _ in sorted(index.items(), key=lambda item: item[1])]
    named = getattr(dataset, "classes", None) or getattr(reader, "info", None)
    if isinstance(named, dict):
        named = named.get("classes")
    if not named:
        raise UserError(
            f"data.dataset={config.dataset} does not name its classes: set data.classes=N or a file of names"
        )
    return [name if isinstance(name, str) else ", ".join(name) for name in named]


def _timm_labels(dataset: Any) -> list[int]:
    reader = getattr(dataset, "reader", None)
    if reader is not None and hasattr(reader, "iter_targets"):
        return [int(y) for y in track(reader.iter_targets(), "reading labels", len(dataset))]
    for holder in (dataset, reader):
        for name in ("targets", "labels", "_labels"):
            if (found := getattr(holder, name, None)) is not None:
                return [int(y) for y in found]
    return [int(dataset[i][1]) for i in track(range(len(dataset)), "reading labels", len(dataset))]
