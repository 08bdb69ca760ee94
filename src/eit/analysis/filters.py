"""Accuracy with filtered tokens: which frequencies of a layer the prediction uses.

After one layer the grid's tokens lose their frequencies above rho, or those up to rho (`frequency.filter_tokens`). The
mean of each channel, the class token and the registers stay, and the rest of the model runs. See docs/analysis.md.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from eit.analysis.frequency import filter_tokens
from eit.analysis.hooks import layers_of, replace_tokens
from eit.console import progress
from eit.data.loaders import EvaluationLoader
from eit.data.workers import Batch
from eit.inference.evaluate import evaluation_mode
from eit.precision import float32_products

Kept = Literal["low", "high"]


@dataclass(frozen=True)
class FilteredAccuracy:
    """Accuracy with the tokens after one layer filtered.

    Attributes:
        layer: 0 is the stem. The last layer is left out, because a head that reads the class token ignores its grid.
        kept: `low`, frequencies up to rho; `high`, those above it.
        images: number of images.
        correct: images that are classified correctly with the filter.
        lost: images that are correct only without the filter.
        won: images that are correct only with the filter.
    """

    layer: int
    kept: Kept
    images: int
    correct: int
    lost: int
    won: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct / self.images

    @property
    def cost(self) -> float:
        """Points of top1 that the filter costs."""
        return 100 * (self.lost - self.won) / self.images

    @property
    def standard_error(self) -> float:
        """Standard error of `cost` over images, in points; each image is compared with itself."""
        mean = (self.lost - self.won) / self.images
        return 100 * math.sqrt(((self.lost + self.won) / self.images - mean**2) / self.images)


@torch.no_grad()
def filter_accuracy(model: nn.Module, loader: EvaluationLoader, rho: float) -> list[FilteredAccuracy]:
    """Accuracy on the loader's images with each layer's tokens low-passed, and high-passed.

    Raises:
        CannotMeasure: the input of a layer is not one grid per image.
    """
    depth = len(layers_of(model))
    cases: list[tuple[int, Kept]] = [(layer, kept) for layer in range(depth) for kept in get_args(Kept)]
    correct, lost, won = ([0] * len(cases) for _ in range(3))
    with evaluation_mode(model), progress("filtered tokens", len(loader.own_blocks)) as advance:
        for batch in loader:
            plain = _hits(model, batch)
            for i, (layer, kept) in enumerate(cases):
                with replace_tokens(model, layer, partial(filter_tokens, rho=rho, kept=kept)):
                    hits = _hits(model, batch)
                correct[i] += int(hits.sum())
                lost[i] += int((plain & ~hits).sum())
                won[i] += int((hits & ~plain).sum())
            advance()
    counts = zip(cases, correct, lost, won, strict=True)
    return [FilteredAccuracy(*case, len(loader.images), *numbers) for case, *numbers in counts]


def _hits(model: nn.Module, batch: Batch) -> Tensor:
    """Which images of a batch are classified correctly."""
    with float32_products("fp32"):
        return (model(batch.images).argmax(dim=1) == batch.labels)[: batch.valid]
