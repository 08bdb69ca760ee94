"""Files that survive a crash, written whole or not at all; and text files of any editor."""

import codecs
import os
import shutil
from pathlib import Path


def write_file(path: Path, content: bytes | str) -> None:
    """Write durably: the file is either the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:  # the one of a full disk names neither the file nor what is missing
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        room = f"{error.strerror}; {len(content):,} bytes are needed, {free:,} are free"
        raise OSError(error.errno, room, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_lines(content: bytes) -> list[str]:
    """The lines of a text file that are not empty: UTF-8 or UTF-16, with or without a byte-order mark, LF or CRLF.

    Bytes that are not UTF-8 stay as Python keeps them in file names (surrogateescape).
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16")
    else:
        text = content.decode("utf-8-sig", errors="surrogateescape")
    lines = (line.removesuffix("\r") for line in text.split("\0" if "\0" in text else "\n"))
    return [line for line in lines if line.strip()]
