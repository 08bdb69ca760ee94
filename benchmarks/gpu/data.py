"""CIFAR-10 for `make gpu`: packed, or random pixels if only speed is measured."""

import numpy as np

from benchmarks import pack
from benchmarks.gpu.record import Session
from eit.data.images import Images

CLASSES = [str(i) for i in range(10)]


def cifar10(session: Session) -> tuple[tuple[Images, Images], str]:
    """(training, validation) images, and a description of them."""
    if session.data is not None:
        train, val = pack.read(session.data)
        return (train, val), f"{len(train):,} + {len(val):,} of {session.data.name}"
    count = 64 if session.dry else 50_000
    return (random_images(count), random_images(max(count // 5, 1))), "random pixels"


def random_images(count: int) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = [i % 10 for i in range(count)]
    return Images(CLASSES, labels, [f"{i:05d}" for i in range(count)], list(pixels))
