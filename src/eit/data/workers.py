"""Batches and samples of the loaders, unreadable images, worker processes and the wait for them."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.queues import Queue
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from eit import distributed
from eit.console import say
from eit.data.images import Images
from eit.data.timm_datasets import ImageStream
from eit.errors import UserError, first_line
from eit.memory import keep_freed

MOST_WORKERS = 16
PREFETCH = 4  # batches of each worker
# Preemption, Ctrl-C, and Slurm's --signal=USR1, which Windows does not have
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
POLL = 15  # seconds between two looks at a loader that gives no batch
SILENT = 30.0  # seconds without a batch, after which a line says so
STALLED = 600.0  # seconds without a batch, after which the run ends


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
        """Count the faults of a batch. Raise a UserError if it has, in place of images, the fault that ends the run."""
        _, labels, faults, _ = batch
        if not len(labels):
            raise UserError(faults[0])
        self.add(faults)

    def check(self, met: int) -> None:
        """Raise a UserError if the budget is exceeded. `met` is the number of unreadable images over all ranks."""
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

    If a sample has no pixels, the result has, in place of images, the fault that ends the run. A fault is returned, not
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
        timeout=POLL if workers else 0,
        worker_init_fn=_start_worker,
    )


# -- Waiting for a batch


class StopRequested(BaseException):
    """A stop signal arrived while a batch was awaited. Not an Exception: readers of images catch those."""


class LoaderStalled(TimeoutError):
    """The loader processes gave no batch for `STALLED` seconds."""


class _Waiting:
    """Whether this process waits for a batch, and whether a signal asks it to stop."""

    def __init__(self) -> None:
        self.stop, self._is_waiting = Event(), False

    def request_stop(self) -> None:
        """Ask for the end, in a signal handler. Raise StopRequested if a batch is awaited and this is the only rank."""
        self.stop.set()
        if self._is_waiting and distributed.world_size() == 1:
            raise StopRequested

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """The batches of a loader.

        Raises:
            StopRequested: a stop signal arrived during the wait; on several ranks only after a wait of `POLL` seconds.
            LoaderStalled: no batch came for `STALLED` seconds.
        """
        try:
            iterator = iter(loader)
        except RuntimeError as error:  # workers that are kept must answer before an epoch
            if not _is_timeout(error):
                raise
            raise LoaderStalled(
                f"the loader processes gave no answer for {POLL} s at the start of an epoch: see if the "
                "disk or server of the data answers"
            ) from None
        while True:
            began, is_said = time.monotonic(), False
            while True:
                try:
                    self._is_waiting = True
                    batch = next(iterator)
                    break
                except StopIteration:
                    return
                except (StopRequested, RuntimeError) as error:
                    # A signal to all processes may kill loader processes that have just started.
                    is_killed = self.stop.is_set() and "DataLoader worker" in str(error)
                    if is_killed or isinstance(error, StopRequested):
                        _end_workers(iterator)
                        raise StopRequested from None
                    if not _is_timeout(error):
                        raise
                finally:
                    self._is_waiting = False
                seconds = time.monotonic() - began
                if self.stop.is_set() or seconds > STALLED:
                    _end_workers(iterator)
                    if self.stop.is_set():
                        raise StopRequested
                    advice = "see if the disk or server of the data answers"
                    raise LoaderStalled(f"the loader processes gave no batch for {seconds:.0f} s: {advice}")
                if seconds >= SILENT and not is_said:
                    is_said = True
                    until = f"waiting up to {STALLED / 60:.0f} minutes for the data; Ctrl-C or SIGTERM stops"
                    say(f"the loader processes gave no batch for {seconds:.0f} s; {until}", any_rank=True)
            yield batch


waiting = _Waiting()  # one for the process, as signals are


def _is_timeout(error: BaseException) -> bool:
    return str(error).startswith("DataLoader timed out")


def _end_workers(iterator: Any) -> None:
    """Tell the loader processes to end: torch would wait 5 s for each of those that hang."""
    with suppress(RuntimeError):  # that one was killed
        if workers := getattr(iterator, "_workers", ()):
            signal_handling._remove_worker_pids(id(iterator))  # torch would report their ends as errors
            iterator._worker_pids_set = False
        for worker in workers:
            worker.terminate()


# -- In a loader process


def _start_worker(worker: int) -> None:
    """Ignore signals that ask a run to end: they reach all its processes, and the trainer ends its workers itself."""
    torch.set_num_threads(1)
    sys.excepthook = _unless_the_trainer_is_gone
    Queue._on_queue_feeder_error = _send_fault  # type: ignore[attr-defined]
    keep_freed(64 << 20)  # keep as much as a few photos take, not as the largest so far took
    for signum in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()  # not os.getppid(), which may be the fork server
    assert trainer is not None
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a SIGTERM to the group ends workers too
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before any thread starts, which inherits it
        Thread(target=_leave_when_told, args=(trainer.pid,), daemon=True).start()
    Thread(target=_leave_after, args=(trainer,), daemon=True).start()


def _send_fault(queue: "Queue[Any]", error: Exception, item: tuple[int, Any]) -> None:
    """Send the trainer the reason in place of a batch that cannot be sent. Otherwise it would wait for ever."""
    none, free = torch.empty(0), ""
    with suppress(OSError):
        free = f" (/dev/shm has {shutil.disk_usage('/dev/shm').free:,} bytes free)"
    advice = "enlarge /dev/shm (docker run --shm-size=8g), or use fewer loader processes or 0"
    fault = f"a loader process cannot send a batch: {first_line(error)}{free}; {advice}"
    queue.put((item[0], (none, none, [fault], none)))


def _unless_the_trainer_is_gone(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Print the error of a thread, except that of the thread that sends tensors when the trainer has gone."""
    if not issubclass(kind, EOFError | OSError):
        sys.__excepthook__(kind, error, traceback)


def _leave_when_told(trainer: int) -> None:
    """End at a SIGTERM from the trainer (Python and torch clean up with it), and ignore those from others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    _leave()


def _leave_after(trainer: Any) -> None:
    """End when the trainer has ended, however it did."""
    trainer.join()
    _leave()


def _leave() -> None:
    """End this process and those that it started, such as a curl that waits for a server."""
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError, ValueError):
            for pid in map(int, children.read_text().split()):
                os.kill(pid, signal.SIGKILL)  # it inherits that SIGTERM is blocked
    os._exit(0)
