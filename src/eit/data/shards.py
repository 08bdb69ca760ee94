"""A data set -> webdataset shards: tar files that read fast from disks and object stores, and give the same batches."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from eit.console import progress, say
from eit.data.datasets import AnyImages
from eit.data.images import Images, UnreadableImage, declared_range, hash_start, is_wide, upright, whole
from eit.data.layouts import INFO, SHARDING, SPLITS
from eit.errors import UserError
from eit.files import read_json, sync_folder, write_file

# What webdataset and timm's reader look for; other formats are stored as PNG, without loss.
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
LOSSLESS = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes that PNG has


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
    assert isinstance(train, Images) and isinstance(val, Images)
    source: dict[str, Any] = dict(train=train.digest(), val=val.digest(), count=count, val_count=val_count)
    if train.pixel_range is not None:
        source["pixel_range"] = list(train.pixel_range)
    earlier = source  # earlier versions did not record it
    source = source | dict(content=f"{train.content_digest()} {val.content_digest()}")
    done = dict(folder=str(folder), train=len(train), val=len(val), shards=count + val_count)
    info: dict[str, Any] = dict(name=folder.name, classes=train.classes, source=source, splits={})
    before = _read_json(folder / INFO).get("source") or _read_json(folder / SHARDING)
    if before not in (source, earlier, {}) or (not before and folder.is_dir() and any(folder.iterdir())):
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
        content = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        raise UserError(f"{file} cannot be read: give a new folder") from None
    return content if isinstance(content, dict) else {}


def _write_shard(file: Path, images: Images, indices: list[int]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    sizes = dict(zip(indices, images.subset(indices).sizes(), strict=True))
    try:
        with open(temporary, "wb") as opened, tarfile.open(fileobj=opened, mode="w") as tar:
            for index in indices:
                content, kind = _stored(images, index)
                start = hash_start(images.sources[index])
                note = json.dumps(dict(name=images.names[index], size=sizes[index], hash=start))
                for suffix, part in ((kind, content), ("cls", b"%d" % images.labels[index]), ("json", note.encode())):
                    member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
            tar.close()
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _stored(images: Images, index: int) -> tuple[bytes, str]:
    """An image's bytes as they are if they have a common format, otherwise as PNG; and the format.

    Pixels of more than 8 bits whose range is known here are stored in 8 bits, for readers that do not know it.
    """
    chosen: tuple[bytes | None, str] | None = None

    def choose(image: Image.Image) -> None:
        nonlocal chosen
        ranged = is_wide(image) and declared_range(image, images.pixel_range)
        if not ranged and image.format in FORMATS:
            chosen = None, FORMATS[image.format]
        elif not ranged and image.mode in LOSSLESS:
            chosen = _png(upright(image)), "png"

    try:
        image = images.read(index, 3, lambda image, channels: image if chosen else whole(image, channels), choose)
        if chosen is None:
            return _png(image), "png"
        content, kind = chosen
        if content is None:
            source = images.sources[index]
            with open(source, "rb") if isinstance(source, str) else source.open() as file:
                content = file.read()
    except (OSError, UnreadableImage) as error:
        raise UserError(f"{images.names[index]} cannot be read, and so not put into a shard: {error}") from None
    return content, kind


def _png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "png", icc_profile=None)
    return buffer.getvalue()
