"""Paths as people give them, text files as they write them, and files that survive a crash: whole or not at all."""

import codecs
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from eit.errors import UserError

MOST_TEXT = 64 << 20  # bytes


def expand_path(path: str) -> str:
    """`path` with ~ and variables such as $HOME replaced, which a shell leaves as they are behind `=` or in quotes.

    An unknown user or variable stays as it is. So do addresses, such as https://, pipe: and hf-hub:.
    """
    if re.match(r"[A-Za-z][\w+.-]+:", path):
        return path
    return os.path.expanduser(os.path.expandvars(path))


def read_text(path: str | Path, what: str) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    Raises:
        UserError: it cannot be read, or is not a text file. The message has `what` was expected, such as `recipe`.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"cannot read {what} {path}: it is not a file")
        with open(path, "rb") as file:
            content = file.read(MOST_TEXT + 1)
        if len(content) > MOST_TEXT:
            raise UserError(f"cannot read {what} {path}: it has more than {MOST_TEXT >> 20} MiB")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {what} {path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error  # ValueError: a null character in the name
        raise UserError(f"cannot read {what} {path}: {reason}") from None


def write_file(path: Path, content: bytes | str) -> None:
    """Write durably: the file is either the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed, or a link
        with open(temporary, "xb") as f:
            # Names of files need not be UTF-8: they are written as the file system has them.
            f.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
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


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the context. On Windows, files that are still open stay until Windows cleans up."""
    folder = Path(tempfile.mkdtemp(prefix="eit-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Write the entries of `folder` to the disk, if the system can: Windows cannot open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
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


def read_regular(path: Path, most: int = MOST_TEXT) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: as `open_regular`, or the file is longer.
    """
    with open_regular(path) as file:
        content: bytes = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)  # `read` allocates what it is given
    if len(content) > most:
        raise OSError(None, f"it has more than {most:,} bytes", str(path))
    return content


def read_json(path: Path) -> Any:
    """The JSON in a regular file.

    Raises:
        OSError: as `read_regular`.
        ValueError: it is not JSON (NaN is not), is nested too deeply, or has a number that is not finite.
    """

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{path} has {text}, which is not a number of JSON")
        return number

    try:
        return json.loads(read_regular(path), parse_constant=finite, parse_float=finite)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


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
