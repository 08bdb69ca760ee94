"""A data set -> webdataset shards: tar files that read fast from disks and object stores, and give the same batches."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eit.console import progress, say
from eit.data.datasets import AnyImages
from eit.data.images import Images, to_mode
from eit.data.layouts import INFO, SHARDING, SPLITS
from eit.errors import UserError
from eit.files import write_file

# What webdataset and timm's reader look for; other formats are stored as PNG, without loss.
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def write_shards(train: AnyImages, val: AnyImages, folder: Path, count: int, val_count: int) -> dict[str, Any]:
    """Write `count` training and `val_count` validation shards below `folder`, with `_info.json` as timm reads it.

    Training images are shuffled over the shards, once, for readers that stream them. A sample's key is its number
    in the data set, so that a reader with random access (`layouts.py`) finds the order and the batches of the source.
    A stopped run goes on with the shards that are not there yet; `_info.json` comes last.

    Raises:
        UserError: fewer images than shards, an image that cannot be read, a folder with other shards.
    """
    parts = {"train": (train, count), "val": (val, val_count)}
    for name, (images, number) in parts.items():
        if not isinstance(images, Images):
            raise UserError("these images are a stream: shards are written from images with random access")
        if number > len(images):
            option = "--count" if name == "train" else "--val-count"
            raise UserError(f"{number} shards for {len(images)} images of {name}: set {option} {len(images)} or less")
    source = dict(train=train.digest(), val=val.digest(), count=count, val_count=val_count)
    done = dict(folder=str(folder), train=len(train), val=len(val), shards=count + val_count)
    info: dict[str, Any] = dict(name=folder.name, classes=train.classes, source=source, splits={})
    before = _read_json(folder / INFO).get("source") or _read_json(folder / SHARDING)
    if before not in (source, {}) or (not before and folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} holds {'other shards' if before else 'something else'}: give a new folder")
    if (folder / INFO).exists():
        say(f"{folder} is complete already")
        return done
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / SHARDING, json.dumps(source))
        for name, (images, number) in parts.items():
            assert isinstance(images, Images)
            split = SPLITS[name]
            order = torch.arange(len(images))
            if name == "train":
                order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            chunks = [chunk.tolist() for chunk in order.tensor_split(number)]
            files = [f"{split}-{i:05d}.tar" for i in range(number)]
            with progress(f"writing {name} shards", len(images)) as advance:
                for file, chunk in zip(files, chunks, strict=True):
                    if not (folder / file).exists():
                        _write_shard(folder / file, images, chunk)
                    advance(len(chunk))
            lengths = [len(chunk) for chunk in chunks]
            info["splits"][split] = dict(name=split, num_samples=len(images), filenames=files, shard_lengths=lengths)
        write_file(folder / INFO, json.dumps(info, indent=2))
        (folder / SHARDING).unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; the same command goes on from here") from None
    return done


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        raise UserError(f"{file} cannot be read: give a new folder") from None
    return content if isinstance(content, dict) else {}


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
    finally:
        temporary.unlink(missing_ok=True)


def _stored(images: Images, index: int) -> tuple[bytes, str]:
    """An image's bytes as they are if they have a common format, otherwise as PNG; and the format."""
    source = images.sources[index]
    try:
        if isinstance(source, str):
            content = Path(source).read_bytes()
        elif isinstance(source, np.ndarray):
            return _png(Image.fromarray(source)), "png"
        else:
            opened = source.open()
            if isinstance(opened, Image.Image):
                return _png(opened), "png"
            content = opened.read()
        with Image.open(io.BytesIO(content)) as image:
            if kind := FORMATS.get(image.format or ""):
                return content, kind
            return _png(image), "png"
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{images.names[index]} cannot be read, and so not put into a shard: {error}") from None


def _png(image: Image.Image) -> bytes:
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = to_mode(image, 3)
    buffer = io.BytesIO()
    image.save(buffer, "png", exif=image.getexif())
    return buffer.getvalue()
