"""Images that come in turn, from shards behind a reader of timm -> batches."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from eit import distributed
from eit.augment import image_transform
from eit.batch import BadImages, Batch, collate, worker_count, worker_options
from eit.config import Augment, Data
from eit.errors import UserError
from eit.images import View, normalise, to_mode
from eit.plan import Plan, Stream, generator, seed_of, seeded
from eit.readers import ImageStream


class StreamLoader:
    """Images of a reader of timm, which shuffles them and gives each rank and worker a part of the shards.

    The order is a function of (seed, epoch, ranks, workers). A continued run reads again, and drops, what it has seen.
    """

    def __init__(
        self, images: ImageStream, view: View, plan: Plan, config: Data, augment: Augment, device: torch.device
    ) -> None:
        self.images, self.view, self.plan, self.device = images, view, plan, device
        self.transform = image_transform(view, augment)
        self.bad = BadImages(images, config.bad_image_budget)
        self.workers = worker_count(config.workers)
        # Readers with unequal numbers of shards would leave out a part of them, and repeat others.
        fit = [n for n in range(self.workers, 0, -1) if images.shards % (n * plan.world) == 0]
        if config.workers is None and fit:
            self.workers = fit[0]
        if images.shards % (max(self.workers, 1) * plan.world):
            parts = f"{plan.world} x {max(self.workers, 1)} processes x data.workers"
            advice = (
                f"set data.workers={fit[0]}" if fit else f"write a multiple of {plan.world} (eit data shard --count)"
            )
            raise UserError(f"{images.shards} shards cannot be shared by {parts}: {advice}")

    def prepare(self) -> None:
        """Nothing: the workers start with each epoch."""

    def _open(self, epoch: int) -> Any:
        seed = seed_of(Stream.ORDER, self.plan.seed, epoch) % 2**31
        dataset = self.images.open(True, self.plan.batch_size, seed)
        dataset.set_loader_cfg(num_workers=self.workers)
        return dataset

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        plan = self.plan
        counters = plan.seed, epoch, distributed.rank()
        self.bad.seen.clear()  # they have no names, and would count anew each epoch
        loader = DataLoader(
            _Turn(self.images, self._open(epoch), self.view.channels, self.transform, *counters),
            batch_size=plan.batch_size,
            collate_fn=_collate_turn,
            generator=generator(Stream.ORDER, *counters),
            **worker_options(self.workers, self.device),
        )
        batches = iter(loader)
        for number in range(plan.steps * plan.accumulate):
            if (batch := next(batches, None)) is None:
                of = f"{number} of {plan.steps * plan.accumulate} batches"
                raise UserError(f"data.dataset={self.images.config.dataset} ended after {of}")
            images, labels, faults = batch
            if not len(labels):
                raise UserError(faults[0])
            self.bad.add(faults)
            if number >= first_step * plan.accumulate:
                yield Batch(images.to(self.device), labels.to(self.device), len(labels))


@dataclass
class StreamEvaluationLoader:
    """Every rank reads the whole stream, and computes each `world`-th batch of it: every image counts once."""

    images: ImageStream
    view: View
    batch_size: int
    workers: int | None
    device: torch.device

    @property
    def blocks(self) -> int:
        """At most; each worker may end with a small batch."""
        return -(-len(self.images) // self.batch_size) + max(worker_count(self.workers), 1)

    @property
    def own_blocks(self) -> range:
        return range(distributed.rank(), self.blocks, distributed.world_size())

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """(block number, batch) of this rank.

        Raises:
            UserError: the stream has another number of images than it says.
        """
        dataset = self.images.open(False, self.batch_size, 0)
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        workers = worker_count(self.workers)
        dataset.set_loader_cfg(num_workers=workers)
        turn = _Turn(self.images, dataset, self.view.channels, self.view.pixels)
        options = worker_options(workers, self.device)
        seen = 0
        loader = DataLoader(turn, self.batch_size, collate_fn=_collate_turn, **options)
        for block, (pixels, labels, faults) in enumerate(loader):
            seen += len(labels)
            if faults or block >= self.blocks:
                more = f"{self.images.config.dataset}: more images were read than the {len(self.images)} it says"
                raise UserError(faults[0] if faults else more)
            if block % distributed.world_size() == distributed.rank():
                images = normalise(pixels.to(self.device), self.view.mean, self.view.std)
                yield block, Batch(images, labels.to(self.device), len(labels))
        if seen != len(self.images):
            raise UserError(f"{self.images.config.dataset}: {seen} images were read of the {len(self.images)} it says")


class _Turn(IterableDataset):
    """The images of a stream in turn, augmented, or as evaluation sees them. Used in worker processes."""

    def __init__(self, images: ImageStream, dataset: Any, channels: int, prepare: Any, *counters: int) -> None:
        self.dataset, self.channels, self.prepare, self.counters = dataset, channels, prepare, counters
        self.name, self.classes = images.config.dataset, len(images.classes)

    def __iter__(self) -> Iterator[tuple[Tensor, int, list[str]]]:
        """(pixels, label, what could not be read before it), or no pixels and a fault, with which it ends."""
        worker = info.id if (info := get_worker_info()) else 0
        with _skipped() as faults:
            last = ""
            for turn, (image, label) in enumerate(self.dataset):
                if not 0 <= int(label) < self.classes:
                    last = f"{self.name} has label {label}, of {self.classes} classes"
                    break
                if any(SHARD.search(fault) for fault in faults):  # a part of a shard, or all of it, is lost
                    break
                image = to_mode(ImageOps.exif_transpose(image), self.channels)
                with seeded(Stream.TURN, *self.counters, worker, turn):
                    pixels = self.prepare(image)
                where = f"{self.name}, before image {turn + 1} of worker {worker}"
                yield pixels, int(label), [f"{where}: {fault}" for fault in faults]
                faults.clear()
            for fault in sorted(faults, key=lambda fault: SHARD.search(fault) is not None):  # a shard is worth most
                found = SHARD.search(fault)
                last = f"{self.name}: " + (f"shard {found.group(1)} cannot be read: " if found else "") + fault
            if last:
                yield torch.empty(0), -1, [last]


SHARD = re.compile(r"'([^' ]+\.tar)'\)*$")  # at the end of webdataset's errors on the file itself


@contextmanager
def _skipped() -> Iterator[list[str]]:
    """What timm's reader of shards cannot read: it passes over it with a line in its log."""
    faults: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = re.sub(r" object at 0x[0-9a-f]+", "", record.getMessage())
            faults.append(error.removeprefix("Handling webdataset ").removesuffix(" Ignoring.").rstrip("."))

    log, collect = logging.getLogger("timm.data.readers.reader_wds"), Collect()
    log.addHandler(collect)
    propagate, log.propagate = log.propagate, False
    try:
        yield faults
    finally:
        log.removeHandler(collect)
        log.propagate = propagate


def _collate_turn(samples: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """No images where one of the samples is the fault with which a stream ends."""
    if last := [faults for pixels, _, faults in samples if not pixels.numel()]:
        return torch.empty(0), torch.empty(0), last[0]
    return collate(samples)
