"""`eit` run as a user runs it."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


def launcher(ranks: int = 0) -> list[str]:
    """The start of a command line: `eit`, or with `ranks`, eit under torchrun."""
    if not ranks:
        return [sys.executable, "-m", "eit"]
    port = 20000 + os.getpid() % 20000
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    return [*torchrun, "-m", "eit"]


class Zygote:
    """Runs commands in forks of one process, tests/helpers/zygote.py."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, words, cwd, stdin, env, timeout):
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.zygote"],
                cwd=Path(__file__).parents[2],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            atexit.register(self.process.kill)
        with tempfile.TemporaryDirectory() as folder:
            streams = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
            for file in streams.values():
                file.touch()
            streams["stdin"].write_text(stdin or "")
            request = dict(words=words, cwd=str(cwd or os.getcwd()), env=env, **{k: str(v) for k, v in streams.items()})
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
            assert line, f"tests/helpers/zygote.py died with status {self.process.wait()}: see its errors above"
            pid = int(line)
            alarm = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
            alarm.start()
            try:
                status = int(self.process.stdout.readline())
            finally:
                alarm.cancel()
            out, err = (streams[name].read_text(errors="replace") for name in ("stdout", "stderr"))
            return subprocess.CompletedProcess([*launcher(), *words], status, out, err)


_zygote = Zygote()


def run_eit(*words, cwd=None, ranks: int = 0, stdin: str | None = None, env=None, timeout=300):
    """`eit WORDS...` as a process of its own, under torchrun with `ranks` processes if given."""
    if not ranks and "PYTHONPATH" not in (env or {}):
        whole = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        return _zygote.run(list(map(str, words)), cwd, stdin, whole, timeout)
    return subprocess.run(
        [*launcher(ranks), *map(str, words)],
        cwd=cwd,
        input=stdin,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
