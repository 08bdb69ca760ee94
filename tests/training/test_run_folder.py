"""The run folder: what it holds, and which runs it refuses."""

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import yaml

import eit
from eit import UserError
from eit.config import load_recipe
from eit.training import run_folder
from eit.training.checkpoint import saved_steps
from eit.training.run_folder import RunFolder, best_line, read_log, read_summary
from eit.training.trainer import train
from tests.helpers.training import log, recipe, train_until_killed


def line_of(epoch):
    line = dict(epoch=epoch, step=epoch, train_loss=1.0, val_loss=1.0, val_top1=1.0, ema_top1=None, lr=1.0)
    line["val_top5"] = 1.0
    return line | dict(images_per_s=1.0)


@pytest.mark.parametrize("ended", ["finished", "stopped", "failed"])
def test_curves_are_drawn_now_and_then_and_whole_at_the_end(folder, monkeypatch, ended):
    drawn = []
    monkeypatch.setattr("eit.plots.curves", lambda lines, file: drawn.append(len(lines)))
    expected = pytest.raises(OSError, match="disk") if ended == "failed" else nullcontext()
    with expected, RunFolder(folder.parent / "run", recipe(folder)) as run:
        run.start_logging({}, 0)
        for epoch in range(3):
            run.show_epoch(line_of(epoch), 3)
        if ended == "finished":
            run.finish()
        if ended == "failed":
            raise OSError("disk")
    assert drawn == [1, 3]


@pytest.mark.parametrize("fault", [RuntimeError("no font"), UserError("curves.png: Is a directory"), OSError("disk")])
@pytest.mark.parametrize("error", [None, OSError("disk")])
def test_curves_and_tensorboard_that_cannot_be_written_are_one_warning_each(folder, monkeypatch, capsys, error, fault):
    """The run goes on, its own error is the one to raise, and the folder is released."""

    def fail(*_):
        raise fault

    monkeypatch.setattr("eit.plots.curves", fail)
    monkeypatch.setattr("eit.training.run_folder._TensorBoard._write", fail)
    monkeypatch.setattr("eit.training.run_folder.CURVES_EVERY", -1)
    expected = pytest.raises(OSError, match="disk") if error else nullcontext()
    with expected, RunFolder(folder.parent / "run", recipe(folder)) as run:
        run.start_logging({}, 0)
        for epoch in range(3):
            run.show_epoch(line_of(epoch), 3)
        if error:
            raise error
    said = capsys.readouterr().err
    assert said.count(f"curves.png cannot be written ({fault}); training goes on") == 1
    assert said.count(f"tensorboard cannot be written ({fault}); training goes on") == 1
    with RunFolder(folder.parent / "run", recipe(folder)):
        pass


@pytest.mark.parametrize(("patience", "best"), [(None, 1), (5, 2)])
def test_the_best_line_of_a_log_is_the_best_epoch_of_the_trainer(patience, best):
    """Epochs 1 and 2 have the same top-1."""
    scores = [(50.0, 1.0), (80.0, 0.9), (80.0, 0.7), (60.0, 0.1)]
    log = [dict(epoch=i, val_top1=top1, val_loss=loss) for i, (top1, loss) in enumerate(scores)]
    assert best_line(log, load_recipe("digits", [f"train.patience={patience or 'null'}"]))["epoch"] == best


def test_a_run_leaves_what_it_promises(folder, drawn_curves):
    r = recipe(folder, "train.ema_decay=0.9")
    summary = train(r)
    run = r.run_folder()
    assert {p.name for p in run.iterdir()} >= {
        "recipe.yaml", "environment.json", "log.jsonl", "curves.png", "summary.json", "checkpoints", "best.safetensors",
        "final.safetensors", "tensorboard",
    }  # fmt: skip
    assert set(summary) == {
        "best_top1", "best_epoch", "last_top1", "last_top5", "last_ema_top1", "epochs", "seconds", "params", "folder",
    }  # fmt: skip
    assert json.loads((run / "summary.json").read_text()) == {k: v for k, v in summary.items() if k != "folder"}
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
    with pytest.raises(eit.UserError, match="not a run folder"):
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


# -- Folders that are not of a run, or have lost a part

OWN = [
    "# my notes\nname: digits\nmodel: {depth: 2}\n",
    "name: digits\n",
    "[a, b]\n",
    "",
    "name: digits\nlearning_rate: 3\n",
]


def begin(folder, *overrides):
    """The folder of a run, before anything is trained."""
    r = recipe(folder, *overrides)
    with RunFolder(r.run_folder(), r) as run:
        run.start_logging({}, 0)
    return r.run_folder()


@pytest.mark.parametrize("text", [*OWN, "recorded, with a note"])
def test_an_own_recipe_is_not_written_over(folder, text):
    r = recipe(folder)
    file = r.run_folder() / "recipe.yaml"
    file.parent.mkdir()
    file.write_text(r.to_yaml() + "# three weeks of tuning\n" if "note" in text else text)
    before = file.read_text()
    with pytest.raises(UserError, match="is not a run folder: its recipe.yaml is not one that a run has written"):
        RunFolder(file.parent, r)
    assert file.read_text() == before and [p.name for p in file.parent.iterdir()] == ["recipe.yaml"]


def test_a_recipe_that_a_run_has_written_may_be_there(folder):
    r = recipe(folder)
    r.run_folder().mkdir()
    (r.run_folder() / "recipe.yaml").write_text(recipe(folder, "optim.lr=0.1").to_yaml())
    with RunFolder(r.run_folder(), r):
        pass


def remove_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def empty_checkpoints(run):
    shutil.rmtree(run / "checkpoints" / "step-4")


def lose_end(run):
    remove_checkpoints(run)
    (run / "summary.json").write_text("{}")
    (run / "final.safetensors").write_bytes(b"")


@pytest.mark.parametrize("lose", [remove_checkpoints, empty_checkpoints, lose_end])
def test_a_begun_run_without_its_checkpoints_is_refused_and_left_alone(folder, lose):
    run = begin(folder)
    (run / "log.jsonl").write_text(json.dumps(line_of(1)) + "\n")
    (run / "best.safetensors").write_text("weights")
    (run / "checkpoints" / "step-4").mkdir(parents=True)
    lose(run)
    with pytest.raises(
        UserError, match=r"has a log \(1 lines\), but no checkpoint to continue from: put .*checkpoints"
    ):
        RunFolder(run, recipe(folder))
    assert len(log(run)) == 1 and (run / "best.safetensors").read_text() == "weights"


def test_a_run_that_died_before_its_first_checkpoint_begins_again(folder):
    run = begin(folder)
    (run / "best.safetensors").write_text("weights")
    (run / "log.jsonl").write_text("")
    with RunFolder(run, recipe(folder, "optim.lr=0.1")):
        pass


def to_link(run, name):
    (run / name).unlink(missing_ok=True)
    (run.parent / "victim").write_text("precious")
    (run / name).symlink_to("../victim")


def to_pipe(run, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)


def to_device(run, name):
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("/dev/zero")


@pytest.mark.parametrize("change", [to_link, to_pipe, to_device])
@pytest.mark.parametrize("name", [".lock", "log.jsonl", "recipe.yaml"])
def test_links_and_pipes_in_a_run_folder_are_one_line(folder, name, change):
    run = begin(folder)
    (run / "checkpoints" / "step-4").mkdir(parents=True)  # so that the recipe is read
    change(run, name)
    with pytest.raises(UserError, match=name):
        RunFolder(run, recipe(folder))
    if change is to_link:
        assert (run.parent / "victim").read_text() == "precious"


@pytest.mark.parametrize("change", [to_link, to_pipe, to_device])
@pytest.mark.parametrize("name", ["environment.json", ".recipe.yaml.tmp", ".curves.png", ".log.jsonl.tmp"])
def test_links_and_pipes_at_names_that_are_written_are_replaced(folder, name, change):
    run = begin(folder)
    change(run, name)
    with RunFolder(run, recipe(folder)) as opened:
        opened.cut_log(0, {})
        opened.start_logging({}, 0)
        opened.show_epoch(line_of(0), 3)
    assert json.loads((run / "environment.json").read_text())["step"] == 0
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    if change is to_link:
        assert (run.parent / "victim").read_text() == "precious"


def test_checkpoints_are_not_deleted_through_a_link(folder):
    run = begin(folder)
    (run.parent / "other" / "step-1").mkdir(parents=True)
    (run / "checkpoints").symlink_to("../other")
    with pytest.raises(
        UserError, match="checkpoints is a link. Old checkpoints are deleted there, which is not done through a link"
    ):
        RunFolder(run, recipe(folder))
    assert (run.parent / "other" / "step-1").is_dir()


# -- Logs, summaries and environments that are damaged


@pytest.mark.parametrize(
    "damage",
    ["[" * 200000, "{}", '{"step": "x", "epoch": 1}', "3", '{"epoch": 2, "st', "\0\0\0", '{"step": 1e3}'],
    ids=range(7),
)
def test_a_damaged_line_of_the_log_loses_no_other(folder, capsys, damage):
    run = begin(folder)
    lines = [json.dumps(line_of(epoch)) for epoch in range(1, 4)]
    (run / "log.jsonl").write_text("\n".join([lines[0], damage, *lines[1:]]) + "\n")
    assert [line["epoch"] for line in read_log(run)] == [1, 2, 3]
    assert "log.jsonl: damaged lines are left out (2)" in capsys.readouterr().err


def test_a_log_is_cut_to_the_checkpoint_and_gets_the_line_that_the_checkpoint_has(folder):
    run = begin(folder)
    (run / "checkpoints" / "step-2").mkdir(parents=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line_of(epoch)) + "\n" for epoch in (1, 3)))
    for _ in range(2):
        with RunFolder(run, recipe(folder)) as opened:
            opened.cut_log(2, line_of(2))
        assert [line["epoch"] for line in log(run)] == [1, 2]


def test_a_log_of_an_earlier_version_with_nan_is_read_and_stays_json(folder):
    run = begin(folder)
    (run / "checkpoints" / "step-2").mkdir(parents=True)
    (run / "log.jsonl").write_text(json.dumps(line_of(1) | dict(val_loss=math.nan)) + "\n")
    with RunFolder(run, recipe(folder)) as opened:
        opened.cut_log(2, line_of(2) | dict(train_loss=math.inf))
        opened.append_log(line_of(3))
        opened.show_epoch(line_of(3), 3)
    text = (run / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and len(read_log(run)) == 3


@pytest.mark.parametrize("text", ["3", '{"a": 1}', "[" * 200000, '{"last_top1": "x"}', "[]", '{"last_top1": NaN}', ""])
def test_a_summary_of_another_kind_is_not_that_of_a_finished_run(folder, text):
    run = begin(folder)
    (run / "final.safetensors").write_text("")
    (run / "summary.json").write_text(text)
    assert read_summary(run) is None


def test_every_start_is_kept_in_the_environment(folder):
    run = begin(folder)
    for step, threads in ((0, 1), (5, 2), (9, 4)):
        with RunFolder(run, recipe(folder)) as opened:
            opened.start_logging(dict(threads=threads, global_batch=8), step)
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["threads"], environment["step"], environment["global_batch"]) == (4, 9, 8)
    assert [start.get("threads") for start in environment["earlier_starts"]] == [None, 1, 2]
    assert "earlier_starts" not in environment["earlier_starts"][1]


def test_an_environment_of_an_earlier_version_is_the_first_start(folder):
    run = begin(folder)
    (run / "environment.json").write_text('{"threads": 7}')
    with RunFolder(run, recipe(folder)) as opened:
        opened.start_logging(dict(threads=2), 3)
    assert json.loads((run / "environment.json").read_text())["earlier_starts"] == [{"threads": 7}]


@pytest.mark.parametrize("text", ["[", "3", "[]", '{"earlier_starts": 3}', '{"earlier_starts": "abc"}', '{"a": NaN}'])
def test_a_damaged_environment_is_said_and_written_anew(folder, capsys, text):
    run = begin(folder)
    (run / "environment.json").write_text(text)
    with RunFolder(run, recipe(folder)) as opened:
        opened.start_logging(dict(threads=2), 3)
    assert "environment.json is damaged" in capsys.readouterr().err
    assert json.loads((run / "environment.json").read_text()) == dict(threads=2, step=3, earlier_starts=[])


def test_tensorboard_reads_the_scalars_and_drops_what_a_continued_run_repeats(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = begin(folder)
    for first, epochs in ((0, (1, 2, 3)), (2, (3, 4))):
        with RunFolder(run, recipe(folder)) as opened:
            opened.start_logging({}, first)
            for epoch in epochs:
                opened.show_epoch(line_of(epoch) | dict(train_loss=float(10 * first + epoch)), 3)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    assert "ema_top1" not in events.Tags()["scalars"]


# -- Weights & Biases


class Board:
    """Stands for the package wandb."""

    def __init__(self):
        self.settings, self.lines, self.finished = [], [], 0

    def init(self, **settings):
        self.settings.append(settings)
        return self

    def log(self, numbers, step):
        self.lines.append((step, numbers))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_the_numbers_of_each_epoch_and_the_same_run_again(folder, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    monkeypatch.setattr(run_folder, "find_spec", lambda name: SimpleNamespace(origin=name))
    words = ["train.log=[wandb]"]
    train_until_killed(recipe(folder, *words), 5, monkeypatch)
    train(recipe(folder, *words))
    first, second = board.settings
    assert first["id"] == second["id"] and first["name"] == "cifar10" and first["config"]["train"]["epochs"] == 2
    assert [step for step, _ in board.lines] == [4, 8] and board.finished == 2
    assert "val_top1" in board.lines[0][1] and "epoch" not in board.lines[0][1]
    assert not (recipe(folder).run_folder() / "tensorboard").exists()


def test_an_error_of_weights_and_biases_does_not_end_the_run(folder, monkeypatch, capsys):
    def init(**_):
        raise RuntimeError("no key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(run_folder, "find_spec", lambda name: SimpleNamespace(origin=name))
    assert train(recipe(folder, "train.log=[wandb, tensorboard]"))["epochs"] == 2
    assert capsys.readouterr().err.count("cannot be written (no key)") == 1
    assert (recipe(folder).run_folder() / "tensorboard").is_dir()


@pytest.mark.parametrize("start, end", [("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_a_log_that_an_editor_saved_keeps_its_lines(folder, capsys, start, end):
    run = begin(folder)
    text = start + "".join(json.dumps(line_of(epoch)) + end for epoch in range(1, 4))
    (run / "log.jsonl").write_bytes(text.encode())
    assert [line["epoch"] for line in read_log(run)] == [1, 2, 3] and not capsys.readouterr().err


def test_a_number_beyond_a_float_is_not_known(folder):
    run = begin(folder)
    (run / "log.jsonl").write_text(json.dumps(line_of(1) | dict(val_loss=0.5)).replace("0.5", "1e999") + "\n")
    assert [line["val_loss"] for line in read_log(run)] == [None]
