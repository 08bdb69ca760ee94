"""Fixtures: small real images, shared/, and commands run as a user runs them."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

torch.set_num_threads(min(int(os.environ["OMP_NUM_THREADS"]), os.cpu_count() or 1))

SHARED = Path(__file__).resolve().parents[2] / "shared"


def require(there: bool, what: str) -> None:
    """Skip for something missing, or fail where EIT_REQUIRE=all says that all must be there."""
    if there:
        return
    if os.environ.get("EIT_REQUIRE") == "all":
        pytest.fail(f"EIT_REQUIRE=all, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """The CIFAR-10 ImageFolder of shared/data, unpacked."""
    archive = SHARED / "data" / "cifar10.tar.gz"
    require(archive.exists(), "shared/data/cifar10.tar.gz is not beside the checkout")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run(["tar", "xzf", archive, "-C", folder], check=True)
    return folder / "cifar10"


def save_digits(folder: Path, classes: int = 3, train: int = 12, val: int = 4, size: int = 16) -> Path:
    """A train/ + val/ image folder of scanned digits, named after their number."""
    digits = load_digits()
    for label in range(classes):
        pixels = digits.images[digits.target == label]
        for part, chosen in (("train", pixels[:train]), ("val", pixels[train : train + val])):
            target = folder / part / f"digit{label}"
            target.mkdir(parents=True)
            for i, image in enumerate(chosen):
                grey = Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((size, size))
                grey.convert("RGB").save(target / f"{i:03d}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return save_digits(tmp_path / "digits")


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
                cwd=Path(__file__).parents[1],
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


# A model that trains in seconds
TINY = [
    "model.kernel_size=3",
    "model.stride=1",
    "model.pool_size=4",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "data.image_size=16",
    "data.batch_size=8",
    "data.workers=0",
    "train.epochs=2",
    "train.warmup_epochs=1",
]
