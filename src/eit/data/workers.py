"""What a loader gives, what it could not read, and the processes that make it."""

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
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # preemption, Ctrl-C, Slurm's --signal=USR1


HostBatch = tuple[Tensor, Tensor, list[str], Tensor]  # of `collate`


class Batch(NamedTuple):
    images: Tensor  # (B, channels, height, width) float, normalised, on the device
    labels: Tensor  # (B,) int64, on the device
    valid: int  # the first so many count; the rest pads a last evaluation block


class Sample(NamedTuple):
    """What a worker makes of an image; without pixels, a fault that ends the run."""

    pixels: Tensor  # uint8: (size, size, channels) where augmented, (channels, size, size) in evaluation
    label: int
    faults: list[str]  # what could not be read instead
    box: Sequence[int] = ()  # of `eit.data.augment.erasing_box`


class BadImages:
    """Unreadable training images: named once each, and counted against the budget."""

    def __init__(self, images: Images | ImageStream, budget: float) -> None:
        self.total, self.allowed = len(images), int(budget * len(images))
        self.seen: dict[str, None] = {}  # in the order met
        self.checked = 0

    def add(self, faults: Iterable[str]) -> None:
        for fault in faults:
            if fault not in self.seen:
                self.seen[fault] = None
                if len(self.seen) <= self.allowed:  # beyond, the run stops
                    say(f"unreadable image, another is used instead: {fault}", any_rank=True)

    def check(self, met: int) -> None:
        """Raise a UserError if the budget is used up. `met` is the sum over ranks; what several met counts once."""
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
    """A batch: pixels, labels, what could not be read, (B, 5) boxes to erase or (B, 0).

    Where a sample has no pixels there is no batch, but the fault that ends the run.

    A fault is handed over, not raised: a worker's exception would arrive with its traceback as its message.
    """
    none = torch.empty(0)
    if last := [sample.faults for sample in samples if not sample.pixels.numel()]:
        return none, none, last[0], none
    images, labels, faults, boxes = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), [fault for some in faults for fault in some], torch.tensor(boxes)


def worker_count(workers: int | None) -> int:
    """Loader processes of this rank: as given, else one for each core that the process may use, at most 16."""
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
    """Signals that ask a run to end reach all its processes; the trainer decides, and ends its workers itself."""
    torch.set_num_threads(1)
    sys.excepthook = _unless_the_trainer_is_gone
    keep_freed(64 << 20)  # some photos, not the largest that ever came
    for signum in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a SIGTERM to the group ends workers too
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_leave_when_told, args=(os.getppid(),), daemon=True).start()


def _unless_the_trainer_is_gone(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Print an error of a thread, but that of the one that hands over tensors when there is nobody to take them."""
    if not issubclass(kind, EOFError | OSError):
        sys.__excepthook__(kind, error, traceback)


def _leave_when_told(trainer: int) -> None:
    """End at a SIGTERM of the trainer, with which Python and torch clean up, and of nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
