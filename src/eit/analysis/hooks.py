"""Watch a model while it runs: the tokens of its layers and the inputs of its attention. Its outputs do not change."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode

from eit.analysis.attention import AttentionInputs
from eit.analysis.frequency import Grid
from eit.errors import UserError
from eit.models.eit import EIT, ConvAttention

MIXERS = {"attn": "norm2", "self_attention": "ln_2"}  # mixer -> norm before the MLP, in blocks of timm, torchvision
# Modules of a block whose outputs are added to the tokens, after mixer and MLP: in timm and here; in torchvision
UPDATE_MODULES = (("drop_path1", "drop_path2"), ("dropout", "mlp"))
STEMS = ("patch_embed.proj", "patch_embed.conv", "conv_proj")  # convolutions of stems; their stride is the pitch


class CannotMeasure(UserError):
    """This model cannot be measured; other models may be."""


@dataclass(frozen=True)
class Tokens:
    """Tokens at one place of a model: the grid (B, h, w, C), and the class token."""

    layer: int  # 0 is the input of the first block
    where: str  # stem, mixer, block; conv, attention; for a sub-block: mixer or mlp
    grid: Tensor
    pitch: float  # pixels from one token to the next
    class_token: Tensor | None = None  # (B, C)
    conv_channels: int = 0  # number of channels, from the first on, that the layer's mixer convolves
    side: str = ""  # for a sub-block: `input`, or `update`, which is added to the tokens


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention in a layer. The grid's tokens follow `prefix` others."""

    layer: int
    number: int  # of the call in its layer; parallel blocks have several calls
    inputs: AttentionInputs
    grid: Grid
    pitch: float
    prefix: int
    has_class_token: bool  # as the first of the prefix


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers: transformer blocks (a token mixer and an MLP), or timm's feature stages.

    Raises:
        CannotMeasure: the model has neither.
    """
    if hasattr(model, "reroll"):
        raise CannotMeasure(f"{type(model).__name__} has its tokens in another order than the image: not measured")
    blocks: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        mixer = next((getattr(module, m) for m in MIXERS if hasattr(module, m)), None)
        if isinstance(mixer, nn.Module) and isinstance(getattr(module, "mlp", None), nn.Module):
            blocks.append((name, module))
    if blocks:
        return blocks
    stages = [info["module"] for info in getattr(model, "feature_info", ())]
    if not stages:
        raise CannotMeasure(
            f"{type(model).__name__} has neither transformer blocks (attn and mlp) nor timm's feature_info: "
            "it cannot be measured"
        )
    return [(name, model.get_submodule(name)) for name in stages]


@contextmanager
def watch(
    model: nn.Module,
    on_tokens: Callable[[Tokens], None] | None = None,
    on_heads: Callable[[AttentionCall], None] | None = None,
    on_missing: Callable[[int, str, str], None] | None = None,
    on_sub_block: Callable[[Tokens], None] | None = None,
) -> Iterator[None]:
    """Inside the context, `model(images)` reports what its layers compute. Its outputs do not change by a bit.

    Args:
        on_tokens: called with the tokens of each place.
        on_heads: called with each call of attention.
        on_missing: called with (layer, where, reason) for what is not on a grid of the image; `where` is a place,
            `heads` or `transfer`.
        on_sub_block: called with input and update of each sub-block.
    """
    probe = _Probe(model, on_tokens, on_heads, on_missing or (lambda layer, where, reason: None), on_sub_block)
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


@contextmanager
def replace_tokens(model: nn.Module, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the context, the grid tokens (B, h, w, C) after layer `layer` (0: the stem) become `change(tokens)`.

    Class token and registers do not change.

    Raises:
        CannotMeasure: when the model runs, if the input of the next layer is not one grid per image.
    """
    probe = _Probe(model, None, None, None)
    _, following = layers_of(model)[layer]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = probe.to_grid(args[0])
        if place is None:
            raise CannotMeasure(f"the input of layer {layer + 1} of {probe.name} is not one grid per image")
        return (probe.from_grid(args[0], change(place)), *args[1:]), kwargs

    handles = [
        model.register_forward_pre_hook(lambda module, args: probe.begin(args[0])),
        following.register_forward_pre_hook(before, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    def __init__(
        self, model: nn.Module, on_tokens: Any, on_heads: Any, on_missing: Any, on_sub_block: Any = None
    ) -> None:
        self.model, self.on_tokens, self.on_heads, self.on_missing = model, on_tokens, on_heads, on_missing
        self.on_sub_block = on_sub_block
        self.name = type(model).__name__
        self.eit = next((module for module in model.modules() if isinstance(module, EIT)), None)
        self.handles: list[Any] = []
        self.prefix = getattr(self.eit or model, "num_prefix_tokens", 1)
        classes = (getattr(self.eit or model, name, None) for name in ("cls_token", "class_token"))
        self.has_class_token = any(token is not None for token in classes)
        self.batch, self.image = 0, (1, 1)
        self.layer: int | None = None  # the layer that runs now
        self.tokens = self.calls = 0  # its tokens, and its calls of attention so far
        self.in_mlp = False
        self.done: set[int] = set()  # layers that have run

    def attach(self) -> None:
        self._before(self.model, self.begin)
        for number, (_, layer) in enumerate(layers_of(self.model), start=1):
            self._attach_layer(number, layer)
        if self.on_heads is not None:
            for module in self.model.modules():
                if isinstance(module, nn.MultiheadAttention):
                    self._attach_multihead(module)

    def _before(self, module: nn.Module, do: Callable[[Any], None]) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda module, args: do(args[0])))

    def _after(self, module: nn.Module, do: Callable[[Any], None]) -> None:
        self.handles.append(
            module.register_forward_hook(lambda module, args, out: do(out[0] if isinstance(out, tuple) else out))
        )

    def begin(self, images: Tensor) -> None:
        self.batch, self.image = images.shape[0], (images.shape[2], images.shape[3])
        self.layer = None
        self.done.clear()

    def _attach_layer(self, number: int, layer: nn.Module) -> None:
        mixer = next((name for name in MIXERS if hasattr(layer, name)), None)
        conv = _conv_channels(layer)

        def enter(x: Any) -> None:
            if number in self.done:
                raise CannotMeasure(f"layer {number} of {self.name} runs several times per forward pass: not measured")
            self.done.add(number)
            self.layer, self.calls, self.in_mlp = number, 0, False
            self.tokens = 0
            if isinstance(x, Tensor) and x.dim() == 3:
                self.tokens = x.shape[1]
            elif isinstance(x, Tensor) and x.dim() == 4 and (place := self.to_grid(x)) is not None:
                self.tokens = math.prod(place.shape[1:3])
            if number == 1 and mixer is not None:
                self._report(0, "stem", x, conv)

        def leave(x: Any) -> None:
            self._report(number, "block", x, conv)
            self.layer = None

        self._before(layer, enter)
        if mixer is not None:
            self._attach_mixer(number, getattr(layer, mixer))
            if self.on_sub_block is not None:
                self._attach_sub_blocks(number, layer, mixer, conv)
            norm, mlp = getattr(layer, MIXERS[mixer], None), getattr(layer, "mlp", None)
            if isinstance(norm, nn.Module) and isinstance(mlp, nn.Module):

                def begin_mlp(_: Any) -> None:
                    self.in_mlp = True

                def before_norm(x: Any) -> None:
                    if not self.in_mlp:  # not the norm after the MLP, whose input is not the mixer's output
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

    def _attach_sub_blocks(self, number: int, layer: nn.Module, mixer: str, conv: int) -> None:
        """Report input and update of the sub-blocks, if the block has modules whose outputs are the updates."""
        adds = next((names for names in UPDATE_MODULES if all(hasattr(layer, name) for name in names)), None)
        if adds is None:
            self.on_missing(number, "transfer", f"{self.name} has no module there whose output is added to the tokens")
            return
        for where, taker, adder in zip(("mixer", "mlp"), (mixer, "mlp"), adds, strict=True):
            convolved = conv if where == "mixer" else 0

            def take(x: Any, where: str = where, convolved: int = convolved) -> None:
                self._report(number, where, x, convolved, "input")

            def add(x: Any, where: str = where, convolved: int = convolved) -> None:
                self._report(number, where, x, convolved, "update")

            self._before(getattr(layer, taker), take)
            self._after(getattr(layer, adder), add)

    def _attach_multihead(self, module: nn.MultiheadAttention) -> None:
        """torch's own module needs hooks: its calls cannot be intercepted, and a mode would disable its fast path."""
        signature = inspect.signature(nn.MultiheadAttention.forward)
        guards: list[Any] = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            self.attention(_packed(module, signature.bind(module, *args, **kwargs).arguments))
            guards.append(torch._C.DisableTorchFunction())
            guards[-1].__enter__()

        def after(module: Any, args: Any, out: Any) -> None:
            if guards:
                guards.pop().__exit__(None, None, None)

        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self.handles.append(module.register_forward_hook(after, always_call=True))

    def _report(self, layer: int, where: str, x: Any, conv_channels: int = 0, side: str = "") -> None:
        tell = self.on_sub_block if side else self.on_tokens
        if tell is None:
            return
        place = self.to_grid(x)
        if place is None:
            reason = f"the tokens of {self.name} are not one grid per image there (windows?)"
            self.on_missing(layer, "transfer" if side else where, reason)
            return
        token = None
        if self.has_class_token and x.dim() == 3 and x.shape[1] > place.shape[1] * place.shape[2]:
            token = x[:, 0]
        with torch.autocast(place.device.type, enabled=False):
            tell(Tokens(layer, where, place, self.pitch(place.shape[1]), token, conv_channels, side))

    def from_grid(self, x: Tensor, place: Tensor) -> Tensor:
        """`x` with other tokens on its grid: the inverse of `to_grid`."""
        if x.dim() == 3:
            tokens = place.flatten(1, 2)
            return torch.cat((x[:, : x.shape[1] - tokens.shape[1]], tokens), dim=1)
        return place if self._has_channels_last(x) else place.permute(0, 3, 1, 2)

    def to_grid(self, x: Any) -> Tensor | None:
        """Tokens (B, N, C), or a map, as (B, h, w, C); None if they are not one grid per image."""
        if not isinstance(x, Tensor) or x.dim() not in (3, 4) or x.shape[0] != self.batch:
            return None
        if x.dim() == 3:
            grid = self._grid(x.shape[1])
            return None if grid is None else x[:, grid[1] :].unflatten(1, grid[0])
        last = self._has_channels_last(x)
        return None if last is None else x if last else x.permute(0, 2, 3, 1)

    def _has_channels_last(self, x: Tensor) -> bool | None:
        """Whether a map has channels last; None if neither order gives the image's shape."""
        last, first = self._has_image_shape(x.shape[1:3]), self._has_image_shape(x.shape[2:4])
        if last and first:  # as many channels as tokens along an axis
            return getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return last if last or first else None

    def _has_image_shape(self, grid: Sequence[int]) -> bool:
        """Whether the grid has the image's aspect ratio, up to one token."""
        return abs(grid[0] * self.image[1] / self.image[0] - grid[1]) <= 1

    def _grid(self, tokens: int) -> tuple[Grid, int] | None:
        """The grid that has the image's shape, and the number of tokens before it."""
        height, width = self.image
        if self.eit is not None:
            return self.eit.patch_embed.grid_size(height, width), 1
        size = getattr(getattr(self.model, "patch_embed", None), "dynamic_feat_size", None)
        stem: Grid | None = None if size is None else tuple(size(self.image))
        for prefix in dict.fromkeys([self.prefix, *range(8)]):  # some add the class token late
            n = tokens - prefix
            if stem is not None and n == stem[0] * stem[1]:
                return stem, prefix
            h = round((n * height / width) ** 0.5) if n > 0 else 0
            if h and n % h == 0 and self._has_image_shape((h, n // h)):
                dropped = (
                    stem is not None and n > 1 and (stem[0] * stem[1]) % n
                )  # not a coarser grid: tokens were dropped
                return None if dropped else ((h, n // h), prefix)
        return None

    def pitch(self, rows: int) -> float:
        """Pixels from one token to the next: a multiple of the stem's stride if it is known, otherwise image / grid."""
        if self.eit is not None:
            return float(self.eit.patch_embed.pitch)
        for path in STEMS:
            try:
                stride = int(cast(nn.Conv2d, self.model.get_submodule(path)).stride[0])
            except AttributeError:
                continue
            for factor in (1, 2, 4, 8, 16):  # later stages are coarser
                if abs(self.image[0] / (stride * factor) - rows) <= 1:
                    return float(stride * factor)
        return self.image[0] / rows

    def attention(self, inputs: AttentionInputs | None) -> None:
        """Report a call of attention while a layer runs; None is a call whose inputs are not known."""
        if self.layer is None:
            return
        number, self.calls = self.calls, self.calls + 1
        if inputs is None:
            self.on_missing(
                self.layer, "heads", f"{self.name} calls nn.MultiheadAttention with masks or with other keys there"
            )
            return
        queries, keys = inputs.query.shape[-2], inputs.key.shape[-2]
        token_grid = self._grid(queries) if inputs.query.dim() == 4 and queries == keys == self.tokens else None
        if inputs.query.shape[0] != self.batch:
            self.on_missing(self.layer, "heads", f"{self.name} attends within windows of {keys} tokens there")
        elif token_grid is None:
            self.on_missing(
                self.layer, "heads", f"{self.name} attends from {queries} to {keys} tokens there, not on a whole grid"
            )
        else:
            grid, prefix = token_grid
            has_class = self.has_class_token and prefix > 0
            with torch.autocast(inputs.query.device.type, enabled=False):
                self.on_heads(AttentionCall(self.layer, number, inputs, grid, self.pitch(grid[0]), prefix, has_class))


class _Interceptor(TorchFunctionMode):
    """Reports the inputs of each call of scaled dot-product attention, and runs it unchanged."""

    def __init__(self, probe: _Probe) -> None:
        super().__init__()
        self.probe = probe

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            given = _SDPA.bind(*args, **kwargs).arguments
            options = given.get("attn_mask"), given.get("is_causal", False), given.get("scale")
            self.probe.attention(AttentionInputs(given["query"], given["key"], *options))
        return function(*args, **kwargs)


# The built-in function has no signature of its own.
_SDPA = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: None
)


def _conv_channels(layer: nn.Module) -> int:
    mixer = getattr(layer, "attn", None)
    return mixer.conv_channels if isinstance(mixer, ConvAttention) else 0


def _packed(module: nn.MultiheadAttention, given: dict[str, Any]) -> AttentionInputs | None:
    """The inputs of plain self-attention; None for cross-attention, masks or added keys."""
    x, width = given["query"], module.embed_dim
    plain = x is given["key"] and x.dim() == 3 and module.in_proj_weight is not None
    masked = given.get("attn_mask") is not None or given.get("key_padding_mask") is not None
    if not plain or masked or module.bias_k is not None or module.add_zero_attn:
        return None
    x = x if module.batch_first else x.transpose(0, 1)
    bias = None if module.in_proj_bias is None else module.in_proj_bias[: 2 * width]
    both = F.linear(x, module.in_proj_weight[: 2 * width], bias)
    q, k = both.unflatten(2, (2, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (2, B, H, N, D)
    return AttentionInputs(q, k)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
