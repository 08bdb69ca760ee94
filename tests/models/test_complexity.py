import pytest
import torch

from eit import EIT, complexity


def by_hand(d, depth, heads, channels, kernel, stem_side, tokens, classes):
    """Multiply-accumulates from the paper's description, with nothing of the counter's."""
    n = tokens + 1
    linear = stem_side**2 * d * 3 * kernel**2 + d * classes
    attention = 0
    for a in channels:
        linear += tokens * (d - a) * 9 + n * (4 * a * a) + n * 8 * d * d
        attention += 2 * n * n * a
    extras = 2 * stem_side**2 * d + depth * 2 * 2 * n * d + 2 * n * d  # stem bias, pooled inputs, norms
    return linear + attention, linear + extras


@pytest.mark.parametrize("schedule", ["eit", "lsra", "vit", (0, 6, 12)])
def test_counts_agree_with_the_formula(schedule):
    d, depth, heads = 12, 3, 2
    model = EIT(32, 3, 1, 4, embed_dim=d, depth=depth, num_heads=heads, num_classes=7, schedule=schedule)
    cost = complexity(model, (3, 32, 32))
    assert (cost.macs, cost.published_macs) == by_hand(d, depth, heads, model.attn_channels, 3, 32, 64, 7)
    assert cost.params == sum(p.numel() for p in model.parameters())


def test_the_model_is_left_as_it_was():
    model = EIT(32, 3, 1, 4, embed_dim=12, depth=1, num_heads=2).train()
    complexity(model, (3, 32, 32))
    assert model.training
    assert all(p.device == torch.device("cpu") for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
