"""How far the heads of a layer look, and how much they differ.

The distance of a head is the Euclidean distance in pixels from query to key token on the grid, weighted by attention,
averaged over queries and images (Dosovitskiy et al. 2021, figure 11; Raghu et al. 2021). docs/analysis.md has the
definitions with their maths.

Legend of the shape comments: B images, H heads, N tokens with P prefix tokens (class token) first, n = N - P = h * w.
"""

import itertools
import statistics
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from eit.analysis.frequency import Grid
from eit.analysis.moments import Moments

MAP_BYTES = 1 << 22  # of attention maps alive at a time, if one image has no more: they stay in a CPU's cache then


@lru_cache(maxsize=4)
def pairwise_distances(grid: Grid, pitch: float = 1.0) -> Tensor:
    """Pixels from each token of the grid to each other one, (n, n), with `pitch` pixels from a token to the next."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack((y.flatten(), x.flatten()), dim=1).double() * pitch
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _distances_on(device: torch.device, dtype: torch.dtype, grid: Grid, pitch: float) -> Tensor:
    """`pairwise_distances`, copied to a device once."""
    return pairwise_distances(grid, pitch).to(device, dtype)


def uniform_distance(grid: Grid, pitch: float = 1.0) -> float:
    """Pixels: the distance of a head that looks everywhere alike."""
    return float(pairwise_distances(grid, pitch).mean())


def head_distances(
    weights: Tensor, grid: Grid, pitch: float = 1.0, prefix: int = 1, renormalize: bool = True
) -> Tensor:
    """Attention weights (B, H, N, N) -> pixels (B, H).

    Rows and columns of the `prefix` tokens are cut and the rows renormalised; without `renormalize` they are not, as in
    the published notebooks, and mass on the class token counts as distance 0.
    """
    away = _distances_on(weights.device, weights.dtype, grid, pitch)
    return _reduce(weights[:, :, prefix:], None, away, prefix, renormalize)[0]


@dataclass(frozen=True)
class Call:
    """Arguments of one call of scaled dot-product attention: q, k (B, H, N, D)."""

    query: Tensor
    key: Tensor
    mask: Tensor | None = None  # broadcast to (B, H, N, N): bool, or added to the scores
    is_causal: bool = False
    scale: float | None = None

    def images(self, start: int, stop: int) -> "Call":
        mask = self.mask
        if mask is not None and mask.dim() == 4 and len(mask) > 1:
            mask = mask[start:stop]
        return Call(self.query[start:stop], self.key[start:stop], mask, self.is_causal, self.scale)

    def scores(self, first: int = 0) -> Tensor:
        """What softmax takes, (B, H, N - first, N), of the queries from `first` on; -inf is replaced by -1e30."""
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        key = self.key.float()
        if key.shape[1] != self.query.shape[1]:  # grouped queries
            key = key.repeat_interleave(self.query.shape[1] // key.shape[1], dim=1)
        scores = (self.query[:, :, first:].float() * scale) @ key.transpose(-1, -2)
        mask = self.mask
        if self.is_causal:
            mask = torch.ones(self.query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
        if mask is not None:
            mask = mask[..., first:, :] if mask.shape[-2] > 1 else mask
            added = torch.where(mask, 0.0, -1e30) if mask.dtype == torch.bool else mask.float().clamp(min=-1e30)
            scores += added
        return scores

    def weights(self) -> Tensor:
        """(B, H, N, N), rows sum to 1."""
        return self.scores().softmax(dim=-1)


def _reduce(
    weights: Tensor, scores: Tensor | None, away: Tensor, prefix: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Distance, prefix mass and entropy of each head, (B, H) each, of the grid's queries: weights (B, H, n, N).

    `away` are the pairwise distances (n, n). Entropy is in nats, of the row renormalised to the grid. With the `scores`
    of the weights no logarithm of each weight is needed: log a = s - m + log max a, m the row's largest score.
    """
    on_grid = weights[..., prefix:]
    total = on_grid.sum(dim=-1).clamp(min=torch.finfo(weights.dtype).tiny)
    distance = (on_grid * away).sum(dim=-1)
    if renormalize:
        distance = distance / total
    if scores is None:
        logs = -torch.special.entr(on_grid).sum(dim=-1)
    else:
        log_sum = scores.amax(dim=-1) - weights.amax(dim=-1).log()
        logs = (on_grid * scores[..., prefix:]).sum(dim=-1) - total * log_sum
    entropy = total.log() - logs / total
    mass = weights[..., :prefix].sum(dim=-1)
    return distance.mean(dim=-1), mass.mean(dim=-1), entropy.mean(dim=-1)


def diversity(distances: list[float]) -> tuple[float, float, float]:
    """Of the heads of a layer, pixels: standard deviation (ddof 1), range, mean gap of a pair. One head has none: 0."""
    if len(distances) < 2:
        return 0.0, 0.0, 0.0
    gaps = [abs(a - b) for a, b in itertools.combinations(distances, 2)]
    return statistics.stdev(distances), max(distances) - min(distances), statistics.fmean(gaps)


@dataclass
class Attention:
    """One layer's heads, over all images.

    Attributes:
        layer: 1 is the first.
        grid: tokens (h, w).
        pitch: pixels from one token to the next.
        distance: pixels, one entry a head: how far it looks.
        distance_se: its standard error over images.
        class_mass: share of the grid's attention that goes to class token and registers, one entry a head.
        entropy: nats, one entry a head; log(h * w) where it looks everywhere alike.
    """

    layer: int
    grid: Grid
    pitch: float
    distance: list[float]
    distance_se: list[float]
    class_mass: list[float]
    entropy: list[float]

    @property
    def uniform(self) -> float:
        """Pixels: the distance of uniform attention on this grid."""
        return uniform_distance(self.grid, self.pitch)

    @property
    def std(self) -> float:
        """Pixels: head diversity, the standard deviation over heads."""
        return diversity(self.distance)[0]

    @property
    def relative_std(self) -> float:
        """Head diversity by the distance of uniform attention, which grids of different pitch can be compared by."""
        return self.std / self.uniform

    @property
    def range(self) -> float:
        """Pixels: from the nearest to the farthest head."""
        return diversity(self.distance)[1]

    @property
    def gap(self) -> float:
        """Pixels: the mean difference of two heads."""
        return diversity(self.distance)[2]


class AttentionMeter:
    """Running sums of one layer; at most `MAP_BYTES` of its maps are alive."""

    def __init__(self, layer: int, renormalize: bool) -> None:
        self.layer, self.renormalize = layer, renormalize
        self._moments = Moments()

    def add(self, call: Call, grid: Grid, pitch: float, prefix: int) -> None:
        self.grid, self.pitch = grid, pitch
        batch, heads, tokens = call.query.shape[:3]
        step = max(1, MAP_BYTES // (4 * heads * tokens**2))
        away = _distances_on(call.query.device, torch.float32, grid, pitch)
        found = []
        for start in range(0, batch, step):
            scores = call.images(start, start + step).scores(prefix)
            found.append(torch.stack(_reduce(scores.softmax(dim=-1), scores, away, prefix, self.renormalize), dim=1))
        self._moments.add(torch.cat(found))

    def result(self) -> Attention:
        distance, mass, entropy = self._moments.mean.tolist()
        return Attention(
            self.layer, self.grid, self.pitch, distance, self._moments.standard_error[0].tolist(), mass, entropy
        )


def together(calls: list[Attention]) -> Attention:
    """The heads of attentions that run side by side in one layer, as one."""
    first = calls[0]
    lists = {
        name: [value for call in calls for value in getattr(call, name)]
        for name in ("distance", "distance_se", "class_mass", "entropy")
    }
    return Attention(first.layer, first.grid, first.pitch, **lists)


def rollout(maps: Tensor, before: Tensor | None = None) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): a layer's weights (B, H, N, N) on top of what came `before` (B, N, N).

    Heads are averaged and half of each token is taken to pass by on the residual path.
    """
    mean = maps.mean(dim=1)
    step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    return step if before is None else step @ before
