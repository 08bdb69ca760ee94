"""Folders of images: which files below a folder are images, of which class, and which folder is which part of a set.

One rule for everything that reads a folder: hidden entries and those of the system are left out at every depth, links
are followed but no folder is read twice, files of all extensions that Pillow reads are images. What is left out is
counted.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from eit.data.images import MAX_PIXELS, Images, compose, is_image_name
from eit.errors import UserError, few

# What NAS boxes, macOS, Windows and file systems put into folders, in lower case
SYSTEM_NAMES = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "__macosx", "icon\r", "lost+found"),
    *("$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
# Parts of a data set, and the names of their folders, in any case
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}

HIDDEN, SYSTEM, LINKS, OUTSIDE = "hidden", "system", "linked more than once", "images outside of class folders"


class Listing(NamedTuple):
    """Images below a folder: their paths in a fixed order, and the number of entries left out, by reason."""

    files: list[str]
    left_out: Counter[str]


def list_images(folder: str | os.PathLike[str]) -> Listing:
    """The images below `folder`.

    Raises:
        UserError: a folder cannot be read.
    """
    left_out: Counter[str] = Counter()
    return Listing(list(_walk(str(folder), left_out)), left_out)


def _walk(folder: str, left_out: Counter[str], above: str = "") -> Iterator[str]:
    """Images below `folder`: first its files, then those of its folders. `above`: the train/ or val/ that holds it."""
    seen: set[str] = set()
    todo = [(folder, (_real(above),) if above else ())]
    while todo:
        here, ancestors = todo.pop()
        real = _real(here)
        if real in seen or any(ancestor.startswith(real) for ancestor in ancestors):
            left_out[LINKS] += 1
            continue
        seen.add(real)
        folders, files = _entries(here, left_out)
        for file in files:
            if is_image_name(file.name):
                yield file.path
            else:
                left_out[_kind(file.name)] += 1
        todo += [(inner.path, (*ancestors, real)) for inner in reversed(folders)]


def _real(folder: str) -> str:
    return os.path.join(os.path.realpath(folder), "")


def _entries(folder: str | Path, left_out: Counter[str]) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Folders and files in `folder`, by name, without hidden ones and those of the system."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}; make it readable, or move it away") from None
    folders: list[os.DirEntry[str]] = []
    files: list[os.DirEntry[str]] = []
    for entry in entries:
        if entry.name.startswith("."):
            left_out[HIDDEN] += 1
        elif entry.name.lower() in SYSTEM_NAMES:
            left_out[SYSTEM] += 1
        else:
            (folders if _is_folder(entry) else files).append(entry)
    return folders, files


def is_left_out(name: str) -> bool:
    """Whether the part of a path is hidden, or of the system."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM_NAMES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an extension"


def describe_left_out(folder: str | os.PathLike[str], left_out: Counter[str]) -> str:
    """`left out of photos: 3 .txt, 1 hidden`, or an empty string if nothing was left out."""
    parts = [f"{count:,} {reason}" for reason, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))]
    return f"left out of {folder}: {few(parts, 6)}" if parts else ""


def read_folder(folder: Path, max_pixels: int = MAX_PIXELS) -> Images:
    """CLASS/**/image files below `folder`, sorted by name. Class folders whose names look alike are one class.

    Raises:
        UserError: no class folders, or no images in one of them.
    """
    left_out: Counter[str] = Counter()
    folders, files = _entries(folder, left_out)
    for file in files:
        left_out[OUTSIDE if is_image_name(file.name) else _kind(file.name)] += 1
    above = _real(str(folder))
    inside = [entry for entry in folders if not above.startswith(_real(entry.path))]
    if len(inside) < len(folders):
        left_out[LINKS] += len(folders) - len(inside)
    classes = sorted({compose(entry.name) for entry in inside})
    if not classes:
        raise UserError(f"{folder} has no class folders (CLASS/image.png is expected)")
    number = {name: label for label, name in enumerate(classes)}
    labels, names, sources = [], [], []
    start = len(os.path.join(folder, ""))  # of a name below the folder; os.path.relpath is slow
    for entry in sorted(inside, key=lambda entry: (number[compose(entry.name)], entry.name)):
        for file_path in _walk(entry.path, left_out, above=str(folder)):
            labels.append(number[compose(entry.name)])
            names.append(file_path[start:])
            sources.append(file_path)
    used = set(labels)
    if empty := [name for label, name in enumerate(classes) if label not in used]:
        there = f"; {describe_left_out(folder, left_out)}" if left_out else ""
        raise UserError(f"{folder}: no images in class {few(empty)}{there}; docs/data.md lists the formats")
    return Images(classes, labels, names, sources, max_pixels, left_out=left_out)


def find_parts(root: Path) -> dict[str, Path]:
    """Part of a data set (train, val, test) -> its folder below `root`, by the names in `PARTS`.

    A folder `test` without class folders is not a part.
    """
    parts = {}
    folders = {entry.name: Path(entry.path) for entry in _entries(root, Counter())[0]}
    lower = {name.lower(): path for name, path in folders.items()}
    for part, names in PARTS.items():
        if found := next((where[name] for name in names for where in (folders, lower) if name in where), None):
            parts[part] = found
    if "test" in parts and not any(map(_has_image, _folders(parts["test"]))):
        del parts["test"]  # images without labels
    return parts


def unused_folders(root: Path, parts: dict[str, Path]) -> list[str]:
    """Names of folders of `root` that have images and are none of its `parts`, such as valid next to val."""
    unused = []
    for folder in _folders(root):
        with suppress(UserError):  # a folder that cannot be read is not needed
            if folder not in parts.values() and _has_image(folder):
                unused.append(f"{folder.name}/")
    return unused


def is_class_folder(root: Path, divided: bool = False) -> bool:
    """Whether the folders of `root` are classes, though one may be called train or val: images decide, not names.

    A part has class folders. If only one folder that is named like a part has class folders, and other folders next to
    it have images, it is a class too, unless train/ is known to be `divided` into training and validation images.
    """
    parts = find_parts(root)
    holding = [part for part, folder in parts.items() if any(map(_has_image, _folders(folder)))]
    if not holding:
        return any(map(_has_image, _folders(root)))
    if len(holding) > 1 or divided:
        return False
    (holder,) = (parts[part] for part in holding)
    mixed = any(is_image_name(entry.name) for entry in _entries(holder, Counter())[1])
    named = {name for names in PARTS.values() for name in names}
    others = [folder for folder in _folders(root) if folder != holder and (mixed or folder.name.lower() not in named)]
    return any(map(_has_image, others))


def holds_parts(root: Path) -> bool:
    """Whether the folders of `root` are parts under unknown names: none has images, and all have the same folders."""
    inner = []
    for folder in _folders(root):
        folders, files = _entries(folder, Counter())
        if any(is_image_name(file.name) for file in files):
            return False
        inner.append({entry.name for entry in folders})
    return len(inner) > 1 and len(set.intersection(*inner)) > 1


def _folders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder, Counter())[0]]


def _has_image(folder: Path) -> bool:
    return next(_walk(str(folder), Counter()), None) is not None
