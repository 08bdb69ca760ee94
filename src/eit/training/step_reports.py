"""What steps tell the host, without the device waiting for it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class StepReports:
    """Numbers of a step, copied to the host and looked at when the next step has been launched.

    So the GPU always has a step to work on, and the host waits for it once in each step at most.

    Args:
        look: called with the step and its numbers; raises what ends the run.
        at_once: look at each step's numbers as they are reported, and let the device wait: for optimizers that cannot
            leave out an update by themselves.
    """

    def __init__(self, look: Callable[[int, list[float]], None], at_once: bool) -> None:
        self.look, self.at_once = look, at_once
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: int, numbers: Tensor) -> None:
        """Report `step`, and look at the one before it."""
        self.flush()
        arrived = None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            numbers = host
        self._pending = step, numbers, arrived
        if self.at_once:
            self.flush()

    def flush(self) -> None:
        """Look at what was reported and not looked at; to be called before anything is saved."""
        if self._pending is None:
            return
        (step, numbers, arrived), self._pending = self._pending, None
        self.look(step, read(numbers, arrived))


def read(numbers: Tensor, arrived: torch.cuda.Event | None) -> list[float]:
    """The one wait for the device in a step."""
    if arrived is not None:
        arrived.synchronize()
    return numbers.tolist()


def from_host(numbers: Sequence[float], device: torch.device) -> Tensor:
    """A tensor on the device; on CUDA through pinned memory, which nothing waits for."""
    tensor = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=device.type == "cuda")
