"""Images -> normalised batches on the device. Order and augmentation are functions of counters, not of random state.

`CachedLoader` holds small images as uint8 and augments whole batches; `WorkerLoader` reads and augments image by image
in worker processes, with timm's policies, and does normalising and random erasing of whole batches on the device;
`streaming.py` has the loaders of streams. `EvaluationLoader` gives the same batches on any number of ranks.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from eit import distributed
from eit.config import Augment, Data
from eit.console import track
from eit.data.augment import ImageTransform, erase, image_transform, noise_fields, shift_and_flip
from eit.data.images import Images, Preprocessing, UnreadableImage, normalise
from eit.data.order import SampleOrder
from eit.data.prefetch import Prefetcher, to_device
from eit.data.random_crop import Kept
from eit.data.streaming import StreamEvaluationLoader, StreamLoader
from eit.data.timm_datasets import ImageStream
from eit.data.workers import BadImages, Batch, HostBatch, Sample, collate, waiting, worker_options
from eit.errors import UserError
from eit.randomness import Stream, generator, own_randomness, set_cpu_seed

CACHE_SIZE = 64  # pixels: images up to this size are held in memory
CACHE_BYTES = 2 << 30


def fits_in_memory(images: Images, view: Preprocessing) -> bool:
    """Whether the images are small enough and few enough to be held in memory as uint8."""
    return view.size <= CACHE_SIZE and len(images) * view.channels * view.size**2 <= CACHE_BYTES


def train_loader(
    images: Images | ImageStream,
    view: Preprocessing,
    order: SampleOrder,
    config: Data,
    augment: Augment,
    device: torch.device,
) -> "CachedLoader | WorkerLoader | StreamLoader":
    """The loader for these images: from memory if they are small and nothing augments image by image."""
    if config.cache and augment.by_image:
        key = augment.policy[0] if augment.policy else "crop_scale, simple_crop or color_jitter"
        raise UserError(
            f"data.cache=true augments whole batches, without {key}: turn that off, or leave data.cache out"
        )
    if isinstance(images, ImageStream):
        if config.cache or augment.repeats > 1:
            key = "data.cache=true" if config.cache else f"augment.repeats={augment.repeats}"
            raise UserError(f"{key} needs images with random access: data.dataset={config.dataset} is a stream")
        return StreamLoader(images, view, order, config, augment, device)
    if (config.cache is None and fits_in_memory(images, view) and not augment.by_image) or config.cache:
        return CachedLoader(images, view, order, config.bad_image_budget, augment, device)
    return WorkerLoader(images, view, order, config, augment, device)


def read_or_neighbour(
    images: Images, index: int, read: Callable[[int], Image.Image]
) -> tuple[Image.Image, int, list[str]]:
    """Image `index`, or the next readable one; its label; the images that could not be read."""
    faults: list[str] = []
    for i in range(index, index + len(images)):
        try:
            return read(i % len(images)), images.labels[i % len(images)], faults
        except UnreadableImage as error:
            faults.append(str(error))
    raise UserError(f"none of {len(images)} images can be read; the first: {faults[0]}")


class CachedLoader:
    """Small images in memory as uint8, on the device; pad-crop, flip and erasing for a whole batch at a time.

    Row (index, repeat) of a table, made once per epoch from (seed, epoch), has a sample's random draws.
    """

    def __init__(
        self,
        images: Images,
        view: Preprocessing,
        order: SampleOrder,
        budget: float,
        augment: Augment,
        device: torch.device,
    ) -> None:
        self.images, self.order, self.augment, self.device = images, order, augment, device
        self.view = replace(view, resize=view.size)
        self.bad = BadImages(images, budget)
        self.pixels = self.labels = torch.empty(0)

    def prepare(self) -> None:
        """Read the images before the first epoch."""
        images, view = self.images, self.view
        pixels = torch.empty(len(images), view.channels, view.size, view.size, dtype=torch.uint8)
        labels = torch.empty(len(images), dtype=torch.int64)

        def fill(index: int) -> list[str]:
            image, labels[index], faults = read_or_neighbour(images, index, lambda i: images.read(i, view.channels))
            pixels[index] = view.pixels(image)
            return faults

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for faults in track(pool.map(fill, range(len(images))), "reading images", len(images)):
                self.bad.add(faults)
        met = torch.tensor(len(self.bad.seen))  # on the CPU: one rank may read for minutes longer than another
        self.bad.check(int(distributed.sum_over_ranks(met)))
        self.pixels, self.labels = pixels.to(self.device), labels.to(self.device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order = self.order
        table = generator(Stream.TABLE, order.seed, epoch)
        draws = torch.rand(order.images, order.repeats, 8, generator=table).to(self.device)
        noise = torch.empty(0)
        if self.augment.erasing:
            noise = noise_fields(self.pixels.shape[1:], order.seed, epoch, self.device)
        # After this, no step waits for a copy to the device.
        for rows in order.batches(epoch, first_step, distributed.rank()).to(self.device):
            index, repeat = rows.unbind(1)
            row = draws[index, repeat].unbind(1)
            x = self.pixels[index]
            if self.augment.pad_crop or self.augment.hflip:
                x = shift_and_flip(x, self.augment.pad_crop, self.augment.hflip, *row[:3])
            x = normalise(x, self.view.mean, self.view.std)
            if self.augment.erasing:
                x = erase(x, self.augment.erasing, noise, *row[3:])
            yield Batch(x, self.labels[index], len(index))


class _Samples(Dataset[Sample]):
    """(epoch, index, repeat) -> augmented sample. Used in worker processes."""

    def __init__(self, images: Images, view: Preprocessing, transform: ImageTransform, seed: int) -> None:
        self.images, self.view, self.transform, self.seed = images, view, transform, seed
        self.kept: tuple[int, Kept] = -1, {}  # the last image, decoded

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> list[Sample]:
        with own_randomness():
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int, repeat: int) -> Sample:
        def read(i: int) -> Image.Image:
            if self.kept[0] != i:
                self.kept = i, {}
            set_cpu_seed(Stream.SAMPLE, self.seed, epoch, index, repeat)  # again, because the crop is drawn here
            return self.images.read(
                i, self.view.channels, lambda image, channels: self.transform.crop(image, channels, self.kept[1])
            )

        try:
            image, label, faults = read_or_neighbour(self.images, index, read)
        except UserError as error:
            return Sample(torch.empty(0), -1, [str(error)])
        pixels, box = self.transform(image)
        return Sample(pixels, label, faults, box)


class _Batches(Sampler[list[tuple[int, int, int]]]):
    """Keys of the micro-batches of the epoch that was last requested; the workers outlive an epoch."""

    def __init__(self, order: SampleOrder) -> None:
        self.order, self.epoch, self.first_step = order, 0, 0

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for rows in self.order.batches(self.epoch, self.first_step, distributed.rank()):
            yield [(self.epoch, index, repeat) for index, repeat in rows.tolist()]


class WorkerLoader:
    """Images read, cropped, augmented one by one in worker processes; normalised, erased at random, on the device."""

    def __init__(
        self,
        images: Images,
        view: Preprocessing,
        order: SampleOrder,
        config: Data,
        augment: Augment,
        device: torch.device,
    ) -> None:
        self.prefetched = Prefetcher(view, augment, order.seed, device)
        self.bad = BadImages(images, config.bad_image_budget)
        self.batches = _Batches(order)
        samples = _Samples(images, view, image_transform(view, augment), order.seed)
        self.loader = DataLoader(
            samples,
            batch_sampler=self.batches,
            collate_fn=collate,
            **worker_options(config.workers, device, persistent=True),
        )

    def prepare(self) -> None:
        """Nothing: the workers start with the first epoch."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self.batches.epoch, self.batches.first_step = epoch, first_step
        yield from self.prefetched(self._host_batches(), epoch)

    def _host_batches(self) -> Iterator[HostBatch]:
        for batch in waiting.batches(self.loader):
            self.bad.add_from(batch)
            yield batch


@dataclass
class EvaluationLoader:
    """Blocks of `batch_size` images in order; rank j mod world has block j; the last one is padded.

    So batches and metrics are the same on any number of ranks. Small images are read once and kept.
    """

    images: Images
    view: Preprocessing
    batch_size: int
    workers: int | None
    device: torch.device
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return -(-len(self.images) // self.batch_size)

    @property
    def own_blocks(self) -> range:
        return range(distributed.rank(), self.blocks, distributed.world_size())

    def __iter__(self) -> Iterator[Batch]:
        """The blocks of this rank, in the order of `own_blocks`.

        Raises:
            UserError: an image cannot be read; the message names it.
        """
        if len(self._kept) == len(self.own_blocks):
            pairs: Iterable[tuple[Tensor, Tensor]] = [self._kept[block] for block in self.own_blocks]
        else:
            pairs = self._read()
        keep = fits_in_memory(self.images, self.view)
        for block, (pixels, labels) in zip(self.own_blocks, pairs, strict=True):
            pixels, labels = to_device(pixels, self.device), to_device(labels, self.device)
            if keep:
                self._kept[block] = pixels, labels
            valid = min(self.batch_size, len(self.images) - block * self.batch_size)
            yield Batch(normalise(pixels, self.view.mean, self.view.std), labels, valid)

    def _worker_count(self) -> int | None:
        """None by default, but 0 if images are in memory, or few and small: processes would take longer to start."""
        is_quick = isinstance(self.images.sources[0], np.ndarray) or (
            len(self.images) < 256 and fits_in_memory(self.images, self.view)
        )
        return 0 if self.workers is None and is_quick else self.workers

    def _read(self) -> Iterable[tuple[Tensor, Tensor]]:
        last = len(self.images) - 1
        keys = [[min(block * self.batch_size + i, last) for i in range(self.batch_size)] for block in self.own_blocks]
        loader = DataLoader(
            _Pixels(self.images, self.view),
            batch_sampler=keys,
            collate_fn=collate,
            **worker_options(self._worker_count(), self.device),
        )
        for pixels, labels, faults, _ in waiting.batches(loader):
            if faults:
                raise UserError(faults[0])
            yield pixels, labels


class _Pixels(Dataset[Sample]):
    def __init__(self, images: Images, view: Preprocessing) -> None:
        self.images, self.view = images, view

    def __getitem__(self, index: int) -> Sample:
        try:
            pixels = self.view.pixels(self.images.read(index, self.view.channels))
        except UnreadableImage as error:
            return Sample(torch.empty(0), 0, [f"unreadable validation image: {error}"])
        return Sample(pixels, self.images.labels[index], [])


AnyEvaluationLoader = EvaluationLoader | StreamEvaluationLoader


def evaluation_batch_size(batch_size: int, images: int, device: torch.device) -> int:
    """The evaluation batch for a training batch of `batch_size`: four times as large on a GPU, with no gradients."""
    return batch_size if device.type == "cpu" else max(batch_size, min(4 * batch_size, images))


def evaluation_loader(
    images: Images | ImageStream, view: Preprocessing, batch_size: int, workers: int | None, device: torch.device
) -> AnyEvaluationLoader:
    if isinstance(images, ImageStream):
        return StreamEvaluationLoader(images, view, batch_size, workers, device)
    return EvaluationLoader(images, view, batch_size, workers, device)
