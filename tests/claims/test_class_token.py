"""The class token bypasses the convolution, so at initial values EIT's logits hardly depend on the image (ours)."""

import functools
import statistics

import pytest
import torch
from sklearn.datasets import load_digits

from eit import create_model

SMALL = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, patch_size=4, num_classes=10)
ARMS = {
    "eit": dict(family="eit"),
    "eit_zero": dict(family="eit", cls_conv="zero"),
    "eit_mean": dict(family="eit", cls_conv="mean"),
    "lsra_identity": dict(family="lsra", cls_conv="identity"),
    "lsra": dict(family="lsra"),
    "vit": dict(family="vit"),
}


@functools.lru_cache
def spread(arm, width, heads, **more):
    """Standard deviation of the logits over 64 digits, mean over classes, median of three seeds, at initial values."""
    digits = torch.tensor(load_digits().images[:64], dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(digits, (32, 32)).expand(-1, 3, -1, -1)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = create_model("eit_mini", embed_dim=width, num_heads=heads, **SMALL, **ARMS[arm], **more).eval()
        with torch.no_grad():
            found.append(float(model(images).std(dim=0).mean()))
    return statistics.median(found)


@pytest.mark.parametrize(("width", "heads"), [(80, 8), (250, 10)])
def test_an_update_that_is_the_same_for_every_image_drowns_the_others(width, heads):
    vit = spread("vit", width, heads)
    assert spread("eit", width, heads) < vit / 50
    assert spread("lsra_identity", width, heads) < vit / 100


@pytest.mark.parametrize("arm", ["eit_zero", "eit_mean", "lsra"])
@pytest.mark.parametrize(("width", "heads"), [(80, 8), (250, 10)])
def test_without_it_the_logits_depend_on_the_image_as_vit_s_do(arm, width, heads):
    assert spread(arm, width, heads) > spread("vit", width, heads) / 3


def test_a_head_that_reads_the_grid_does_not_see_it():
    assert spread("eit", 80, 8, global_pool="avg") > spread("vit", 80, 8, global_pool="avg") / 3
