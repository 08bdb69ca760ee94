"""Watch a model while it runs: the tokens of its layers and the arguments of its attention, without changing either."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eit.analysis.attention import Call
from eit.analysis.frequency import Grid
from eit.errors import UserError
from eit.model import EIT, ConvAttention

MIXERS = {"attn": "norm2", "self_attention": "ln_2"}  # of timm's blocks, torchvision's -> the norm before the MLP


@dataclass(frozen=True)
class Tokens:
    """Tokens at one place: (B, h, w, C), without class token."""

    layer: int  # 0 is what the first block takes
    where: str  # stem, mixer, block; conv, attention
    grid: Tensor


@dataclass(frozen=True)
class Heads:
    """One call of attention in a layer, whose tokens lie on a grid behind `prefix` others."""

    layer: int
    call: Call
    grid: Grid
    pitch: float
    prefix: int


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers: transformer blocks (with a token mixer and an MLP), else timm's feature stages.

    Raises:
        UserError: the model has neither.
    """
    if hasattr(model, "reroll"):
        raise UserError(f"{type(model).__name__} keeps its tokens in another order than the image's: not measured")
    blocks: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        mixer = next((getattr(module, m) for m in MIXERS if hasattr(module, m)), None)
        if isinstance(mixer, nn.Module) and isinstance(getattr(module, "mlp", None), nn.Module):
            blocks.append((name, module))
    if blocks:
        return blocks
    stages = [info["module"] for info in getattr(model, "feature_info", ())]
    if not stages:
        raise UserError(
            f"{type(model).__name__} has neither transformer blocks (attn and mlp) nor feature_info of timm: "
            "nothing of it can be measured"
        )
    return [(name, model.get_submodule(name)) for name in stages]


@contextmanager
def watch(
    model: nn.Module,
    on_tokens: Callable[[Tokens], None] | None = None,
    on_heads: Callable[[Heads], None] | None = None,
    on_other_attention: Callable[[int, int], None] | None = None,
) -> Iterator[None]:
    """While the context lasts, `model(images)` reports what its layers do.

    `on_other_attention(layer, tokens)` is told of attention that is not over all tokens of a layer's grid.
    The outputs stay as they are, to the bit. Hooks are gone afterwards, however the context ends.
    """
    probe = _Probe(model, on_tokens, on_heads, on_other_attention)
    try:
        probe.attach()
        if on_heads is None:
            yield
        else:
            with _Interceptor(probe):
                yield
    finally:
        for handle in probe.handles:
            handle.remove()


class _Probe:
    def __init__(self, model: nn.Module, on_tokens: Any, on_heads: Any, on_other_attention: Any) -> None:
        self.model, self.on_tokens, self.on_heads, self.on_other = model, on_tokens, on_heads, on_other_attention
        self.handles: list[Any] = []
        self.layer: int | None = None  # the one that runs
        self.in_mlp = False
        self.image = (1, 1)
        self.prefix = getattr(model, "num_prefix_tokens", 1)
        self.batch = 0

    def attach(self) -> None:
        self._before(self.model, self._begin)
        for number, (_, layer) in enumerate(layers_of(self.model), start=1):
            self._attach_layer(number, layer)

    def _before(self, module: nn.Module, do: Callable[[Any], None]) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda module, args: do(args[0])))

    def _after(self, module: nn.Module, do: Callable[[Any], None]) -> None:
        self.handles.append(
            module.register_forward_hook(lambda module, args, out: do(out[0] if isinstance(out, tuple) else out))
        )

    def _begin(self, images: Tensor) -> None:
        self.batch, self.image = images.shape[0], (images.shape[2], images.shape[3])
        self.layer = None

    def _attach_layer(self, number: int, layer: nn.Module) -> None:
        def enter(x: Tensor) -> None:
            self.layer, self.in_mlp = number, False
            self.tokens = math.prod(x.shape[1:-1])  # (B, N, C) or (B, h, w, C); attention of maps is over windows
            if number == 1 and has_mixer:
                self._report(0, "stem", x)

        def leave(x: Tensor) -> None:
            self._report(number, "block", x)
            self.layer = None

        mixer = next((m for m in MIXERS if hasattr(layer, m)), None)
        has_mixer = mixer is not None
        self._before(layer, enter)
        if mixer is not None:
            self._attach_mixer(number, getattr(layer, mixer))
            norm, mlp = getattr(layer, MIXERS[mixer], None), getattr(layer, "mlp", None)
            if isinstance(norm, nn.Module) and isinstance(mlp, nn.Module):

                def begin_mlp(_: Tensor) -> None:
                    self.in_mlp = True

                def before_norm(x: Tensor) -> None:
                    if not self.in_mlp:  # a norm behind the MLP does not take what the mixer left
                        self._report(number, "mixer", x)

                self._before(mlp, begin_mlp)
                self._before(norm, before_norm)
        self._after(layer, leave)

    def _attach_mixer(self, number: int, mixer: nn.Module) -> None:
        if isinstance(mixer, ConvAttention):
            conv = mixer.conv_channels

            def parts(x: Tensor) -> None:
                if conv:
                    self._report(number, "conv", x[..., :conv])
                if x.shape[-1] > conv:
                    self._report(number, "attention", x[..., conv:])

            self._after(mixer, parts)
        else:
            self._after(mixer, lambda x: self._report(number, "attention", x))

    def _report(self, layer: int, where: str, x: Any) -> None:
        if self.on_tokens is not None:
            self.on_tokens(Tokens(layer, where, self._on_grid(x, layer)))

    def _on_grid(self, x: Tensor, layer: int) -> Tensor:
        """Tokens (B, N, C), or a map, as (B, h, w, C)."""
        if isinstance(x, Tensor) and x.dim() == 3:
            grid, prefix = self._grid(x.shape[1])
            return x[:, prefix:].unflatten(1, grid)
        if isinstance(x, Tensor) and x.dim() == 4:
            last, first = self._has_image_shape(x.shape[1:3]), self._has_image_shape(x.shape[2:4])
            if last and first:  # as many channels as tokens on an axis
                last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            if last or first:
                return x if last else x.permute(0, 2, 3, 1)
        name, shape = type(self.model).__name__, tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UserError(
            f"layer {layer} of {name} gives {shape}, which is neither tokens nor a map of the image's shape"
        )

    def _has_image_shape(self, grid: Sequence[int]) -> bool:
        """Up to the rounding of one token."""
        return abs(grid[0] * self.image[1] / self.image[0] - grid[1]) <= 1

    def _grid(self, tokens: int) -> tuple[Grid, int]:
        """The grid that has the image's shape, and how many tokens stand before it."""
        height, width = self.image
        if isinstance(self.model, EIT):
            return self.model.patch_embed.grid_size(height, width), 1
        for prefix in dict.fromkeys([self.prefix, *range(8)]):  # some add the class token late
            n = tokens - prefix
            h = round((n * height / width) ** 0.5) if n > 0 else 0
            if h and n % h == 0 and self._has_image_shape((h, n // h)):
                return (h, n // h), prefix
        raise UserError(
            f"{tokens} tokens of {type(self.model).__name__} do not lie on a grid of the shape of {height}x{width}"
        )

    def attention(self, call: Call) -> None:
        """A call of attention while a layer runs."""
        if self.layer is None:
            return
        batch, queries, keys = call.query.shape[0], call.query.shape[-2], call.key.shape[-2]
        if call.query.dim() == 4 and batch == self.batch and queries == keys == self.tokens:
            grid, prefix = self._grid(queries)
            self.on_heads(Heads(self.layer, call, grid, self.pitch(grid), prefix))
        elif self.on_other is not None:
            self.on_other(self.layer, keys)

    def pitch(self, grid: Grid) -> float:
        """Pixels from one token of the grid to the next: the stem's stride where it is known, else image by grid."""
        model: Any = self.model
        if isinstance(model, EIT):
            return float(model.patch_embed.pitch)
        for path in ("patch_embed.proj", "conv_proj"):
            try:
                stride = model.get_submodule(path).stride[0]
            except AttributeError:
                continue
            if self.image[0] // stride == grid[0]:
                return float(stride)
        return self.image[0] / grid[0]


class _Interceptor(TorchFunctionMode):
    """Sees each call of scaled dot-product attention, which returns no weights, and lets it run as it is."""

    def __init__(self, probe: _Probe) -> None:
        super().__init__()
        self.probe = probe

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            given = _SDPA.bind(*args, **kwargs).arguments
            options = given.get("attn_mask"), given.get("is_causal", False), given.get("scale")
            self.probe.attention(Call(given["query"], given["key"], *options))
        elif function is F.multi_head_attention_forward:  # of nn.MultiheadAttention: what it calls is out of sight
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            self.probe.attention(_packed(given))
        return function(*args, **kwargs)


# The built-in function has no signature of its own.
_SDPA = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: None
)


def _packed(given: dict[str, Any]) -> Call:
    """The call that nn.MultiheadAttention makes of (N, B, C) tokens, where query, key and value are one."""
    x, heads = given["query"], given["num_heads"]
    if x is not given["key"] or given.get("use_separate_proj_weight"):
        return Call(x.transpose(0, 1), given["key"].transpose(0, 1))
    width, bias = x.shape[-1], given["in_proj_bias"]
    both = F.linear(x, given["in_proj_weight"][: 2 * width], None if bias is None else bias[: 2 * width])
    q, k = both.unflatten(-1, (2, heads, -1)).permute(2, 1, 3, 0, 4)  # (2, B, H, N, D)
    return Call(q, k, given.get("attn_mask"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DistributedDataParallel."""
    for attribute in ("_orig_mod", "module", "_orig_mod"):
        inner = getattr(model, attribute, None)
        model = inner if isinstance(inner, nn.Module) else model
    return model
