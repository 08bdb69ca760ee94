"""Data sets that timm opens: torchvision's, Hugging Face's, TensorFlow's, and webdataset shards."""

import hashlib
import json
import os
import re
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from eit.config import Data
from eit.console import track
from eit.data.images import Images
from eit.data.layouts import INFO, check_shard_name
from eit.errors import UserError, first_line, nearest
from eit.files import open_regular, read_text

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
    """Labelled images without random access: shards or a service, read by a reader of timm."""

    classes: list[str]
    length: int
    config: Data
    split: str
    shards: int  # number of webdataset's tar files; 0 for other readers
    sizes: tuple[int, ...] = ()  # bytes of each shard on this machine

    def __len__(self) -> int:
        return self.length

    def open(self, training: bool, batch_size: int, seed: int) -> Any:
        """timm's IterableImageDataset of (PIL image, label). In training under DDP each rank reads a part."""
        return _create_timm(self.config, self.split, training, batch_size, seed)

    def digest(self) -> str:
        """A hash of classes, number of images, data set and split."""
        text = json.dumps([self.classes, self.length, self.config.dataset, self.split])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def content_digest(self) -> str:
        """A hash of the sizes in bytes of shards on this machine."""
        return hashlib.sha256(json.dumps(self.sizes).encode()).hexdigest()[:16]


def read_timm(config: Data, split: str) -> Images | ImageStream:
    """The images of a split of `data.dataset`, a name of `timm.data.create_dataset`."""
    dataset = _create_timm(config, split)
    classes = _timm_classes(dataset, config)
    reader = getattr(dataset, "reader", None)
    if isinstance(dataset, IterableDataset):
        if not (length := getattr(reader, "num_samples", 0)):
            raise UserError(f"data.dataset={config.dataset}: its {split} split does not say how many samples it has")
        names = shard_names(reader)
        local = [] if "://" in config.root else [Path(config.root, name) for name in names]
        return ImageStream(classes, int(length), config, split, len(names), tuple(map(_check_end, local)))
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
    """Raise a UserError for addresses that webdataset would run as shell commands."""
    remote = "://" in config.root
    for text in (config.root, *names):
        if text.startswith("pipe:") or (remote and re.search(r"['\"`$;&<>\\\s]", text)):
            raise UserError(f"data.dataset={config.dataset}: {text!r} is refused, because a shell would execute it")


def shard_names(reader: Any) -> list[str]:
    """Names of a reader's webdataset shards, below its root; none for other readers.

    The reader of `tfds/` has file names too, but of TFRecord files in its own cache.
    """
    from timm.data.readers.reader_wds import ReaderWds

    return list(reader.split_info.filenames) if isinstance(reader, ReaderWds) else []


def one_shard(dataset: Any, name: str) -> Any:
    """A copy of an unread timm data set of webdataset shards that reads only shard `name`, in this process."""
    info = get_worker_info()
    reading = copy(dataset)
    reading.reader = copy(dataset.reader)
    reading.reader.dist_rank, reading.reader.dist_num_replicas = 0, 1
    # timm gives worker i the files i, i + workers, ...: one copy of the name for each worker.
    names = (name,) * (info.num_workers if info else 1)
    reading.reader.split_info = replace(dataset.reader.split_info, filenames=names)
    return reading


def _check_names(dataset: Any, config: Data) -> None:
    """Raise a UserError if a shard's name is a command or leads elsewhere.

    Whenever a data set is opened, for a server may give other names each time.
    """
    for name in shard_names(getattr(dataset, "reader", None)):
        if isinstance(name, str):
            _refuse_commands(config, name)
        check_shard_name(name, f"{config.root}/{INFO}")


def _check_end(shard: Path) -> int:
    """The size of a tar file. Raise a UserError if it is missing, not a regular file, or without an end mark.

    Without that check, a file that was cut between two members would seem whole.
    """
    with _open_file(shard) as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(size - 1024, 0))
        end = f.read()
    if end != bytes(1024):
        raise UserError(f"shard {shard} is cut: it has no end of a tar file")
    return size


def _open_file(file: Path) -> IO[bytes]:
    try:
        return open_regular(file)
    except FileNotFoundError:
        raise UserError(f"shard {file} is missing: {INFO} names it") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _create_timm(config: Data, split: str, training: bool = False, batch_size: int = 1, seed: int = 0) -> Any:
    from timm.data import create_dataset

    assert config.dataset
    prefix = config.dataset.partition("/")[0].lower()
    if prefix not in TIMM_PREFIXES:
        raise UserError(
            f"data.dataset={config.dataset} is not a known data set{nearest(prefix, TIMM_PREFIXES)} "
            f"(names of timm's begin with {', '.join(p + '/' for p in TIMM_PREFIXES)})"
        )
    if prefix == "wds":
        if not config.root:
            raise UserError(f"data.dataset={config.dataset} needs data.root, the folder or address of the shards")
        _refuse_commands(config, split)
        for info in (INFO, "info.json"):  # timm opens the first of them, and would wait for a pipe
            if "://" not in config.root and (file := Path(config.root, info)).exists():
                _open_file(file).close()
    given: dict[str, Any] = dict(input_key=config.input_key, target_key=config.target_key)  # None: timm's default
    if prefix != "hfds":
        given |= dict(is_training=training, batch_size=batch_size, seed=seed, input_img_mode="")  # no conversion
    try:
        dataset = create_dataset(
            config.dataset,
            root=config.root or None,
            split=split,
            download=config.download,
            **({} if prefix == "torch" else given),
        )
    except Exception as error:  # each library raises its own errors
        line = first_line(error)
        need = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets"}.get(prefix)
        missing = isinstance(error, ImportError) or "Please install" in line
        hint = f"; it needs: pip install {need}" if missing and need else ""
        where = f"data.dataset={config.dataset}, split {split}" + (f", data.root={config.root}" if config.root else "")
        raise UserError(f"{where} cannot be opened: {line}{hint}") from None
    _check_names(dataset, config)
    return dataset


def _timm_classes(dataset: Any, config: Data) -> list[str]:
    reader = getattr(dataset, "reader", dataset)
    index = getattr(reader, "class_to_idx", None) or getattr(dataset, "class_to_idx", None)
    if isinstance(config.classes, int):
        return [str(i) for i in range(config.classes)]
    if config.classes is not None:
        text = read_text(config.classes, "data.classes")
        names = [line.removesuffix("\r") for line in text.rstrip().split("\n")]
        if not all(map(str.strip, names)):
            raise UserError(f"data.classes={config.classes} has an empty line: give one class name per line")
        return names
    if index and sorted(index.values()) == list(
        range(len(index))
    ):  # torchvision's ImageNet has several names per class
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
            if (labels := getattr(holder, name, None)) is not None:
                return [int(y) for y in labels]
    return [int(dataset[i][1]) for i in track(range(len(dataset)), "reading labels", len(dataset))]
