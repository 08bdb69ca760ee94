"""Random numbers as functions of counters: what makes a run repeatable."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """The uses of random numbers. Each has its own counters, and so its own numbers."""

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
