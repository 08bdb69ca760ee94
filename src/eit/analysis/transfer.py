"""What a sub-block does to frequencies: the spectrum of what it adds, by that of what it takes.

Stem and residual are left out: neither is part of what is added. docs/analysis.md has the definitions.

Legend of the shape comments: B images, (h, w) token grid, C channels.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from eit.analysis.frequency import Frequency, FrequencyMeter, transform


@dataclass(frozen=True)
class Transfer:
    """One sub-block, or the convolved or attending channels of a mixer.

    Attributes:
        layer: 1 is the first.
        where: `mixer` or `mlp`; `conv`, the channels that the mixer convolves; `attention`, its others.
        input: frequencies of what the sub-block takes, behind its norm where that comes first.
        update: frequencies of what it adds to the tokens.
    """

    layer: int
    where: str
    input: Frequency
    update: Frequency

    @property
    def gain(self) -> float:
        """Share of high frequencies of the update by that of the input; above 1 it is richer in them. NaN of 0 / 0."""
        if not self.input.share:
            return math.inf if self.update.share else math.nan
        return self.update.share / self.input.share

    def radial(self) -> list[tuple[float, float, float]]:
        """(f from, f to, share of the update's energy by the input's share) of each ring, without DC; NaN of 0 / 0."""
        pairs = zip(self.input.radial(), self.update.radial(), strict=True)
        return [(low, high, out / into if into else math.nan) for (low, high, into, _), (_, _, out, _) in pairs]


class TransferMeter:
    """Running sums of one sub-block."""

    def __init__(self, layer: int, where: str, rho: float) -> None:
        self.layer, self.where, self.rho = layer, where, rho
        self._meters: dict[tuple[str, str], FrequencyMeter] = {}  # by part and side

    def add(self, side: str, x: Tensor, conv_channels: int, pitch: float) -> None:
        """What a batch has on one side, `input` or `update`: (B, h, w, C), a mixer convolves the first channels."""
        coefficients = transform(x)
        parts = {self.where: coefficients}
        if self.where == "mixer":
            parts |= dict(conv=coefficients[..., :conv_channels]) if conv_channels else {}
            parts |= dict(attention=coefficients[..., conv_channels:]) if conv_channels < x.shape[3] else {}
        for part, update in parts.items():
            key = part, side
            if key not in self._meters:
                self._meters[key] = FrequencyMeter(self.layer, part, self.rho)
            self._meters[key].add_coefficients(update, pitch)

    def result(self) -> list[Transfer]:
        """Of what was seen on both sides, on the same grid."""
        transfers = []
        for part in dict.fromkeys(part for part, _ in self._meters):
            into, out = (self._meters.get((part, side)) for side in ("input", "update"))
            if into is not None and out is not None and into.grid == out.grid:
                transfers.append(Transfer(self.layer, part, into.result(), out.result()))
        return transfers
