"""How far the heads of a layer look, and how much they differ.

The distance of a head is the Euclidean distance in pixels from query to key token on the grid, weighted by attention,
averaged over queries and images (Dosovitskiy et al. 2021, figure 11; Raghu et al. 2021). docs/analysis.md has the
definitions with their maths.

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

NEAR_UNIFORM = 0.95  # of uniform entropy: where all heads of a layer are above, their diversity is not testable
QUERIES = 64  # of an image, evenly spaced, that heads are compared at: pairs of heads are many
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


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _modes_on(device: torch.device, n: int) -> Tensor:
    """`basis`, transposed and copied to a device once, in float32."""
    return basis(n).T.contiguous().to(device, torch.float32)


def mode_gains(weights: Tensor, grid: Grid) -> Tensor:
    """Attention of the grid to itself (B, H, n, n) -> energy gain of each real Fourier mode of the grid, (B, H, h, w).

    The gain of a mode m of unit energy is |A m|^2. A wave's cosine and sine have one gain each; their mean is that of
    the complex mode, the energy of its column of F A F^-1, F the 2-D DFT.
    """
    h, w = grid
    rows, columns = _modes_on(weights.device, h), _modes_on(weights.device, w)
    along_w = torch.matmul(weights.unflatten(3, (h, w)), columns)  # (B, H, n, h, w)
    return torch.matmul(rows.T, along_w).square().sum(dim=2)


def head_divergence(weights: Tensor) -> Tensor:
    """Attention rows (B, H, Q, n) that sum to 1 -> Jensen-Shannon divergence of each pair of heads, (B, pairs), nats.

    The mean over the Q queries; 0 for equal heads, log 2 for heads that look at no place in common. Pairs in the order
    of itertools.combinations.
    """

    def entropy(rows: Tensor) -> Tensor:
        return -(rows * rows.clamp(min=torch.finfo(rows.dtype).tiny).log()).sum(dim=-1)

    if weights.device.type != "mps":  # which has no float64: heads that are nearly alike differ in the last bits
        weights = weights.double()
    entropies, divergences = entropy(weights), []
    for head in range(weights.shape[1] - 1):
        both = (weights[:, head : head + 1] + weights[:, head + 1 :]) / 2
        divergences.append(entropy(both) - (entropies[:, head : head + 1] + entropies[:, head + 1 :]) / 2)
    if not divergences:
        return weights.new_zeros(len(weights), 0)
    return torch.cat(divergences, dim=1).clamp(min=0).mean(dim=-1)


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
        divergence: nats, Jensen-Shannon, one entry a pair of heads, which compares them query by query.
        rho: the frequency above which `high_gain` counts.
        gain: (heads, h, w), by what attention among the grid's tokens multiplies the energy of each Fourier mode.
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
        """Of uniform attention's, 0..1, one entry a head."""
        return [nats / math.log(self.grid[0] * self.grid[1]) for nats in self.entropy]

    @property
    def near_uniform(self) -> bool:
        """Whether all heads are above 95% of uniform entropy: then diversity is not testable."""
        return min(self.relative_entropy) > NEAR_UNIFORM

    @property
    def mean_divergence(self) -> float:
        """Nats: of two heads in the mean, 0 to log 2. NaN of one head."""
        return statistics.fmean(self.divergence) if self.divergence else math.nan

    @property
    def low_gain(self) -> list[float]:
        """Energy gain at 0 < f <= rho, mean over the modes, one entry a head."""
        inside = ~is_high(self.grid, self.rho)
        inside[0, 0] = False
        return self._gain_in(inside)

    @property
    def high_gain(self) -> list[float]:
        """Energy gain at f > rho, mean over the modes, one entry a head."""
        return self._gain_in(is_high(self.grid, self.rho))

    def _gain_in(self, inside: Tensor) -> list[float]:
        """NaN where the grid has no mode inside."""
        return [float(gain[inside].mean()) for gain in self.gain]

    def radial_gain(self) -> list[tuple[float, float, float]]:
        """(f from, f to, energy gain) of each ring of modes, the mean over heads and the ring's modes."""
        mean = self.gain.mean(dim=0)
        return [(low, high, float(mean[inside].mean())) for low, high, inside in annuli(self.grid)]

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

    def __init__(self, layer: int, renormalize: bool, rho: float = RHO) -> None:
        self.layer, self.renormalize, self.rho = layer, renormalize, rho
        self._moments, self._gains, self._divergences = Moments(), Moments(), Moments()

    def add(self, call: Call, grid: Grid, pitch: float, prefix: int) -> None:
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
            del scores, weights, on_grid  # before those of the next images are made
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


def together(calls: list[Attention]) -> Attention:
    """The heads of attentions that run side by side in one layer, as one. Pairs are those within an attention."""
    first = calls[0]
    lists = {
        name: [value for call in calls for value in getattr(call, name)]
        for name in ("distance", "distance_se", "class_mass", "entropy", "divergence")
    }
    gain = torch.cat([call.gain for call in calls])
    return Attention(first.layer, first.grid, first.pitch, **lists, rho=first.rho, gain=gain)


def rollout(maps: Tensor, before: Tensor | None = None) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): a layer's weights (B, H, N, N) on top of what came `before` (B, N, N).

    Heads are averaged and half of each token is taken to pass by on the residual path.
    """
    mean = maps.mean(dim=1)
    step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    return step if before is None else step @ before
