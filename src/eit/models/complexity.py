"""Parameters and multiply-accumulates (MACs), true and as the paper counts them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Complexity:
    """The cost of a model.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates of all matrix products and convolutions, for one image.
        logits_macs: those that `model(images)` computes: without tokens of the last layer that the head does not read.
        published_macs: the paper's "FLOPs": without the two attention products, but with the stem's bias, the
            max-pool's inputs and 2 per LayerNorm element.
    """

    params: int
    macs: int
    logits_macs: int
    published_macs: int


def complexity(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> Complexity:
    """Count the cost of `model` for one image, without computing anything.

    Args:
        model: any model that takes images (B, channels, height, width).
        input_size: (channels, height, width), in pixels.

    Examples:
        >>> from eit import create_model
        >>> complexity(create_model("eit_mini"))
        Complexity(params=3512750, macs=1926348500, logits_macs=1591886500, published_macs=1733398000)
    """
    params = sum(p.numel() for p in model.parameters())
    twin = copy.deepcopy(model).to("meta").eval()
    images = torch.empty(1, *input_size, device="meta")
    extras = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal extras
        if isinstance(module, nn.MaxPool2d):
            extras += inputs[0].numel()
        elif isinstance(module, nn.LayerNorm):
            extras += 2 * output.numel()
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            extras += output.numel()

    logits_flops = _flops(twin, images)
    for module in twin.modules():
        module.register_forward_hook(count)  # with hooks, the model computes all tokens
    flops = _flops(twin, images)
    attention = flops.get(torch.ops.aten.bmm, 0)
    total = sum(flops.values())
    return Complexity(params, total // 2, sum(logits_flops.values()) // 2, (total - attention) // 2 + extras)


def _flops(model: nn.Module, images: Tensor) -> dict[Any, int]:
    # The math kernel uses batched products, which the counter distinguishes from the linear layers.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_flop_counts()["Global"]


def training_macs(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> int:
    """Multiply-accumulates of a training step for one image: forward pass, gradients of inputs and of weights.

    Three times `Complexity.logits_macs`, without the gradient of the image, which is not needed.
    """
    reading = 0
    twin = copy.deepcopy(model).to("meta").eval().requires_grad_()
    images = torch.empty(1, *input_size, device="meta")
    logits_macs = sum(_flops(twin, images).values()) // 2

    def count(module: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal reading
        if not inputs[0].requires_grad:
            reading += output.numel() * module.weight[0].numel()

    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    twin(images)
    return 3 * logits_macs - reading
