"""What a process does with freed memory, and the most that a step holds."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# glibc gives large blocks back as they are freed, and keeps no arena a thread: what is resident is what is in use.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_freed(most: int = 2**31 - 1) -> None:
    """Let glibc keep up to `most` bytes of freed memory for what comes next, in place of giving them back.

    Blocks beyond 32 MiB go back to the kernel at once otherwise, and are cleared page by page in the next step. It is
    of the whole process, so commands do it, not the library. An allocator that the environment tunes is left alone.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if os.name == "nt":  # which cannot open the process as a library
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None and not tuned:
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
        if not mallopt(mmap_threshold, min(most, 2**30)):  # before 2.35 it was 32 MiB at most
            mallopt(mmap_max, 0)
        mallopt(trim_threshold, most)


def is_measurable(device: torch.device) -> bool:
    """Whether `peak_bytes` can be had: on CUDA, and on Linux."""
    return device.type == "cuda" or (device.type == "cpu" and _RESET.exists())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most that the second of two calls of `step` holds, beyond what was there before the first, in bytes.

    Measure each step in a process of its own: what one leaves behind would hide another.

    So a training step's peak has the gradients and the optimizer's state in it, which the first call makes. On the CPU
    it is anonymous memory, from the kernel's high-water mark (VmHWM, which clear_refs resets) without the pages of
    libraries; on CUDA what the caching allocator has given out. The process is to be started with `MALLOC` in its
    environment.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = _status()["RssAnon"]
    step()
    gc.collect()
    _RESET.write_text("5")
    step()
    after = _status()
    return after["VmHWM"] - after["RssFile"] - after["RssShmem"] - before


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
