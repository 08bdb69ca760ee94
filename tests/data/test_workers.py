"""Waiting for loader processes: what is said, what ends the wait, and that they end with the trainer."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from eit import distributed
from eit.data import workers
from eit.data.workers import LoaderStalled, StopRequested, waiting, worker_options

CPU = torch.device("cpu")


class Numbers(Dataset):
    """Tensors; after `stop` of them an item never comes."""

    def __init__(self, count=6, stop=99):
        self.count, self.stop = count, stop

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.stop:
            time.sleep(600)
        return torch.full((4,), index)


@pytest.fixture
def quick(monkeypatch):
    """Waiting with another clock: looks each second, a line after one, an error after three."""
    for name, seconds in (("POLL", 1), ("SILENT", 1.0), ("STALLED", 3.0)):
        monkeypatch.setattr(workers, name, seconds)
    yield
    waiting.stop.clear()


def batches(dataset, count):
    return waiting.batches(DataLoader(dataset, batch_size=2, **worker_options(count, CPU)))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_batches_come_as_the_loader_gives_them(count):
    assert [batch[:, 0].tolist() for batch in batches(Numbers(), count)] == [[0, 1], [2, 3], [4, 5]]


def test_a_stalled_loader_is_said_once_and_ends_with_an_error(quick, capsys):
    others = multiprocessing.active_children()  # of earlier tests
    wait = batches(Numbers(stop=2), 1)
    assert next(wait)[:, 0].tolist() == [0, 1]
    (worker,) = set(multiprocessing.active_children()) - set(others)
    with pytest.raises(LoaderStalled, match="gave no batch for [34] s: see if the disk or server of the data answers"):
        next(wait)
    assert capsys.readouterr().err.count("the loader processes gave no batch for 1 s; waiting up to") == 1
    assert not worker.is_alive()


@pytest.mark.parametrize(("count", "world"), [(0, 1), (1, 1), (2, 1), (1, 2)])
def test_a_stop_signal_ends_the_wait(quick, monkeypatch, count, world):
    """At once, or at the next look if other ranks wait too."""
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(workers, "STALLED", 60.0)
    previous = signal.signal(signal.SIGALRM, lambda *_: waiting.request_stop())
    try:
        wait = batches(Numbers(stop=2), count)
        next(wait)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        began = time.monotonic()
        with pytest.raises(StopRequested):
            next(wait)
        assert time.monotonic() - began < 30
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_signal_while_no_batch_is_awaited_leaves_the_batch(quick):
    wait = batches(Numbers(), 1)
    next(wait)
    waiting.request_stop()
    assert next(wait)[:, 0].tolist() == [2, 3]


class Unsendable:
    def __reduce__(self):
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")


class Full(Numbers):
    """Samples whose batch cannot be sent, as with a full /dev/shm."""

    def __getitem__(self, index):
        return Unsendable()


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_that_cannot_be_sent_is_a_fault_with_the_reason(count):
    loader = DataLoader(Full(), batch_size=2, collate_fn=lambda samples: samples, **worker_options(count, CPU))
    images, labels, faults, _ = next(waiting.batches(loader))
    assert not len(images) and not len(labels)
    assert faults[0].startswith(
        "a loader process cannot send a batch: unable to write to file </torch_1_2_3>: No space"
    )
    assert "--shm-size" in faults[0]


LOADER = """
import multiprocessing, os, subprocess, sys, time, torch
from torch.utils.data import DataLoader, Dataset
from eit.data.workers import waiting, worker_options

class Starting(Dataset):
    # its process starts another one, as webdataset starts curl
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.tensor([os.getpid(), subprocess.Popen(["sleep", "600"]).pid])

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    loader = DataLoader(Starting(), batch_size=1, **worker_options(1, torch.device("cpu")))
    for batch in waiting.batches(loader):
        print(*batch[0].tolist(), flush=True)
        time.sleep(600)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.project
@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_processes_end_with_a_trainer_that_is_killed(tmp_path, method):
    """And what they have started. With forkserver, Python 3.14's default, their parent is the server."""
    (tmp_path / "loader.py").write_text(LOADER)
    command = [sys.executable, str(tmp_path / "loader.py"), method]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        started = list(map(int, process.stdout.readline().split()))
        assert len(started) == 2 and all(map(is_running, started))
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in started if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
