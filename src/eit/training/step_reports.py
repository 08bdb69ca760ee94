"""The numbers that all ranks share in a step, read by the host without making the device wait."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eit import distributed


class StepReport(NamedTuple):
    """What all ranks know of a step: loss, norm and scale are means over ranks, the rest are sums."""

    step: int
    loss: float
    gradient_norm: float
    loss_scale: float  # of the fp16 scaler, otherwise 1
    unreadable_images: float  # so far
    writer_failed: float  # a checkpoint could not be written
    save_is_due: float  # by rank 0's clock
    signals: tuple[float, ...]  # how many ranks have received each of STOP_SIGNALS


def share_step(
    loss: Tensor,
    gradient_norm: Tensor,
    loss_scale: Tensor,
    unreadable_images: int,
    writer_failed: bool,
    save_is_due: bool,
    signals: Sequence[float],
) -> Tensor:
    """Add up the numbers of all ranks in one collective: the fields of a `StepReport`, in its order, on the device."""
    means = torch.stack((loss, gradient_norm, loss_scale)) / distributed.world_size()
    counts = from_host([unreadable_images, writer_failed, save_is_due, *signals], means.device)
    return distributed.sum_over_ranks(torch.cat((means, counts)))


class StepReports:
    """Reports on their way from the device to the host, each read after the next step has been launched.

    So the GPU always has a step to work on, and the host waits for it at most once in each step.

    Args:
        immediate: read each report in its own step, and let the device wait. Needed for optimizers that cannot skip an
            update by themselves.
    """

    def __init__(self, immediate: bool) -> None:
        self.immediate = immediate
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, numbers: Tensor) -> StepReport | None:
        """Send the numbers of `step` to the host; the report of the step before, or of this one if `immediate`."""
        previous = self.flush()
        arrived = None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            numbers = host
        self._pending = step, numbers, arrived
        return self.flush() if self.immediate else previous

    def flush(self) -> StepReport | None:
        """The report that was not read yet, if any. To be called before anything is saved."""
        if self._pending is None:
            return None
        (step, numbers, arrived), self._pending = self._pending, None
        if arrived is not None:
            arrived.synchronize()  # the one wait for the device in a step
        values = numbers.tolist()
        return StepReport._make((step, *values[:6], tuple(values[6:])))


def from_host(numbers: Sequence[float], device: torch.device) -> Tensor:
    """A tensor on the device. On CUDA it is copied from pinned memory, and nothing waits for the copy."""
    tensor = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=device.type == "cuda")
