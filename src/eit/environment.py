"""The environment of a run, which its figures depend on: code, packages, machine, GPU, settings of torch."""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eit import distributed, operators

DRIVER = Path("/proc/driver/nvidia/version")


def environment(device: torch.device) -> dict[str, Any]:
    """The current environment: everything besides the recipe that figures depend on."""
    cuda, cpu = device.type == "cuda", operators.cpu()
    return dict(
        eit=version("eit"),
        commit=_commit(),
        python=platform.python_version(),
        packages=_packages(),
        system=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name(device) if cuda else f"{device.type}: {cpu['model name']}",
        **(dict(gpu=_gpu(device)) if cuda else {}),
        cpu={key: cpu[key] for key in ("cpu family", "model", "stepping") if key in cpu}  # rounding depends on it
        | dict(capability=torch.backends.cpu.get_cpu_capability()),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        settings=_settings(),
        world_size=distributed.world_size(),
        command=shlex.join(["eit", *sys.argv[1:]]),
    )


def versions() -> dict[str, str]:
    """What several processes of one run must share: Python's minor version, packages, and this package's code."""
    here, code = Path(__file__).parent, hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        code.update(f"{file.relative_to(here).as_posix()}\n".encode() + file.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    return dict(python=python, eit=version("eit"), **_packages(), **{"code of eit": code.hexdigest()[:12]})


def _packages() -> dict[str, str]:
    return {"torch": torch.__version__} | {n: version(n) for n in ("torchvision", "timm", "pillow", "numpy")}


def _gpu(device: torch.device) -> dict[str, Any]:
    """The GPU, its driver, and the libraries of CUDA."""
    properties = torch.cuda.get_device_properties(device)
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return dict(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory=properties.total_memory,  # bytes
        visible=torch.cuda.device_count(),
        CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES"),
        driver=_driver(),
        cuda=torch.version.cuda,  # that torch was built with
        cudnn=torch.backends.cudnn.version(),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
    )


def _driver() -> str | None:
    """The version of NVIDIA's driver: from Linux, or from nvidia-smi, which WSL and Windows have."""
    try:
        text = DRIVER.read_text()
    except OSError:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    number = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)  # the first number; the compiler's version follows
    return number and number[0]


def _settings() -> dict[str, Any]:
    """Settings of torch that change rounding, or make runs differ."""
    backends = torch.backends
    attention = dict(
        flash=backends.cuda.flash_sdp_enabled,
        mem_efficient=backends.cuda.mem_efficient_sdp_enabled,
        cudnn=backends.cuda.cudnn_sdp_enabled,
        math=backends.cuda.math_sdp_enabled,
    )
    return dict(
        # Reading allow_tf32 raises an error if fp32_precision was set; fp32_precision is right whichever was set.
        tf32_matmul=backends.cuda.matmul.fp32_precision == "tf32",
        tf32_conv=backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]
        deterministic_algorithms=torch.are_deterministic_algorithms_enabled(),
        cudnn_benchmark=backends.cudnn.benchmark,
        cudnn_deterministic=backends.cudnn.deterministic,
        CUBLAS_WORKSPACE_CONFIG=os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        cpu_operators=sorted(operators.chosen()),
        attention=[name for name, is_enabled in attention.items() if is_enabled()],
    )


def _commit() -> str | None:
    """The commit of a source checkout, with + if files differ from it."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        inside = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        if inside.returncode:
            return None
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        return head + ("+" if subprocess.run([*git, "diff", "--quiet", "HEAD", "--", here]).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return None
