"""Precision of arithmetic: fp32, tf32, bf16 and fp16, and determinism on CUDA."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch

from eit.errors import UserError

T = TypeVar("T")
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS; with these its products are deterministic


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """The precision to use on `device`; `auto` is bf16 on a CUDA GPU that supports it, otherwise fp32.

    Raises:
        UserError: an unknown name, or tf32 on a device without it.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(
            f"train.precision=tf32 needs an NVIDIA GPU of the Ampere generation or newer; on {device} use fp32 or auto"
        )
    for known in PRECISIONS:
        if precision == known:
            return known
    raise UserError(f"precision {precision} is unknown: give auto, {', '.join(PRECISIONS)}")


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass; weights stay in float32."""
    low = precision in ("bf16", "fp16")
    return torch.autocast(device.type, DTYPES[precision] if low else None, enabled=low)


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Compute float32 matrix products and convolutions in TF32 if `precision` is tf32, otherwise in full float32.

    PyTorch's default on CUDA is TF32 for convolutions and float32 for matrix products. The backward pass must be inside
    the context too. Each setting has two names and is set by both: torch refuses to read the older one if they differ.
    """
    matmul, cudnn, tf32 = torch.backends.cuda.matmul, torch.backends.cudnn, precision == "tf32"
    parts: list[Any] = [matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
    kept: list[Any] = [*parts, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [part.fp32_precision for part in kept]
    products, convolutions = _read(torch.get_float32_matmul_precision), _read(lambda: cudnn.allow_tf32)
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    for part in parts:
        part.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for part, value in zip(kept, before, strict=True):
            part.fp32_precision = value


def _read(setting: Callable[[], T]) -> T | None:
    """The setting; None if the caller used its newer name, so that torch refuses to read the older one."""
    try:
        return setting()
    except RuntimeError:
        return None


@contextmanager
def arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """`autocast` and `float32_products` together, for a forward pass without a backward pass."""
    with float32_products(precision), autocast(device, precision):
        yield


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Make results on CUDA bit-identical in every run; operators that cannot do that raise a RuntimeError.

    Enter it before CUDA starts, because cuBLAS reads its variable only then. Attention uses the backends of torch with
    a deterministic backward pass: flash and memory-efficient in their deterministic forms, and plain products.

    Raises:
        UserError: CUDA has started without the variable, or the variable has another value.
    """
    if not enabled:
        yield
        return
    name = "CUBLAS_WORKSPACE_CONFIG"
    variable = os.environ.get(name)
    if variable not in _WORKSPACES:
        if torch.cuda.is_initialized():
            raise UserError(f"train.deterministic=true needs {name}=:4096:8 in the environment before CUDA starts")
        if variable is not None:
            raise UserError(f"train.deterministic=true needs {name}={' or '.join(_WORKSPACES)}, not {variable}")
        os.environ[name] = _WORKSPACES[0]
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    before = cudnn.benchmark, cudnn.deterministic, cuda.cudnn_sdp_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic = False, True
    cuda.enable_cudnn_sdp(False)
    memory.fill_uninitialized_memory = False  # costs time, and no code here reads uninitialised memory
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before[:2]
        cuda.enable_cudnn_sdp(before[2])
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
