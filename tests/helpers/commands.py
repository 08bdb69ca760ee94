"""`eit` run as a user runs it."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

import eit.cli


def launcher(ranks: int = 0) -> list[str]:
    """The start of a command line: `eit`, or with `ranks`, eit under torchrun."""
    if not ranks:
        return [sys.executable, "-m", "eit"]
    port = 20000 + os.getpid() % 20000
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    return [*torchrun, "-m", "eit"]


@contextmanager
def _stream(name: str, file: Path):
    """The file takes the place of stdin, stdout or stderr, for Python and for libraries written in C."""
    number = ("stdin", "stdout", "stderr").index(name)
    if number:
        getattr(sys, name).flush()
    kept, new = os.dup(number), os.open(file, os.O_RDWR)
    os.dup2(new, number)
    os.close(new)
    try:
        with patch.object(sys, name, os.fdopen(number, "w" if number else "r", buffering=1, closefd=False)) as stream:
            yield
            stream.flush()
    finally:
        os.dup2(kept, number)
        os.close(kept)


@contextmanager
def _as_in_a_new_process():
    """Warnings and log messages go to stderr, not to pytest; signal handlers and threads are put back at the end."""
    handlers, logging.root.handlers = logging.root.handlers, []
    interrupt, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.resetwarnings()
            for category in (ImportWarning, ResourceWarning, PendingDeprecationWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            warnings.showwarning = lambda *words, **_: sys.stderr.write(warnings.formatwarning(*words[:4]))
            yield
    finally:
        logging.root.handlers = handlers
        signal.signal(signal.SIGINT, interrupt)
        torch.set_num_threads(threads)


def _run_here(words: list[str], cwd, stdin: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    """`eit WORDS...` in this process, which has imported the package."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        for file in streams:
            file.write_text(stdin if file.name == "stdin" else "")
        program = importlib.util.find_spec("eit.__main__").origin
        with ExitStack() as stack:
            for file in streams:
                stack.enter_context(_stream(file.name, file))
            stack.enter_context(_as_in_a_new_process())
            stack.enter_context(chdir(cwd or os.getcwd()))
            stack.enter_context(patch.dict(os.environ, env))
            stack.enter_context(patch.object(sys, "argv", [program, *words]))
            stack.enter_context(patch.object(sys.modules["__main__"], "__package__", "eit"))  # for the program's name
            try:
                eit.cli.main()
                status = 0
            except SystemExit as end:
                status = end.code or 0
        out, err = (file.read_text(errors="replace") for file in streams[1:])
    return subprocess.CompletedProcess([*launcher(), *words], status, out, err)


def run_eit(*words, cwd=None, ranks: int = 0, stdin: str | None = None, env=None, timeout=300):
    """`eit WORDS...` in this process; as processes under torchrun if `ranks` is given, and with another PYTHONPATH."""
    words, env = [str(word) for word in words], {"OMP_NUM_THREADS": "1"} | (env or {})
    if not ranks and "PYTHONPATH" not in env:
        return _run_here(words, cwd, stdin or "", env)
    return subprocess.run(
        [*launcher(ranks), *words],
        cwd=cwd,
        input=stdin,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
