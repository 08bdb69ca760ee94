"""Small images -> a few files without loss, each of which can be trained on alone.

    python benchmarks/pack.py pack FOLDER OUT [--part-mib 46]   of FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png
    python benchmarks/pack.py check OUT                         decode all, compare checksums, count
    python benchmarks/pack.py unpack OUT FOLDER                 write the images as PNG again, pixel-identical

A part is a zip file of `index.json` and lossless WebP mosaics, `0.webp` and so on, whose tiles stand in one column.
"""

import argparse
import hashlib
import io
import math
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eit.console import track
from eit.data.folders import read_folder
from eit.data.images import Images
from eit.errors import UserError, first_line, printable
from eit.files import write_file

SPLITS = ("train", "val")
MAX_SIDE = 16_383  # pixels of a WebP image
# Blocks of 8x8 pixels of a mosaic, with which CIFAR-10 has 162 tiles. With more, libwebp chooses its codes for larger
# blocks: 400 tiles are 1.8% larger. Fewer decode more slowly.
MAX_BLOCKS = 2600
MAX_INDEX_BYTES, MAX_PART_PIXELS = 2**26, 2**28  # of a part that is read; whole CIFAR-10 would have 2**21 and 2**26
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Whole = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Mosaic(Strict):
    split: Literal["train", "val"]
    tiles: Side
    columns: Literal[1]
    labels: list[Whole]
    names: list[str]
    sha256: str  # of the decoded pixels, uint8: tiles x height x width x channels


class Index(Strict):
    format: Literal[1]
    set: str  # a hash of all names, labels and pixels of the set, the same in each of its parts
    part: Whole
    parts: Whole
    size: tuple[Side, Side]  # height, width
    channels: Literal[1, 3]
    classes: list[str]
    mosaics: list[Mosaic]


def is_plain(name: str) -> bool:
    """Whether a file or folder of this name lies in the folder that it is put into."""
    return name.isprintable() and 0 < len(name.encode()) < 256 and name[0] != "." and not set(name) & set("/\\:")


# -- Writing ----------------------------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, Images]:
    """Split -> images with pixels as sources. Refused is what is not CLASS/NAME.png, 8 bits, of one size and mode."""
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise UserError(f"{folder} has no {split}/ folder (train/CLASS/*.png and val/CLASS/*.png are expected)")
    splits = {split: read_folder(folder / split) for split in SPLITS}
    if splits["train"].classes != splits["val"].classes:
        raise UserError(f"{folder}: train/ and val/ have different classes")
    first = None
    for split, images in splits.items():
        for i, name in enumerate(track(images.names, f"reading {split}", len(images))):
            file = folder / split / name
            words = Path(name).parts
            if len(words) != 2 or not all(map(is_plain, words)) or not name.endswith(".png"):
                raise UserError(f"{file} cannot be packed: CLASS/NAME.png is expected, of plain names")
            try:
                with Image.open(file) as image:
                    kind = f"{image.width}x{image.height} pixels, mode {image.mode}"
                    images.sources[i] = np.asarray(image)
            except (OSError, SyntaxError, ValueError) as error:
                raise UserError(f"{file} cannot be read: {first_line(error)}") from None
            first = first or kind
            if kind != first or image.mode not in ("RGB", "L"):
                raise UserError(f"{file} is of {kind}, the first image of {first}: one size is packed, RGB or L (grey)")
    return splits


def deal(labels: Sequence[int], parts: int) -> np.ndarray:
    """Image -> part, shuffled by a fixed seed: of each class every part has the same number of images, up to one."""
    part_of = np.empty(len(labels), int)
    for label in range(max(labels) + 1):
        shuffled = np.random.default_rng((0, label)).permutation(np.flatnonzero(np.asarray(labels) == label))
        part_of[shuffled] = (np.arange(len(shuffled)) + label) % parts
    return part_of


def cut(images: Images) -> list[Images]:
    """Images in their order, as many together as a mosaic takes."""
    height, width = images.sources[0].shape[:2]
    tiles = max(1, min(MAX_BLOCKS * 8 * 8 // (height * width), MAX_SIDE // height))
    return [images.subset(range(i, min(i + tiles, len(images)))) for i in range(0, len(images), tiles)]


def encode(images: Images) -> bytes:
    """A mosaic, as WebP. Quality 100 saves 0.2% more and takes 30 times as long."""
    pixels = np.concatenate(images.sources)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, "webp", lossless=True, quality=75, method=6)
    return buffer.getvalue()


def encode_all(mosaics: list[Images], title: str) -> list[bytes]:
    with ThreadPoolExecutor() as pool:  # Pillow encodes without Python's lock
        return list(track(pool.map(encode, mosaics), title, len(mosaics)))


def make_part(splits: dict[str, Images], identity: str, part: int, parts: int) -> bytes:
    mosaics, described = [], []
    for split, images in splits.items():
        for m in cut(images.subset(np.flatnonzero(deal(images.labels, parts) == part).tolist())):
            names = [Path(name).name for name in m.names]
            checksum = hashlib.sha256(np.stack(m.sources).data).hexdigest()
            described.append(dict(split=split, tiles=len(m), columns=1, labels=m.labels, names=names, sha256=checksum))
            mosaics.append(m)
    shape = mosaics[0].sources[0].shape
    fields = dict(format=1, set=identity, part=part, parts=parts, size=shape[:2], channels=3 if len(shape) == 3 else 1)
    index = Index.model_validate(fields | dict(classes=mosaics[0].classes, mosaics=described))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # entries have ZipInfo's fixed date: the same images, the same bytes
        archive.writestr(zipfile.ZipInfo("index.json"), index.model_dump_json(), zipfile.ZIP_DEFLATED, 9)
        for i, content in enumerate(encode_all(mosaics, f"packing part {part} of {parts}")):
            archive.writestr(zipfile.ZipInfo(f"{i}.webp"), content)
    return buffer.getvalue()


def pack(folder: Path, out: Path, part_mib: float) -> None:
    """Write the images into as few parts of equal shares as the limit allows; their number is estimated first."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: give a new folder")
    splits = load(folder)
    identity = hashlib.sha256()
    for images in splits.values():
        identity.update(images.digest().encode())
        for pixels in images.sources:
            identity.update(pixels)
    whole = [m for images in splits.values() for m in cut(images)]
    sample = whole[:: max(1, len(whole) // 32)]
    share = sum(map(len, sample)) / sum(map(len, whole))
    limit = part_mib * 2**20
    parts = max(1, math.ceil(sum(map(len, encode_all(sample, "estimating"))) / share / limit))
    fewest = min(min(Counter(images.labels).values()) for images in splits.values())
    contents: list[bytes] = []
    while len(contents) < parts:
        if parts > fewest:
            raise UserError(f"--part-mib {part_mib:g} is too little: not every part would have images of every class")
        contents.append(make_part(splits, identity.hexdigest(), len(contents), parts))
        if len(contents[-1]) > limit:
            parts, contents = parts + 1, []
    out.mkdir(parents=True, exist_ok=True)
    for part, content in enumerate(contents):
        write_file(out / f"part-{part}.zip", content)


# -- Reading: a part is untrusted, so that its index is checked before anything is decoded ----------------------------


def read_index(archive: zipfile.ZipFile) -> Index:
    entry = archive.getinfo("index.json")
    if entry.file_size > MAX_INDEX_BYTES or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"index.json is of more than {MAX_INDEX_BYTES} bytes, or not deflated")
    index = Index.model_validate_json(archive.read(entry))
    height, width = index.size
    tiles = [m.tiles for m in index.mosaics]
    rows = [(m.split, label, name) for m in index.mosaics for label, name in zip(m.labels, m.names, strict=True)]
    names = [name for _, _, name in rows]
    faults = {
        "lacks a split": {m.split for m in index.mosaics} != set(SPLITS),
        "counts its parts wrongly": index.part >= index.parts,
        "counts its tiles wrongly": any(m.tiles != len(m.labels) for m in index.mosaics),
        f"has mosaics of more than {MAX_SIDE} pixels in height": max(tiles, default=0) * height > MAX_SIDE,
        f"has more than {MAX_PART_PIXELS} pixels": sum(tiles) * height * width > MAX_PART_PIXELS,
        "has an image twice": len(set(rows)) < len(rows),
        "has a class twice": len(set(index.classes)) < len(index.classes),
        "has labels without a class": max((label for _, label, _ in rows), default=0) >= len(index.classes),
        "has names that are not plain": not all(map(is_plain, [*index.classes, *names])),
        "has names that do not end with .png": not all(name.endswith(".png") for name in names),
    }
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise ValueError(f"index.json {fault}")
    return index


def decode(content: bytes, mosaic: Mosaic, index: Index) -> np.ndarray:
    """-> (N, H, W, 3) uint8, or (N, H, W) of grey images."""
    height, width = index.size
    riff, _, kind, _, signature, bits = struct.unpack_from("<4sI8sIBI", content)
    size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1  # of the only form of WebP that is written here
    if (riff, kind, signature) != (b"RIFF", b"WEBPVP8L", 0x2F) or size != (width, mosaic.tiles * height):
        raise ValueError("a mosaic is not as index.json describes it")
    with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
        pixels = np.array(image.convert("RGB")).reshape(mosaic.tiles, height, width, 3)
    pixels = pixels if index.channels == 3 else pixels[..., 0].copy()
    if hashlib.sha256(pixels.data).hexdigest() != mosaic.sha256:
        raise ValueError("the checksum of a mosaic's pixels does not match")
    return pixels


def read_part(file: Path) -> tuple[Index, list[np.ndarray]]:
    """-> index, and the decoded images of each of its mosaics."""
    try:
        with zipfile.ZipFile(file) as archive, ThreadPoolExecutor() as pool:
            index = read_index(archive)
            entries = [archive.getinfo(f"{i}.webp") for i in range(len(index.mosaics))]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("a mosaic is compressed twice")
            contents = map(archive.read, entries)
            return index, list(pool.map(decode, contents, index.mosaics, [index] * len(entries)))
    except ValidationError as error:
        fault = error.errors()[0]
        reason = f"index.json: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    except Exception as error:  # zipfile and Pillow raise BadZipFile, OSError, ValueError, KeyError, struct.error, ...
        reason = first_line(error)
    raise UserError(printable(f"{file} is damaged, or no part of packed images: {reason}"[:500]))


def read_parts(where: Path) -> dict[Path, tuple[Index, list[np.ndarray]]]:
    """The part `where`, or all parts of the folder `where`, which must be of one set."""
    files = sorted(where.glob("part-*.zip")) if where.is_dir() else [where]
    if not files or not files[0].is_file():
        raise UserError(f"{where} has no parts of packed images: part-0.zip or the like is expected")
    parts: dict[Path, tuple[Index, list[np.ndarray]]] = {}
    for file in files:
        parts[file] = read_part(file)
        (first, _), (index, _) = parts[files[0]], parts[file]
        if any(getattr(index, k) != getattr(first, k) for k in ("set", "parts", "size", "channels", "classes")):
            raise UserError(f"{files[0]} and {file} are of different sets, or cut differently: read one of them alone")
    if len({index.part for index, _ in parts.values()}) < len(files):
        raise UserError(f"{where} has a part twice")
    return parts


def read(where: str | Path) -> tuple[Images, Images]:
    """Training and validation images of one part, or of the parts in a folder; in the order of the packed folder.

    Raises:
        UserError: no part, a damaged one, or parts of different sets.
    """
    return join(read_parts(Path(where)))


def join(parts: dict[Path, tuple[Index, list[np.ndarray]]]) -> tuple[Images, Images]:
    rows: dict[str, list[tuple[int, str, np.ndarray]]] = {split: [] for split in SPLITS}
    classes: list[str] = []
    for index, arrays in parts.values():
        classes = index.classes
        for m, array in zip(index.mosaics, arrays, strict=True):
            rows[m.split] += zip(m.labels, m.names, array, strict=True)
    splits = []
    for split in SPLITS:
        labels, names, pixels = zip(*sorted(rows[split], key=lambda row: row[:2]), strict=True)
        paths = [f"{classes[label]}/{name}" for label, name in zip(labels, names, strict=True)]
        splits.append(Images(classes, list(labels), paths, list(pixels)))
    return splits[0], splits[1]


def check(out: Path) -> None:
    parts = read_parts(out)
    for file, part in parts.items():
        counts = ", ".join(f"{len(images):,} {split}" for split, images in zip(SPLITS, join({file: part}), strict=True))
        size = file.stat().st_size
        print(f"{file.name}: {counts}, {len(part[1])} mosaics, {size:,} bytes ({size / 2**20:.1f} MiB)")
    train, val = join(parts)
    total = sum(file.stat().st_size for file in parts)
    print(
        f"{len(parts)} of {part[0].parts} parts: {len(train):,} train, {len(val):,} val of {len(train.classes)} classes"
    )
    print(f"{total:,} bytes, {total / (len(train) + len(val)):.0f} per image; all checksums match")


def unpack(out: Path, folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give a new folder")
    for split, images in zip(SPLITS, read(out), strict=True):
        for name in images.classes:
            (folder / split / name).mkdir(parents=True)
        for name, pixels in track(zip(images.names, images.sources, strict=True), f"unpacking {split}", len(images)):
            Image.fromarray(pixels).save(folder / split / name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("pack", ("folder", "out")), ("check", ("out",)), ("unpack", ("out", "folder"))):
        command = commands.add_parser(name)
        for word in words:
            command.add_argument(word, type=Path)
        if name == "pack":
            command.add_argument("--part-mib", type=float, default=46, help="largest part in MiB (46)")
    options = parser.parse_args(argv)
    try:
        if options.command == "pack":
            if not options.part_mib > 0:
                raise UserError(f"--part-mib {options.part_mib:g}: more than 0 is expected")
            pack(options.folder, options.out, options.part_mib)
        elif options.command == "unpack":
            unpack(options.out, options.folder)
        if options.command != "unpack":
            check(options.out)
    except (UserError, OSError) as error:
        print(printable(f"pack: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
