"""Attention distances of the heads of a layer, and their diversity.

The distance of a head is the Euclidean distance in pixels from query to key token on the grid, weighted by attention,
averaged over queries and images (Dosovitskiy et al. 2021, figure 11; Raghu et al. 2021). docs/analysis.md has the
formulas.

Legend of the shape comments: B images, H heads, N tokens with P prefix tokens (class token) first, n = N - P = h * w.
"""

import itertools
import math
import statistics
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from eit.analysis.frequency import RHO, Grid, annuli, basis, is_high
from eit.analysis.moments import Moments

NEAR_UNIFORM = 0.95  # of uniform entropy; if all heads of a layer are above, their diversity is not testable
QUERIES = 64  # per image, evenly spaced, at which pairs of heads are compared
MAP_BYTES = 1 << 22  # of attention maps at a time (at least one image), so that they stay in a CPU's cache


@lru_cache(maxsize=4)
def pairwise_distances(grid: Grid, pitch: float = 1.0) -> Tensor:
    """Pixels from each token of the grid to each other token, (n, n); `pitch` is the distance of two neighbours."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack((y.flatten(), x.flatten()), dim=1).double() * pitch
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _distances_on(device: torch.device, dtype: torch.dtype, grid: Grid, pitch: float) -> Tensor:
    """`pairwise_distances`, copied to a device once."""
    return pairwise_distances(grid, pitch).to(device, dtype)


def uniform_distance(grid: Grid, pitch: float = 1.0) -> float:
    """The distance of a head with uniform attention, in pixels."""
    return float(pairwise_distances(grid, pitch).mean())


def head_distances(
    weights: Tensor, grid: Grid, pitch: float = 1.0, prefix: int = 1, renormalize: bool = True
) -> Tensor:
    """Attention weights (B, H, N, N) -> pixels (B, H).

    Rows and columns of the `prefix` tokens are removed and the rows renormalised. Without `renormalize`, attention to
    the class token counts as distance 0, as in published notebooks of other papers.
    """
    away = _distances_on(weights.device, weights.dtype, grid, pitch)
    return _reduce(weights[:, :, prefix:], None, away, prefix, renormalize)[0]


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of one call of scaled dot-product attention: q, k (B, H, N, D)."""

    query: Tensor
    key: Tensor
    mask: Tensor | None = None  # broadcast to (B, H, N, N): bool, or added to the scores
    is_causal: bool = False
    scale: float | None = None

    def images(self, start: int, stop: int) -> "AttentionInputs":
        mask = self.mask
        if mask is not None and mask.dim() == 4 and len(mask) > 1:
            mask = mask[start:stop]
        return AttentionInputs(self.query[start:stop], self.key[start:stop], mask, self.is_causal, self.scale)

    def scores(self, first: int = 0) -> Tensor:
        """The input of softmax, (B, H, N - first, N), for the queries from `first` on; -inf is replaced by -1e30."""
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
    """Distance, prefix mass and entropy of each head, (B, H) each, from the weights (B, H, n, N) of the grid's queries.

    `away` has the pairwise distances (n, n). Entropy is in nats, of the row renormalised to the grid. With `scores`,
    the logarithms of the weights are not computed: log a = s - m + log max a, where m is the row's largest score.
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


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _modes_on(device: torch.device, n: int) -> Tensor:
    """`basis`, transposed and copied to a device once, in float32."""
    return basis(n).T.contiguous().to(device, torch.float32)


def mode_gains(weights: Tensor, grid: Grid) -> Tensor:
    """Attention of the grid to itself (B, H, n, n) -> energy gain of each real Fourier mode of the grid, (B, H, h, w).

    The gain of a mode m of unit energy is |A m|^2. Cosine and sine of a wave have one gain each. Their mean is the gain
    of the complex mode: the energy of its column of F A F^-1, where F is the 2-D DFT.
    """
    h, w = grid
    rows, columns = _modes_on(weights.device, h), _modes_on(weights.device, w)
    along_w = torch.matmul(weights.unflatten(3, (h, w)), columns)  # (B, H, n, h, w)
    return torch.matmul(rows.T, along_w).square().sum(dim=2)


def head_divergence(weights: Tensor) -> Tensor:
    """Attention rows (B, H, Q, n) that sum to 1 -> Jensen-Shannon divergence of each pair of heads, (B, pairs), nats.

    It is the mean over the Q queries: 0 for equal heads, log 2 for heads without a common key. The pairs have the order
    of itertools.combinations.
    """

    def entropy(rows: Tensor) -> Tensor:
        return -(rows * rows.clamp(min=torch.finfo(rows.dtype).tiny).log()).sum(dim=-1)

    if weights.device.type != "mps":  # nearly equal heads differ only in the last bits; MPS has no float64
        weights = weights.double()
    entropies, divergences = entropy(weights), []
    for head in range(weights.shape[1] - 1):
        both = (weights[:, head : head + 1] + weights[:, head + 1 :]) / 2
        divergences.append(entropy(both) - (entropies[:, head : head + 1] + entropies[:, head + 1 :]) / 2)
    if not divergences:
        return weights.new_zeros(len(weights), 0)
    return torch.cat(divergences, dim=1).clamp(min=0).mean(dim=-1)


def diversity(distances: list[float]) -> tuple[float, float, float]:
    """Standard deviation (ddof 1), range and mean pairwise gap of the heads' distances, in pixels; 0 for one head."""
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
        distance: attention distance in pixels, one value per head.
        distance_se: its standard error over images.
        class_mass: share of the grid's attention that goes to class token and registers, one value per head.
        entropy: nats, one value per head; log(h * w) for uniform attention.
        divergence: Jensen-Shannon divergence in nats, query by query, one value per pair of heads.
        rho: frequencies above it are high.
        gain: (heads, h, w), the factor by which attention changes the energy of each Fourier mode of the grid.
    """

    layer: int
    grid: Grid
    pitch: float
    distance: list[float]
    distance_se: list[float]
    class_mass: list[float]
    entropy: list[float]
    divergence: list[float]
    rho: float
    gain: Tensor = field(repr=False)

    @property
    def relative_entropy(self) -> list[float]:
        """Entropy relative to uniform attention, 0..1, one value per head."""
        return [nats / math.log(self.grid[0] * self.grid[1]) for nats in self.entropy]

    @property
    def near_uniform(self) -> bool:
        """Whether all heads are above 95% of uniform entropy, so that diversity is not testable."""
        return min(self.relative_entropy) > NEAR_UNIFORM

    @property
    def mean_divergence(self) -> float:
        """Mean divergence of two heads in nats, 0 to log 2; NaN for one head."""
        return statistics.fmean(self.divergence) if self.divergence else math.nan

    @property
    def low_gain(self) -> list[float]:
        """Mean energy gain of the modes with 0 < f <= rho, one value per head."""
        inside = ~is_high(self.grid, self.rho)
        inside[0, 0] = False
        return self._gain_in(inside)

    @property
    def high_gain(self) -> list[float]:
        """Mean energy gain of the modes with f > rho, one value per head."""
        return self._gain_in(is_high(self.grid, self.rho))

    def _gain_in(self, inside: Tensor) -> list[float]:
        """Mean gain of the modes inside, per head; NaN if there are none."""
        return [float(gain[inside].mean()) for gain in self.gain]

    def radial_gain(self) -> list[tuple[float, float, float]]:
        """(f from, f to, energy gain) of each ring of modes, averaged over heads and modes."""
        mean = self.gain.mean(dim=0)
        return [(low, high, float(mean[inside].mean())) for low, high, inside in annuli(self.grid)]

    @property
    def uniform(self) -> float:
        """The distance of uniform attention on this grid, in pixels."""
        return uniform_distance(self.grid, self.pitch)

    @property
    def std(self) -> float:
        """Head diversity: the standard deviation of the distances over heads, in pixels."""
        return diversity(self.distance)[0]

    @property
    def relative_std(self) -> float:
        """Head diversity divided by the distance of uniform attention, to compare grids of different pitch."""
        return self.std / self.uniform

    @property
    def range(self) -> float:
        """Largest minus smallest distance of a head, in pixels."""
        return diversity(self.distance)[1]

    @property
    def gap(self) -> float:
        """Mean difference of two heads' distances, in pixels."""
        return diversity(self.distance)[2]


class AttentionMeter:
    """Running sums for one layer; at most `MAP_BYTES` of attention maps are in memory."""

    def __init__(self, layer: int, renormalize: bool, rho: float = RHO) -> None:
        self.layer, self.renormalize, self.rho = layer, renormalize, rho
        self._moments, self._gains, self._divergences = Moments(), Moments(), Moments()

    def add(self, call: AttentionInputs, grid: Grid, pitch: float, prefix: int) -> None:
        self.grid, self.pitch = grid, pitch
        batch, heads, tokens = call.query.shape[:3]
        step = max(1, MAP_BYTES // (4 * heads * tokens**2))
        away = _distances_on(call.query.device, torch.float32, grid, pitch)
        every = -(-(tokens - prefix) // QUERIES)
        distances, gains, divergences = [], [], []
        for start in range(0, batch, step):
            scores = call.images(start, start + step).scores(prefix)
            weights = scores.softmax(dim=-1)
            distances.append(torch.stack(_reduce(weights, scores, away, prefix, self.renormalize), dim=1))
            on_grid = weights[..., prefix:]
            on_grid = on_grid / on_grid.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
            gains.append(mode_gains(on_grid, grid))
            divergences.append(head_divergence(on_grid[:, :, ::every]))
            del scores, weights, on_grid  # free them before the next images
        self._moments.add(torch.cat(distances))
        self._gains.add(torch.cat(gains))
        self._divergences.add(torch.cat(divergences))

    def result(self) -> Attention:
        distance, mass, entropy = self._moments.mean.tolist()
        return Attention(
            self.layer,
            self.grid,
            self.pitch,
            distance,
            self._moments.standard_error[0].tolist(),
            mass,
            entropy,
            self._divergences.mean.tolist(),
            self.rho,
            self._gains.mean,
        )


def merge_calls(calls: list[Attention]) -> Attention:
    """Join the heads of parallel attentions in one layer. Pairs of heads are only those within one attention."""
    first = calls[0]
    lists = {
        name: [value for call in calls for value in getattr(call, name)]
        for name in ("distance", "distance_se", "class_mass", "entropy", "divergence")
    }
    gain = torch.cat([call.gain for call in calls])
    return Attention(first.layer, first.grid, first.pitch, **lists, rho=first.rho, gain=gain)


def rollout(maps: Tensor, before: Tensor | None = None) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020) of one more layer: weights (B, H, N, N), rollout `before` it (B, N, N).

    Heads are averaged. Half of each token is assumed to come from the residual path.
    """
    mean = maps.mean(dim=1)
    step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    return step if before is None else step @ before
