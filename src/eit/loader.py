"""Images -> normalised batches on the device. Order and augmentation are functions of counters, not of random state.

`CachedLoader` holds small images as uint8 and augments whole batches; `WorkerLoader` reads and augments image by image
in worker processes, with timm's transforms; `StreamLoader` does so with images that come in turn, from shards behind a
reader of timm. `EvaluationLoader` and `StreamEvaluationLoader` give the same images on any number of ranks.
"""

import logging
import math
import os
import random
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize
from torchvision.transforms import functional as TF

from eit import distributed
from eit.config import Augment, Data
from eit.console import say, track
from eit.errors import UserError
from eit.images import Images, UnreadableImage, View, normalise, not_a_thread, resize_and_crop, to_mode
from eit.readers import ImageStream

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # preemption, Ctrl-C, Slurm's --signal=USR1
CACHE_SIZE = 64  # pixels: images up to this size are held in memory
CACHE_BYTES = 2 << 30


class Stream(IntEnum):
    """What randomness is for. Each stream has counters of its own, and so numbers of its own."""

    INITIAL_VALUES = 1  # seed
    ORDER = 2  # seed, epoch
    TABLE = 3  # seed, epoch
    NOISE = 4  # seed, epoch
    SAMPLE = 5  # seed, epoch, index, repeat
    STEP = 6  # seed, step, micro-batch, rank
    TURN = 7  # seed, epoch, rank, worker, turn


def seed_of(stream: Stream, *counters: int) -> int:
    """A 63-bit seed that is a function of the stream and its counters."""
    return int(np.random.SeedSequence((stream, *counters)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(stream: Stream, *counters: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(stream, *counters))


def set_seed(stream: Stream, *counters: int) -> None:
    """Seed the global generators of Python, NumPy and torch, which timm and dropout draw from."""
    seed = seed_of(stream, *counters)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(stream: Stream, *counters: int) -> Iterator[None]:
    """`set_seed` for the block; the generators are put back after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_seed(stream, *counters)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut: into steps of `accumulate` micro-batches of `batch_size` images on each of `world` ranks."""

    images: int
    batch_size: int
    accumulate: int
    world: int
    repeats: int
    seed: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulate * self.world

    @property
    def steps(self) -> int:
        """Steps an epoch; the images that do not fill a last one are left out, other ones each epoch."""
        return self.images // self.global_batch

    def order(self, epoch: int) -> Tensor:
        """(steps, global_batch, 2): index and repeat of each sample, a function of seed and epoch alone.

        With repeated augmentation each image stands `repeats` times in a row, so that ranks share its copies, and an
        epoch is as long as without: it shows a part of the images (Hoffer et al. 2020, as in the DeiT code).
        """
        shuffled = torch.randperm(self.images, generator=generator(Stream.ORDER, self.seed, epoch))
        index = shuffled.repeat_interleave(self.repeats)
        repeat = torch.arange(self.repeats).repeat(self.images)
        used = self.steps * self.global_batch
        return torch.stack((index, repeat), dim=1)[:used].view(self.steps, self.global_batch, 2)

    def batches(self, epoch: int, first_step: int, rank: int) -> Iterator[Tensor]:
        """(batch_size, 2) for each micro-batch of this rank, from `first_step` on; neighbours go to different ranks."""
        for step in self.order(epoch)[first_step:]:
            yield from step.view(self.accumulate, self.batch_size, self.world, 2)[:, :, rank]


class Batch(NamedTuple):
    images: Tensor  # (B, channels, height, width) float, normalised, on the device
    labels: Tensor  # (B,) int64, on the device
    valid: int  # the first so many count; the rest pads a last evaluation block


def fits_in_memory(images: Images, view: View) -> bool:
    """Whether the images are small, and few enough, to be held as uint8."""
    return view.size <= CACHE_SIZE and len(images) * view.channels * view.size**2 <= CACHE_BYTES


def train_loader(
    images: Images | ImageStream, view: View, plan: Plan, config: Data, augment: Augment, device: torch.device
) -> "CachedLoader | WorkerLoader | StreamLoader":
    """The loader that suits: from memory where the images are small and no policy works image by image."""
    if config.cache and augment.by_image:
        key = augment.policy[0] if augment.policy else "crop_scale, simple_crop or color_jitter"
        raise UserError(f"data.cache=true augments whole batches: it has no {key}")
    if isinstance(images, ImageStream):
        if config.cache or augment.repeats > 1:
            key = "data.cache=true" if config.cache else f"augment.repeats={augment.repeats}"
            raise UserError(f"{key} needs images with random access: data.dataset={config.dataset} comes in turn")
        return StreamLoader(images, view, plan, config, augment, device)
    if (config.cache is None and fits_in_memory(images, view) and not augment.by_image) or config.cache:
        return CachedLoader(images, view, plan, config.bad_image_budget, augment, device)
    return WorkerLoader(images, view, plan, config, augment, device)


class BadImages:
    """Unreadable training images: named once each, and counted against the budget."""

    def __init__(self, images: Images | ImageStream, budget: float) -> None:
        self.total, self.allowed = len(images), int(budget * len(images))
        self.seen: dict[str, None] = {}  # in the order met

    def add(self, faults: Iterable[str]) -> None:
        for fault in faults:
            if fault not in self.seen:
                self.seen[fault] = None
                if len(self.seen) <= self.allowed:  # beyond, the run stops
                    say(f"unreadable image, its neighbour is used instead: {fault}", any_rank=True)

    def check(self, met: int) -> None:
        """Raise a UserError if the budget is used up. `met` is the sum over ranks; what several met counts once."""
        if met > self.allowed and (count := len(set().union(*distributed.gather(self.seen)))) > self.allowed:
            last = f"; the last here: {list(self.seen)[-1]}" if self.seen else ""
            raise UserError(
                f"{count} of {self.total} training images are unreadable, "
                f"data.bad_image_budget allows {self.allowed}{last}"
            )


def read_or_neighbour(images: Images, index: int, channels: int) -> tuple[Image.Image, int, list[str]]:
    """Image `index`, or the next one that can be read; its label; what could not be read."""
    faults: list[str] = []
    for i in range(index, index + len(images)):
        try:
            return images.read(i % len(images), channels), images.labels[i % len(images)], faults
        except UnreadableImage as error:
            faults.append(str(error))
    raise UserError(f"none of {len(images)} images can be read; the first: {faults[0]}")


class CachedLoader:
    """Small images in memory as uint8, on the device; pad-crop, flip and erasing for a whole batch at a time.

    A sample's draws stand in row (index, repeat) of a table made once an epoch from (seed, epoch).
    """

    def __init__(
        self, images: Images, view: View, plan: Plan, budget: float, augment: Augment, device: torch.device
    ) -> None:
        self.images, self.plan, self.augment, self.device = images, plan, augment, device
        self.view = replace(view, resize=view.size)
        self.bad = BadImages(images, budget)
        self.pixels = self.labels = torch.empty(0)

    def prepare(self) -> None:
        """Read the images, before the first epoch."""
        images, view = self.images, self.view
        pixels = torch.empty(len(images), view.channels, view.size, view.size, dtype=torch.uint8)
        labels = torch.empty(len(images), dtype=torch.int64)

        def fill(index: int) -> list[str]:
            image, labels[index], faults = read_or_neighbour(images, index, view.channels)
            pixels[index] = view.pixels(image)
            return faults

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for faults in track(pool.map(fill, range(len(images))), "reading images", len(images)):
                self.bad.add(faults)
        self.bad.check(len(self.bad.seen))
        self.pixels, self.labels = pixels.to(self.device), labels.to(self.device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        plan = self.plan
        table = generator(Stream.TABLE, plan.seed, epoch)
        draws = torch.rand(plan.images, plan.repeats, 8, generator=table).to(self.device)
        noise = torch.empty(0)
        if self.augment.erasing:
            shape = (NOISE_FIELDS, *self.pixels.shape[1:])
            noise = torch.randn(shape, generator=generator(Stream.NOISE, plan.seed, epoch)).to(self.device)
        for rows in plan.batches(epoch, first_step, distributed.rank()):
            index, repeat = rows.to(self.device).unbind(1)
            row = draws[index, repeat].unbind(1)
            x = self.pixels[index]
            if self.augment.pad_crop or self.augment.hflip:
                x = shift_and_flip(x, self.augment.pad_crop, self.augment.hflip, *row[:3])
            x = normalise(x, self.view.mean, self.view.std)
            if self.augment.erasing:
                x = erase(x, self.augment.erasing, noise, *row[3:])
            yield Batch(x, self.labels[index], len(index))


NOISE_FIELDS = 64  # of erasing, an epoch


def shift_and_flip(x: Tensor, pad: int, hflip: float, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Crop each (B, C, H, W) image out of its zero-padded self, and mirror some; draws are (B,) in [0, 1)."""
    batch, _, height, width = x.shape
    x = F.pad(x, (pad,) * 4)
    rows = torch.arange(height, device=x.device) + (dy * (2 * pad + 1)).long()[:, None]  # (B, H)
    columns = torch.arange(width, device=x.device).expand(batch, -1)
    columns = torch.where(flip[:, None] < hflip, columns.flip(1), columns) + (dx * (2 * pad + 1)).long()[:, None]
    one = torch.arange(batch, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[one, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def erase(x: Tensor, probability: float, noise: Tensor, *draws: Tensor) -> Tensor:
    """Random erasing (Zhong et al. 2020) of (B, C, H, W): a box of 2 to 33% of the area becomes noise.

    `noise` is (fields, C, H, W), of which each image uses one; `draws` are five (B,) tensors in [0, 1).
    """
    height, width = x.shape[2:]
    chosen, area, aspect, top, left = draws
    field_ = (chosen / probability * len(noise)).long().clamp(max=len(noise) - 1)  # uniform where it matters
    area = (0.02 + area * (1 / 3 - 0.02)) * height * width
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / 0.3))
    h = (area * aspect).sqrt().round().clamp(1, height - 1)
    w = (area / aspect).sqrt().round().clamp(1, width - 1)
    top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    y, x_ = (torch.arange(n, device=x.device) for n in (height, width))
    inside_y = (y >= top[:, None]) & (y < (top + h)[:, None])
    inside_x = (x_ >= left[:, None]) & (x_ < (left + w)[:, None])
    box = inside_y[:, None, :, None] & inside_x[:, None, None, :] & (chosen < probability)[:, None, None, None]
    return torch.where(box, noise[field_], x)


class _Samples(Dataset):
    """(epoch, index, repeat) -> augmented sample. Used in worker processes."""

    def __init__(self, images: Images, view: View, transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self.images, self.view, self.transform, self.seed = images, view, transform, seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int, list[str]]:
        epoch, index, repeat = key
        image, label, faults = read_or_neighbour(self.images, index, self.view.channels)
        with seeded(Stream.SAMPLE, self.seed, epoch, index, repeat):
            return self.transform(image), label, faults


class _Batches(Sampler):
    """Keys of the micro-batches of the epoch that was last asked for; the workers live on from epoch to epoch."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.epoch, self.first_step = plan, 0, 0

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for rows in self.plan.batches(self.epoch, self.first_step, distributed.rank()):
            yield [(self.epoch, index, repeat) for index, repeat in rows.tolist()]


class WorkerLoader:
    """Images read, cropped, augmented and normalised one by one in worker processes, with timm's transforms."""

    def __init__(
        self, images: Images, view: View, plan: Plan, config: Data, augment: Augment, device: torch.device
    ) -> None:
        self.device = device
        self.bad = BadImages(images, config.bad_image_budget)
        self.batches = _Batches(plan)
        samples = _Samples(images, view, image_transform(view, augment), plan.seed)
        self.loader = DataLoader(
            samples,
            batch_sampler=self.batches,
            collate_fn=_collate,
            **_worker_options(config.workers, device),
        )

    def prepare(self) -> None:
        """Nothing: the workers start with the first epoch."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self.batches.epoch, self.batches.first_step = epoch, first_step
        for images, labels, faults in self.loader:
            self.bad.add(faults)
            yield Batch(
                images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True), len(labels)
            )


class PadCrop:
    """PIL image -> its evaluation view, padded and cropped at random. A class, for worker processes to be sent it."""

    def __init__(self, view: View, pad: int) -> None:
        self.view, self.pad = view, pad

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self.view.size
        image = resize_and_crop(image, size, size, self.view.interpolation)
        if self.pad:
            top, left = random.randint(0, 2 * self.pad), random.randint(0, 2 * self.pad)
            image = TF.crop(TF.pad(image, self.pad), top, left, size, size)
        return image


def simple_crop(view: View) -> Compose:
    """DeiT III's simple random crop: the shorter side to the size, 4 pixels reflected around, a random square."""
    mode = InterpolationMode(view.interpolation)
    crop = RandomCrop(view.size, padding=4, padding_mode="reflect")
    return Compose([not_a_thread, Resize(view.size, mode), crop])


def image_transform(view: View, augment: Augment) -> Compose:
    """PIL image -> normalised, augmented (channels, size, size) float.

    Raises:
        UserError: a policy that timm does not know, or that needs colour.
    """
    key, policy = augment.policy or ("", None)
    if policy and view.channels != 3:
        raise UserError(f"augment.{key} needs colour images: model.in_chans=3")
    begins = {"rand_augment": ("rand",), "augmix": ("augmix",), "auto_augment": ("original", "v0")}.get(key)
    try:
        if policy and begins and not policy.startswith(begins):
            raise ValueError("of another kind")
        transform = create_transform(
            input_size=view.size,
            is_training=True,
            color_jitter=augment.color_jitter or None,
            auto_augment=policy,
            interpolation=view.interpolation,
            hflip=augment.hflip,
            re_prob=augment.erasing,
            re_mode="pixel",
            mean=view.mean,
            std=view.std,
            scale=augment.crop_scale,
            ratio=augment.crop_aspect,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        of_auto = "original, originalr, v0 or v0r"
        such = {"augmix": "augmix-m5-w4-d2", "auto_augment": of_auto}.get(key, "rand-m9-mstd0.5-inc1")
        raise UserError(f"augment.{key}={policy}: timm does not know this policy ({error}), such as {such}") from None
    if augment.simple_crop:
        transform.transforms[0] = simple_crop(view)
    elif augment.crop_scale is None:
        transform.transforms[0] = PadCrop(view, augment.pad_crop)  # instead of timm's random resized crop
    return transform


def _collate(samples: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    images, labels, faults = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), [fault for one in faults for fault in one]


def worker_count(workers: int | None) -> int:
    """Loader processes of this rank: as given, else one a core, at most 8."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min((os.cpu_count() or 1) // local_world, 8) if workers is None else workers


def _worker_options(workers: int | None, device: torch.device) -> dict[str, Any]:
    workers = worker_count(workers)
    return dict(
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    """Signals that ask a run to end reach all its processes; the trainer decides, and ends its workers itself."""
    torch.set_num_threads(1)
    for signum in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a SIGTERM to the group ends workers too
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_leave_when_told, args=(os.getppid(),), daemon=True).start()


def _leave_when_told(trainer: int) -> None:
    """End at a SIGTERM of the trainer, with which Python and torch clean up, and of nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


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
    return _collate(samples)


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
            **_fresh_workers(self.workers, self.device),
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


def _fresh_workers(workers: int, device: torch.device) -> dict[str, Any]:
    return _worker_options(workers, device) | dict(persistent_workers=False)


@dataclass
class EvaluationLoader:
    """Blocks of `batch_size` images in order, block j on rank j mod world, the last one padded.

    So the batches, and the figures, are the same on any number of ranks. Small images are read once and kept.
    """

    images: Images
    view: View
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

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """(block number, batch) of this rank.

        Raises:
            UserError: an image cannot be read; it is named.
        """
        if len(self._kept) == len(self.own_blocks):
            pairs: Iterable[tuple[Tensor, Tensor]] = [self._kept[block] for block in self.own_blocks]
        else:
            pairs = self._read()
        keep = fits_in_memory(self.images, self.view)
        for block, (pixels, labels) in zip(self.own_blocks, pairs, strict=True):
            pixels, labels = pixels.to(self.device), labels.to(self.device)
            if keep:
                self._kept[block] = pixels, labels
            valid = min(self.batch_size, len(self.images) - block * self.batch_size)
            yield block, Batch(normalise(pixels, self.view.mean, self.view.std), labels, valid)

    def _read(self) -> Iterable[tuple[Tensor, Tensor]]:
        last = len(self.images) - 1
        keys = [[min(block * self.batch_size + i, last) for i in range(self.batch_size)] for block in self.own_blocks]
        loader = DataLoader(
            _Pixels(self.images, self.view),
            batch_sampler=keys,
            collate_fn=_collate_pixels,
            **_fresh_workers(worker_count(self.workers), self.device),
        )
        for pixels, labels, faults in loader:
            if faults:
                raise UserError(f"unreadable validation image: {faults[0]}")
            yield pixels, labels


class _Pixels(Dataset):
    def __init__(self, images: Images, view: View) -> None:
        self.images, self.view = images, view

    def __getitem__(self, index: int) -> tuple[Tensor, int, list[str]]:
        try:
            return self.view.pixels(self.images.read(index, self.view.channels)), self.images.labels[index], []
        except UnreadableImage as error:
            return torch.empty(0), 0, [str(error)]


def _collate_pixels(samples: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    faults = [fault for *_, one in samples for fault in one]
    return (torch.empty(0), torch.empty(0), faults) if faults else _collate(samples)


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
        options = _fresh_workers(workers, self.device)
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


AnyEvaluationLoader = EvaluationLoader | StreamEvaluationLoader


def evaluation_loader(
    images: Images | ImageStream, view: View, batch_size: int, workers: int | None, device: torch.device
) -> AnyEvaluationLoader:
    if isinstance(images, ImageStream):
        return StreamEvaluationLoader(images, view, batch_size, workers, device)
    return EvaluationLoader(images, view, batch_size, workers, device)
