"""High-frequency share, radial spectrum and relative log amplitude of a layer's tokens.

The frequency of a bin is f = 2 sqrt(u^2 + v^2), u and v in cycles per token: 1 is the Nyquist frequency of an axis,
sqrt(2) the corner. Shares are 0..1. docs/analysis.md has the formulas.

Legend of the shape comments: B images, (h, w) token grid, C channels.
"""

import itertools
import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from eit.analysis.moments import Moments

RHO = 0.5  # frequencies above half the Nyquist frequency of an axis are high
ANNULI = 12  # of the radial spectrum, of equal width from 0 to sqrt(2)
RHOS = tuple(round(0.1 * i, 9) for i in range(1, 15))  # of the sweep: 0.1 ... 1.4

Grid = tuple[int, int]


@lru_cache(maxsize=64)
def basis(n: int) -> Tensor:
    """The real Fourier basis, (n, n) float64 with orthonormal rows: 1, cos 1, sin 1, cos 2, sin 2 ... in cycles of n.

    With the basis on both axes, the squared coefficients of a frequency sum to the energy of the FFT's bins (+-u, +-v).
    On small grids two matrix products take less than half of the FFT's time (benchmarks/analysis.py).
    """
    angle = 2 * math.pi * cycles(n)[:, None] * torch.arange(n)
    rows = torch.where(torch.arange(n)[:, None] % 2 == 0, angle.sin(), angle.cos())
    rows[0] = 1
    return rows / rows.norm(dim=1, keepdim=True)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _basis_on(device: torch.device, n: int) -> Tensor:
    """`basis`, copied to a device once, in float32."""
    return basis(n).to(device, torch.float32)


def cycles(n: int) -> Tensor:
    """Cycles per token of each row of `basis(n)`: 0, 1, 1, 2, 2 ... divided by n."""
    return (torch.arange(n) + 1).div(2, rounding_mode="floor").double() / n


@lru_cache(maxsize=64)
def frequencies(grid: Grid) -> Tensor:
    """f of each coefficient, (h, w), float64."""
    return 2 * (cycles(grid[0])[:, None] ** 2 + cycles(grid[1]) ** 2).sqrt()


def is_high(grid: Grid, rho: float = RHO) -> Tensor:
    """Whether f > rho, (h, w). f = rho is low, also with a rounding error of the square root."""
    return frequencies(grid) > rho + 1e-9


def annuli(grid: Grid) -> list[tuple[float, float, Tensor]]:
    """(f from, f to, mask of its coefficients (h, w)) of each annulus that is not empty; none contains DC."""
    f, edges = frequencies(grid), [math.sqrt(2) * i / ANNULI for i in range(ANNULI + 1)]
    rings = [(low, high, (f > low + 1e-9) & (f <= high + 1e-9)) for low, high in itertools.pairwise(edges)]
    return [(low, high, inside) for low, high, inside in rings if inside.any()]


def noise_shares(grid: Grid, rho: float = RHO) -> tuple[float, float]:
    """Mean `share` and `share_with_dc` of white noise: high coefficients divided by all but DC, and by all."""
    n, k = grid[0] * grid[1], int(is_high(grid, rho).sum())
    return k / (n - 1), k / n


def fourier_coefficients(x: Tensor) -> Tensor:
    """Tokens (B, h, w, C) -> coefficients in the real Fourier basis of both axes, the same shape; [:, 0, 0] is DC.

    The mean is subtracted before and put back after, so that a large mean does not round the other coefficients. A
    channel that varies by no more than the rounding of its mean has only DC.
    """
    h, w = x.shape[1:3]
    rounding = torch.finfo(x.dtype).eps
    x = x.float()
    mean = x.mean(dim=(1, 2), keepdim=True)
    along_h = torch.matmul(_basis_on(x.device, h), (x - mean).flatten(2)).unflatten(2, (w, -1))
    coefficients = torch.matmul(_basis_on(x.device, w), along_h)
    coefficients[:, 0, 0] = 0
    dc = mean[:, 0, 0] * math.sqrt(h * w)
    varies = coefficients.square().sum(dim=(1, 2)) > (rounding * dc).square()
    coefficients *= varies[:, None, None]
    coefficients[:, 0, 0] = dc
    return coefficients


def shares(x: Tensor, rho: float = RHO) -> tuple[Tensor, Tensor]:
    """(B, h, w, C) -> `share`, `share_with_dc`, each (B,): means over channels. A channel without energy has 0."""
    without, with_dc = _shares(fourier_coefficients(x).square(), (rho,))
    return without[:, 0], with_dc[:, 0]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _sums_on(device: torch.device, grid: Grid, rhos: tuple[float, ...]) -> Tensor:
    """(2 + R, h * w): 0-1 masks of the coefficients without DC, of DC, and of those above each rho."""
    dc = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    dc[0] = True
    high = [is_high(grid, rho).flatten() for rho in rhos]
    return torch.stack((~dc, dc, *high)).to(device, torch.float32)


def _shares(energy: Tensor, rhos: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(B, h, w, C) -> `share` and `share_with_dc` above each rho, (B, R) each."""
    sums = _sums_on(energy.device, (energy.shape[1], energy.shape[2]), rhos)
    shares = torch.matmul(sums, energy.flatten(1, 2))  # (B, 2 + R, C)
    varying, constant, above = shares[:, :1], shares[:, 1:2], shares[:, 2:]
    without = torch.where(varying == 0, 0, above / varying)
    with_dc = torch.where(varying == 0, 0, above / (varying + constant))
    return without.mean(dim=2), with_dc.mean(dim=2)


def filter_tokens(x: Tensor, rho: float, kept: str) -> Tensor:
    """Low-pass (`kept` is "low": frequencies up to rho) or high-pass ("high": above rho) filter of tokens (B, h, w, C).

    Both keep the mean of each channel, which `share` excludes too.
    """
    h, w = x.shape[1], x.shape[2]
    away = is_high((h, w), rho) if kept == "low" else ~is_high((h, w), rho)
    away[0, 0] = False
    coefficients = fourier_coefficients(x).masked_fill(away.to(x.device)[..., None], 0)
    rows, columns = _basis_on(x.device, h), _basis_on(x.device, w)
    along_w = torch.matmul(columns.T, coefficients)
    return torch.matmul(rows.T, along_w.flatten(2)).unflatten(2, (w, -1)).to(x.dtype)


def diagonal_frequencies(grid: Grid) -> list[float]:
    """f of the FFT's bins (i, i) from DC to the corner: the half diagonal."""
    return [2 * math.hypot(i / grid[0], i / grid[1]) for i in range(min(grid) // 2 + 1)]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _half_diagonal_on(device: torch.device, grid: Grid) -> tuple[Tensor, Tensor]:
    """(4, k): flat indices of the coefficients cos x cos, sin x sin, cos x sin and sin x cos of the FFT's bins (i, i),
    i = 1 ... k; (4, k, 1): the factor of each, 0 for a coefficient that does not exist."""
    h, w = grid
    steps = torch.arange(1, min(h, w) // 2 + 1)
    cos, sin = 2 * steps - 1, 2 * steps
    half = [torch.where(sin < n, 0.5, 1.0).sqrt() for n in (h, w)]
    pairs = [(cos, cos), (sin, sin), (cos, sin), (sin, cos)]
    places = [rows.clamp(max=h - 1) * w + columns.clamp(max=w - 1) for rows, columns in pairs]
    factors = [half[0] * half[1] * ((rows < h) & (columns < w)) for rows, columns in pairs]
    return torch.stack(places).to(device), torch.stack(factors)[..., None].to(device)


def log_amplitude(coefficients: Tensor) -> Tensor:
    """log(|F| + 1e-6) on the FFT's half diagonal, averaged over channels: (B, h, w, C) -> (B, min(h, w) // 2 + 1).

    F = C - iS on each axis. C and S are the coefficients of cos and sin divided by sqrt(2); at DC and at an axis's
    Nyquist frequency F = C. Park & Kim (ICLR 2022, arXiv 2202.06709) show it minus its first value.
    """
    places, factors = _half_diagonal_on(coefficients.device, (coefficients.shape[1], coefficients.shape[2]))
    both_cos, both_sin, cos_sin, sin_cos = (coefficients.flatten(1, 2)[:, places] * factors).unbind(dim=1)
    real, imaginary = both_cos - both_sin, cos_sin + sin_cos
    amplitude = torch.cat((coefficients[:, :1, 0].abs(), torch.hypot(real, imaginary)), dim=1)
    return (amplitude + 1e-6).log().mean(dim=2)


@dataclass
class Frequency:
    """Frequencies at one place of a model, over all images. Standard errors are NaN for one image.

    Attributes:
        layer: 1 is the first; 0 is the stem's output.
        where: stem, mixer, block; conv, attention: channels of the mixer's output, before the residual is added.
        channels: number of channels.
        grid: tokens (h, w).
        pitch: pixels from one token to the next.
        rho: frequencies above it are high.
        share: of high frequencies in the energy without DC, 0..1, averaged over channels and images.
        share_se: its standard error over images.
        share_with_dc: share of high frequencies in all energy.
        share_with_dc_se: its standard error over images.
        noise_share: `share` of white noise on this grid.
        noise_share_with_dc: `share_with_dc` of white noise.
        log_amplitude: relative log amplitude at `diagonal_frequencies(grid)`; the first is 0.
        energy: (h, w), of each coefficient, averaged over channels and images.
        sweep: `share` above each of `RHOS`.
        sweep_with_dc: `share_with_dc` above each of them.
    """

    layer: int
    where: str
    channels: int
    grid: Grid
    pitch: float
    rho: float
    share: float
    share_se: float
    share_with_dc: float
    share_with_dc_se: float
    noise_share: float
    noise_share_with_dc: float
    log_amplitude: list[float]
    energy: Tensor = field(repr=False)
    sweep: list[float] = field(repr=False)
    sweep_with_dc: list[float] = field(repr=False)

    def radial(self) -> list[tuple[float, float, float, float]]:
        """(f from, f to, share of the energy without DC, that share for white noise) of each annulus."""
        total, modes = float(self.energy.sum() - self.energy[0, 0]), self.energy.numel() - 1
        return [
            (low, high, float(self.energy[inside].sum()) / total if total else 0.0, int(inside.sum()) / modes)
            for low, high, inside in annuli(self.grid)
        ]


class FrequencyMeter:
    """Running sums for one place."""

    def __init__(self, layer: int, where: str, rho: float) -> None:
        self.layer, self.where, self.rho = layer, where, rho
        self.grid: Grid | None = None
        self._shares, self._logs, self._energy = Moments(), Moments(), Moments()

    def add(self, x: Tensor, pitch: float = 1.0) -> None:
        """Add the tokens of a batch, (B, h, w, C)."""
        self.add_coefficients(fourier_coefficients(x), pitch)

    def add_coefficients(self, coefficients: Tensor, pitch: float = 1.0) -> None:
        """Add the result of `fourier_coefficients` for a batch, (B, h, w, C)."""
        _, h, w, self.channels = coefficients.shape
        self.grid, self.pitch = (h, w), pitch
        energy = coefficients.square()
        self._shares.add(torch.stack(_shares(energy, (self.rho, *RHOS)), dim=1))
        self._logs.add(log_amplitude(coefficients))
        self._energy.add(energy.mean(dim=3))

    def result(self) -> Frequency:
        assert self.grid is not None
        (share, *sweep), (with_dc, *sweep_with_dc) = self._shares.mean.tolist()
        se, with_dc_se = self._shares.standard_error[:, 0].tolist()
        logs = self._logs.mean
        return Frequency(
            self.layer,
            self.where,
            self.channels,
            self.grid,
            self.pitch,
            self.rho,
            share,
            se,
            with_dc,
            with_dc_se,
            *noise_shares(self.grid, self.rho),
            log_amplitude=(logs - logs[0]).tolist(),
            energy=self._energy.mean,
            sweep=sweep,
            sweep_with_dc=sweep_with_dc,
        )
