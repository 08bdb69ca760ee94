"""Files that survive a crash: written whole or not at all."""

import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

MAX_JSON = 64 << 20  # bytes


def write_file(path: Path, content: bytes | str) -> None:
    """Write durably: the file is either the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed, or a link
        with open(temporary, "xb") as f:
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
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, mode: str = "rb", **options: Any) -> IO[Any]:
    """`open` for a regular file. A link is not followed, and a pipe is not waited for.

    Raises:
        OSError: the file is missing, or is a link, a folder, a pipe or a device; or what `open` raises.
    """

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(None, "it is not a regular file", name)
        return descriptor

    if path.is_symlink():
        raise OSError(None, "it is a link, not a regular file", str(path))
    return open(path, mode, opener=opener, **options)


def read_regular(path: Path, most: int = MAX_JSON) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: as `open_regular`, or the file is longer.
    """
    with open_regular(path) as file:
        content: bytes = file.read(most + 1)
    if len(content) > most:
        raise OSError(None, f"it has more than {most:,} bytes", str(path))
    return content


def read_json(path: Path) -> Any:
    """The JSON in a regular file.

    Raises:
        OSError: as `read_regular`.
        ValueError: it is not JSON, as NaN is not, or is nested too deeply.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{path} has {name}, which is not JSON")

    try:
        return json.loads(read_regular(path), parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
