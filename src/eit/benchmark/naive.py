"""A direct port of EIT from the paper: the baseline of `eit bench --naive`.

It has the same weights and results as `eit.EIT`. The token mixer is written step by step: rearrange tokens to an image,
split its channels, convolve one part, rearrange the other part to tokens, attention as two products with a softmax
between, concatenate. Images and weights have PyTorch's default memory format, and layers are PyTorch's own.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eit.models.eit import EIT, ConvAttention
from eit.models.ops import Linear, MaxPool2d, PatchConv2d


class NaiveMixer(ConvAttention):
    def convolve_image(self, image: Tensor) -> Tensor:
        return self.conv_drop(self.conv(image))

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        weights = torch.dropout(weights.softmax(dim=-1), self.attn_drop_rate, self.training)
        x = (weights @ v).transpose(1, 2).reshape(batch, tokens, channels)
        return self.proj_drop(self.proj(x))

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        if self.conv_channels == 0:
            return self.attend(x)
        if hasattr(self, "conv_in"):
            gated = F.glu(self.conv_in(x[..., : self.conv_channels]), dim=2)
            x = torch.cat((gated, x[..., self.conv_channels :]), dim=2)
        batch, _, dim = x.shape
        token, image = x[:, :1], x[:, 1:]
        image = image.transpose(1, 2).reshape(batch, dim, h, w)
        conv = self.convolve_image(image[:, : self.conv_channels]).flatten(2).transpose(1, 2)
        own = token[..., : self.conv_channels]
        own = dict(identity=own, zero=torch.zeros_like(own), mean=conv.mean(dim=1, keepdim=True))[self.cls_conv]
        conv = torch.cat((own, conv), dim=1)
        if hasattr(self, "conv_out"):
            conv = self.proj_drop(self.conv_out(conv))
        if self.attn_channels == 0:
            return conv
        attn = image[:, self.conv_channels :].flatten(2).transpose(1, 2)
        attn = self.attend(torch.cat((token[..., self.conv_channels :], attn), dim=1))
        return torch.cat((conv, attn), dim=2)


def make_naive(model: EIT) -> EIT:
    """A copy of `model` with the same weights that computes as described above."""
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    plain = {ConvAttention: NaiveMixer, Linear: nn.Linear, PatchConv2d: nn.Conv2d, MaxPool2d: nn.MaxPool2d}
    for module in twin.modules():
        module.__class__ = plain.get(type(module), type(module))
    return twin
