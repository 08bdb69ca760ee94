"""Rank, world and a few collectives; everything works without torchrun too.

Two groups: that of the devices (NCCL on GPUs), for gradients and what a step shares, and one of gloo, for objects and
for waiting. NCCL ends the process if a collective takes longer than its limit, so it is used only in training
steps. What rank 0 does while the others wait (download, read, measure, write) goes through gloo.
"""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer, current_thread, main_thread
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from eit.errors import UserError, few, first_line

T = TypeVar("T")
NCCL_TIMEOUT = timedelta(minutes=3)  # of a collective of a step: so soon a lost node is noticed
GLOO_TIMEOUT = timedelta(minutes=10)  # the same on the CPU
WAIT_TIMEOUT = timedelta(hours=12)  # of ranks that wait for rank 0, which may download a data set
JOIN = 2 * GLOO_TIMEOUT  # others may have to notice first that a rank is gone
SILENT = 30.0  # seconds, after which a line says what is waited for
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def start(device: str = "auto") -> torch.device:
    """Join the group that torchrun describes in the environment, if any; return the device of this process.

    Raises:
        UserError: a device that this machine does not have.
    """
    if not DEVICE.fullmatch(device):
        raise UserError(f"train.device={device} is not one of auto, cpu, mps, cuda, cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    ranks = _variable("WORLD_SIZE") if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1
    if ranks > 1 and device.startswith("cuda:"):
        raise same_everywhere(
            f"train.device={device} is for one process, and there are {ranks}: give cuda, so that each has its own GPU"
        )
    if ranks > 1 and device == "mps":
        raise same_everywhere(f"train.device=mps is for one process, and there are {ranks}: start one, or give cpu")
    if device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{_gpu_of_rank()}"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"train.device={device} is not there: {torch.cuda.device_count()} GPUs are visible")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("train.device=mps is not there: this machine has no Apple GPU, or its macOS is too old")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and not dist.is_initialized():
        if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"RANK is set, as torchrun does, but {', '.join(missing)} not: set it, or unset RANK")
        rank, place = _variable("RANK"), f"{os.environ['MASTER_ADDR']}:{_variable('MASTER_PORT')}"
        with _said_after(SILENT, f"rank {rank} waits for the others at {place}, up to {JOIN}; SIGTERM ends it"):
            try:
                store, rank, world = next(rendezvous("env://", timeout=JOIN))
            except (RuntimeError, OSError, ValueError) as error:  # torch's DistError is a RuntimeError
                if "in use" in str(error) or "EADDRINUSE" in str(error):
                    advice = "give another --master-port (MASTER_PORT), or end the process that has it"
                    raise UserError(f"the port of MASTER_PORT={place.rpartition(':')[2]} is taken: {advice}") from None
                raise UserError(f"rank {rank} cannot join the others at {place}: {first_line(error)}") from None
            _join(chosen, _of_this_start(store, rank, world), rank, world)
    global _waiting
    if dist.is_initialized() and _waiting is None:
        _waiting = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    return chosen


_waiting: Any = None  # the group of gloo
ON_MAIN = "on rank 0"  # the note of an error that every rank raises, for rank 0 to tell


def same_everywhere(text: str) -> UserError:
    """An error that every rank raises, and rank 0 alone tells."""
    error = UserError(text)
    error.add_note(ON_MAIN)
    return error


def _variable(name: str) -> int:
    """A number in the environment, as torchrun sets it."""
    if not re.fullmatch("[0-9]{1,9}", text := os.environ[name]):
        raise UserError(f"{name}={text} is not a number: it is set by torchrun, or by hand for each process")
    return int(text)


@contextmanager
def _said_after(seconds: float, line: str) -> Iterator[None]:
    """Print a line if the context lasts longer. Ctrl-C ends the process there: Python cannot act while torch waits."""
    timer = Timer(seconds, lambda: print(f"eit: {line}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    is_main = current_thread() is main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if is_main else None
    try:
        yield
    finally:
        timer.cancel()
        if is_main:
            signal.signal(signal.SIGINT, before)


def _gpu_of_rank() -> int:
    """The index of this process's GPU: LOCAL_RANK, or 0 if each process sees one (srun --gpus-per-task=1)."""
    return 0 if torch.cuda.device_count() == 1 else int(os.environ.get("LOCAL_RANK", 0))


def _join(device: torch.device, store: dist.Store, rank: int, world: int) -> None:
    """Make the group of the devices.

    Raises:
        UserError: two ranks would compute on one GPU, on which NCCL would fail, or one on a GPU and one on the CPU.
    """
    gpu = device.type
    if gpu == "cuda":
        gpu += f" {socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"eit/gpu/{rank}", gpu)
    gpus = [store.get(f"eit/gpu/{other}").decode() for other in range(world)]
    kinds = [other.partition(" ")[0] for other in gpus]
    if other := next((other for other in range(world) if kinds[other] != kinds[0]), 0):
        raise same_everywhere(
            f"rank 0 computes on {kinds[0]} and rank {other} on {kinds[other]}: give all the same kind"
        )
    if device.type == "cuda":
        if len(sharing := [str(other) for other in range(world) if gpus[other] == gpu]) > 1:
            raise same_everywhere(f"ranks {few(sharing)} share one GPU: start as many processes as there are GPUs")
        dist.init_process_group(
            "nccl", store=store, rank=rank, world_size=world, timeout=NCCL_TIMEOUT, device_id=device
        )
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=GLOO_TIMEOUT)


def _of_this_start(store: dist.Store, rank: int, world: int) -> dist.Store:
    """`store` with a prefix that only the processes of this start share.

    torchrun keeps its store when it restarts processes, and they would wait for addresses of dead processes. torchrun's
    count of restarts cannot be the prefix, because it differs between nodes (pytorch issue 135712). So each rank asks
    rank 0, with a word of its own that no dead process knows, until it gets an answer.
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
            missing = min(waiting) if rank == 0 else 0
            raise TimeoutError(f"rank {missing} did not join within {JOIN}: start all with the same address and port")
        time.sleep(0.05)
    return dist.PrefixStore(word, store)


def is_group() -> bool:
    return dist.is_initialized()


def stop() -> None:
    global _waiting
    if is_group():
        _waiting = None
        dist.destroy_process_group()


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Inside the context, this process works as if it had no group: the others need not take part."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def is_main() -> bool:
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of each rank's `tensor`, in place.

    On a GPU the host does not wait for the result. Use it there only within a training step: where ranks may come
    minutes apart, the tensor must be on the CPU.
    """
    if world_size() > 1:
        dist.all_reduce(tensor, group=_waiting if tensor.device.type == "cpu" else None)
    return tensor


def gather(value: Any) -> list[Any]:
    """Each rank's `value`, without tensors on a device, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_waiting)
    return values


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise a UserError on every rank if a value is not that of rank 0. The line names the rank and what differs."""
    first, *others = gather(dict(facts))
    for other, values in enumerate(others, 1):
        keys = [key for key in first | values if first.get(key) != values.get(key)]
        if keys:
            differing = few([f"{key} is {first.get(key)} on rank 0, {values.get(key)} on rank {other}" for key in keys])
            raise same_everywhere(f"the ranks do not agree: {differing}; start all with one command and one version")


def share_buffers(module: Any) -> None:
    """Rank 0's buffers (running statistics of batch norms) for all; DDP does so with the next forward pass only."""
    if world_size() > 1 and module is not None:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


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
    dist.broadcast_object_list(outcome, group=_waiting)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
