"""`eit` run as a user runs it: in this process, in forks of one that has imported the package, or under torchrun."""

import atexit
import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

import eit.cli

PROGRAM = importlib.util.find_spec("eit.__main__").origin


def launcher(ranks: int = 0) -> list[str]:
    """The start of a command line: `eit`, or with `ranks`, eit under torchrun."""
    if not ranks:
        return [sys.executable, "-m", "eit"]
    port = 20000 + os.getpid() % 20000
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    return [*torchrun, "-m", "eit"]


def run_eit(
    *words, cwd=None, ranks: int = 0, torchrun=False, prepare=None, stdin: str | None = None, env=None, timeout=300
):
    """`eit WORDS...` in this process, or with `ranks` in a process for each, which calls `prepare` first.

    Under torchrun, and with another PYTHONPATH, Python starts anew.
    """
    words, env = [str(word) for word in words], {"OMP_NUM_THREADS": "1"} | (env or {})
    if torchrun or "PYTHONPATH" in env:
        command, whole = [*launcher(ranks), *words], os.environ | env
        return subprocess.run(command, cwd=cwd, env=whole, input=stdin, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        for file in files:
            file.write_text(stdin or "" if file.name == "stdin" else "")
        if ranks:
            processes = start_ranks(words, [cwd] * ranks, [files[1:]] * ranks, prepare)
            status = max(map(abs, wait_for_all(processes, timeout)))
        else:
            status = _run_here(words, files, cwd or os.getcwd(), env)
        return subprocess.CompletedProcess(words, status, *(file.read_text(errors="replace") for file in files[1:]))


# -- In this process


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


def _run_here(words, files, cwd, env) -> int:
    """The exit status of `eit WORDS...`, with files for stdin, stdout and stderr."""
    with ExitStack() as stack:
        for file in files:
            stack.enter_context(_stream(file.name, file))
        stack.enter_context(_as_in_a_new_process())
        stack.enter_context(chdir(cwd))
        stack.enter_context(patch.dict(os.environ, env))
        stack.enter_context(patch.object(sys, "argv", [PROGRAM, *words]))
        stack.enter_context(patch.object(sys.modules["__main__"], "__package__", "eit"))  # for the program's name
        return _status_of_main()


def _status_of_main() -> int:
    try:
        eit.cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


# -- In forks of a process that has imported the package, and computes nothing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers.training"])


def _become(words, cwd, env, out, err, prepare) -> None:
    """`python -m eit WORDS...` in a new process, which calls `prepare` first."""
    os.setsid()
    for number, target in ((1, out), (2, err)):  # a file or a pipe
        os.dup2(os.open(target, os.O_WRONLY | os.O_APPEND) if isinstance(target, Path) else target.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the system's, of loaders
    sys.argv = [PROGRAM, *words]
    sys.modules["__main__"].__package__ = "eit"
    if prepare is not None:
        prepare()
    status = _status_of_main()
    atexit._run_exitfuncs()  # they wait for loader processes, so no frame may hold the loader, as sys.exit would here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _start(words, cwd, out, err, env=None, prepare=None):
    whole = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    words = [str(word) for word in words]
    process = FORKS.Process(target=_become, args=(words, str(cwd or os.getcwd()), dict(whole), out, err, prepare))
    process.start()
    return process


def start_ranks(words, cwds, files, prepare=None):
    """The ranks of `eit WORDS...`, each in its folder with its files for stdout and stderr; without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = dict(WORLD_SIZE=len(cwds), LOCAL_WORLD_SIZE=len(cwds), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    environments = [{k: str(v) for k, v in (world | dict(RANK=i, LOCAL_RANK=i)).items()} for i in range(len(cwds))]
    return [
        _start(words, cwd, out, err, env, prepare)
        for cwd, (out, err), env in zip(cwds, files, environments, strict=True)
    ]


def wait_for_all(processes, timeout) -> list[int]:
    """Their exit statuses. Those that go on for longer are killed."""
    alarm = threading.Timer(timeout, lambda: [process.kill() for process in processes])
    alarm.start()
    try:
        for process in processes:
            process.join()
    finally:
        alarm.cancel()
    return [process.exitcode for process in processes]


class Running:
    """`eit WORDS...` in a process group of its own, with as much of the interface of Popen as tests need."""

    def __init__(self, *words, cwd, prepare=None) -> None:
        reader, writer = FORKS.Pipe(duplex=False)
        self.process = _start(words, cwd, Path(os.devnull), writer, prepare=prepare)
        writer.close()
        self.pid, self.stderr = self.process.pid, os.fdopen(os.dup(reader.fileno()))
        reader.close()

    returncode = property(lambda self: self.process.exitcode)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 60) -> tuple[None, str]:
        """The rest of stderr."""
        alarm = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        alarm.start()
        try:
            rest = self.stderr.read()
            self.process.join()
        finally:
            alarm.cancel()
        return None, rest
