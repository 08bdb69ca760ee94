"""Batches and samples of the loaders, unreadable images, and worker processes."""

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eit import distributed
from eit.console import say
from eit.data.images import Images
from eit.data.timm_datasets import ImageStream
from eit.errors import UserError
from eit.memory import keep_freed

MOST_WORKERS = 16
PREFETCH = 4  # batches of each worker
# Preemption, Ctrl-C, and Slurm's --signal=USR1, which Windows does not have
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


HostBatch = tuple[Tensor, Tensor, list[str], Tensor]  # of `collate`


class Batch(NamedTuple):
    images: Tensor  # (B, channels, height, width) float, normalised, on the device
    labels: Tensor  # (B,) int64, on the device
    valid: int  # the first `valid` images count; the rest pads the last evaluation block


class Sample(NamedTuple):
    """What a worker returns for an image; without pixels, the fault that ends the run."""

    pixels: Tensor  # uint8: (size, size, channels) if augmented, (channels, size, size) in evaluation
    label: int
    faults: list[str]  # the images before it that could not be read
    box: Sequence[int] = ()  # of `eit.data.augment.erasing_box`


class BadImages:
    """Unreadable training images: each is reported once, and they count against the budget."""

    def __init__(self, images: Images | ImageStream, budget: float) -> None:
        self.total, self.allowed = len(images), int(budget * len(images))
        self.seen: dict[str, None] = {}  # in the order found
        self.checked = 0

    def add(self, faults: Iterable[str]) -> None:
        for fault in faults:
            if fault not in self.seen:
                self.seen[fault] = None
                if len(self.seen) <= self.allowed:  # with more, the run stops
                    say(f"unreadable image, another is used instead: {fault}", any_rank=True)

    def add_from(self, batch: HostBatch) -> None:
        """Count the faults of a batch. Raise a UserError if it has no images but the fault that ends the run."""
        _, labels, faults, _ = batch
        if not len(labels):
            raise UserError(faults[0])
        self.add(faults)

    def check(self, met: int) -> None:
        """Raise a UserError if the budget is exceeded. `met` is the sum over ranks; each image counts once."""
        if met == self.checked:
            return
        self.checked = met
        if met > self.allowed and (count := len(set().union(*distributed.gather(self.seen)))) > self.allowed:
            last = f"; the last here: {list(self.seen)[-1]}" if self.seen else ""
            raise UserError(
                f"{count} of {self.total} training images are unreadable, "
                f"data.bad_image_budget allows {self.allowed}{last}"
            )


def collate(samples: list[Sample]) -> HostBatch:
    """A batch: pixels, labels, faults, (B, 5) boxes to erase or (B, 0).

    If a sample has no pixels, the result has no images but the fault that ends the run. A fault is returned, not
    raised: a worker's exception would arrive with its traceback as its message.
    """
    none = torch.empty(0)
    if last := [sample.faults for sample in samples if not sample.pixels.numel()]:
        return none, none, last[0], none
    images, labels, faults, boxes = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), [fault for some in faults for fault in some], torch.tensor(boxes)


def worker_count(workers: int | None) -> int:
    """Number of loader processes of this rank; None: one for each core that the process may use, at most 16."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), MOST_WORKERS)


def worker_options(workers: int | None, device: torch.device, persistent: bool = False) -> dict[str, Any]:
    """Arguments of a DataLoader."""
    workers = worker_count(workers)
    return dict(
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    """Ignore signals that ask a run to end: they reach all its processes, and the trainer ends its workers itself."""
    torch.set_num_threads(1)
    sys.excepthook = _unless_the_trainer_is_gone
    keep_freed(64 << 20)  # a few photos, not the largest so far
    for signum in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a SIGTERM to the group ends workers too
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_leave_when_told, args=(os.getppid(),), daemon=True).start()


def _unless_the_trainer_is_gone(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Print the error of a thread, except that of the thread that sends tensors when the trainer has gone."""
    if not issubclass(kind, EOFError | OSError):
        sys.__excepthook__(kind, error, traceback)


def _leave_when_told(trainer: int) -> None:
    """End at a SIGTERM from the trainer (Python and torch clean up with it), and ignore those from others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
