"""A data set -> webdataset shards: tar files that read fast from disks and object stores, and give the same batches."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eit.checkpoint import write_file
from eit.console import progress
from eit.data import AnyImages
from eit.errors import UserError
from eit.images import Images
from eit.readers import INFO, SPLITS

# What webdataset and timm's reader look for; other formats are stored as PNG, without loss.
EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


def write_shards(train: AnyImages, val: AnyImages, folder: Path, count: int, val_count: int) -> dict[str, Any]:
    """Write `count` training and `val_count` validation shards below `folder`, with `_info.json` as timm reads it.

    Training images are shuffled over the shards, once, for readers that take them in turn. A sample's key is its number
    in the data set, so that a reader with random access (`eit.readers`) finds the order and the batches of the source.
    A stopped run goes on with the shards that are not there yet; `_info.json` comes last.

    Raises:
        UserError: fewer images than shards, an image that cannot be read, a folder with other shards.
    """
    info: dict[str, Any] = dict(name=folder.name, classes=train.classes, splits={})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    plan = dict(train=train.digest(), val=val.digest(), count=count, val_count=val_count)
    note = folder / ".sharding.json"
    if (folder / INFO).exists() or (note.exists() and json.loads(note.read_text()) != plan):
        raise UserError(f"{folder} holds other shards: give a new folder")
    write_file(note, json.dumps(plan))
    for name, images, parts in (("train", train, count), ("val", val, val_count)):
        if not isinstance(images, Images):
            raise UserError("these images come in turn already: shards are written from images with random access")
        if parts > len(images):
            raise UserError(f"{parts} shards for {len(images)} images of {name}: at most one a shard")
        split = SPLITS[name]
        order = torch.arange(len(images))
        if name == "train":
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        chunks = [chunk.tolist() for chunk in order.tensor_split(parts)]
        files = [f"{split}-{i:05d}.tar" for i in range(parts)]
        with progress(f"writing {name} shards", len(images)) as advance:
            for file, chunk in zip(files, chunks, strict=True):
                if not (folder / file).exists():
                    _write_shard(folder / file, images, chunk)
                advance(len(chunk))
        lengths = [len(chunk) for chunk in chunks]
        info["splits"][split] = dict(name=split, num_samples=len(images), filenames=files, shard_lengths=lengths)
    write_file(folder / INFO, json.dumps(info, indent=2))
    note.unlink()
    return dict(folder=str(folder), train=len(train), val=len(val), shards=count + val_count)


def _write_shard(file: Path, images: Images, indices: list[int]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with tarfile.open(temporary, "w") as tar:
            for index in indices:
                content, kind = _stored(images, index)
                note = json.dumps(dict(name=images.names[index]))
                for suffix, part in ((kind, content), ("cls", b"%d" % images.labels[index]), ("json", note.encode())):
                    member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
        temporary.rename(file)
    except OSError as error:
        raise UserError(f"{file} was not written: {error.strerror}; the same command goes on from here") from None
    finally:
        temporary.unlink(missing_ok=True)


def _stored(images: Images, index: int) -> tuple[bytes, str]:
    """An image's bytes as they are, where they are of a common format, else as PNG; and the format."""
    source = images.sources[index]
    if isinstance(source, str):
        kind = EXTENSIONS.get(Path(source).suffix.lower())
        if kind:
            return Path(source).read_bytes(), kind
        with Image.open(source) as opened:
            return _png(opened), "png"
    if isinstance(source, np.ndarray):
        return _png(Image.fromarray(source)), "png"
    opened = source.open()
    if isinstance(opened, Image.Image):
        return _png(opened), "png"
    content = opened.read()
    with Image.open(io.BytesIO(content)) as image:
        kind = EXTENSIONS.get(f".{(image.format or '').lower()}")
        return (content, kind) if kind else (_png(image), "png")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
