"""The `eit` command: `eit NAME` is the file NAME.py here, with its options, what it calls and what it prints.

`options` and `output` are shared by the commands; `app` puts them together. Heavy modules are imported inside the
functions, so that `eit --version` and completion are quick.
"""

from eit.cli.app import main

__all__ = ["main"]
