"""The machine's matrix-multiply peak, to which the speed of models is compared."""

import time
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from eit.precision import DTYPES, Precision, float32_products

SIZE = {"cpu": 2048, "mps": 4096, "cuda": 8192}  # of square matrices: large enough for the best rate
FP16_ON_CPU = 512  # side for fp16: CPUs have no fast fp16 products, and `mm` of 2048 takes half a minute
REPEATS = 5  # products per measurement; the fastest counts


def side_of(precision: Precision, device: torch.device) -> int:
    """The side of the square matrices for measuring a peak."""
    side = SIZE[device.type]
    return min(side, FP16_ON_CPU) if device.type == "cpu" and precision == "fp16" else side


def routes(precision: Precision, device: torch.device, size: int | None = None) -> dict[str, Callable[[], Tensor]]:
    """Name -> a product of two `size` x `size` matrices by one of torch's operators.

    Their speeds differ: on AMD processors fp32 `mm` uses MKL, which has half the speed of oneDNN there. `conv1x1` uses
    oneDNN, and so does `linear`, with packed weights, which ONNX Runtime and OpenVINO have too.
    """
    n = size or side_of(precision, device)
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES[precision])
    ways: dict[str, Callable[[], Tensor]] = {"mm": lambda: a @ b}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        side = 32
        image = a.view(1, n // side, side, n).permute(0, 3, 1, 2)  # (1, n, n / 32, 32), channels last
        weight = b.t().contiguous().view(n, n, 1, 1)
        ways["conv1x1"] = lambda: F.conv2d(image, weight)
        with suppress(RuntimeError):  # bf16 on a processor without AVX-512
            packed = torch.ops.mkldnn._reorder_linear_weight(b.t().contiguous(), n)
            ways["linear"] = lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
    return ways


@torch.no_grad()
def flops_per_second(
    product: Callable[[], Tensor], device: torch.device, precision: Precision, size: int | None = None
) -> float:
    """The speed of the fastest of a few calls of a product of `routes`: 2 n^3 / seconds."""
    n = size or side_of(precision, device)
    times = []
    with float32_products(precision):
        for _ in range(REPEATS + 1):  # the first one warms up
            synchronize(device)
            began = time.perf_counter()
            product()
            synchronize(device)
            times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
