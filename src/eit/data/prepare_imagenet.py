"""The ILSVRC2012 archives as downloaded -> an image folder, counted against the devkit; a stopped run goes on.

TARGET/train/WNID and TARGET/val/WNID are renamed into place when complete; until then they lie in TARGET/.unpacking.
"""

import io
import os
import platform
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from eit.console import progress, say
from eit.errors import UserError
from eit.files import sync_folder, write_file

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


@dataclass
class Devkit:
    """What the archives should hold."""

    words: dict[str, str]  # WNID -> "tench, Tinca tinca", sorted by WNID
    train: dict[str, int]  # WNID -> training images
    val: dict[str, int]  # WNID -> validation images
    truth: list[str]  # WNID of validation image i + 1


def prepare_imagenet(source: Path, target: Path) -> dict[str, Any]:
    """Unpack the three archives of `source` into the image folder `target`, or continue a stopped run.

    An archive whose part of `target` is complete is not needed any more. The validation images come first: they take
    minutes, the training images hours.

    Returns:
        folder, and the numbers of train images, val images and classes

    Raises:
        UserError: one line that names the archive or folder at fault; what was unpacked so far stays.
    """
    source, target = source.expanduser(), target.expanduser()
    devkit = read_devkit(_archive(source, DEVKIT))
    train, val, words, work = (target / name for name in ("train", "val", "words.txt", ".unpacking"))

    def completed() -> tuple[set[str], set[str], list[str]]:
        """The complete classes of val/ and of train/, and the archives that are still needed."""
        with _reading(target):
            val_done, train_done = _complete(val, devkit.val), _complete(train, devkit.train)
        parts = ((VAL, val_done), (TRAIN, train_done))
        return val_done, train_done, [name for name, done in parts if len(done) < len(devkit.words)]

    _, _, todo = completed()
    archives = {name: _archive(source, name) for name in todo}
    classes = _list_classes(archives[TRAIN], devkit) if TRAIN in archives else []
    if todo or work.exists() or not words.exists():
        with _locked(target):
            val_done, train_done, todo = completed()  # by the process that held the lock until now
            with _writing(target):
                if (work / "train").exists():  # the class that a stopped run was unpacking; val/ may be complete
                    shutil.rmtree(work / "train")
                for folder in (work, train, val):
                    folder.mkdir(parents=True, exist_ok=True)
                write_file(words, "".join(f"{wnid}\t{text}\n" for wnid, text in devkit.words.items()))
            if VAL in todo:
                _unpack_val(archives[VAL], devkit, val_done, work / "val", val)
            if TRAIN in todo:
                _unpack_train(archives[TRAIN], classes, devkit, train_done, work / "train", train)
            with _writing(work):
                shutil.rmtree(work)
    else:
        say(f"{target} is complete already: nothing to do")
    images = dict(train=sum(devkit.train.values()), val=len(devkit.truth))
    return dict(folder=str(target), **images, classes=len(devkit.words))


def read_devkit(archive: Path) -> Devkit:
    from scipy.io import loadmat

    with _reading(archive), tarfile.open(archive, "r:gz") as tar:
        if missing := {META, TRUTH} - {member.name for member in tar if member.isreg()}:
            raise UserError(f"{archive} has no file {min(missing)}")
        meta, lines = (_content(tar, name) for name in (META, TRUTH))
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = [(str(row["WNID"]), row) for row in synsets if row["num_children"] == 0]
        by_id = {int(row["ILSVRC2012_ID"]): wnid for wnid, row in leaves}
        words = {wnid: " ".join(str(row["words"]).split()) for wnid, row in sorted(leaves, key=lambda leaf: leaf[0])}
        train = {wnid: int(row["num_train_images"]) for wnid, row in leaves}
        truth = [by_id[int(line)] for line in lines.split()]
    except Exception as error:  # loadmat meets a damaged file with any of them
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{archive}: {META} or {Path(TRUTH).name} cannot be read ({reason})") from error
    if not len(leaves) == len(by_id) == len(words) == len(set(truth)) > 0:
        counts = f"{len(leaves)} classes, {len(by_id)} IDs, {len(words)} WNIDs, {len(set(truth))} in {TRUTH}"
        raise UserError(f"{archive}: {META} is damaged: {counts}")
    for wnid, count in train.items():
        if not re.fullmatch("n[0-9]{8}", wnid) or count < 1:
            raise UserError(
                f"{archive}: {META} has a class {wnid!r} of {count} images; valid is a class such as n01440764 of 1300"
            )
    return Devkit(words, train, Counter(truth), truth)


def _list_classes(archive: Path, devkit: Devkit) -> list[tarfile.TarInfo]:
    """The inner archives, a thousand headers: a wrong or truncated download is known before anything is unpacked."""
    with _reading(archive), tarfile.open(archive, "r:") as outer:
        members = list(_members(outer, str(archive), r"n[0-9]{8}\.tar"))
    names = [member.name.removesuffix(".tar") for member in members]
    for wnid in names:
        if wnid not in devkit.train:
            raise UserError(f"{archive} has {wnid}.tar, which is not a class of {DEVKIT}")
    if missing := sorted(devkit.train.keys() - set(names)):
        some = f"{len(missing)} of the {len(devkit.train)} classes in {DEVKIT} are missing, such as {missing[0]}.tar"
        raise UserError(f"{archive} is truncated, or another archive: {some}")
    return members


def _unpack_train(
    archive: Path, classes: list[tarfile.TarInfo], devkit: Devkit, done: set[str], work: Path, folder: Path
) -> None:
    total, start = sum(devkit.train.values()), sum(devkit.train[wnid] for wnid in done)
    with progress("unpacking train", total, start) as advance, _reading(archive), tarfile.open(archive, "r:") as outer:
        for member in classes:
            wnid, where = member.name.removesuffix(".tar"), f"{archive}: {member.name}"
            if wnid in done:
                continue
            with _reading(where), tarfile.open(fileobj=outer.extractfile(member), mode="r:") as tar:
                for image in _members(tar, where, rf"{wnid}_[0-9]+\.JPEG"):
                    _unpack(tar, image, work / wnid)
                    advance()
            _place(where, work / wnid, folder / wnid, devkit.train[wnid])


def _unpack_val(archive: Path, devkit: Devkit, done: set[str], work: Path, folder: Path) -> None:
    total = len(devkit.truth)
    with progress("unpacking val", total) as advance, _reading(archive), tarfile.open(archive, "r:") as tar:
        for image in _members(tar, str(archive), r"ILSVRC2012_val_[0-9]{8}\.JPEG"):
            number = int(image.name[-13:-5])
            if not 1 <= number <= total:
                raise UserError(f"{archive} holds {image.name}, but {DEVKIT} has {total} validation images")
            if (wnid := devkit.truth[number - 1]) not in done:
                _unpack(tar, image, work / wnid)
            advance()
    for wnid in sorted(devkit.val.keys() - done):
        _place(str(archive), work / wnid, folder / wnid, devkit.val[wnid])


def _members(tar: tarfile.TarFile, where: str, pattern: str) -> Iterator[tarfile.TarInfo]:
    """Plain files of the expected names; anything else is refused, so no name can lead out of the folder."""
    for member in tar:
        if not re.fullmatch(pattern, member.name) or not member.isreg() or member.issparse():
            raise UserError(f"{where} holds {member.name!r}, but plain files named {pattern} alone are expected")
        if not member.size:
            raise UserError(f"{where} is damaged: {member.name} is empty")
        yield member


def _unpack(tar: tarfile.TarFile, image: tarfile.TarInfo, folder: Path) -> None:
    """Write one image, unless a stopped run did: the one that it was writing is shorter."""
    path = folder / image.name
    with _writing(path):
        if path.exists() and path.stat().st_size == image.size:
            return
    data = _content(tar, image)
    with _writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    """All of a plain file, or tarfile.ReadError."""
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _place(where: str, part: Path, folder: Path, count: int) -> None:
    with _writing(folder):
        present = len(os.listdir(part)) if part.exists() else 0
        if present != count:
            raise UserError(f"{where} is truncated or damaged: {present} images of {folder.name}, not {count}")
        _sync(part)
        part.rename(folder)
        sync_folder(folder.parent)


def _sync(folder: Path) -> None:
    """Wait until the images in `folder` are on the disk: a class counts as complete after that."""
    if platform.system() == "Linux":  # where it waits; one by one, a million images would take hours
        os.sync()
        return
    for name in os.listdir(folder):
        with open(folder / name, "r+b") as image:
            os.fsync(image.fileno())
    sync_folder(folder)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other processes out of `target`. The lock ends with the process; its file stays."""
    lock = FileLock(target / ".lock")
    with _writing(target):
        target.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{target} is in use by another eit data prepare: wait for it, or stop it; if there is none, "
                f"remove {lock.lock_file}"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _complete(folder: Path, counts: Mapping[str, int]) -> set[str]:
    """The classes in `folder`. They are put there complete, so any other number of images is not ours to mend."""
    classes = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    for wnid in classes:
        if wnid not in counts:
            raise UserError(f"{folder / wnid} is not a class of {DEVKIT}: remove it, or choose another TARGET")
        images = sum(name.endswith(".JPEG") for name in os.listdir(folder / wnid))
        if images != counts[wnid]:
            raise UserError(f"{folder / wnid} has {images} images, not {counts[wnid]}: remove it and run this again")
    return set(classes)


def _archive(source: Path, name: str) -> Path:
    with _reading(source):
        if not (source / name).is_file():
            raise UserError(f"{source} has no {name} (a folder with {TRAIN}, {VAL} and {DEVKIT} is expected)")
    return source / name


@contextmanager
def _reading(archive: Path | str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is truncated or damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{archive} cannot be read: {error.strerror or error}") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error} (run this again to go on)") from None
