"""How much of the class token depends on the image.

A classifier that reads the class token knows only what differs there between images. docs/analysis.md has the formulas.

Legend of the shape comments: B images, C channels.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from eit.analysis.moments import Moments

PLACES = ("stem", "mixer", "mlp", "block")  # token before the first layer, two updates, token after a layer
MIN_SHARE = 0.001  # a smaller share of the token after the last layer gives a warning (docs/analysis.md)


@dataclass(frozen=True)
class ClassToken:
    """The class token at one place of a model, or the update of it by a sub-block, over all images.

    Attributes:
        layer: 1 is the first; 0 is the input of the first layer.
        where: `stem`, the token before the first layer; `mixer` or `mlp`, the update by that sub-block; `block`, the
            token after the layer.
        part: `all` channels; `conv`, the channels that the layer's mixer convolves; `attention`, the others.
        channels: number of channels of the part.
        norm: root of the mean over images of |x|^2.
        share: the part of the energy that depends on the image, 0..1: 1 - |mean of x|^2 / mean of |x|^2. NaN for one
            image, or if x is 0.
    """

    layer: int
    where: str
    part: str
    channels: int
    norm: float
    share: float


class ClassTokenMeter:
    """Running sums of the class token at one place, in float64."""

    def __init__(self, layer: int, where: str, conv_channels: int) -> None:
        """`conv_channels`: number of convolved channels, which come first."""
        self.layer, self.where, self.conv = layer, where, conv_channels
        self._moments = Moments()

    def add(self, x: Tensor) -> None:
        """Class tokens of a batch, (B, C)."""
        self._moments.add(x)

    def result(self) -> list[ClassToken]:
        """Results for all channels and, except for an MLP, for each part."""
        width = len(self._moments.mean)
        parts = {"all": slice(0, width)}
        if self.where != "mlp":
            parts |= {"conv": slice(0, self.conv)} if self.conv else {}
            parts |= {"attention": slice(self.conv, width)} if self.conv < width else {}
        return [self._part(name, channels) for name, channels in parts.items()]

    def _part(self, name: str, channels: slice) -> ClassToken:
        varying = float(self._moments.variance[channels].sum())
        energy = float(self._moments.mean[channels].square().sum()) + varying
        share = math.nan if self._moments.count < 2 or not energy else varying / energy
        return ClassToken(self.layer, self.where, name, len(self._moments.mean[channels]), math.sqrt(energy), share)
