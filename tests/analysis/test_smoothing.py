"""Oversmoothing: likeness and effective rank of an image's tokens, in closed form and by plain loops."""

import math

import pytest
import torch

from eit.analysis.smoothing import RANK_EVERY, SmoothingMeter, cosine_similarity, effective_rank


def tokens(images=5, n=12, channels=7, seed=0):
    return torch.randn(images, n, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, channels", [(9, 4), (4, 9)])
def test_equal_tokens_point_the_same_way_and_have_rank_one(n, channels):
    x = tokens(n=1, channels=channels).expand(-1, n, -1) * torch.arange(1, n + 1)[:, None]  # of any length
    assert cosine_similarity(x) == pytest.approx(torch.ones(5), abs=1e-6)
    assert effective_rank(x).float() == pytest.approx(torch.ones(5), abs=1e-5)


def test_orthogonal_tokens_have_cosine_zero_and_full_rank():
    x = torch.linalg.qr(tokens(n=8, channels=8))[0][:, :6]
    assert cosine_similarity(x) == pytest.approx(torch.zeros(5), abs=1e-6)
    assert effective_rank(x).float() == pytest.approx(torch.full((5,), 6.0), rel=1e-5)


def test_tokens_of_two_directions():
    """Half along one axis and half along another, or against it: cosines 1, 0 and -1 in known numbers."""
    x = torch.zeros(2, 4, 3)
    x[0, :2, 0] = x[0, 2:, 1] = 1
    x[1, :2, 0], x[1, 2:, 0] = 1, -1
    assert cosine_similarity(x).tolist() == pytest.approx([1 / 3, -1 / 3])
    assert effective_rank(x).tolist() == pytest.approx([2, 1])


def test_singular_values_of_known_size():
    """1 and 3: weights 1/4 and 3/4."""
    x = torch.diag_embed(torch.tensor([[1.0, 3.0]]))
    assert effective_rank(x).item() == pytest.approx(math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))


def test_tokens_of_zeros():
    assert cosine_similarity(torch.zeros(1, 4, 3)).item() == 0 and effective_rank(torch.zeros(1, 4, 3)).item() == 1
    x = torch.zeros(1, 3, 2)
    x[0, :2, 0] = 5
    assert cosine_similarity(x).item() == pytest.approx(1 / 3)  # one of three pairs


def test_plain_loops_agree():
    x = tokens()
    for image, cosine, rank in zip(x.double(), cosine_similarity(x), effective_rank(x), strict=True):
        rows, gaps = image.tolist(), []
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if i != j:
                    gaps.append(sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b))
        assert cosine.item() == pytest.approx(sum(gaps) / len(gaps), abs=1e-6)
        values = torch.linalg.svdvals(image)
        weights = (values / values.sum()).tolist()
        assert rank.item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in weights)), rel=1e-6)


@pytest.mark.parametrize("sizes", [[11], [3, 1, 5, 2], [1] * 11])
def test_running_sums_are_those_of_all_images_and_ranks_those_of_each_fourth(sizes):
    x = tokens(images=11)
    meter = SmoothingMeter(3, "block")
    for part in x.split(sizes):
        meter.add(part.unflatten(1, (3, 4)))
    found, cosines, ranks = meter.result(), cosine_similarity(x).double(), effective_rank(x[::RANK_EVERY])
    assert (found.layer, found.where, found.grid, found.channels, found.full_rank) == (3, "block", (3, 4), 7, 7)
    assert found.cosine == pytest.approx(cosines.mean().item(), abs=1e-7)
    assert found.cosine_se == pytest.approx(cosines.std().item() / math.sqrt(11), rel=1e-4)
    assert found.rank == pytest.approx(ranks.mean().item(), rel=1e-6)
    assert found.rank_se == pytest.approx(ranks.std().item() / math.sqrt(3), rel=1e-4)
