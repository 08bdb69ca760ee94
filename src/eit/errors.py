"""The one kind of error that is the user's to mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line that names what was given and what is allowed. The command line exits with status 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known word is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {found[0]!r}?" if found else ""
