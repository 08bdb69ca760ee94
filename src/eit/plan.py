"""Order and random numbers as functions of counters: what makes a run repeatable."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


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


def set_cpu_seed(stream: Stream, *counters: int) -> None:
    """`set_seed` for what runs on the CPU: it leaves the accelerators' generators, at a tenth of the time."""
    seed = seed_of(stream, *counters)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def own_randomness() -> Iterator[None]:
    """The generators of the CPU are put back after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def seeded(stream: Stream, *counters: int) -> Iterator[None]:
    """`set_cpu_seed` for the block; the generators are put back after it."""
    with own_randomness():
        set_cpu_seed(stream, *counters)
        yield


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

    def batches(self, epoch: int, first_step: int, rank: int) -> Tensor:
        """(micro-batches, batch_size, 2) of this rank, from `first_step` on; neighbours go to different ranks."""
        steps = self.order(epoch)[first_step:]
        return steps.view(-1, self.batch_size, self.world, 2)[:, :, rank]
