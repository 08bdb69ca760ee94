"""UserError, for mistakes that the user can correct, and short texts for messages."""

import difflib
import re
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Bad input: one line that names what was given and what is allowed. The command line exits with status 2.

    Examples:
        >>> import eit
        >>> try:
        ...     eit.create_model("eit_minni")
        ... except eit.UserError as error:
        ...     print(str(error).split(" (")[0])
        unknown model 'eit_minni'; did you mean 'eit_mini'?
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or an empty string if no known word is similar."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def first_line(error: Exception) -> str:
    """The first non-empty line of an error's message; the name of its class if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def few(names: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """The first `most` names, and the number of those left out."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: str) -> str:
    """`text` in one line without control characters, so that names of files or classes cannot move the cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\n", " "))


def shorten(text: str, width: int) -> str:
    """`text` in one printable line of at most `width` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 3] + "..."


def is_out_of_memory(error: Exception) -> bool:
    """Whether CUDA, MPS, NumPy or the CPU's allocator raised it for lack of memory."""
    return isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error)) is not None
