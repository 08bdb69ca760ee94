"""Attention distances and head diversity: cases with a closed form, plain loops, and invariances."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eit.analysis.attention import (
    AttentionMeter,
    Call,
    diversity,
    head_distances,
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
    call = Call(q, k, masks.get(mask), is_causal=mask == "causal", scale=0.7)
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
    assert meter_of(Call(q, torch.randn(2, 3, 13, 4)), (3, 4), 1).entropy == pytest.approx([math.log(12)] * 3)


def test_grouped_queries_share_their_keys():
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    expected = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 8**0.5).softmax(dim=-1)
    assert Call(q, k).weights() == pytest.approx(expected, abs=1e-6)


def test_images_are_taken_in_turn_with_the_same_result(monkeypatch):
    torch.manual_seed(0)
    call = Call(torch.randn(7, 2, 13, 4), torch.randn(7, 2, 13, 4), torch.randn(7, 1, 13, 13))
    at_once = meter_of(call, (3, 4), 1)
    monkeypatch.setattr("eit.analysis.attention.MAP_BYTES", 1)
    in_turn = meter_of(call, (3, 4), 1)
    for name in ("distance", "distance_se", "class_mass", "entropy"):
        assert getattr(in_turn, name) == pytest.approx(getattr(at_once, name), rel=1e-5)


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
