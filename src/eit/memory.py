"""Freed memory of a process, and the peak memory of a step."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# With these, glibc returns large blocks as soon as they are freed, and has one arena: resident memory is memory in use.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_freed(most: int = 2**31 - 1) -> None:
    """Let glibc keep up to `most` bytes of freed memory for later use, instead of returning them to the kernel.

    Otherwise blocks of more than 32 MiB are returned at once, and the kernel clears them page by page in the next step.
    This changes the whole process, so commands call it, not the library. An allocator that is tuned by environment
    variables is not changed.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if os.name == "nt":  # which cannot open the process as a library
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None and not tuned:
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
        if not mallopt(mmap_threshold, min(most, 2**30)):  # before glibc 2.35 the limit was 32 MiB
            mallopt(mmap_max, 0)
        mallopt(trim_threshold, most)


def is_measurable(device: torch.device) -> bool:
    """Whether `peak_bytes` works: on CUDA, and for the CPU on Linux."""
    return device.type == "cuda" or (device.type == "cpu" and _RESET.exists())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Peak memory in bytes of the second of two calls of `step`, minus the memory before the first.

    The second call includes gradients and the optimizer's state, which the first call allocates. On the CPU it is
    anonymous memory: the kernel's high-water mark (VmHWM, which clear_refs resets) without pages of libraries. On CUDA
    it is memory that the caching allocator handed out. Measure each step in its own process, started with `MALLOC` in
    its environment.
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
