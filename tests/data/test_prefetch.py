"""Loader processes, and batches on their way to the device."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eit.config import Augment
from eit.data import prefetch
from eit.data.augment import noise_fields
from eit.data.images import Preprocessing
from eit.data.loaders import evaluation_batch_size
from eit.data.prefetch import Prefetcher, to_device
from eit.data.workers import worker_count, worker_options

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(1, None, 1), (6, None, 6), (64, None, 16), (64, 8, 8), (64, 2, 16), (2, 4, 0)]
)
def test_workers_are_the_cores_that_the_process_may_use(monkeypatch, cores, ranks, expected):
    """Fewer than the machine has, in a container or under Slurm."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert worker_count(None) == expected
    assert [worker_count(given) for given in (0, 3, 40)] == [0, 3, 40]
    options = worker_options(None, CPU)
    assert options["num_workers"] == expected and options["prefetch_factor"] == (4 if expected else None)


def test_workers_are_the_cores_of_the_machine_where_a_system_has_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert worker_count(None) == 10


@pytest.mark.parametrize(
    ("kind", "pinned", "waits"),
    [("cuda", True, False), ("cuda", False, True), ("mps", False, True), ("cpu", False, True)],
)
def test_only_a_copy_from_pinned_memory_to_cuda_is_not_waited_for(kind, pinned, waits):
    """Pageable memory may be freed before the copy is done."""
    seen = []
    tensor = SimpleNamespace(
        is_pinned=lambda: pinned, to=lambda device, non_blocking=False: seen.append((device, non_blocking))
    )
    to_device(tensor, torch.device(kind))
    assert seen == [(torch.device(kind), not waits)]
    assert worker_options(0, torch.device(kind))["pin_memory"] is (kind == "cuda")


@pytest.mark.parametrize(
    ("kind", "batch_size", "images", "expected"),
    [
        ("cpu", 64, 50_000, 64),
        ("cuda", 64, 50_000, 256),
        ("mps", 64, 50_000, 256),
        ("cuda", 64, 100, 100),
        ("cuda", 64, 10, 64),
    ],
)
def test_more_images_are_evaluated_at_a_time_on_a_gpu_but_no_more_than_there_are(kind, batch_size, images, expected):
    assert evaluation_batch_size(batch_size, images, torch.device(kind)) == expected


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
VIEW = Preprocessing(8, 8, "bicubic", MEAN, STD)


def host_batches():
    """Two batches of workers: with boxes (top, left, height, width, seed) to erase, none in the second image."""
    random = np.random.default_rng(0)
    for labels in ([3, 1, 4], [1, 5, 9]):
        pixels = torch.from_numpy(random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
        boxes = torch.tensor([[1, 2, 3, 4, 70], [0, 0, 0, 0, 0], [5, 0, 3, 8, 5]])
        yield pixels, torch.tensor(labels), [], boxes


def by_hand(host_batch, epoch, erasing):
    pixels, labels, _, boxes = host_batch
    images = (pixels.numpy() / 255 - np.array(MEAN)) / np.array(STD)
    noise = noise_fields((8, 8, 3), 7, epoch, CPU).numpy()
    for image, (top, left, height, width, seed) in zip(images, boxes.tolist(), strict=True):
        if erasing and height:
            box = np.s_[top : top + height, left : left + width]
            image[box] = noise[seed % len(noise)][box]
    return images.transpose(0, 3, 1, 2), labels


class Streams:
    """Stands for CUDA's: notes what is asked of them, in order."""

    def __init__(self, monkeypatch):
        self.happened, self.current = [], "main"
        self.main, self.side = (SimpleNamespace(name=name) for name in ("main", "side"))
        for stream in (self.main, self.side):
            stream.wait_stream = lambda other, own=stream: self.happened.append(f"{own.name} waits for {other.name}")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.main)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        keep = lambda tensor, stream: self.happened.append(f"{tensor.ndim} axes are kept for {stream.name}")  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", keep)
        copy = prefetch.to_device
        monkeypatch.setattr(
            prefetch, "to_device", lambda *given: self.happened.append(f"copy on {self.current}") or copy(*given)
        )

    def on(self, stream):
        streams = self

        class Context(nullcontext):
            def __enter__(self):
                streams.current = stream.name

            def __exit__(self, *_):
                streams.current = "main"

        return Context()


@pytest.mark.parametrize("erasing", [0.0, 0.5])
@pytest.mark.parametrize("side", [False, True], ids=["here", "side stream"])
def test_batches_of_workers_become_the_images_that_are_made_by_hand(monkeypatch, erasing, side):
    prefetcher = Prefetcher(VIEW, Augment(erasing=erasing), 7, CPU)
    if side:
        prefetcher.side = Streams(monkeypatch).side
    batches = list(prefetcher(host_batches(), 2))
    for batch, host_batch in zip(batches, host_batches(), strict=True):
        images, labels = by_hand(host_batch, 2, erasing)
        np.testing.assert_allclose(batch.images.numpy(), images, atol=1e-6)
        assert batch.images.dtype == torch.float32 and torch.equal(batch.labels, labels) and batch.valid == 3


def test_a_side_stream_makes_the_batches_and_the_step_waits_for_them_there(monkeypatch):
    streams = Streams(monkeypatch)
    prefetcher = Prefetcher(VIEW, Augment(erasing=0.5), 7, CPU)
    prefetcher.side = streams.side
    batches = prefetcher(host_batches(), 0)
    made = ["copy on side"] * 3 + ["main waits for side", "4 axes are kept for main", "1 axes are kept for main"]
    next(batches)
    assert streams.happened == ["side waits for main", *made]
    next(batches)
    assert streams.happened == ["side waits for main", *made, *made]
    assert streams.current == "main" and list(batches) == []
