"""Mean and standard error over images, in one pass and constant memory."""

import torch
from torch import Tensor


class Moments:
    """Streaming mean and variance of per-image values (Chan, Golub & LeVeque 1983), in float64.

    The sums stay on the device of the values, so no batch waits for a copy; for MPS, which has no float64, on the CPU.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """`values` (B, ...), one row per image."""
        values = (values.cpu() if values.device.type == "mps" else values).double()
        n, mean = len(values), values.mean(dim=0)
        shift, total = mean - self._mean, self.count + n
        self._squares = self._squares + (values - mean).square().sum(dim=0) + shift**2 * (self.count * n / total)
        self._mean = self._mean + shift * (n / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean over images, on the CPU."""
        return self._mean.cpu()

    @property
    def variance(self) -> Tensor:
        """Population variance over images (divided by n), on the CPU."""
        return (self._squares / max(self.count, 1)).cpu()

    @property
    def deviation(self) -> Tensor:
        """Sample standard deviation over images (n - 1), on the CPU; NaN for one image."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self._squares / (self.count - 1)).sqrt().cpu()

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the mean, on the CPU; NaN for one image."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self._squares / (self.count - 1) / self.count).sqrt().cpu()
