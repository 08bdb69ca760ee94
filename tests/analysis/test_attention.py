"""Attention distances and head diversity: cases with a closed form, plain loops, and invariances."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eit.analysis.attention import (
    QUERIES,
    Attention,
    AttentionInputs,
    AttentionMeter,
    diversity,
    head_distances,
    head_divergence,
    mode_gains,
    pairwise_distances,
    rollout,
    uniform_distance,
)

SETTINGS = settings(max_examples=30, deadline=None)


def random_weights(h, w, heads=3, images=2, prefix=1, seed=0):
    n = h * w + prefix
    return torch.randn(images, heads, n, n, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(dim=-1)


# -- Closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (1, 7), (3, 5)])
def test_a_head_that_looks_at_itself_has_distance_zero(grid):
    eye = torch.eye(grid[0] * grid[1])[None, None]
    assert head_distances(eye, grid, pitch=16, prefix=0).item() == 0


def test_uniform_attention_has_the_mean_pairwise_distance():
    assert uniform_distance((2, 2)) == pytest.approx((2 + math.sqrt(2)) / 4)
    for n in (2, 5, 13):
        assert uniform_distance((1, n)) == pytest.approx((n**2 - 1) / (3 * n))
    assert uniform_distance((14, 14), 16) == pytest.approx(116.49, abs=5e-3)
    assert uniform_distance((19, 19), 12) == pytest.approx(118.72, abs=5e-3)
    assert uniform_distance((60, 60), 1 / 60) == pytest.approx(0.5214, abs=2e-4)  # of the side, in the continuum
    n = 5 * 4 + 1
    uniform = torch.full((1, 2, n, n), 1 / n)
    assert head_distances(uniform, (5, 4), 3.0) == pytest.approx(torch.full((1, 2), uniform_distance((5, 4), 3.0)))


@pytest.mark.parametrize("shift, axis", [(1, "x"), (1, "y"), (2, "x")])
def test_a_head_that_looks_at_its_neighbour_has_one_pitch(shift, axis):
    """On a grid of 1 x n or n x 1; the last tokens, which have no such neighbour, look at themselves."""
    n = 6
    weights = torch.zeros(n, n)
    for i in range(n):
        weights[i, i + shift if i + shift < n else i] = 1
    grid = (1, n) if axis == "x" else (n, 1)
    expected = 16 * shift * (n - shift) / n
    assert head_distances(weights[None, None], grid, 16, prefix=0).item() == pytest.approx(expected)


def test_half_the_mass_on_the_class_token_changes_nothing_once_rows_are_renormalised():
    plain = random_weights(4, 5, prefix=0)
    with_class = torch.zeros(2, 3, 21, 21)
    with_class[..., 0, :] = 1 / 21
    with_class[..., 1:, 0] = 0.5
    with_class[..., 1:, 1:] = plain / 2
    assert head_distances(with_class, (4, 5)) == pytest.approx(head_distances(plain, (4, 5), prefix=0), rel=1e-5)
    published = head_distances(with_class, (4, 5), renormalize=False)
    assert published == pytest.approx(head_distances(plain, (4, 5), prefix=0) / 2, rel=1e-5)


def test_diversity_of_known_distances():
    assert diversity([1.0, 3.0]) == (pytest.approx(math.sqrt(2)), 2, 2)
    assert diversity([2.0, 2.0, 2.0]) == (0, 0, 0)
    assert diversity([1.0, 2.0, 6.0]) == (pytest.approx(math.sqrt(7)), 5, pytest.approx(10 / 3))
    assert diversity([5.0]) == (0, 0, 0)


# -- Against plain loops ----------------------------------------------------------------------------------------------


def by_loops(weights, grid, pitch, prefix):
    """The definition, pair by pair; query and key do not commute on a grid that is not square."""
    h, w = grid
    found = []
    for head in weights:
        total = 0.0
        for qy in range(h):
            for qx in range(w):
                row = head[prefix + qy * w + qx]
                mass = sum(row[prefix:])
                for ky in range(h):
                    for kx in range(w):
                        away = pitch * math.sqrt((qy - ky) ** 2 + (qx - kx) ** 2)
                        total += away * row[prefix + ky * w + kx] / mass
        found.append(total / (h * w))
    return found


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (1, 6), (5, 5)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_plain_loops_agree(grid, prefix):
    weights = random_weights(*grid, images=1, prefix=prefix)
    expected = by_loops(weights[0].tolist(), grid, 12, prefix)
    assert head_distances(weights, grid, 12, prefix)[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_query_and_key_are_not_confused():
    """Every query looks at the corner: the mean distance to it, which the transpose does not have."""
    weights = torch.zeros(1, 1, 6, 6)
    weights[..., 0] = 1
    to_corner = pairwise_distances((2, 3))[0].mean().item()
    assert head_distances(weights, (2, 3), prefix=0).item() == pytest.approx(to_corner)


# -- Invariances ------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99), st.floats(0.1, 50))
def test_distance_is_linear_in_pitch_and_keeps_the_order_of_heads(h, w, seed, pitch):
    weights = random_weights(h, w, seed=seed)
    once = head_distances(weights, (h, w))
    assert head_distances(weights, (h, w), pitch) == pytest.approx(once * pitch, rel=1e-4, abs=1e-6)
    assert head_distances(weights.flip(1), (h, w)) == pytest.approx(once.flip(1), rel=1e-5, abs=1e-6)
    assert diversity(once[0].tolist()) == pytest.approx(diversity(once.flip(1)[0].tolist()), abs=1e-6)
    furthest = pairwise_distances((h, w)).max().item()
    assert (once >= 0).all() and (once <= furthest + 1e-4).all()


# -- From queries and keys --------------------------------------------------------------------------------------------


def meter_of(call, grid, prefix, renormalize=True):
    meter = AttentionMeter(1, renormalize)
    meter.add(call, grid, 2.0, prefix)
    return meter.result()


@pytest.mark.parametrize("mask", ["none", "bool", "added", "causal"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_what_is_measured_of_queries_and_keys_is_that_of_the_weights(mask, prefix):
    torch.manual_seed(0)
    grid, n = (3, 4), 12 + prefix
    q, k, v = torch.randn(3, 5, 2, n, 8)
    masks = dict(bool=torch.rand(n, n) > 0.3, added=torch.randn(1, 2, n, n))
    masks["bool"] |= torch.eye(n, dtype=torch.bool)
    call = AttentionInputs(q, k, masks.get(mask), is_causal=mask == "causal", scale=0.7)
    weights = call.weights()
    fused = F.scaled_dot_product_attention(q, k, v, masks.get(mask), is_causal=mask == "causal", scale=0.7)
    assert weights @ v == pytest.approx(fused, abs=1e-5)
    found = meter_of(call, grid, prefix)
    assert found.distance == pytest.approx(head_distances(weights, grid, 2.0, prefix).mean(dim=0).tolist(), rel=1e-5)
    assert found.class_mass == pytest.approx(weights[:, :, prefix:, :prefix].sum(-1).mean((0, 2)).tolist(), abs=1e-6)
    rows = weights[:, :, prefix:, prefix:]
    rows = rows / rows.sum(dim=-1, keepdim=True)
    expected = torch.special.entr(rows).sum(dim=-1).mean(dim=(0, 2)).tolist()
    assert found.entropy == pytest.approx(expected, abs=1e-5)


def test_uniform_attention_has_the_largest_entropy():
    q = torch.zeros(2, 3, 13, 4)
    assert meter_of(AttentionInputs(q, torch.randn(2, 3, 13, 4)), (3, 4), 1).entropy == pytest.approx(
        [math.log(12)] * 3
    )


def test_grouped_queries_share_their_keys():
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    expected = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 8**0.5).softmax(dim=-1)
    assert AttentionInputs(q, k).weights() == pytest.approx(expected, abs=1e-6)


def test_images_are_taken_in_turn_with_the_same_result(monkeypatch):
    torch.manual_seed(0)
    call = AttentionInputs(torch.randn(7, 2, 13, 4), torch.randn(7, 2, 13, 4), torch.randn(7, 1, 13, 13))
    at_once = meter_of(call, (3, 4), 1)
    monkeypatch.setattr("eit.analysis.attention.MAP_BYTES", 1)
    in_turn = meter_of(call, (3, 4), 1)
    for name in ("distance", "distance_se", "class_mass", "entropy", "divergence"):
        assert getattr(in_turn, name) == pytest.approx(getattr(at_once, name), rel=1e-5)
    assert in_turn.gain == pytest.approx(at_once.gain, rel=1e-5)


# -- As a filter ------------------------------------------------------------------------------------------------------


def shifts(grid, *steps):
    """Attention that looks (down, right) of itself, around the edges, evenly at several places: (1, 1, n, n)."""
    h, w = grid
    found = torch.zeros(h * w, h * w)
    for y in range(h):
        for x in range(w):
            for down, right in steps:
                found[y * w + x, (y + down) % h * w + (x + right) % w] += 1 / len(steps)
    return found[None, None]


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
def test_identity_and_shifts_pass_all_frequencies_and_uniform_attention_none_but_dc(grid):
    n = grid[0] * grid[1]
    for passing in (torch.eye(n)[None, None], shifts(grid, (0, 1)), shifts(grid, (1, 2))):
        assert mode_gains(passing, grid) == pytest.approx(torch.ones(1, 1, *grid), abs=1e-5)
    dc = torch.zeros(1, 1, *grid)
    dc[..., 0, 0] = 1
    assert mode_gains(torch.full((1, 1, n, n), 1 / n), grid) == pytest.approx(dc, abs=1e-6)


def test_attention_to_both_neighbours_has_the_cosine_of_the_wave():
    """(e^(i k) + e^(-i k)) / 2 = cos k: energy cos^2 k, which passes the lowest and the highest waves."""
    found = mode_gains(shifts((1, 8), (0, 1), (0, -1)), (1, 8))[0, 0, 0]
    waves = [0, 1, 1, 2, 2, 3, 3, 4]
    assert found.tolist() == pytest.approx([math.cos(2 * math.pi * k / 8) ** 2 for k in waves], abs=1e-6)


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (5, 5)])
def test_gains_are_the_columns_of_the_attention_in_fourier_space(grid):
    """|F A F^-1|^2 summed over rows, by the FFT's own matrix; cos and sin share each wave's."""
    h, w = grid
    weights = random_weights(h, w, heads=1, images=1, prefix=0)
    eye = torch.eye(h * w, dtype=torch.complex128)
    dft = torch.fft.fft2(eye.unflatten(1, grid), norm="ortho").flatten(1)  # symmetric
    columns = (dft @ weights[0, 0].to(torch.complex128) @ dft.conj()).abs().square().sum(dim=0).unflatten(0, grid)
    ours = mode_gains(weights, grid)[0, 0].double()
    assert ours.sum().item() == pytest.approx(weights.double().square().sum().item(), rel=1e-5)  # Frobenius

    def by_frequency(values, rows, columns):
        found = {}
        for y, p in enumerate(rows):
            for x, q in enumerate(columns):
                found[p, q] = found.get((p, q), 0) + values[y, x].item()
        return found

    fft = by_frequency(columns, *([min(k, n - k) for k in range(n)] for n in grid))
    real = by_frequency(ours, *([(k + 1) // 2 for k in range(n)] for n in grid))
    assert real == pytest.approx(fft, rel=1e-4)


def attention_of(weights, grid, rho=0.5, divergence=(), entropy=None):
    heads = weights.shape[1]
    zeros = [0.0] * heads
    given = zeros if entropy is None else entropy
    gain = mode_gains(weights, grid)[0]
    return Attention(1, grid, 1.0, zeros, zeros, zeros, given, list(divergence), rho, gain)


def test_low_and_high_gains_part_the_spectrum_at_rho():
    layer = attention_of(torch.cat((shifts((1, 8), (0, 1), (0, -1)), torch.eye(8)[None, None]), dim=1), (1, 8))
    assert layer.low_gain == pytest.approx([(2 * 0.5 + 2 * 0) / 4, 1], abs=1e-6)  # f = 0.25 and 0.5
    assert layer.high_gain == pytest.approx([(2 * 0.5 + 1) / 3, 1], abs=1e-6)  # 0.75 and 1
    assert [gain for *_, gain in layer.radial_gain()] == pytest.approx([0.75, 0.5, 0.75, 1], abs=1e-6)


# -- Heads against each other -----------------------------------------------------------------------------------------


def test_equal_heads_do_not_diverge_and_disjoint_ones_by_log_2():
    same = random_weights(3, 3, heads=1, prefix=0).expand(-1, 4, -1, -1)
    assert head_divergence(same).tolist() == [[0] * 6] * 2
    apart = torch.cat((shifts((1, 6), (0, 0)), shifts((1, 6), (0, 1)), shifts((1, 6), (0, 2))), dim=1)
    assert head_divergence(apart) == pytest.approx(torch.full((1, 3), math.log(2)).double())
    half = torch.cat((shifts((1, 6), (0, 0)), shifts((1, 6), (0, 0), (0, 1))), dim=1)
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert head_divergence(half).item() == pytest.approx(expected)
    assert head_divergence(same[:, :1]).shape == (2, 0)


def test_divergence_by_plain_loops():
    weights = random_weights(2, 3, heads=3, images=1, prefix=0)
    found = head_divergence(weights)[0].tolist()
    for (a, b), value in zip([(0, 1), (0, 2), (1, 2)], found, strict=True):
        total = 0.0
        for p, q in zip(weights[0, a].tolist(), weights[0, b].tolist(), strict=True):
            for x, y in zip(p, q, strict=True):
                m = (x + y) / 2
                total += (x * math.log(x / m) + y * math.log(y / m)) / 2
        assert value == pytest.approx(total / 6, rel=1e-5)


def test_heads_are_compared_at_evenly_spaced_queries_of_large_grids():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 2, 201, 8)
    weights = AttentionInputs(q, k).weights()[:, :, 1:, 1:]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    found = meter_of(AttentionInputs(q, k), (10, 20), 1)
    assert -(-200 // QUERIES) == 4  # each fourth
    assert found.divergence == pytest.approx(head_divergence(weights[:, :, ::4]).mean(dim=0).tolist(), rel=1e-5)
    assert found.gain.float() == pytest.approx(mode_gains(weights, (10, 20)).mean(dim=0), rel=1e-4)


@pytest.mark.parametrize("entropies, marked", [([0.96, 0.99], True), ([0.94, 0.99], False), ([0.96, 0.95], False)])
def test_a_layer_is_near_uniform_where_all_its_heads_are(entropies, marked):
    layer = attention_of(random_weights(2, 3, 2, 1, 0), (2, 3), entropy=[e * math.log(6) for e in entropies])
    assert layer.near_uniform == marked and layer.relative_entropy == pytest.approx(entropies)
    assert math.isnan(layer.mean_divergence)
    assert attention_of(random_weights(2, 3, 3, 1, 0), (2, 3), divergence=(0.1, 0.2, 0.6)).mean_divergence == 0.3


def test_rollout_of_known_layers():
    eye, mean = torch.eye(4)[None, None], torch.full((1, 2, 4, 4), 0.25)
    assert rollout(eye)[0] == pytest.approx(torch.eye(4))
    twice = rollout(mean, rollout(mean))[0]
    assert twice == pytest.approx(0.25 * torch.eye(4) + 0.75 * 0.25 * torch.ones(4, 4))
    first, second = (torch.zeros(1, 1, 2, 2) for _ in range(2))
    first[..., 0], second[..., 1] = 1, 1  # all look at token 0; then all at token 1
    assert rollout(second, rollout(first))[0] == pytest.approx(torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    assert rollout(random_weights(2, 2), rollout(random_weights(2, 2, seed=1))).sum(dim=-1) == pytest.approx(
        torch.ones(2, 5), rel=1e-5
    )
