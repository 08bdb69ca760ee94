"""Systems other than Linux, as far as Linux can stand for them: see tests/helpers/other_system.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eit import memory
from tests.helpers.images import save_digits
from tests.helpers.training import TINY

SCRIPT = Path(__file__).parent / "helpers" / "other_system.py"
TRAINED = ["train", "cifar10", "data.root=data", "out=run", *TINY]


@pytest.mark.project
@pytest.mark.parametrize(
    ("system", "commands"),
    [
        (
            "windows",
            [
                [
                    *TRAINED,
                    "data.workers=1",
                    "augment.pad_crop=0",
                    "augment.crop_scale=[0.5,1]",
                ],  # augmented in a worker
                ["eval", "run", "--workers", "1"],
                ["predict", "run", "data/val"],
                ["export", "run", "--out", "run.onnx"],
                ["predict", "run.onnx", "data/val/digit1/000.png"],
                ["analyze", "run", "--data", "data", "--images", "4", "--workers", "0", "--no-initial"],
                ["convert", "run/final.safetensors", "again.safetensors"],
                ["data", "check", "data"],
                ["data", "shard", "data", "shards", "--count", "1", "--val-count", "1"],
                ["push", "run", "--to", "pushed"],
                [*TRAINED, "data.workers=1", "augment.pad_crop=0", "augment.crop_scale=[0.5,1]"],  # finished
            ],
        ),
        pytest.param(
            "macos",
            [[*TRAINED, "data.workers=0"], ["eval", "run", "--workers", "1"], ["predict", "run", "data/val"]],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_commands_need_no_more_than_the_system_has(tmp_path, system, commands):
    save_digits(tmp_path / "data")
    done = subprocess.run(
        [sys.executable, SCRIPT],
        cwd=tmp_path,
        input="\n".join(map(json.dumps, commands)),
        env=os.environ | {"OMP_NUM_THREADS": "1", "EIT_SYSTEM": system},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if ": status " in line]
    assert said == [f"{words[0]}: status 0" for words in commands], done.stderr


def test_windows_has_no_library_of_the_process(monkeypatch):
    """ctypes.CDLL(None) raises a TypeError there."""
    monkeypatch.setattr(memory, "os", SimpleNamespace(name="nt", environ={}))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: len(name))
    memory.keep_freed()
