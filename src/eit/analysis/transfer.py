"""How a sub-block changes frequencies: the spectrum of its update divided by the spectrum of its input.

The update is what the sub-block adds to the tokens, so stem and residual are excluded. See docs/analysis.md.

Legend of the shape comments: B images, (h, w) token grid, C channels.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from eit.analysis.frequency import Frequency, FrequencyMeter, fourier_coefficients


@dataclass(frozen=True)
class TransferFunction:
    """Input and update of one sub-block, or of the convolved or the attention channels of a mixer.

    Attributes:
        layer: 1 is the first.
        where: `mixer` or `mlp`; `conv`, the channels that the mixer convolves; `attention`, its other channels.
        input: frequencies of the input, after the norm if the norm comes first.
        update: frequencies of what is added to the tokens.
    """

    layer: int
    where: str
    input: Frequency
    update: Frequency

    @property
    def gain(self) -> float:
        """High-frequency share of the update divided by that of the input; above 1: high-pass filter. NaN for 0 / 0."""
        if not self.input.share:
            return math.inf if self.update.share else math.nan
        return self.update.share / self.input.share

    def radial(self) -> list[tuple[float, float, float]]:
        """(f from, f to, update's share of energy divided by the input's) of each ring, without DC; NaN for 0 / 0."""
        pairs = zip(self.input.radial(), self.update.radial(), strict=True)
        return [(low, high, out / into if into else math.nan) for (low, high, into, _), (_, _, out, _) in pairs]


class TransferMeter:
    """Running sums for one sub-block."""

    def __init__(self, layer: int, where: str, rho: float) -> None:
        self.layer, self.where, self.rho = layer, where, rho
        self._meters: dict[tuple[str, str], FrequencyMeter] = {}  # by part and side

    def add(self, side: str, x: Tensor, conv_channels: int, pitch: float) -> None:
        """Tokens of a batch on one side, `input` or `update`: (B, h, w, C); a mixer convolves the first channels."""
        coefficients = fourier_coefficients(x)
        parts = {self.where: coefficients}
        if self.where == "mixer":
            parts |= dict(conv=coefficients[..., :conv_channels]) if conv_channels else {}
            parts |= dict(attention=coefficients[..., conv_channels:]) if conv_channels < x.shape[3] else {}
        for part, update in parts.items():
            meter = self._meters.setdefault((part, side), FrequencyMeter(self.layer, part, self.rho))
            meter.add_coefficients(update, pitch)

    def result(self) -> list[TransferFunction]:
        """The parts that have input and update on the same grid."""
        transfers = []
        for part in dict.fromkeys(part for part, _ in self._meters):
            into, out = (self._meters.get((part, side)) for side in ("input", "update"))
            if into is not None and out is not None and into.grid == out.grid:
                transfers.append(TransferFunction(self.layer, part, into.result(), out.result()))
        return transfers
