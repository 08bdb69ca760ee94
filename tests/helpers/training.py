"""Small training runs of tests: their recipe, their results, their death."""

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import eit
from eit.config import load_recipe
from eit.randomness import Stream
from eit.training import trainer as trainer_module
from eit.training.trainer import train
from tests.helpers.commands import Running, launcher

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
    "train.report=false",
]


def recipe(folder, *overrides, base="cifar10"):
    return load_recipe(base, [*TINY, f"data.root={folder}", f"out={folder.parent / 'run'}", *overrides])


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run, name="final"):
    return eit.load(run / f"{name}.safetensors").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(BaseException):
    """Stands for the process's end in the tests that stay in one process."""


def train_until_killed(recipe, step, monkeypatch):
    """The process ends in the middle of `step`: nothing after its forward pass happens."""
    original = trainer_module.set_seed

    def set_seed(*counters):
        if counters[0] == Stream.STEP and counters[2] == step:
            raise Killed
        original(*counters)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "set_seed", set_seed)
        with pytest.raises(Killed):
            train(recipe)


# -- As processes

LONG = ["model.embed_dim=16", "model.depth=2", "model.num_heads=2", "train.epochs=4000", "train.warmup_epochs=1"]


@contextmanager
def long_run(folder, *overrides, ranks=0, options=(), until="epoch 2"):
    """A digits run for the test to end, as a process group of its own, given when the line `until` is out.

    With `ranks` it is torchrun's.
    """
    words = ["train", "digits", *LONG, *overrides]
    if ranks:
        command = [*launcher(ranks), *words]
        command[4:4] = options
        more = dict(text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, **more)
    else:
        process = Running(*words, cwd=folder)
    try:
        for line in process.stderr:
            if line.startswith(until):
                break
        yield process
    finally:
        for pid in (*children(process.pid), process.pid):  # torchrun's ranks have process groups of their own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def finish(process, seconds=60):
    """Exit status and the rest of stderr, within a minute."""
    err = process.communicate(timeout=seconds)[1]
    assert "Traceback" not in err.replace('Traceback (most recent call last):\n  File "<frozen', ""), err
    return process.returncode, err


def wait_for(condition):
    """Until it holds, at most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid):
    """Process ids below `pid`, the nearest first."""
    try:
        found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [below for child in found for below in children(child)]
