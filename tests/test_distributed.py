"""Several processes, as torchrun starts them (gloo)."""

import json

import pytest
import torch

import eit
from tests.conftest import TINY, run_eit


def train(folder, out, ranks, *overrides):
    done = run_eit("train", "cifar10", *TINY, f"data.root={folder}", f"out={out}", *overrides, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


DETERMINISTIC = [
    "augment.mixup=0",
    "augment.cutmix=0",
    *(f"model.{name}_rate=0" for name in ("pos_drop", "proj_drop", "attn_drop", "drop_path")),
]


def test_two_processes_train_as_one_with_the_same_global_batch(folder, tmp_path):
    one = train(folder, tmp_path / "one", 0, *DETERMINISTIC, "data.batch_size=8")
    two = train(folder, tmp_path / "two", 2, *DETERMINISTIC, "data.batch_size=4")
    for a, b in zip(one, two, strict=True):
        for key in ("train_loss", "val_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
    first, second = (eit.load(tmp_path / name / "final.safetensors").state_dict() for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=2e-4, rtol=0)

    # and evaluation counts every image once, with the same figures, on any number of ranks
    results = []
    for ranks in (0, 3):
        done = run_eit("eval", tmp_path / "one", "--data", folder, "--batch-size", 5, "--json", ranks=ranks)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0] == results[1]
    assert results[0]["images"] == 12


def test_a_finished_run_and_a_mistake_end_on_all_ranks(folder, tmp_path):
    train(folder, tmp_path / "run", 2)
    again = run_eit("train", "cifar10", *TINY, f"data.root={folder}", f"out={tmp_path / 'run'}", ranks=2)
    assert again.returncode == 0 and again.stderr.count("is finished") == 1
    other = run_eit("train", "cifar10", *TINY, f"data.root={folder}", f"out={tmp_path / 'run'}", "seed=9", ranks=2)
    assert other.returncode != 0
    assert "eit: " in other.stderr and "another recipe (seed: 0 -> 9)" in other.stderr


def test_what_one_rank_meets_is_said_and_counted_for_all(folder, tmp_path):
    for name in ("000.png", "001.png", "002.png"):
        (folder / "train" / "digit1" / name).write_bytes(b"nothing")
    words = ["train", "cifar10", *TINY, f"data.root={folder}", "data.cache=false", f"out={tmp_path / 'run'}"]
    done = run_eit(*words, "data.bad_image_budget=0.09", ranks=2)
    assert done.returncode == 0, done.stderr
    assert all(f"digit1/{name}" in done.stderr for name in ("000.png", "001.png", "002.png"))
    done = run_eit(*words, "data.bad_image_budget=0.06", f"out={tmp_path / 'other'}", ranks=2)
    assert done.returncode != 0
    assert "3 of 36 training images are unreadable, data.bad_image_budget allows 2" in done.stderr


def test_the_accuracy_of_a_run_on_two_ranks_is_that_of_its_weights_with_batch_norm_too(folder, tmp_path):
    words = ["model.name=timm/resnet10t", "data.batch_size=4", "train.ema_decay=0.5"]
    line = train(folder, tmp_path / "run", 2, *words)[-1]
    done = run_eit("eval", tmp_path / "run" / "final.safetensors", "--json", "--batch-size", 4)
    found = json.loads(done.stdout)
    assert found["top1"] == pytest.approx(line["val_top1"]) and found["loss"] == pytest.approx(
        line["val_loss"], rel=1e-5
    )


@pytest.mark.slow
def test_cifar10_learns_on_two_processes(cifar10, tmp_path):
    """A few hundred steps of the real recipe, narrower; loss falls, accuracy leaves chance far behind."""
    small = ["model.embed_dim=60", "model.depth=4", "model.num_heads=6", "data.batch_size=64", "optim.lr=2e-3"]
    short = ["train.epochs=1", "train.warmup_epochs=0.2", f"data.root={cifar10}", f"out={tmp_path / 'run'}"]
    done = run_eit("train", "cifar10", *small, *short, ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert line["step"] == 390
    assert line["train_loss"] < 2.25 and line["val_loss"] < 2.0 and line["val_top1"] > 24
    counts = []
    for ranks in (0, 2, 3):
        done = run_eit("eval", tmp_path / "run", "--json", ranks=ranks)
        counts.append(json.loads(done.stdout))
    assert counts[0] == counts[1] == counts[2] and counts[0]["images"] == 10_000
