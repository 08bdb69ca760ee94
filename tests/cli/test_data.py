"""`eit data`."""

import json
import shutil

import pytest

from tests.cli.conftest import assert_mistake
from tests.helpers.commands import run_eit
from tests.helpers.training import TINY


def test_what_the_model_will_see_is_drawn(trained):
    words = ["data.root=data", *TINY, "augment.erasing=0.5", "--out", "grid.png", "--images", "5"]
    done = run_eit("data", "show", "cifar10", *words, cwd=trained)
    assert done.stdout == "grid.png: 5 training and 5 validation images\n"
    assert (trained / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_data_check(trained, tmp_path):
    report = json.loads(run_eit("data", "check", "data", "--json", cwd=trained).stdout)
    assert report["ok"] and report["splits"]["train"]["images"] == 36
    shutil.copytree(trained / "data", tmp_path / "data")
    (tmp_path / "data" / "val" / "digit1").rename(tmp_path / "data" / "val" / "eins")
    done = run_eit("data", "check", tmp_path / "data")
    assert done.returncode == 1
    assert "only in train/: digit1; only in val/: eins" in done.stdout and "not ready to train" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "/nowhere"], ["/nowhere is not a folder"]),
        (["show", "cifar10"], ["data.root is not set"]),
        (["show", "digits", "--out", "x"], ["--out x", ".png", ".pdf", ".svg"]),
        (["shard", "/nowhere", "x"], ["/nowhere is not a folder"]),
        (["prepare", "imagenet", "a", "b"], ["a has no ILSVRC2012_devkit_t12.tar.gz"]),
        (["prepare", "cifar", "a", "b"], ["'cifar'", "'imagenet'"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["data", *words], said)
