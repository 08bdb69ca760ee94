"""Rank, world and a few collectives; everything works without torchrun too."""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eit.errors import UserError

T = TypeVar("T")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def start(device: str = "auto") -> torch.device:
    """Join the group that torchrun describes in the environment, if any; the device of this process.

    Raises:
        UserError: a device that this machine does not have.
    """
    if not DEVICE.fullmatch(device):
        raise UserError(f"device {device!r} is not one of auto, cpu, mps, cuda, cuda:N")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{local_rank}"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device} is not there: {torch.cuda.device_count()} GPUs are visible")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not there: this is no Apple GPU, or macOS is too old")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return chosen


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of each rank's `tensor`, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """Each rank's `value`, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share_buffers(module: Any) -> None:
    """Rank 0's buffers (running statistics of batch norms) for all; DDP does so with the next forward pass only."""
    if world_size() > 1 and module is not None:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


ON_MAIN = "on rank 0"  # the note of an error that every rank raises, for rank 0 to tell


def on_main(call: Callable[[], T]) -> T:
    """Run `call` on rank 0 and give its result, or its error, to all."""
    if world_size() == 1:
        return call()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = call()
        except Exception as error:
            error.add_note(ON_MAIN)
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
