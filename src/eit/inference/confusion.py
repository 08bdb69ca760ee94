"""The confusion matrix as a file."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from eit import plots
from eit.errors import UserError
from eit.files import write_file


def write_confusion(file: Path, counts: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Write `counts` (truth x prediction) as a picture, or as a table with class names if `file` ends in .csv.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if file.suffix.lower() != ".csv":
            plots.confusion(counts, classes, file)
            return
        text = io.StringIO()
        rows = ([name, *row] for name, row in zip(classes, counts, strict=True))
        csv.writer(text).writerows([["truth \\ prediction", *classes], *rows])
        write_file(file, text.getvalue().encode(errors="surrogateescape"))  # names as the file system has them
    except OSError as error:
        raise UserError(f"--confusion {file} cannot be written: {error.strerror}") from None
