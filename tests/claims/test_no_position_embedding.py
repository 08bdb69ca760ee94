"""EIT needs no position embedding, so another input size needs no change to the weights (section 4.4)."""

import torch

from eit import create_model


def test_another_input_size_works_without_touching_the_weights():
    model = create_model("eit_mini", depth=2).eval()
    assert not [name for name, _ in model.named_parameters() if "pos" in name]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for size in ((224, 224), (384, 384), (160, 320), (97, 61)):
            assert model(torch.randn(1, 3, *size)).isfinite().all()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_order_of_tokens_still_matters():
    """Without position embedding, attention alone could not tell a picture from its shuffled patches."""
    torch.manual_seed(0)
    small = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, num_classes=10)
    x = torch.randn(1, 3, 32, 32)
    rolled = x.roll(shifts=16, dims=3)
    for family, differs in (("eit", True), ("vit", False)):
        model = create_model("eit_mini", family=family, patch_size=4, **small).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        if model.pos_embed is not None:
            torch.nn.init.zeros_(model.pos_embed)
        with torch.no_grad():
            assert torch.allclose(model(x), model(rolled), atol=1e-3) != differs
