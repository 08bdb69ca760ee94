"""EIT is small: 3.5, 8.9, 16.0, 25.3 M parameters and 1.73, 3.84, 6.52, 10.0 G "FLOPs" (the authors' README)."""

import pytest

from eit import complexity, create_model
from eit.models.registry import VARIANTS

COST = {  # parameters, true MACs and the paper's, at 224x224
    "eit_mini": (3_512_750, 1.926, 1.733),
    "eit_tiny": (8_927_230, 4.213, 3.839),
    "eit_base": (15_972_280, 7.073, 6.516),
    "eit_large": (25_305_592, 10.766, 10.010),
}


@pytest.mark.parametrize("name", COST)
def test_parameters_and_macs_are_the_published_ones(name):
    params, macs, published_macs = COST[name]
    cost = complexity(create_model(name))
    assert cost.params == params
    assert cost.macs / 1e9 == pytest.approx(macs, abs=0.0006) and VARIANTS[name].gmacs == macs
    assert cost.published_macs / 1e9 == pytest.approx(published_macs, abs=0.0006)


def test_at_224_pixels_it_is_dearer_than_a_vit_of_its_width():
    """Its grid of 19x19 tokens, and a stem on 57x57 positions, against 14x14 patches."""
    eit, vit = (complexity(create_model("eit_mini", family=family)) for family in ("eit", "vit"))
    assert round(eit.macs / vit.macs, 1) == 2.2
    assert eit.params < vit.params
