"""Watch a model while it runs: the tokens of its layers and the arguments of its attention, without changing either."""

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

from eit.analysis.attention import Call
from eit.analysis.frequency import Grid
from eit.errors import UserError
from eit.models.eit import EIT, ConvAttention

MIXERS = {"attn": "norm2", "self_attention": "ln_2"}  # of timm's blocks, torchvision's -> the norm before the MLP
# Modules of a block whose outputs are what it adds to the tokens: after mixer and MLP. In timm, ours; in torchvision
ADDED = (("drop_path1", "drop_path2"), ("dropout", "mlp"))
STEMS = ("patch_embed.proj", "patch_embed.conv", "conv_proj")  # their convolutions; the stride is the pitch


class CannotMeasure(UserError):
    """It is the model, not the input, that cannot be measured."""


@dataclass(frozen=True)
class Tokens:
    """Tokens at one place: (B, h, w, C), and the class token apart."""

    layer: int  # 0 is what the first block takes
    where: str  # stem, mixer, block; conv, attention; of a sub-block mixer or mlp
    grid: Tensor
    pitch: float  # pixels from one token to the next
    class_token: Tensor | None = None  # (B, C), where there is one
    conv_channels: int = 0  # so many first channels are convolved by the layer's mixer
    side: str = ""  # of a sub-block: `input`, what it takes, or `update`, what it adds


@dataclass(frozen=True)
class Heads:
    """One call of attention in a layer, whose tokens lie on a grid behind `prefix` others."""

    layer: int
    number: int  # of the call in its layer: parallel blocks make several
    call: Call
    grid: Grid
    pitch: float
    prefix: int
    has_class_token: bool  # the first of the prefix


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers: transformer blocks (with a token mixer and an MLP), else timm's feature stages.

    Raises:
        UserError: the model has neither.
    """
    if hasattr(model, "reroll"):
        raise CannotMeasure(f"{type(model).__name__} keeps its tokens in another order than the image's: not measured")
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
            f"{type(model).__name__} has neither transformer blocks (attn and mlp) nor feature_info of timm: "
            "nothing of it can be measured"
        )
    return [(name, model.get_submodule(name)) for name in stages]


@contextmanager
def watch(
    model: nn.Module,
    on_tokens: Callable[[Tokens], None] | None = None,
    on_heads: Callable[[Heads], None] | None = None,
    on_missing: Callable[[int, str, str], None] | None = None,
    on_flow: Callable[[Tokens], None] | None = None,
) -> Iterator[None]:
    """While the context lasts, `model(images)` reports what its layers do.

    `on_tokens` is told of the tokens, `on_flow` of what each sub-block takes and adds. `on_missing(layer, where,
    reason)` is told what lies on no grid of the image: `where` is a place, or `heads`. The outputs stay as they are, to
    the bit. Hooks are gone afterwards, however the context ends.
    """
    probe = _Probe(model, on_tokens, on_heads, on_missing or (lambda layer, where, reason: None), on_flow)
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
def altered(model: nn.Module, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the context lasts, `change` works on the grid tokens (B, h, w, C) after layer `layer`, 0 is the stem.

    The class token and registers stay as they are.

    Raises:
        CannotMeasure: when the model runs: its next layer takes no grid of each image.
    """
    probe = _Probe(model, None, None, None)
    _, following = layers_of(model)[layer]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = probe.place(args[0])
        if place is None:
            raise CannotMeasure(f"{probe.name} takes no grid of each image in layer {layer + 1}")
        return (probe.put_back(args[0], change(place)), *args[1:]), kwargs

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
    def __init__(self, model: nn.Module, on_tokens: Any, on_heads: Any, on_missing: Any, on_flow: Any = None) -> None:
        self.model, self.on_tokens, self.on_heads, self.on_missing = model, on_tokens, on_heads, on_missing
        self.on_flow = on_flow
        self.name = type(model).__name__
        self.eit = next((module for module in model.modules() if isinstance(module, EIT)), None)
        self.handles: list[Any] = []
        self.prefix = getattr(self.eit or model, "num_prefix_tokens", 1)
        classes = (getattr(self.eit or model, name, None) for name in ("cls_token", "class_token"))
        self.has_class_token = any(token is not None for token in classes)
        self.batch, self.image = 0, (1, 1)
        self.layer: int | None = None  # the one that runs
        self.tokens = self.calls = 0  # of that layer
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
                raise CannotMeasure(f"layer {number} of {self.name} runs several times in a pass: not measured")
            self.done.add(number)
            self.layer, self.calls, self.in_mlp = number, 0, False
            self.tokens = 0
            if isinstance(x, Tensor) and x.dim() == 3:
                self.tokens = x.shape[1]
            elif isinstance(x, Tensor) and x.dim() == 4 and (place := self.place(x)) is not None:
                self.tokens = math.prod(place.shape[1:3])
            if number == 1 and mixer is not None:
                self._report(0, "stem", x, conv)

        def leave(x: Any) -> None:
            self._report(number, "block", x, conv)
            self.layer = None

        self._before(layer, enter)
        if mixer is not None:
            self._attach_mixer(number, getattr(layer, mixer))
            if self.on_flow is not None:
                self._attach_flow(number, layer, mixer, conv)
            norm, mlp = getattr(layer, MIXERS[mixer], None), getattr(layer, "mlp", None)
            if isinstance(norm, nn.Module) and isinstance(mlp, nn.Module):

                def begin_mlp(_: Any) -> None:
                    self.in_mlp = True

                def before_norm(x: Any) -> None:
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

    def _attach_flow(self, number: int, layer: nn.Module, mixer: str, conv: int) -> None:
        """What the sub-blocks take, and what they add to the tokens: known where a block adds a module's output."""
        adds = next((names for names in ADDED if all(hasattr(layer, name) for name in names)), None)
        if adds is None:
            self.on_missing(number, "flow", f"{self.name} has no module there whose output is what is added")
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
        """torch's own module: what it calls is out of sight, and it has a fast path that a mode would switch off."""
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
        tell = self.on_flow if side else self.on_tokens
        if tell is None:
            return
        place = self.place(x)
        if place is None:
            reason = f"{self.name} gives no grid of each image there (windows?)"
            self.on_missing(layer, "flow" if side else where, reason)
            return
        token = None
        if self.has_class_token and x.dim() == 3 and x.shape[1] > place.shape[1] * place.shape[2]:
            token = x[:, 0]
        with torch.autocast(place.device.type, enabled=False):
            tell(Tokens(layer, where, place, self.pitch(place.shape[1]), token, conv_channels, side))

    def put_back(self, x: Tensor, place: Tensor) -> Tensor:
        """`x` with other tokens on its grid: the inverse of `place`."""
        if x.dim() == 3:
            tokens = place.flatten(1, 2)
            return torch.cat((x[:, : x.shape[1] - tokens.shape[1]], tokens), dim=1)
        return place if self._has_channels_last(x) else place.permute(0, 3, 1, 2)

    def place(self, x: Any) -> Tensor | None:
        """Tokens (B, N, C), or a map, as (B, h, w, C); None where they are not one grid an image."""
        if not isinstance(x, Tensor) or x.dim() not in (3, 4) or x.shape[0] != self.batch:
            return None
        if x.dim() == 3:
            grid = self._grid(x.shape[1])
            return None if grid is None else x[:, grid[1] :].unflatten(1, grid[0])
        last = self._has_channels_last(x)
        return None if last is None else x if last else x.permute(0, 2, 3, 1)

    def _has_channels_last(self, x: Tensor) -> bool | None:
        """Of a map; None where neither order gives the image's shape."""
        last, first = self._has_image_shape(x.shape[1:3]), self._has_image_shape(x.shape[2:4])
        if last and first:  # as many channels as tokens on an axis
            return getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return last if last or first else None

    def _has_image_shape(self, grid: Sequence[int]) -> bool:
        """Up to the rounding of one token."""
        return abs(grid[0] * self.image[1] / self.image[0] - grid[1]) <= 1

    def _grid(self, tokens: int) -> tuple[Grid, int] | None:
        """The grid that has the image's shape, and how many tokens stand before it."""
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
                )  # not a coarser grid: tokens are missing
                return None if dropped else ((h, n // h), prefix)
        return None

    def pitch(self, rows: int) -> float:
        """Pixels from one token to the next: multiples of the stem's stride where it is known, else image by grid."""
        if self.eit is not None:
            return float(self.eit.patch_embed.pitch)
        for path in STEMS:
            try:
                stride = int(cast(nn.Conv2d, self.model.get_submodule(path)).stride[0])
            except AttributeError:
                continue
            for factor in (1, 2, 4, 8, 16):  # of stages that are coarser
                if abs(self.image[0] / (stride * factor) - rows) <= 1:
                    return float(stride * factor)
        return self.image[0] / rows

    def attention(self, call: Call | None) -> None:
        """A call of attention while a layer runs; None is one that cannot be followed."""
        if self.layer is None:
            return
        number, self.calls = self.calls, self.calls + 1
        if call is None:
            self.on_missing(
                self.layer, "heads", f"{self.name} calls nn.MultiheadAttention with masks or other keys there"
            )
            return
        queries, keys = call.query.shape[-2], call.key.shape[-2]
        token_grid = self._grid(queries) if call.query.dim() == 4 and queries == keys == self.tokens else None
        if call.query.shape[0] != self.batch:
            self.on_missing(self.layer, "heads", f"{self.name} attends within windows of {keys} tokens there")
        elif token_grid is None:
            self.on_missing(
                self.layer, "heads", f"{self.name} attends from {queries} to {keys} tokens there, no whole grid"
            )
        else:
            grid, prefix = token_grid
            has_class = self.has_class_token and prefix > 0
            with torch.autocast(call.query.device.type, enabled=False):
                self.on_heads(Heads(self.layer, number, call, grid, self.pitch(grid[0]), prefix, has_class))


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
        return function(*args, **kwargs)


# The built-in function has no signature of its own.
_SDPA = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: None
)


def _conv_channels(layer: nn.Module) -> int:
    mixer = getattr(layer, "attn", None)
    return mixer.conv_channels if isinstance(mixer, ConvAttention) else 0


def _packed(module: nn.MultiheadAttention, given: dict[str, Any]) -> Call | None:
    """The attention of one sequence to itself; None where there are other keys, or masks, or added keys."""
    x, width = given["query"], module.embed_dim
    plain = x is given["key"] and x.dim() == 3 and module.in_proj_weight is not None
    masked = given.get("attn_mask") is not None or given.get("key_padding_mask") is not None
    if not plain or masked or module.bias_k is not None or module.add_zero_attn:
        return None
    x = x if module.batch_first else x.transpose(0, 1)
    bias = None if module.in_proj_bias is None else module.in_proj_bias[: 2 * width]
    both = F.linear(x, module.in_proj_weight[: 2 * width], bias)
    q, k = both.unflatten(2, (2, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (2, B, H, N, D)
    return Call(q, k)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
