"""The run folder: what it holds, and which runs it refuses."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml

import eit
from eit.training.checkpoint import saved_steps
from eit.training.run_folder import RunFolder
from eit.training.trainer import train
from tests.helpers.training import log, recipe, train_until_killed


def line_of(epoch):
    line = dict(epoch=epoch, step=epoch, train_loss=1.0, val_loss=1.0, val_top1=1.0, ema_top1=None, lr=1.0)
    return line | dict(images_per_s=1.0)


@pytest.mark.parametrize("ended", ["finished", "stopped", "failed"])
def test_curves_are_drawn_now_and_then_and_whole_at_the_end(folder, monkeypatch, ended):
    drawn = []
    monkeypatch.setattr("eit.plots.curves", lambda lines, file: drawn.append(len(lines)))
    expected = pytest.raises(OSError, match="disk") if ended == "failed" else nullcontext()
    with expected, RunFolder(folder.parent / "run", recipe(folder)) as run:
        run.start_logging({}, 0)
        for epoch in range(3):
            run.log_epoch(line_of(epoch), 3)
        if ended == "finished":
            run.finish()
        if ended == "failed":
            raise OSError("disk")
    assert drawn == [1, 3]


@pytest.mark.parametrize("error", [None, OSError("disk")])
def test_curves_that_cannot_be_drawn_replace_no_error_and_release_the_folder(folder, monkeypatch, error):
    def fail(lines, file):
        if len(lines) > 1:
            raise RuntimeError("curves")

    monkeypatch.setattr("eit.plots.curves", fail)
    expected = pytest.raises(OSError, match="disk") if error else pytest.raises(RuntimeError, match="curves")
    with expected, RunFolder(folder.parent / "run", recipe(folder)) as run:
        run.start_logging({}, 0)
        for epoch in range(2):
            run.log_epoch(line_of(epoch), 3)
        if error:
            raise error
    with RunFolder(folder.parent / "run", recipe(folder)):
        pass


def test_a_run_leaves_what_it_promises(folder):
    r = recipe(folder, "train.ema_decay=0.9")
    summary = train(r)
    run = r.run_folder()
    assert {p.name for p in run.iterdir()} >= {
        "recipe.yaml", "environment.json", "log.jsonl", "curves.png", "summary.json", "checkpoints", "best.safetensors",
        "final.safetensors", "tensorboard",
    }  # fmt: skip
    assert set(summary) == {
        "best_top1", "best_epoch", "last_top1", "last_top5", "last_ema_top1", "epochs", "seconds", "params",
    }  # fmt: skip
    assert json.loads((run / "summary.json").read_text()) == summary
    lines = log(run)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["step"] for line in lines] == [4, 8]
    assert set(lines[0]) == {
        "epoch", "step", "lr", "train_loss", "val_loss", "val_top1", "val_top5", "ema_top1", "images_per_s",
    }  # fmt: skip
    assert summary["best_top1"] == max(line["val_top1"] for line in lines)
    assert summary["last_top1"] == lines[-1]["val_top1"] and summary["last_ema_top1"] == lines[-1]["ema_top1"]
    assert saved_steps(run) == [8, 4]
    assert yaml.safe_load((run / "recipe.yaml").read_text()) == r.model_dump(mode="json")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and environment["cpu"]["capability"]
    card = eit.load(run).card
    assert card.classes == ["digit0", "digit1", "digit2"] and card.recipe["name"] == "cifar10"
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_run_says_so_and_another_recipe_is_refused(folder, capsys):
    r = recipe(folder)
    summary = train(r)
    before = (r.run_folder() / "final.safetensors").read_bytes()
    assert train(r) == summary
    assert "is finished" in capsys.readouterr().err
    assert train(recipe(folder, "data.workers=1")) == summary
    with pytest.raises(eit.UserError, match=r"another recipe \(optim\.lr: 0\.00055 -> 0\.1\)"):
        train(recipe(folder, "optim.lr=0.1"))
    assert (r.run_folder() / "final.safetensors").read_bytes() == before


def test_a_folder_that_is_no_run_folder_is_left_alone(folder):
    """The data themselves, say."""
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(eit.UserError, match="is not empty and is not a run folder"):
        train(recipe(folder, f"out={folder}"))
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_finished_run_on_other_data_says_so(folder):
    train(recipe(folder))
    next((folder / "train" / "digit0").iterdir()).rename(folder / "train" / "digit1" / "new.png")
    with pytest.raises(eit.UserError, match="was trained with another data"):
        train(recipe(folder))


def test_a_second_process_is_kept_out(folder):
    r = recipe(folder)
    r.run_folder().mkdir()
    lock = str(r.run_folder() / ".lock")
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(eit.UserError, match="is in use by another process"):
        train(r)
    holder.kill()  # kill -9 frees it
    holder.wait()
    train(r)


def test_a_recipe_may_change_until_something_is_trained(folder, monkeypatch):
    r = recipe(folder)
    train_until_killed(r, 0, monkeypatch)
    train(recipe(folder, "optim.lr=1e-3"))
