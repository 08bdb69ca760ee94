"""Accuracy under noise of one frequency band (Park & Kim, ICLR 2022, arXiv 2202.06709, section 2)."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eit.console import progress
from eit.data.images import Preprocessing
from eit.data.loaders import EvaluationLoader
from eit.inference.evaluate import evaluation_mode
from eit.precision import float32_products

HALF_WIDTH = 0.1  # of a ring, in units of an axis's Nyquist frequency, pi
EPS = 0.1  # of pixels in 0..1


@dataclass(frozen=True)
class BandAccuracy:
    """Accuracy with noise of frequencies low < f <= high; 1 is the Nyquist frequency of an axis. None: no noise."""

    low: float | None
    high: float | None
    images: int
    correct: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct / self.images

    @property
    def standard_error(self) -> float:
        """Standard error of top1 over images, in points."""
        return (self.top1 * (100 - self.top1) / self.images) ** 0.5


def rings(height: int, width: int) -> list[tuple[float, float]]:
    """(low, high) of the rings that cover the spectrum of an image without DC; empty rings are left out."""
    edges = [
        *(round(2 * HALF_WIDTH * i, 9) for i in range(7)),
        math.sqrt(2),
    ]  # the last ring is wider: it reaches to the corner
    return [ring for ring in itertools.pairwise(edges) if _inside(height, width, *ring).any()]


def _inside(height: int, width: int, low: float, high: float) -> Tensor:
    """Which bins of the half spectrum lie in the ring, (height, width // 2 + 1)."""
    f = 2 * (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2).sqrt()
    return (f > low + 1e-6) & (f <= high + 1e-6)


def band_noise(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """The sign (-1 or 1) of white noise in the ring low < f <= high, of `shape` (..., height, width), on the CPU.

    With the sign, every band has the same maximum and mean energy, but some energy leaks into other frequencies.
    """
    height, width = shape[-2:]
    white = torch.randn(shape, generator=generator)
    spectrum = torch.fft.rfft2(white) * _inside(height, width, low, high)
    return torch.fft.irfft2(spectrum, s=(height, width)).sign()


@torch.no_grad()
def band_accuracy(
    model: nn.Module, loader: EvaluationLoader, view: Preprocessing, eps: float = EPS
) -> list[BandAccuracy]:
    """Accuracy on the loader's images without noise, then with the noise of each ring.

    The noise is eps * sign, added to pixels in 0..1 before normalisation, without clipping. It depends only on ring and
    block, so all models see the same noise.
    """
    std = torch.tensor(view.std).view(-1, 1, 1)
    every: list[tuple[float, float] | None] = [None, *rings(view.size, view.size)]
    correct = [0] * len(every)
    with evaluation_mode(model), progress("noise by band", len(every) * len(loader.own_blocks)) as advance:
        for block, batch in zip(loader.own_blocks, loader, strict=True):  # reads each image once
            for number, ring in enumerate(every):
                x = batch.images
                if ring is not None:
                    generator = torch.Generator().manual_seed(1000 * block + number)
                    x = x + (eps * band_noise(tuple(x.shape), *ring, generator) / std).to(x)
                with float32_products("fp32"):
                    hits = model(x).argmax(dim=1) == batch.labels
                correct[number] += int(hits[: batch.valid].sum())
                advance()
    ends = [ring or (None, None) for ring in every]
    return [BandAccuracy(low, high, len(loader.images), n) for (low, high), n in zip(ends, correct, strict=True)]
