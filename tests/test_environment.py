"""What environment.json says of the machine and of torch's settings."""

import json
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from eit import environment as module
from eit.environment import environment

ROOT = Path(__file__).resolve().parents[1]
CPU, MPS, CUDA = torch.device("cpu"), torch.device("mps"), torch.device("cuda", 1)


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two H100s, as torch tells of them."""
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_029_158_912)
    asked = []

    def properties(device):
        asked.append(device)
        return card

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties(device).name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91301)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(module, "DRIVER", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    return asked


def write_tool(tmp_path, text):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)


def test_a_gpu_is_named_with_its_software(gpus, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    write_tool(tmp_path, '[ "$*" = "--query-gpu=driver_version --format=csv,noheader" ] && echo 580.159.04')
    found = environment(CUDA)
    assert found["device"] == "NVIDIA H100 80GB HBM3" and set(gpus) == {CUDA}
    assert json.loads(json.dumps(found["gpu"])) == dict(
        name="NVIDIA H100 80GB HBM3",
        capability="9.0",
        memory=85_029_158_912,
        visible=2,
        CUDA_VISIBLE_DEVICES="2,5",
        driver="580.159.04",
        cuda="13.0",
        cudnn=91301,
        nccl="2.27.5",
    )


@pytest.mark.parametrize("kernel", ["NVIDIA UNIX x86_64 Kernel Module", "NVIDIA UNIX Open Kernel Module for x86_64"])
def test_linux_tells_the_driver(gpus, tmp_path, kernel):
    write_tool(tmp_path, "echo 1.2.3")
    text = f"NVRM version: {kernel}  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.3.0\n"
    (tmp_path / "version").write_text(text)
    assert environment(CUDA)["gpu"]["driver"] == "535.104.05"


@pytest.mark.parametrize("tool", [None, "echo 1.2.3; exit 9", "echo no driver"])
def test_what_is_not_there_is_none(gpus, monkeypatch, tmp_path, tool):
    if tool:
        write_tool(tmp_path, tool)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu = environment(CUDA)["gpu"]
    assert [key for key, value in gpu.items() if value is None] == ["CUDA_VISIBLE_DEVICES", "driver", "nccl"]


@pytest.mark.parametrize("device", [CPU, MPS])
def test_without_cuda_no_gpu_is_asked_for(monkeypatch, device):
    def fail(*_):
        raise AssertionError("CUDA was asked")

    for name in ("get_device_name", "get_device_properties", "device_count", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, fail)
    found = environment(device)
    assert "gpu" not in found and found["device"].startswith(f"{device.type}: ")


def test_the_keys_of_committed_records_stay():
    of_run = dict(precision="fp32", compile="off", global_batch=1, step=0, earlier_starts=[])  # which a run adds
    now = environment(CPU) | of_run
    records = list((ROOT / "results").rglob("environment.json"))
    assert records
    for record in records:
        then = json.loads(record.read_text())
        assert set(then) <= set(now) and set(then.get("cpu", {})) <= set(now["cpu"])


# -- Settings


def settings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return environment(CPU)["settings"]


@contextmanager
def precisions_kept():
    """What tests set in torch is as before behind it, in both of torch's ways to say it."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        yield matmul, conv
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[0] == "tf32", before[1] == "tf32"
        matmul.fp32_precision, conv.fp32_precision = before


def test_tf32_is_told_whichever_way_it_was_set():
    with precisions_kept() as (matmul, conv):
        for on in (True, False):
            matmul.fp32_precision, conv.fp32_precision = ("tf32" if on else "ieee"), ("ieee" if on else "tf32")
            found = settings()
            assert (found["tf32_matmul"], found["tf32_conv"]) == (on, not on)
    with precisions_kept() as (matmul, _):
        for on in (True, False):
            matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = on, not on
            found = settings()
            assert (found["tf32_matmul"], found["tf32_conv"]) == (on, not on)


def test_determinism_is_told(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    names = ("deterministic_algorithms", "cudnn_benchmark", "cudnn_deterministic", "CUBLAS_WORKSPACE_CONFIG")
    assert [settings()[name] for name in names] == [False, False, False, None]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert [settings()[name] for name in names] == [False, True, False, ":4096:8"]
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert [settings()[name] for name in names] == [True, True, True, ":4096:8"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_attention_backends_are_told():
    assert settings()["attention"] == ["flash", "mem_efficient", "cudnn", "math"]
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        assert settings()["attention"] == ["mem_efficient", "math"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is there")
def test_this_gpu_is_named():
    gpu = environment(torch.device("cuda"))["gpu"]
    missing = [key for key, value in gpu.items() if value is None]
    assert missing == ["CUDA_VISIBLE_DEVICES"] * ("CUDA_VISIBLE_DEVICES" not in os.environ)
