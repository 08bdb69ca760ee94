"""Layers of PyTorch, with the same parameters and results, computed faster on some CPUs or on a GPU.

docs/performance.md has the gain of each. On other devices, and in scripted and exported programs, PyTorch's operators
run. So do they in compiled programs on CPUs, because Inductor cannot lay out the views of this module if height and
width are symbols. torch.fx traces each function as one operator, because it knows neither the device nor the width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

FASTER_ON_CPU: set[str] = set()  # of linear, stem, max_pool, attention; `eit.operators` has the choice
NARROW = 16  # channels of a head: with fewer, fused attention takes longer than with 16
MANY = 64  # tokens: with fewer, padding takes longer than it saves
CACHE = 1 << 22  # bytes of attention weights
WIDTH = 8  # flash attention needs head widths that are multiples of 8; otherwise a slower kernel runs
PAD_HEADS_ON = {"cuda"}  # kinds of device
FOLD_STRIDES_ON: set[str] = set()  # of the stem, besides CPUs: not yet measured on a GPU


def _is_faster(operator: str, x: Tensor) -> bool:
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0
    return operator in FASTER_ON_CPU and known and not torch.compiler.is_compiling()


class Linear(nn.Linear):
    """`nn.Linear`: (..., in_features) -> (..., out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@torch.fx.wrap
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` as a 1x1 convolution.

    PyTorch gives float32 matrix products to MKL, which leaves AVX-512 unused on AMD, and convolutions to oneDNN.
    """
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    else:  # TorchScript does not compile this
        is_plain_weight = type(weight) in (Tensor, nn.Parameter)  # quantised weights have their own product
        if not _is_faster("linear", x) or not is_plain_weight:
            return F.linear(x, weight, bias)
        image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # channels_last
        image = F.conv2d(image, weight[:, :, None, None], bias)  # (1, out_features, 1, pixels)
        return image.permute(0, 2, 3, 1).reshape((*x.shape[:-1], -1))


class PatchConv2d(nn.Conv2d):
    """`nn.Conv2d` of square kernels: (B, C, height, width) -> (B, out_channels, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return patch_conv2d(x, self.weight, self.bias, self.stride[0], int(self.padding[0]))


@torch.fx.wrap
def patch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """`F.conv2d`; if the stride divides the kernel, each stride x stride square becomes the channels of one pixel.

    A kernel of 16 with stride 4 over 3 channels is then a kernel of 4 with stride 1 over 48, which fill the registers.
    """
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, stride, padding)
    else:
        kernel = weight.shape[-1]
        if stride == 1 or kernel % stride or not (_is_faster("stem", x) or x.device.type in FOLD_STRIDES_ON):
            return F.conv2d(x, weight, bias, stride, padding)
        x = F.pad(x, (padding, padding, padding, padding))
        return F.conv2d(_squares_as_channels(x, stride), _squares_as_channels(weight, stride), bias)


def _squares_as_channels(x: Tensor, side: int) -> Tensor:
    """(B, C, height, width) -> (B, side*side*C, height // side, width // side), channels_last."""
    h, w = x.shape[2] // side, x.shape[3] // side
    x = x[:, :, : h * side, : w * side].unflatten(2, (h, side)).unflatten(4, (w, side))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).permute(0, 3, 1, 2)


class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` of squares that do not overlap: (B, C, height, width) -> (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.kernel_size, int)
        return max_pool(x, self.kernel_size)


@torch.fx.wrap
def max_pool(x: Tensor, size: int) -> Tensor:
    """`F.max_pool2d` with stride `size`; for the backward pass it keeps the positions of the maxima, not its input."""
    if torch.jit.is_scripting():
        return F.max_pool2d(x, size, size)
    else:
        if torch.jit.is_tracing() or not (_is_faster("max_pool", x) and x.requires_grad):
            return F.max_pool2d(x, size, size)
        return _MaxPool.apply(x, size)[0]


class _MaxPool(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        pooled, places = F.max_pool2d(x, size, size, return_indices=True)
        return pooled, places.int()  # half of the memory

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        (x, ctx.size), (_, places) = inputs, output
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(places)
        ctx.shape, ctx.channels_last = x.shape, x.stride(1) == 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        b, c, h, w = ctx.shape  # the operator reads only shape and format of its input
        x = gradient.new_empty(b, h, w, c).permute(0, 3, 1, 2) if ctx.channels_last else gradient.new_empty(ctx.shape)
        square, zero, one = [ctx.size] * 2, [0, 0], [1, 1]
        operator = torch.ops.aten.max_pool2d_with_indices_backward
        return operator(gradient, x, square, square, zero, one, False, places.long()), None


@torch.fx.wrap
def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """`F.scaled_dot_product_attention` of (B, H, N, D), by the kernel that is fastest for heads this narrow."""
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        if not _is_faster("attention", q):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        # The fused kernel has no dropout, and its backward pass takes twice as long in bfloat16 as in float32.
        if q.requires_grad and (dropout or q.dtype == torch.bfloat16):
            return _attention_in_pieces(q, k, v, dropout)
        width = q.shape[-1]
        if width < NARROW and q.shape[2] >= MANY:
            q, k, v = (F.pad(part, (0, NARROW - width)) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=width**-0.5)[..., :width]


def class_attention(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, dropout: float) -> Tensor:
    """Attention from the first token to all: (B, N, C), weights (3*C, C) and bias (3*C) of qkv -> (B, 1, C).

    With one query, (x K) q = x (K q) and a (x V) = (a x) V: no key or value is computed, and both products with x cost
    N*H*C instead of N*C*C. The bias of the keys adds the same to each score, so softmax removes it.
    """
    width = weight.shape[1] // heads
    to_query, to_key, to_value = weight.chunk(3)
    query_bias, value_bias = (None, None) if bias is None else bias.chunk(3)[::2]
    query = F.linear(x[:, 0], to_query, query_bias).unflatten(1, (heads, width)) * width**-0.5
    x = x.to(query.dtype)  # of autocast
    query = torch.einsum("bhd,hdc->bhc", query, to_key.unflatten(0, (heads, width)))
    weights = torch.dropout((query @ x.transpose(1, 2)).softmax(-1), dropout, dropout > 0)  # (B, H, N)
    found = torch.einsum("bhc,hdc->bhd", weights.to(x.dtype) @ x, to_value.unflatten(0, (heads, width)))
    if value_bias is not None:
        found = found + weights.sum(-1, keepdim=True) * value_bias.unflatten(0, (heads, width))
    return found.flatten(1).unsqueeze(1)


def is_plain(weight: Tensor) -> bool:
    """Whether these are plain numbers: not quantised, nor spread over devices."""
    return type(weight) in (Tensor, nn.Parameter, FakeTensor)  # a FakeTensor stands for one in torch.export


def has_hooks(module: nn.Module) -> bool:
    """Whether something besides the module itself runs before or after its forward or backward pass."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _attention_in_pieces(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Matrix products with a softmax between, for as many images at a time as fit into the cache."""
    of_one = q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
    images = max(CACHE // of_one, 1)
    pieces = []
    with torch.autocast("cpu", enabled=False):
        for some_q, some_k, some_v in zip(q.split(images), k.split(images), v.split(images), strict=True):
            weights = (some_q * q.shape[-1] ** -0.5) @ some_k.transpose(-2, -1)
            pieces.append(torch.dropout(weights.softmax(-1), dropout, dropout > 0) @ some_v)
    return torch.cat(pieces)


# -- Heads padded to a multiple of 8 channels, on a GPU ---------------------------------------------------------------


class PaddedHeads:
    """Attention with `qkv` and `proj` weights padded with zeros, for wider heads: exactly the same result.

    Unlike padded queries, keys and values, this costs nothing per token. In evaluation the padded weights are kept
    until the layers' weights change. A change shows in the version of the weights. torch's fused optimizers do not
    change the version, so the padded weights are also dropped after recording gradients and after a change of mode.
    """

    def __init__(self, heads: int, width: int) -> None:
        self.heads, self.width, self.padded = heads, width, -(-width // WIDTH) * WIDTH
        self._kept: tuple[Any, ...] = ()

    def apply_to(self, x: Any, qkv: nn.Module, proj: nn.Module) -> bool:
        """Whether to pad heads for this input: not in traced programs, and not if the layers have hooks."""
        if self.padded == self.width or isinstance(x, torch.fx.Proxy) or x.device.type not in PAD_HEADS_ON:
            return False
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return False
        return all(type(layer) is Linear and not has_hooks(layer) for layer in (qkv, proj))

    def attention(self, x: Tensor, qkv: nn.Linear, proj: nn.Linear, dropout: float) -> Tensor:
        """(B, N, C) -> projected attention, (B, N, C)."""
        weight, bias, proj_weight = self._weights(x, qkv, proj)
        q, k, v = F.linear(x, weight, bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.width**-0.5)
        return F.linear(x.transpose(1, 2).flatten(2), proj_weight, proj.bias)

    def _weights(self, x: Tensor, qkv: nn.Linear, proj: nn.Linear) -> tuple[Tensor, Tensor | None, Tensor]:
        if torch.compiler.is_compiling():
            return self._pad(qkv.weight, qkv.bias, proj.weight)
        own = [parameter for parameter in (qkv.weight, qkv.bias, proj.weight) if parameter is not None]
        plain = all(type(parameter) is nn.Parameter and not parameter.is_inference() for parameter in own)
        if qkv.training or torch.is_grad_enabled() or not plain:
            self.forget()
            return self._pad(qkv.weight, qkv.bias, proj.weight)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else qkv.weight.dtype
        state = (dtype, *((id(parameter), parameter._version, parameter.data_ptr()) for parameter in own))
        kept = self._kept
        if not kept or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                padded = tuple(None if p is None else p.to(dtype) for p in self._pad(qkv.weight, qkv.bias, proj.weight))
            kept = self._kept = state, padded, own  # holding them keeps their ids valid
        return kept[1]

    def forget(self) -> None:
        """Drop the padded weights."""
        self._kept = ()

    def _pad(self, weight: Tensor, bias: Tensor | None, proj: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        more = self.padded - self.width
        weight = F.pad(weight.unflatten(0, (3, self.heads, self.width)), (0, 0, 0, more)).flatten(0, 2)
        if bias is not None:
            bias = F.pad(bias.unflatten(0, (3, self.heads, self.width)), (0, more)).flatten()
        proj = F.pad(proj.unflatten(1, (self.heads, self.width)), (0, more)).flatten(1)
        return weight, bias, proj

    def __deepcopy__(self, memo: dict[int, Any]) -> "PaddedHeads":
        return PaddedHeads(self.heads, self.width)

    def __reduce__(self) -> tuple[Any, ...]:
        return PaddedHeads, (self.heads, self.width)
