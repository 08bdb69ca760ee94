"""Layouts of data sets on disk -> `Images`. What is missing is named in one line.

A layout is a pair of functions in `LAYOUTS`: one finds it below a folder, one reads its training and validation images.
"""

import gzip
import hashlib
import json
import math
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from eit.console import track
from eit.data.folders import is_left_out, read_folder
from eit.data.images import Images, image_extensions
from eit.errors import UserError, few, nearest
from eit.files import open_regular, read_json, read_text

Pair = tuple[Images, Images]  # training, validation


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
        dataset = kind(folder.parent, train=train)
        names = [f"{name}-{i:05d}" for i in range(len(dataset.targets))]
        parts.append(Images(list(dataset.classes), list(dataset.targets), names, list(dataset.data), max_pixels))
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
    arrays = [
        Images(classes, y.tolist(), [f"{part}-{i:05d}" for i in range(len(x))], list(x), max_pixels)
        for part, (x, y) in parts.items()
    ]
    return arrays[0], arrays[1]


MAX_IDX = 1 << 30  # bytes of values; EMNIST, the largest of its kind, has 638 million


def read_idx(file: Path, axes: int) -> Any:
    """The uint8 array of an idx file (the format stands on the MNIST page): 0, 0, type, axes, sizes, values.

    A packed file is unpacked no further than its header says.
    """
    start = 4 + 4 * axes
    try:
        with open(file, "rb") as opened, gzip.open(opened) if file.suffix == ".gz" else opened as stream:
            header = stream.read(start)
            if header[:4] != bytes((0, 0, 8, axes)) or len(header) < start:
                raise UserError(f"{file} is not an idx file of {axes}-dimensional bytes")
            shape = [int(n) for n in np.frombuffer(header[4:], ">u4")]
            expected = math.prod(shape)
            if expected > MAX_IDX:
                raise UserError(f"{file} says that it has {expected:,} bytes of values; at most {MAX_IDX:,} are read")
            values = stream.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if len(values) != expected or not expected:
        there = f"more than {expected:,}" if len(values) > expected else f"{len(values):,}"
        raise UserError(f"{file} has {there} bytes of values, its header says {expected:,}")
    return np.frombuffer(values, np.uint8).reshape(shape)


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
    expected = sorted(read_text(root / "wnids.txt", "list").split())
    train = read_folder(root / "train", max_pixels)
    if missing := sorted(set(expected) - set(train.classes)):
        what = f"{len(missing)} of {len(expected)} classes of wnids.txt: {few(missing)}"
        raise UserError(f"{root / 'train'} lacks {what}; {again}")
    counts = Counter(train.labels)
    for label, wnid in enumerate(train.classes):
        boxes = root / "train" / wnid / f"{wnid}_boxes.txt"  # one line per image
        if boxes.is_file() and (said := len(read_text(boxes, "list").split("\n")) - 1) > counts[label]:
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
    for line in sorted(read_text(file, "list").splitlines()):
        name, wnid = [*line.split("\t"), "", ""][:2]
        source = folder / "images" / name
        if wnid not in number or Path(name).name != name:
            raise UserError(f"{file}: the line {line[:60]!r} does not name an image and a class of train/")
        if not source.is_file():
            raise UserError(f"{source} is missing: val_annotations.txt names it")
        labels.append(number[wnid])
        names.append(f"images/{name}")
        sources.append(str(source))
    if not labels:
        raise UserError(f"{file} is empty")
    return Images(wnids, labels, names, sources, max_pixels)


def class_names(words: Path, wnids: Sequence[str]) -> list[str]:
    """The first word of each WordNet id in words.txt (`id<TAB>word, word`); if two ids share it, all words and id."""
    lines = (line.partition("\t") for line in read_text(words, "list").splitlines())
    said = {wnid: text for wnid, _, text in lines}
    first = [said.get(wnid, wnid).split(",")[0] for wnid in wnids]
    pairs = zip(wnids, first, strict=True)
    return [f"{said.get(wnid, wnid)} ({wnid})" if first.count(name) > 1 else name for wnid, name in pairs]


# -- Shards: tar files of webdataset, with random access --------------------------------------------------------------

INFO = "_info.json"  # what timm's reader looks for; `eit data shard` adds the class names
SHARDING = ".sharding.json"  # there while shards are being written
SPLITS = {"train": "train", "val": "validation"}  # our names -> those in the info


MAX_MEMBER = 1 << 30  # bytes of an image in a shard
MAX_NOTE = 1 << 20  # bytes of a class number, a note, or a name in a shard


class Member(NamedTuple):
    """A file inside a tar file that is not compressed."""

    tar: str
    offset: int
    size: int
    stored_size: int  # of the image that it was written from
    stored_hash: str = ""  # as `eit.data.images.hash_start`

    def open_stored(self) -> IO[bytes]:
        return self.open()

    def open(self) -> IO[bytes]:
        with open_regular(Path(self.tar)) as f:
            f.seek(self.offset)
            return BytesIO(f.read(self.size))


def _find_shards(root: Path) -> Path | None:
    begun = (root / INFO).is_file() or (root / SHARDING).is_file() or any(root.glob("train-*.tar"))
    return root if begun else None


def _read_shards(root: Path, max_pixels: int) -> Pair:
    file = root / INFO
    if not file.exists():
        raise UserError(f"{file} is missing: eit data shard, which writes it last, did not end; run it again")
    try:
        info = read_json(file)
        splits = {name: list(info["splits"][split]["filenames"]) for name, split in SPLITS.items()}
        lengths = {name: list(info["splits"][split]["shard_lengths"]) for name, split in SPLITS.items()}
        if not isinstance(info["classes"], list):
            raise ValueError("classes is not a list")
        classes = [str(name) for name in info["classes"]]
        shards = [name for part in splits.values() for name in map(str, part)]
        if len(set(shards)) < len(shards):
            raise ValueError("a shard is named twice")
        if any(len(splits[name]) != len(lengths[name]) for name in splits):
            raise ValueError("filenames and shard_lengths differ in number")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not describe train and validation shards with classes, as eit data shard does ({error!r}); "
            "other shards are read with data.dataset=wds/NAME"
        ) from None
    pairs = []
    for name, files in splits.items():
        for shard in files:
            check_shard_name(shard, str(file))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(track(pool.map(index_shard, [root / f for f in files]), f"indexing {name} shards", len(files)))
        for shard, part, length in zip(files, parts, lengths[name], strict=True):
            if len(part) != length:
                raise UserError(f"shard {root / shard} has {len(part)} samples, {INFO} says {length}")
        samples = sorted(sample for part in parts for sample in part)
        if wrong := next((s for s in samples if s.label >= len(classes)), None):
            raise UserError(f"{wrong.member.tar}: {wrong.key} is of class {wrong.label}, {INFO} has {len(classes)}")
        pairs.append(
            Images(
                classes, [s.label for s in samples], [s.name for s in samples], [s.member for s in samples], max_pixels
            )
        )
    return pairs[0], pairs[1]


class Sample(NamedTuple):
    key: str
    label: int
    name: str
    member: Member


def check_shard_name(name: Any, source: str) -> None:
    """Raise a UserError unless `name`, which `source` gives, names a file below the folder of the shards."""
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else [""]
    if "" in parts or ".." in parts or ":" in parts[0]:
        raise UserError(f"{source} names the shard {name!r}: a file below its own folder is expected")


class PlainMember(tarfile.TarInfo):
    """A member of a shard. One that would unpack to more bytes than the shard has is refused before it is read."""

    def isreg(self) -> bool:
        if self.issparse() or self.size > MAX_MEMBER:
            what = "is sparse" if self.issparse() else f"has {self.size:,} bytes, at most {MAX_MEMBER:,} are read"
            raise tarfile.ReadError(f"member {self.name} {what}")
        return super().isreg()


class _Headers(BufferedReader):
    """A tar file of which headers and notes are read, none of them large."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_NOTE:
            raise tarfile.ReadError(f"a header or note of more than {MAX_NOTE:,} bytes")
        return super().read(size)


def index_shard(file: Path) -> list[Sample]:
    """The samples of a webdataset shard (KEY.png and so on, KEY.cls, optionally KEY.json with a name)."""
    parts: dict[str, dict[str, Any]] = {}
    try:
        with (
            open_regular(file, buffering=0) as raw,
            tarfile.open(fileobj=_Headers(cast(FileIO, raw)), mode="r:", tarinfo=PlainMember) as tar,
        ):
            length = os.fstat(raw.fileno()).st_size
            for member in tar:
                key, _, kind = os.path.basename(member.name).partition(".")
                if not member.isreg() or any(map(is_left_out, member.name.split("/"))):
                    continue  # a folder, or a link, which would lead elsewhere; what macOS's tar adds
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"member {member.name} is cut: it has {member.size:,} bytes")
                sample = parts.setdefault(os.path.join(os.path.dirname(member.name), key), {})
                if kind in ("cls", "json"):
                    if member.size > MAX_NOTE:
                        raise tarfile.ReadError(f"member {member.name} has {member.size:,} bytes")
                    content = tar.extractfile(member)
                    sample[kind] = json.loads(content.read()) if content else None
                elif f".{kind.lower()}" in image_extensions():
                    sample["image"] = member.offset_data, member.size
    except (OSError, tarfile.TarError, ValueError, RecursionError) as error:
        raise UserError(f"shard {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    samples = []
    for key, sample in parts.items():
        if "image" not in sample or type(sample.get("cls")) is not int or sample["cls"] < 0:
            raise UserError(f"shard {file}: sample {key} has no image, or no class number in {key}.cls")
        note = sample.get("json")
        note = note if isinstance(note, dict) else {}
        offset, size = sample["image"]
        stored = note.get("size")
        stored = stored if type(stored) is int else size
        image = Member(str(file), offset, size, stored, str(note.get("hash", "")))
        samples.append(Sample(key, sample["cls"], str(note.get("name", key)), image))
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
    """Training and validation images of a published layout below `root`; None if there is none.

    Where several lie there, `dataset` says which is meant.
    """
    if dataset is not None and dataset not in LAYOUTS:
        raise UserError(
            f"data.dataset={dataset} is not a known data set{nearest(dataset, LAYOUTS)} "
            f"(known: {', '.join(LAYOUTS)}, and timm's wds/NAME, ...)"
        )
    folders = {name: folder for name, (find, _) in LAYOUTS.items() if (folder := find(root)) is not None}
    if len(folders) > 1 and dataset not in folders:
        raise UserError(f"{root} holds several data sets: say which with data.dataset={' or '.join(folders)}")
    if folders:
        name = dataset if dataset in folders else next(iter(folders))
        return LAYOUTS[name][1](folders[name], max_pixels)
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
