"""Rank, world and a few collectives; everything works without torchrun too."""

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from eit.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # of a collective; a rank may read and check data for so long
JOIN = 2 * TIMEOUT  # others may have to notice first that a rank is gone
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
        if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"RANK is set, as torchrun does, but {', '.join(missing)} not: set it, or unset RANK")
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        store, rank, world = next(rendezvous("env://", timeout=JOIN))
        store = _of_this_start(store, rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return chosen


def _of_this_start(store: dist.Store, rank: int, world: int) -> dist.Store:
    """`store` with a prefix that the processes of this start alone share.

    torchrun keeps its store when it restarts them, and they would wait for addresses that dead ones left there. Its
    count of restarts is no prefix: it differs between nodes (pytorch issue 135712). So each rank asks rank 0, with a
    word of its own that no dead process knows, and again until it is answered.
    """
    word, deadline = uuid4().hex, time.monotonic() + JOIN.total_seconds()
    waiting = set(range(1, world)) if rank == 0 else {rank}
    if rank == 0:
        for other in waiting:
            store.delete_key(f"eit/ask/{other}")
    while waiting:
        for other in tuple(waiting):
            ask, answer = f"eit/ask/{other}", f"eit/answer/{other}"
            if rank == 0 and store.check([ask]):
                store.set(answer, f"{store.get(ask).decode()} {word}")
                waiting.remove(other)
            elif rank and store.check([answer]) and store.get(answer).decode().startswith(f"{word} "):
                word = store.get(answer).decode().split()[1]
                waiting.remove(other)
            elif rank:
                store.set(ask, word)
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {min(waiting) if rank == 0 else 0} did not join within {JOIN}")
        time.sleep(0.05)
    return dist.PrefixStore(word, store)


def is_group() -> bool:
    return dist.is_initialized()


def stop() -> None:
    if is_group():
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
