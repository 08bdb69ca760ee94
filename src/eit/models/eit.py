"""EIT, LSRA and plain ViT as one model family (arXiv 2203.07116).

They differ in the *schedule*: how many of a layer's channels go through attention. The rest go through a depthwise 3x3
convolution (EIT-T in the paper). The stem (EIT-P) makes overlapping patches with a convolution and a max-pool.
The paper's configuration of LSRA for images is not known: what is called LSRA here is an interpretation.

Legend of the shape comments: B batch, N tokens (class token first), C channels, H heads, D head width; h, w token grid.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, global_pool_nlc, resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eit.models import ops

Schedule = str | tuple[int, ...] | list[int]


def decreasing_conv(dim: int, depth: int, heads: int) -> list[int]:
    """The paper's schedule: attention grows linearly with depth, and the last layer is all attention."""
    return [int(dim // heads * (layer + 1) / depth) * heads for layer in range(depth - 1)] + [dim]


def increasing_conv(dim: int, depth: int, heads: int) -> list[int]:
    """The paper's schedule in reverse order, for the ablation."""
    return decreasing_conv(dim, depth, heads)[::-1]


def constant_half(dim: int, depth: int, heads: int) -> list[int]:
    """Our interpretation of LSRA: half of the channels in every layer, including the last."""
    return [(dim // heads) // 2 * heads] * depth


def no_conv(dim: int, depth: int, heads: int) -> list[int]:
    """Plain ViT."""
    return [dim] * depth


# (embed_dim, depth, num_heads) -> attention channels of each layer. A new schedule is a new line here.
SCHEDULES: dict[str, Callable[[int, int, int], list[int]]] = {
    "eit": decreasing_conv,
    "increasing": increasing_conv,
    "lsra": constant_half,
    "vit": no_conv,
}


def attention_channels(schedule: Schedule, embed_dim: int, depth: int, num_heads: int) -> list[int]:
    """Attention channels of each layer; the other `embed_dim - n` channels are convolved.

    Args:
        schedule: `eit`, `increasing`, `lsra` or `vit` (the keys of `SCHEDULES`), or a sequence of `depth` ints, each a
            multiple of `num_heads` in [0, embed_dim].
        embed_dim: width C.
        depth: number of layers.
        num_heads: number of heads of each layer.

    Raises:
        ValueError: the numbers do not fit together; the message names them.

    Examples:
        >>> attention_channels("eit", embed_dim=250, depth=5, num_heads=10)
        [50, 100, 150, 200, 250]
    """
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}")
    if depth < 1:
        raise ValueError(f"depth={depth}: at least one layer is needed")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}, nor a list of ints")
        return SCHEDULES[schedule](embed_dim, depth, num_heads)
    channels = list(schedule)
    if len(channels) != depth:
        raise ValueError(f"schedule={channels} has {len(channels)} entries for depth={depth}")
    for n in channels:
        if not isinstance(n, int) or n % num_heads or not 0 <= n <= embed_dim:
            raise ValueError(f"schedule={channels}: {n} is not a multiple of num_heads={num_heads} in 0..{embed_dim}")
    return channels


POOLS = ("token", "avg", "max", "avgmax", "")  # global_pool: what the head reads; "": all tokens
CHOICES = dict(  # values of other arguments of EIT
    cls_conv=("identity", "zero", "mean"),
    conv_branch=("depthwise", "gated"),
    stem=("conv_pool", "patch"),
    pos_embed=("none", "learned"),
)


class ConvPoolStem(nn.Module):
    """EIT-P: overlapping patches from a convolution and a max-pool. (B, in_chans, height, width) -> (B, C, h, w)."""

    def __init__(
        self, in_chans: int, embed_dim: int, kernel_size: int, stride: int, pool_size: int, **factory_kwargs: Any
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.pool_size = kernel_size, stride, pool_size
        self.pitch = stride * pool_size  # pixels from one token to the next
        self.proj = ops.PatchConv2d(
            in_chans, embed_dim, kernel_size, stride, padding=kernel_size // 2, **factory_kwargs
        )
        self.pool = ops.MaxPool2d(pool_size)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (h, w) of an image of height x width pixels; an axis is 0 if the image is too small."""
        pad = 2 * (self.kernel_size // 2)
        h, w = (((n + pad - self.kernel_size) // self.stride + 1) // self.pool_size for n in (height, width))
        return max(h, 0), max(w, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.proj(x))


class PatchStem(nn.Module):
    """ViT's stem: patches that do not overlap. (B, in_chans, height, width) -> (B, C, h, w)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.pitch = patch_size
        self.proj = ops.PatchConv2d(in_chans, embed_dim, patch_size, patch_size, **factory_kwargs)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (h, w) of an image of height x width pixels; an axis is 0 if the image is too small."""
        return height // self.pitch, width // self.pitch

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ConvAttention(nn.Module):
    """Token mixer: the first channels go through a depthwise 3x3 convolution, the last through attention.

    The class token is not on the grid. `cls_conv` sets what it gets instead of the convolution: its own channels
    (`identity`, as published), `zero`, or the `mean` of the convolved grid. The `gated` branch has linear layers around
    the convolution, as in the Lite Transformer's code: Linear to twice the width, GLU, convolution, Linear.
    """

    __jit_ignored_attributes__ = ("_padded",)

    def __init__(
        self,
        dim: int,
        attn_channels: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        cls_conv: str = "identity",
        conv_branch: str = "depthwise",
        **factory_kwargs: Any,
    ) -> None:
        super().__init__()
        self.cls_conv = cls_conv
        self.attn_channels = attn_channels
        self.conv_channels = dim - attn_channels
        self.num_heads = num_heads
        self.attn_drop_rate = attn_drop
        if self.attn_channels > 0:
            self.qkv = ops.Linear(attn_channels, 3 * attn_channels, bias=qkv_bias, **factory_kwargs)
            self.proj = ops.Linear(attn_channels, attn_channels, **factory_kwargs)
            self._padded = ops.PaddedHeads(num_heads, attn_channels // num_heads)
        if self.conv_channels > 0:
            self.conv = nn.Conv2d(
                self.conv_channels,
                self.conv_channels,
                3,
                padding=1,
                groups=self.conv_channels,
                bias=False,
                **factory_kwargs,
            )
            self.conv_drop = nn.Dropout(attn_drop)
            if conv_branch == "gated":
                self.conv_in = ops.Linear(self.conv_channels, 2 * self.conv_channels, **factory_kwargs)
                self.conv_out = ops.Linear(self.conv_channels, self.conv_channels, **factory_kwargs)
        self.proj_drop = nn.Dropout(proj_drop)

    def convolve(self, x: Tensor, h: int, w: int) -> Tensor:
        if hasattr(self, "conv_in"):
            x = F.glu(self.conv_in(x), dim=2)  # (B, N, 2*C) -> (B, N, C)
        # Token layout is channels_last, so the image is a view: (B, 1+h*w, C) -> (B, C, h, w) -> (B, 1+h*w, C)
        token, image = x.split([1, h * w], dim=1)
        image = self.conv_drop(self.conv(image.unflatten(1, (h, w)).permute(0, 3, 1, 2)))
        image = image.permute(0, 2, 3, 1).flatten(1, 2)
        if self.cls_conv == "zero":
            token = torch.zeros_like(token)
        elif self.cls_conv == "mean":
            token = image.mean(dim=1, keepdim=True)
        x = torch.cat((token, image), dim=1)
        if hasattr(self, "conv_out"):
            x = self.proj_drop(self.conv_out(x))
        return x

    def attend(self, x: Tensor) -> Tensor:
        dropout = self.attn_drop_rate if self.training else 0.0
        if torch.jit.is_scripting():
            pass
        else:  # TorchScript does not compile this
            if self._padded.apply_to(x, self.qkv, self.proj):
                return self.proj_drop(self._padded.attention(x, self.qkv, self.proj, dropout))
        # (B, N, 3*H*D) -> (3, B, H, N, D), views all the way
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = ops.attention(q, k, v, dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # (B, H, N, D) -> (B, N, H*D)

    def attend_token(self, x: Tensor) -> Tensor:
        """The class token of `attend`: (B, 1+h*w, C) -> (B, 1, C). Needs attention channels."""
        dropout = self.attn_drop_rate if self.training else 0.0
        x = ops.class_attention(x, self.qkv.weight, self.qkv.bias, self.num_heads, dropout)
        return self.proj_drop(self.proj(x))

    @torch.jit.ignore
    def train(self, mode: bool = True) -> "ConvAttention":
        if hasattr(self, "_padded"):
            self._padded.forget()
        return super().train(mode)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, 1+h*w, C) -> the same shape."""
        if not hasattr(self, "conv"):  # hasattr lets TorchScript leave out a missing part
            x = self.attend(x)
        elif not hasattr(self, "qkv"):
            x = self.convolve(x, h, w)
        else:
            conv, attn = x.split([self.conv_channels, self.attn_channels], dim=2)
            x = torch.cat((self.convolve(conv, h, w), self.attend(attn)), dim=2)
        return x

    def forward_token(self, x: Tensor, h: int, w: int) -> Tensor:
        """The class token of `forward`: (B, 1+h*w, C) -> (B, 1, C)."""
        if not hasattr(self, "conv"):
            return self.attend_token(x)
        conv, attn = x.split([self.conv_channels, self.attn_channels], dim=2)
        # The whole convolution: its weights get their gradient, which is zero unless `cls_conv` is mean
        return torch.cat((self.convolve(conv, h, w)[:, :1], self.attend_token(attn)), dim=2)


class Mlp(nn.Module):
    """The channel mixer: (B, N, C) -> the same shape."""

    def __init__(self, dim: int, hidden: int, drop: float, **factory_kwargs: Any) -> None:
        super().__init__()
        self.fc1 = ops.Linear(dim, hidden, **factory_kwargs)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = ops.Linear(hidden, dim, **factory_kwargs)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block around `ConvAttention`."""

    def __init__(
        self,
        dim: int,
        attn_channels: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        cls_conv: str = "identity",
        conv_branch: str = "depthwise",
        **factory_kwargs: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **factory_kwargs)
        self.attn = ConvAttention(
            dim, attn_channels, num_heads, qkv_bias, attn_drop, proj_drop, cls_conv, conv_branch, **factory_kwargs
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **factory_kwargs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **factory_kwargs)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, 1+h*w, C) -> the same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x), h, w))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def forward_token(self, x: Tensor, h: int, w: int) -> Tensor:
        """The class token of `forward`, without computing the other tokens: (B, 1+h*w, C) -> (B, 1, C)."""
        token = x[:, :1] + self.drop_path1(self.attn.forward_token(self.norm1(x), h, w))
        return token + self.drop_path2(self.mlp(self.norm2(token)))

    def can_skip_tokens(self) -> bool:
        """Whether `forward_token` may run instead of `forward`: nothing replaces or watches a part of this block."""
        mixer = self.attn
        if type(mixer) is not ConvAttention or type(self.mlp) is not Mlp or not mixer.attn_channels:
            return False
        layers = (mixer.qkv, mixer.proj, self.mlp.fc1, self.mlp.fc2)
        if any(type(layer) is not ops.Linear for layer in layers) or not ops.is_plain(mixer.qkv.weight):
            return False
        return not any("forward" in vars(module) or ops.has_hooks(module) for module in self.modules())


class EIT(nn.Module):
    """A pyramid-free vision transformer with convolution in a share of each layer's channels.

    Takes images (B, in_chans, height, width) of any size that gives at least one token, square or not, and returns
    logits (B, num_classes). The defaults are EIT16/4/3-mini of the paper.

    Args:
        img_size: pixels, an int or (height, width). Only the learned position table depends on it.
        kernel_size: pixels, of the convolution of the `conv_pool` stem: 16 of "EIT16/4/3" in the paper's names.
        stride: pixels, of that convolution: 4 of "EIT16/4/3".
        pool_size: side and stride of the max-pool after it: 3 of "EIT16/4/3".
        in_chans: number of image channels.
        num_classes: number of logits; 0 for features.
        embed_dim: width C, a multiple of `num_heads`.
        depth: number of layers.
        num_heads: number of heads of each layer, which share its attention channels evenly.
        schedule: attention channels of each layer, see `attention_channels`.
        cls_conv: what the class token, which is not on the grid, gets instead of each layer's convolution: `identity`
            (its own normalised channels, as published: the same update for every image), `zero` (no update; with the
            gated branch, the bias of its last layer), or `mean` (the mean of the convolved grid).
        conv_branch: `depthwise` (only a 3x3 convolution, as published), or `gated` (Linear to twice the width, GLU,
            that convolution, Linear: the Lite Transformer's branch in two dimensions).
        stem: `conv_pool` (EIT-P) or `patch` (ViT).
        patch_size: pixels, of the `patch` stem.
        pos_embed: `none` (the paper), or `learned`: a table for the tokens of `img_size`, interpolated to other sizes.
        representation_size: width of an optional Linear + tanh before the head.
        global_pool: what the head reads: `token`; `avg`, `max` or `avgmax` over the grid; or "" for all tokens.
        mlp_ratio: hidden width of the MLP divided by `embed_dim`.
        qkv_bias: whether queries, keys and values have a bias.
        init_std: standard deviation of the linear layers' initial values.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the stem.
        proj_drop_rate: dropout after the attention projection, after the gated branch, and in the MLP.
        attn_drop_rate: dropout of attention weights and of the convolution's output.
        drop_path_rate: stochastic depth, linear from 0 in the first layer.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: the arguments do not make a valid model; the message names the argument.

    Examples:
        >>> model = EIT(img_size=32, kernel_size=3, stride=1, pool_size=4, num_classes=10, embed_dim=40, depth=4)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    card: Any  # set by `eit.load`: classes and preprocessing of the weights, and what applies them
    predict: Any
    transform: Any
    __jit_ignored_attributes__ = ("card", "predict", "transform")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        kernel_size: int = 16,
        stride: int = 4,
        pool_size: int = 3,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 250,
        depth: int = 5,
        num_heads: int = 10,
        schedule: Schedule = "eit",
        cls_conv: str = "identity",
        conv_branch: str = "depthwise",
        stem: str = "conv_pool",
        patch_size: int = 16,
        pos_embed: str = "none",
        representation_size: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_std: float = 0.01,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = dict(device=device, dtype=dtype)
        given = dict(cls_conv=cls_conv, conv_branch=conv_branch, stem=stem, pos_embed=pos_embed)
        for name, value in given.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(CHOICES[name])}")
        if global_pool not in POOLS:
            raise ValueError(_unknown_pool(global_pool))
        sizes = dict(
            kernel_size=kernel_size, stride=stride, pool_size=pool_size, patch_size=patch_size, in_chans=in_chans
        )
        for name, size in (sizes | dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads)).items():
            if isinstance(size, bool) or not hasattr(size, "__index__"):
                raise ValueError(f"{name}={size!r} is not an integer")
            if size < 1:
                raise ValueError(f"{name}={size} is not positive")
        if isinstance(num_classes, bool) or not hasattr(num_classes, "__index__") or num_classes < 0:
            raise ValueError(f"num_classes={num_classes!r} is not an integer of 0 or more")
        rates = dict(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, proj_drop_rate=proj_drop_rate)
        for name, rate in (rates | dict(attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)).items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}={rate} is not in 0..1")
        if not init_std > 0:
            raise ValueError(f"init_std={init_std} is not positive")
        if int(embed_dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} leaves no hidden channel of embed_dim={embed_dim}")
        self.attn_channels = attention_channels(schedule, embed_dim, depth, num_heads)  # the others are convolved
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.head_hidden_size = representation_size or embed_dim
        self.num_prefix_tokens = 1
        self.global_pool = global_pool
        self.init_std = init_std
        self.grad_checkpointing = False

        if stem == "patch":
            self.patch_embed: ConvPoolStem | PatchStem = PatchStem(in_chans, embed_dim, patch_size, **factory_kwargs)
        else:
            self.patch_embed = ConvPoolStem(in_chans, embed_dim, kernel_size, stride, pool_size, **factory_kwargs)
        self.img_size, self.grid_size = self._size_and_grid(img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **factory_kwargs))
        self.pos_embed: nn.Parameter | None = None
        if pos_embed == "learned":
            tokens = 1 + self.grid_size[0] * self.grid_size[1]
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim, **factory_kwargs))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                attn_channels,
                num_heads,
                mlp_ratio,
                qkv_bias,
                proj_drop_rate,
                attn_drop_rate,
                drop_path=drop_path_rate * layer / max(depth - 1, 1),
                cls_conv=cls_conv,
                conv_branch=conv_branch,
                **factory_kwargs,
            )
            for layer, attn_channels in enumerate(self.attn_channels)
        )
        self.feature_info = [
            dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=self.patch_embed.pitch) for i in range(depth)
        ]
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=1e-6, **factory_kwargs)
        self.pre_logits: nn.Module = nn.Identity()
        if representation_size:
            self.pre_logits = nn.Sequential()
            self.pre_logits.add_module("fc", nn.Linear(embed_dim, representation_size, **factory_kwargs))
            self.pre_logits.add_module("act", nn.Tanh())
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = (
            nn.Linear(self.head_hidden_size, num_classes, **factory_kwargs) if num_classes else nn.Identity()
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Initial values as in the published code."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(self._init_module)

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.init_std)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        else:
            return
        if module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Images (B, in_chans, height, width) -> tokens (B, 1+h*w, C) with the class token first, h, w."""
        x = self.patch_embed(x)
        h, w = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.pos_embed is not None:
            x = x + resample_abs_pos_embed(self.pos_embed, [h, w], list(self.grid_size), num_prefix_tokens=1)
        return self.pos_drop(x), h, w

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> normalised tokens (B, 1+h*w, C), class token first."""
        x, h, w = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, h, w, use_reentrant=False)
            else:
                x = block(x, h, w)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1+h*w, C) -> logits (B, num_classes), or the features before them."""
        x = global_pool_nlc(x, self.global_pool, num_prefix_tokens=1)
        x = self.head_drop(self.pre_logits(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> logits (B, num_classes), or features (B, C) if num_classes is 0.

        If the head reads the class token alone, the last block computes no other token.
        """
        if torch.jit.is_scripting():
            pass
        else:  # TorchScript does not compile this
            if self._can_skip_tokens(x):
                return self.forward_head(self._forward_token(x))
        return self.forward_head(self.forward_features(x))

    def _can_skip_tokens(self, x: Any) -> bool:
        if self.global_pool != "token" or type(self) is not EIT or isinstance(x, torch.fx.Proxy):
            return False
        if "forward_features" in vars(self) or ops.has_hooks(self.norm) or not len(self.blocks):
            return False
        last = self.blocks[-1]
        return type(last) is Block and last.can_skip_tokens()

    @torch.jit.ignore
    def _forward_token(self, x: Tensor) -> Tensor:
        """Images -> the class token of `forward_features`, (B, 1, C)."""
        x, h, w = self.embed(x)
        *blocks, last = self.blocks
        for block in blocks:
            x = self._run(block, x, h, w)
        return self.norm(self._run(cast(Block, last).forward_token, x, h, w))

    def _run(self, part: Callable[[Tensor, int, int], Tensor], x: Tensor, h: int, w: int) -> Tensor:
        return checkpoint(part, x, h, w, use_reentrant=False) if self.grad_checkpointing else part(x, h, w)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen blocks, by timm's conventions.

        Args:
            x: images (B, in_chans, height, width).
            indices: the last n blocks, a list of blocks (negative from the end), or None for all.
            return_prefix_tokens: return pairs (map, class token (B, 1, C)).
            norm: apply the final norm to each output.
            stop_early: do not run the blocks after the last chosen one.
            output_fmt: `NCHW` (B, C, h, w) or `NLC` (B, h*w, C).
            intermediates_only: do not return the final features.

        Returns:
            (final normalised tokens (B, 1+h*w, C), list of outputs), or the list alone.

        Raises:
            ValueError: an unknown `output_fmt`, or a block that does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not one of NCHW, NLC")
        wanted = self._chosen_blocks(indices)
        batch = x.shape[0]
        outputs = []
        x, h, w = self.embed(x)
        for i, block in enumerate(self.blocks[: max(wanted) + 1] if stop_early else self.blocks):
            x = self._run(block, x, h, w)
            if i in wanted:
                y = self.norm(x) if norm else x
                image = y[:, 1:]
                if output_fmt == "NCHW":
                    image = image.transpose(1, 2).reshape(batch, self.embed_dim, h, w)
                outputs.append((image, y[:, :1]) if return_prefix_tokens else image)
        return outputs if intermediates_only else (self.norm(x), outputs)

    def _chosen_blocks(self, indices: int | list[int] | None) -> list[int]:
        depth = len(self.blocks)
        if indices is None:
            indices = depth
        given = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
        if not given or any(not -depth <= i < depth for i in given):
            raise ValueError(f"indices={indices}: the model has only {depth} blocks")
        return [i % depth for i in given]

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the outputs of blocks `indices` (see `forward_intermediates`) do not need; return indices."""
        wanted = self._chosen_blocks(indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.pre_logits = nn.Identity()
            self.head_hidden_size = self.embed_dim
            self.reset_classifier(0, "")
        return wanted

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with initial values.

        Args:
            num_classes: number of logits; 0 removes the head.
            global_pool: another pooling, as for the model; None keeps it.
        """
        if global_pool is not None:
            if global_pool not in POOLS:
                raise AssertionError(_unknown_pool(global_pool))  # timm expects this type
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.cls_token
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            self.head.apply(self._init_module)
        self.head.train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Set the usual size of the images: pixels, an int or (height, width).

        Other sizes work without this. It changes the size in `model_args` of timm's exports, and it interpolates a
        learned position table once instead of in each step.

        Raises:
            ValueError: the images are too small for the stem.
        """
        size, grid = self._size_and_grid(img_size)
        if self.pos_embed is not None and grid != self.grid_size:
            table = resample_abs_pos_embed(self.pos_embed.detach(), list(grid), list(self.grid_size))
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.img_size, self.grid_size = size, grid
        self._traits = dict(getattr(self, "_traits", {}), img_size=self.img_size)  # what timm's export reads

    def _size_and_grid(self, img_size: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) in pixels and in tokens."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = self.patch_embed.grid_size(height, width)
        if 0 in grid:
            raise ValueError(f"img_size={img_size} is too small: the stem makes no token")
        return (height, width), grid

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizer factory must not decay, besides those with one axis."""
        return {"cls_token", "pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates, by timm's conventions."""
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: EIT) -> dict[str, Tensor]:
    """Convert weights to the names and shapes of `model`, by timm's conventions.

    The names may be the published ones, or those of DistributedDataParallel and torch.compile. A square position table
    of another resolution is interpolated. Other mismatches are left to `load_state_dict`, which names them.
    """
    state = our_names(state_dict)
    table, wanted = state.get("pos_embed"), model.pos_embed
    if table is None or wanted is None or table.shape == wanted.shape or table.shape[2:] != wanted.shape[2:]:
        return state
    if round((table.shape[1] - 1) ** 0.5) ** 2 != table.shape[1] - 1:
        return state
    return state | dict(pos_embed=resample_abs_pos_embed(table, list(model.grid_size), num_prefix_tokens=1))


def our_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published parameter names, and those of DDP and torch.compile -> ours, which are timm's for the same parts."""
    renames = [(".eit_p.conv.", ".proj."), (".eit_t.conv1.", ".attn.conv.")]
    named = {}
    for name, tensor in state_dict.items():
        for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # each wraps the other
            name = name.removeprefix(prefix)
        for old, new in renames:
            name = name.replace(old, new)
        named[name] = tensor
    return named


def _unknown_pool(global_pool: str) -> str:
    return f"global_pool={global_pool!r} is not one of {', '.join(POOLS[:-1])}, ''"
