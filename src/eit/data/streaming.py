"""Batches of images that a reader of timm streams, from shards for example."""

import logging
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from eit import distributed
from eit.config import Augment, Data
from eit.data.augment import ImageTransform, image_transform
from eit.data.images import Preprocessing, UnreadableImage, careful_pillow, normalise, to_mode, upright
from eit.data.layouts import PlainMember
from eit.data.order import SampleOrder
from eit.data.prefetch import Prefetcher, to_device
from eit.data.timm_datasets import ImageStream, one_shard, shard_names
from eit.data.workers import BadImages, Batch, HostBatch, Sample, collate, waiting, worker_count, worker_options
from eit.errors import UserError, first_line
from eit.randomness import Stream, generator, seed_of, seeded


class StreamLoader:
    """Training batches from a reader of timm, which shuffles and gives each rank and worker a part of the shards.

    The order is a function of (seed, epoch, ranks, workers). A resumed run reads the images it has seen again and drops
    them.
    """

    def __init__(
        self,
        images: ImageStream,
        view: Preprocessing,
        order: SampleOrder,
        config: Data,
        augment: Augment,
        device: torch.device,
    ) -> None:
        self.images, self.view, self.order, self.device = images, view, order, device
        self.prefetched = Prefetcher(view, augment, order.seed, device)
        self.augmented = _Augmented(image_transform(view, augment), view.channels)
        self.bad = BadImages(images, config.bad_image_budget)
        self.workers = worker_count(config.workers)
        # With unequal numbers of shards, some readers would skip images and others repeat them.
        fit = [n for n in range(self.workers, 0, -1) if images.shards % (n * order.world) == 0]
        if config.workers is None and fit:
            self.workers = fit[0]
        each = max(self.workers, 1)
        if images.shards % (readers := order.world * each):
            parts = f"{readers} readers ({order.world} x data.workers={each})"
            advice = (
                f"set data.workers={fit[0]}" if fit else f"write a multiple of {order.world} (eit data shard --count)"
            )
            raise UserError(f"{images.shards} shards cannot be divided equally among {parts}: {advice}")

    def prepare(self) -> None:
        """Nothing: the workers start with each epoch."""

    def _open(self, epoch: int) -> Any:
        seed = seed_of(Stream.ORDER, self.order.seed, epoch) % 2**31
        dataset = self.images.open(True, self.order.batch_size, seed)
        dataset.set_loader_cfg(num_workers=self.workers)
        return dataset

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        yield from self.prefetched(self._host_batches(epoch, first_step), epoch)

    def _host_batches(self, epoch: int, first_step: int) -> Iterator[HostBatch]:
        """The workers' batches of an epoch, from `first_step` on.

        Raises:
            UserError: an unreadable shard, a label that is not a class, or an epoch that ends too early.
        """
        order = self.order
        counters = order.seed, epoch, distributed.rank()
        self.bad.seen.clear()  # images have no names here, so the count starts again each epoch
        loader = DataLoader(
            _Turn(self.images, self._open(epoch), self.view.channels, self.augmented, *counters),
            batch_size=order.batch_size,
            collate_fn=collate,
            generator=generator(Stream.ORDER, *counters),
            **worker_options(self.workers, self.device),
        )
        batches = waiting.batches(loader)
        for number in range(order.steps * order.accumulate):
            if (batch := next(batches, None)) is None:
                of = f"{number} of {order.steps * order.accumulate} batches"
                raise UserError(
                    f"data.dataset={self.images.config.dataset} ended after {of}: it has fewer images than its "
                    "metadata say; write the data set again"
                )
            self.bad.add_from(batch)
            if number >= first_step * order.accumulate:
                yield batch


def _worker_count(images: ImageStream, workers: int | None) -> int:
    """Number of loader processes of an evaluation: at least 1 for a server: only a wait for a process has a limit."""
    return max(worker_count(workers), 1 if "://" in images.config.root else 0)


@dataclass
class _Augmented:
    """A decoded image -> augmented pixels and the box to erase. A class, so that workers are not sent the loader."""

    transform: ImageTransform
    channels: int

    def __call__(self, image: Image.Image) -> tuple[Tensor, Sequence[int]]:
        return self.transform(self.transform.crop(image, self.channels, {}))


@dataclass
class StreamEvaluationLoader:
    """Evaluation batches. One worker of one rank reads each shard, so every image counts once.

    A batch never crosses the end of a shard, so the batches are the same on any number of ranks and workers. Only their
    order and their distribution over the ranks differ.

    If a reader names no shards (`hfids/`, `tfds/`), every rank reads the whole stream and keeps each `world`-th batch.
    Then the batches depend on the number of workers.
    """

    images: ImageStream
    view: Preprocessing
    batch_size: int
    workers: int | None
    device: torch.device

    @property
    def own_blocks(self) -> range:
        """A range as long as this rank's batches: exact for shards of equal length, otherwise an estimate."""
        rank, world = distributed.rank(), distributed.world_size()
        if shards := self.images.shards:
            return range(len(range(rank, shards, world)) * -(-len(self.images) // (shards * self.batch_size)))
        return range(rank, -(-len(self.images) // self.batch_size), world)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches. Every rank must iterate to the end, where the ranks add up their counts.

        Raises:
            UserError: an image or a shard cannot be read, or the stream does not have the number of images it declares.
        """
        seen = 0
        for pixels, labels, faults, _ in self._host_batches():
            if faults:
                raise UserError(faults[0])
            seen += len(labels)
            images = normalise(to_device(pixels, self.device), self.view.mean, self.view.std)
            yield Batch(images, to_device(labels, self.device), len(labels))
        total = sum(distributed.gather(seen))
        if total != len(self.images):
            declared = f"but it declares {len(self.images)}"
            raise distributed.same_everywhere(f"{self.images.config.dataset}: {total} images were read, {declared}")

    def _host_batches(self) -> Iterator[HostBatch]:
        rank, world = distributed.rank(), distributed.world_size()
        dataset = self.images.open(False, self.batch_size, 0)
        workers = _worker_count(self.images, self.workers)
        channels, prepare = self.view.channels, partial(_plain, self.view)
        if names := shard_names(dataset.reader)[rank::world]:
            shards = _Shards(self.images, dataset, names, self.batch_size, channels, prepare)
            options = worker_options(min(workers, len(names)), self.device)
            yield from waiting.batches(DataLoader(shards, batch_size=None, **options))
        elif not self.images.shards:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1  # the reader skips nothing
            dataset.set_loader_cfg(num_workers=workers)
            turn = _Turn(self.images, dataset, channels, prepare)
            loader = DataLoader(turn, self.batch_size, collate_fn=collate, **worker_options(workers, self.device))
            for block, batch in enumerate(waiting.batches(loader)):
                if block % world == rank or batch[2]:  # every rank reports faults
                    yield batch


def _plain(view: Preprocessing, image: Image.Image) -> tuple[Tensor, Sequence[int]]:
    """A decoded image -> its evaluation pixels, and no box to erase."""
    return view.pixels(image), ()


class _Turn(IterableDataset[Any]):
    """The images of a stream one after another, as `prepare` returns them. Used in worker processes."""

    def __init__(
        self, images: ImageStream, dataset: Any, channels: int, prepare: Any, *counters: int, shard: str = ""
    ) -> None:
        self.dataset, self.channels, self.prepare, self.counters = dataset, channels, prepare, counters
        self.name, self.classes, self.shard = images.config.dataset, len(images.classes), shard
        self.max_pixels, self.pixel_range = images.config.max_pixels, images.config.pixel_range

    def __iter__(self) -> Iterator[Sample]:
        """Samples, each with the faults before it. A sample without pixels, with one fault, ends the stream early."""
        worker = info.id if (info := get_worker_info()) else 0
        part = f"shard {self.shard}" if self.shard else f"worker {worker}"
        turn = -1
        with _skipped(self.dataset.reader, self.max_pixels) as (faults, lost):
            last = ""
            for turn, (image, label) in enumerate(self.dataset):
                if not 0 <= int(label) < self.classes:
                    last = f"{self.name} has label {label}, of {self.classes} classes"
                if last or lost:
                    break
                try:
                    image = to_mode(upright(image), self.channels, self.pixel_range)
                except Exception as error:  # as in `eit.data.images.decode`
                    faults.append(first_line(error))
                    continue
                with seeded(Stream.TURN, *self.counters, worker, turn):
                    pixels, box = self.prepare(image)
                where = f"{self.name}, before image {turn + 1} of {part}"
                yield Sample(pixels, int(label), [f"{where}: {fault}" for fault in faults], box)
                faults.clear()
            if lost:
                last = f"{self.name}: shard {lost[0]}"
            elif faults:
                last = f"{self.name}, after image {turn + 1} of {part}: {faults[0]}"
            if last:
                yield Sample(torch.empty(0), -1, [last])


class _Shards(IterableDataset[Any]):
    """Batches from shards; one worker reads all of a shard."""

    def __init__(
        self, images: ImageStream, dataset: Any, names: list[str], batch_size: int, channels: int, prepare: Any
    ) -> None:
        self.images, self.dataset, self.names, self.batch_size = images, dataset, names, batch_size
        self.channels, self.prepare = channels, prepare

    def __iter__(self) -> Iterator[HostBatch]:
        info = get_worker_info()
        for name in self.names[info.id :: info.num_workers] if info else self.names:
            shard = one_shard(self.dataset, name)
            samples = iter(_Turn(self.images, shard, self.channels, self.prepare, shard=name))
            while batch := list(islice(samples, self.batch_size)):
                yield collate(batch)


@contextmanager
def _skipped(reader: Any, max_pixels: int) -> Iterator[tuple[list[str], list[str]]]:
    """Collect the images and the shards that a reader of timm skips because it cannot read them.

    Images are read as everywhere (`careful_pillow`), shards as tar files that are not packed, with plain members.
    """
    # timm's ReaderWds takes no webdataset `handler`: it hard-codes `log_and_continue`, which logs the error and skips
    # the sample or shard, but raises TypeErrors again. Exchanging it would need private parts of both; its log needs
    # none.
    shards = {os.path.join(reader.root, name) for name in shard_names(reader)}
    faults: list[str] = []
    lost: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = sys.exc_info()[1]  # timm logs inside `except`
            arguments = [str(argument) for argument in error.args] if error else []
            if found := shards.intersection(arguments):  # webdataset adds the file's name to errors of the shard
                lost.append(f"{found.pop()} cannot be read: {type(error).__name__}: {arguments[0]}")
            else:
                if isinstance(error, UnreadableImage):
                    faults.append(str(error))
                else:
                    faults.append(repr(error) if error else record.getMessage())

    log, collect = logging.getLogger("timm.data.readers.reader_wds"), Collect()
    log.addHandler(collect)
    propagate, log.propagate = log.propagate, False
    try:
        with careful_pillow(max_pixels), _careful_tarfile():
            yield faults, lost
    finally:
        log.removeHandler(collect)
        log.propagate = propagate


@contextmanager
def _careful_tarfile() -> Iterator[None]:
    """While it is open, webdataset unpacks nothing: a small shard would become gigabytes."""
    try:
        from webdataset import tariterators  # type: ignore[import-untyped]
    except ImportError:  # the reader is another one
        yield
        return

    def careful_open(fileobj: Any, mode: str) -> tarfile.TarFile:
        return tarfile.open(fileobj=fileobj, mode="r|", tarinfo=PlainMember)

    tariterators.tarfile = SimpleNamespace(open=careful_open, TarFile=tarfile.TarFile)
    try:
        yield
    finally:
        tariterators.tarfile = tarfile
