"""The convolution's part decreases with depth, down to none (the abstracts)."""

from itertools import pairwise

import pytest

from eit import create_model, list_models


@pytest.mark.parametrize("name", list_models())
def test_convolution_decreases_strictly_and_the_last_layer_is_all_attention(name):
    model = create_model(name)
    conv = [block.attn.conv.out_channels if block.attn.conv_channels else 0 for block in model.blocks]
    attention = [block.attn.qkv.in_features for block in model.blocks]
    assert all(a > b for a, b in pairwise(conv))
    assert conv[0] > model.embed_dim / 2
    assert conv[-1] == 0 and attention[-1] == model.embed_dim
    assert [c + a for c, a in zip(conv, attention, strict=True)] == [model.embed_dim] * len(conv)
