"""EIT needs no position embedding, so another input size needs no change to the weights (abstracts of v1 and v2)."""

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
    """The convolution sees neighbours; attention alone could not tell a picture from its shuffled patches."""
    torch.manual_seed(0)
    small = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, num_classes=10)
    x, shuffled = torch.randn(1, 3, 32, 32).double(), torch.randperm(64)
    for schedule, matters in (("eit", True), ("lsra", True), ("vit", False)):
        model = create_model("eit_mini", schedule=schedule, **small).double().eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        with torch.no_grad():
            tokens, h, w = model.embed(x)
            logits = []
            for order in (torch.arange(64), shuffled):
                y = torch.cat((tokens[:, :1], tokens[:, 1:][:, order]), dim=1)
                for block in model.blocks:
                    y = block(y, h, w)
                logits.append(model.forward_head(model.norm(y)))
        assert torch.allclose(*logits, atol=1e-9) != matters
