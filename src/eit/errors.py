"""The one kind of error that is the user's to mend."""

import difflib
import re
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Bad input: one line that names what was given and what is allowed. The command line exits with status 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known word is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def first_line(error: Exception) -> str:
    """What an error says in its first line that is not empty; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: str) -> str:
    """`text` in one line that a terminal shows as it is: whoever named a file or a class may not move its cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\n", " "))


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is what CUDA, MPS, NumPy or the CPU's allocator raises when memory ends."""
    return isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error)) is not None
