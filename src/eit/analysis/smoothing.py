"""Oversmoothing: how similar the tokens of an image are. docs/analysis.md has the formulas.

Legend of the shape comments: B images, n = h * w grid tokens, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eit.analysis.frequency import Grid
from eit.analysis.moments import Moments

RANK_EVERY = 4  # the rank is computed for every 4th image: it costs as much as the forward pass of a small model


def cosine_similarity(x: Tensor) -> Tensor:
    """Tokens (B, n, C) -> the mean cosine of two different tokens of an image, (B,), -1 / (n - 1) to 1.

    A zero token has cosine 0 to all others.
    """
    n = x.shape[1]
    unit = torch.nn.functional.normalize(x.float(), dim=2)
    itself = unit.square().sum(dim=(1, 2))  # n minus the number of zero tokens
    return (unit.sum(dim=1).square().sum(dim=1) - itself) / (n * (n - 1))


def effective_rank(x: Tensor) -> Tensor:
    """Tokens (B, n, C) -> exp of the entropy of the normalised singular values, (B,), 1 to min(n, C).

    Roy & Vetterli 2007. The tokens are not centred: equal tokens have rank 1. Zero tokens have rank 1 too.
    """
    x = (x.cpu() if x.device.type == "mps" else x).double()
    gram = x @ x.transpose(1, 2) if x.shape[1] <= x.shape[2] else x.transpose(1, 2) @ x
    values = torch.linalg.eigvalsh(gram.nan_to_num()).clamp(min=0)  # raises an error for values that are not finite
    values = torch.where(values > 1e-14 * values[:, -1:], values, 0).sqrt()  # the rest is rounding
    weights = values / values.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    entropy: Tensor = torch.special.entr(weights).sum(dim=1)
    return entropy.exp()


@dataclass(frozen=True)
class Smoothing:
    """Similarity of an image's grid tokens at one place, averaged over images.

    Attributes:
        layer: 1 is the first; 0 is the stem's output.
        where: `stem` or `block`.
        grid: tokens (h, w).
        channels: number of channels.
        cosine: mean cosine of two different tokens; 1 means that all have the same direction.
        cosine_se: its standard error over images.
        rank: effective rank of the tokens; 1 means that all are multiples of one vector.
        rank_se: its standard error over the images it is computed for, every `RANK_EVERY`-th.
        full_rank: min(h * w, C), the largest possible rank.
    """

    layer: int
    where: str
    grid: Grid
    channels: int
    cosine: float
    cosine_se: float
    rank: float
    rank_se: float
    full_rank: int


class SmoothingMeter:
    """Running sums for one place."""

    def __init__(self, layer: int, where: str) -> None:
        self.layer, self.where = layer, where
        self.grid: Grid = (0, 0)
        self._cosines, self._ranks = Moments(), Moments()

    def add(self, x: Tensor) -> None:
        """Tokens of a batch, (B, h, w, C)."""
        self.grid, self.channels = (x.shape[1], x.shape[2]), x.shape[3]
        first = -self._cosines.count % RANK_EVERY  # images 0, 4, 8 ... of all, for any batch size
        tokens = x.flatten(1, 2)
        self._cosines.add(cosine_similarity(tokens))
        if first < len(tokens):
            self._ranks.add(effective_rank(tokens[first::RANK_EVERY]))

    def result(self) -> Smoothing:
        h, w = self.grid
        return Smoothing(
            self.layer,
            self.where,
            self.grid,
            self.channels,
            float(self._cosines.mean),
            float(self._cosines.standard_error),
            float(self._ranks.mean),
            float(self._ranks.standard_error),
            min(h * w, self.channels),
        )
