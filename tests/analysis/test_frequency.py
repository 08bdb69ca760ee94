"""High-frequency shares, spectra and log amplitudes: cases with a closed form, plain loops, and invariances."""

import cmath
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eit.analysis.frequency import (
    RHOS,
    FrequencyMeter,
    diagonal_frequencies,
    filter_tokens,
    fourier_coefficients,
    frequencies,
    is_high,
    log_amplitude,
    noise_shares,
    shares,
)
from eit.analysis.moments import Moments

SETTINGS = settings(max_examples=30, deadline=None)
GRIDS = [(8, 8), (7, 7), (19, 19), (6, 9), (9, 6), (13, 27), (1, 5), (2, 2), (4, 1)]


def tokens(h, w, channels=3, images=2, seed=0):
    return torch.randn(images, h, w, channels, generator=torch.Generator().manual_seed(seed))


def of(pattern):
    """Shares of one image of one channel."""
    share, with_dc = shares(pattern[None, :, :, None])
    return share.item(), with_dc.item()


def grid_of(f, h=8, w=8):
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return f(y.double(), x.double()).float()


# -- Closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e4, 1e-20])
@pytest.mark.parametrize("grid", [(8, 8), (19, 19), (5, 7)])
def test_a_constant_has_no_high_frequencies(value, grid):
    assert of(torch.full(grid, value)) == (0, 0)


def test_a_constant_with_the_rounding_of_a_large_offset_has_none():
    small = 1e-5 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert of(small + 1e4) == (0, 0)  # float32 cannot hold it
    assert of(small)[0] > 0.5


def test_a_large_mean_does_not_round_a_faint_wave_into_noise():
    wave = grid_of(lambda y, x: 1000 + 0.01 * torch.cos(2 * math.pi * x / 19), 19, 19)
    assert of(wave)[0] < 1e-4


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (14, 14)])
def test_a_checkerboard_is_all_high_and_dc_counts_where_asked(grid):
    board = grid_of(lambda y, x: 1 - 2 * ((x + y) % 2), *grid)
    assert of(board) == pytest.approx((1, 1))
    assert of(board + 3) == pytest.approx((1, 1 / 10))
    assert of(board + 1e4)[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("cycles, high", [((0, 1), 0), ((2, 0), 0), ((1, 1), 0), ((2, 1), 1), ((0, 3), 1), ((4, 4), 1)])
def test_a_sinusoid_falls_on_its_side_of_rho(cycles, high):
    """On 8 x 8 tokens u cycles an image have f = u / 4: two of them lie on rho itself and are not above it."""
    wave = grid_of(lambda y, x: torch.cos(2 * math.pi * (cycles[0] * y + cycles[1] * x) / 8 + 0.3))
    assert of(wave) == pytest.approx((high, high), abs=1e-6)


@pytest.mark.parametrize("n, share, with_dc", [(8, 0.810, 0.797), (14, 0.815, 0.811), (19, 0.811, 0.809)])
def test_white_noise_has_k_of_n(n, share, with_dc):
    assert noise_shares((n, n)) == pytest.approx((share, with_dc), abs=5e-4)
    found = shares(tokens(n, n, channels=400, images=4))
    assert [v.mean().item() for v in found] == pytest.approx(noise_shares((n, n)), abs=5e-3)


def test_channels_without_energy_count_as_zero():
    board = grid_of(lambda y, x: 1 - 2 * ((x + y) % 2))
    both = torch.stack((board, torch.full((8, 8), 5.0)), dim=2)[None]
    assert shares(both)[0].item() == pytest.approx(0.5)


def test_a_blur_lowers_the_share():
    x = tokens(14, 14)
    image = x.permute(0, 3, 1, 2)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(image, (1, 1, 1, 1), mode="circular"), 3, 1)
    assert (shares(blurred.permute(0, 2, 3, 1))[0] < 0.6 * shares(x)[0]).all()


# -- Against plain loops and the FFT ----------------------------------------------------------------------------------


def by_loops(plane, rho):
    """The definition, coefficient by coefficient."""
    h, w = len(plane), len(plane[0])
    mean = sum(map(sum, plane)) / (h * w)
    high = total = 0.0
    for p in range(h):
        for q in range(w):
            f = sum(
                (plane[y][x] - mean) * cmath.exp(-2j * math.pi * (p * y / h + q * x / w))
                for y in range(h)
                for x in range(w)
            )
            u, v = min(p, h - p) / h, min(q, w - q) / w
            e = abs(f) ** 2 / (h * w) if p or q else 0.0
            total += e
            high += e if 2 * math.hypot(u, v) > rho + 1e-9 else 0.0
    return high / total, high / (total + h * w * mean**2)


@pytest.mark.parametrize("grid", [(5, 5), (4, 6), (6, 3), (1, 7)])
@pytest.mark.parametrize("rho", [0.3, 0.5, 1.0])
def test_plain_loops_agree(grid, rho):
    x = tokens(*grid, channels=2, images=1) + 0.7
    loops = [by_loops(x[0, :, :, c].tolist(), rho) for c in range(2)]
    expected = [sum(column) / 2 for column in zip(*loops, strict=True)]
    assert [v.item() for v in shares(x, rho)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_real_basis_is_the_fft(grid):
    x = tokens(*grid).double() + 2
    fft = torch.fft.fft2(x, dim=(1, 2), norm="ortho").abs()
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in grid)
    f = 2 * (rows[:, None] ** 2 + columns**2).sqrt()
    ours = fourier_coefficients(x).double().square()
    assert ours.sum(dim=(1, 2)) == pytest.approx(x.square().sum(dim=(1, 2)), rel=1e-5)  # Parseval
    for value in frequencies(grid).unique():
        a = ours[:, (frequencies(grid) - value).abs() < 1e-9].sum(dim=1)
        b = fft.square()[:, (f - value).abs() < 1e-9].sum(dim=1)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    diagonal = torch.stack([(fft[:, i, i] + 1e-6).log().mean(dim=1) for i in range(min(grid) // 2 + 1)], dim=1)
    assert log_amplitude(fourier_coefficients(x)).double() == pytest.approx(diagonal, abs=1e-4)
    assert diagonal_frequencies(grid) == pytest.approx([f[i, i].item() for i in range(min(grid) // 2 + 1)])


# -- Invariances ------------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda grid: grid != (1, 1))


@SETTINGS
@given(sizes, st.integers(0, 99), st.floats(0.01, 100), st.integers(0, 8), st.integers(0, 8))
def test_scale_shift_flip_and_transpose_change_nothing(grid, seed, scale, down, right):
    x = tokens(*grid, seed=seed) + 0.3
    before = torch.stack(shares(x))
    for changed in (scale * x, x.roll((down, right), (1, 2)), x.flip(1), x.flip(2), x.transpose(1, 2)):
        assert torch.stack(shares(changed)) == pytest.approx(before, abs=1e-4)


@SETTINGS
@given(sizes, st.integers(0, 99), st.floats(-10, 10))
def test_share_does_not_know_an_added_constant(grid, seed, constant):
    x = tokens(*grid, seed=seed)
    share, with_dc = shares(x + constant)
    assert share == pytest.approx(shares(x)[0], abs=1e-4)
    assert (with_dc <= share + 1e-6).all()


@SETTINGS
@given(sizes, st.integers(0, 99), st.lists(st.floats(0.01, 1.41), min_size=2, max_size=5))
def test_the_share_falls_as_rho_rises(grid, seed, rhos):
    x = tokens(*grid, seed=seed)
    found = [shares(x, rho)[0] for rho in sorted(rhos)]
    for lower, higher in itertools.pairwise(found):
        assert (higher <= lower + 1e-6).all()
    assert all(((f >= 0) & (f <= 1 + 1e-6)).all() for f in found)


# -- Filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rho", [0.3, 0.5, 1.1])
def test_low_and_high_are_the_fft_cut_at_rho_with_the_mean_in_both(grid, rho):
    x = tokens(*grid) + 5
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in grid)
    high = 2 * (rows[:, None] ** 2 + columns**2).sqrt() > rho + 1e-9
    spectrum = torch.fft.fft2(x.double(), dim=(1, 2))
    low = torch.fft.ifft2(spectrum * ~high[..., None], dim=(1, 2)).real
    mean = x.mean(dim=(1, 2), keepdim=True)
    assert filter_tokens(x, rho, "low").double() == pytest.approx(low, abs=1e-4)
    assert filter_tokens(x, rho, "low") + filter_tokens(x, rho, "high") - mean == pytest.approx(x, abs=1e-4)


def test_a_cut_leaves_the_share_zero_or_one_and_keeps_the_precision():
    x = tokens(8, 8) + 3
    assert shares(filter_tokens(x, 0.5, "low"))[0] == pytest.approx(torch.zeros(2), abs=1e-6)
    assert shares(filter_tokens(x, 0.5, "high"))[0] == pytest.approx(torch.ones(2), abs=1e-6)
    assert filter_tokens(x.bfloat16(), 0.5, "low").dtype == torch.bfloat16


# -- Running sums -----------------------------------------------------------------------------------------------------


def test_running_sums_are_those_of_all_images_at_once():
    x = tokens(6, 8, images=11)
    once, in_turn = FrequencyMeter(1, "block", 0.5), FrequencyMeter(1, "block", 0.5)
    once.add(x)
    for part in x.split([3, 1, 5, 2]):
        in_turn.add(part)
    a, b = once.result(), in_turn.result()
    assert (a.share, a.share_se, a.share_with_dc) == pytest.approx((b.share, b.share_se, b.share_with_dc), rel=1e-6)
    assert a.log_amplitude == pytest.approx(b.log_amplitude, abs=1e-5)
    logs = log_amplitude(fourier_coefficients(x)).mean(dim=0)
    assert a.log_amplitude[0] == 0 and a.log_amplitude == pytest.approx((logs - logs[0]).tolist(), abs=1e-5)
    each = shares(x)[0].double()
    assert a.share_se == pytest.approx(each.std().item() / math.sqrt(11), rel=1e-5)
    assert a.share == pytest.approx(each.mean().item(), rel=1e-6)


def test_the_sweep_is_the_share_above_each_rho():
    x = tokens(6, 8, images=5) + 1
    meter = FrequencyMeter(1, "block", 0.7)
    for part in x.split(2):
        meter.add(part)
    found = meter.result()
    for rho, share, with_dc in zip(RHOS, found.sweep, found.sweep_with_dc, strict=True):
        assert [share, with_dc] == pytest.approx([v.mean().item() for v in shares(x, rho)], abs=1e-6)
    assert found.sweep[RHOS.index(0.7)] == pytest.approx(found.share)
    assert RHOS[0] == 0.1 and RHOS[-1] == 1.4 and len(RHOS) == 14


def test_the_radial_spectrum_holds_all_energy_and_is_flat_for_white_noise():
    meter = FrequencyMeter(1, "block", 0.5)
    meter.add(tokens(14, 14, channels=64, images=20))
    rings = meter.result().radial()
    assert sum(share for _, _, share, _ in rings) == pytest.approx(1)
    assert sum(noise for *_, noise in rings) == pytest.approx(1)
    assert all(share == pytest.approx(noise, rel=0.05) for _, _, share, noise in rings)
    high = sum(share for low, _, share, _ in rings if low >= 0.5)
    assert high <= meter.result().share


def test_one_image_has_no_standard_error():
    moments = Moments()
    moments.add(torch.ones(1, 2))
    assert moments.standard_error.isnan().all() and moments.mean.tolist() == [1, 1]
    moments.add(torch.full((1, 2), 3.0))
    assert moments.standard_error.tolist() == [1, 1]


def test_half_precision_is_measured_in_single():
    x = tokens(8, 8)
    assert torch.stack(shares(x.bfloat16())) == pytest.approx(torch.stack(shares(x.bfloat16().float())), abs=1e-6)
    assert is_high((8, 8)).sum() == 51
