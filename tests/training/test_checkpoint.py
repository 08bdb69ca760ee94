"""Checkpoints of training: whole or not there."""

import errno
import hashlib
import io
import os
import resource
import shutil
import signal
import threading
from contextlib import contextmanager, suppress

import pytest
import torch

import eit
from eit.config import load_recipe
from eit.training.checkpoint import (
    BackgroundWriter,
    Progress,
    check_unchanged,
    load_checkpoint,
    load_state,
    newest_checkpoint,
    save_checkpoint,
    saved_steps,
)
from tests.weights.test_load import SMALL, card


@pytest.fixture
def state():
    return eit.create_model("eit_mini", num_classes=3, **SMALL).state_dict()


@pytest.fixture
def steps(tmp_path, state):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, card(), state, {k: v + 1 for k, v in state.items()}, training_state(step))
    return tmp_path


def training_state(step):
    return dict(optimizer={}, scaler={}, progress=Progress(step=step).model_dump())


def test_the_newest_two_are_kept_with_checksums(steps):
    assert saved_steps(steps) == [30, 20]
    folder, faults = newest_checkpoint(steps)
    assert folder.name == "step-30" and faults == []
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "ema.safetensors", "state.pt", "manifest.json"}
    model, ema, state = load_checkpoint(folder)
    assert state == training_state(30)
    assert torch.equal(ema["norm.bias"], model["norm.bias"] + 1)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("damage", [flip, truncate, lambda file: file.write_bytes(b""), lambda file: file.unlink()])
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(steps, name, damage):
    damage(steps / "checkpoints" / "step-30" / name)
    folder, faults = newest_checkpoint(steps)
    assert folder.name == "step-20"
    assert len(faults) == 1 and "step-30 is damaged" in faults[0]


MANIFESTS = [
    "[" * 200000,
    "9" * 5000,
    "[]",
    '{"sha256": 3}',
    '{"sha256": [1]}',
    '{"sha256": {}}',
    '{"sha256": {"/etc": "x"}}',
]


@pytest.mark.parametrize("text", [*MANIFESTS, '{"sha256": {"state.pt": NaN}}', "\0"], ids=range(9))
def test_a_manifest_of_another_kind_is_a_damaged_checkpoint(steps, text):
    (steps / "checkpoints" / "step-30" / "manifest.json").write_text(text)
    folder, faults = newest_checkpoint(steps)
    assert folder.name == "step-20" and len(faults) == 1 and "step-30 is damaged: manifest.json" in faults[0]


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def link(file):
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("change", [pipe, link])
def test_links_and_pipes_in_a_checkpoint_are_not_opened(steps, name, change):
    change(steps / "checkpoints" / "step-30" / name)
    folder, faults = newest_checkpoint(steps)
    assert folder.name == "step-20" and f"step-30 is damaged or cannot be read now: {name}: it is" in faults[0]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_what_cannot_be_read_now_is_named_the_one_before_used_and_nothing_is_deleted(steps, state, monkeypatch, number):
    def fail(file, _):
        if "step-30" in file.name:
            raise OSError(number, os.strerror(number))
        return original(file, "sha256")

    original = hashlib.file_digest
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", fail)
        folder, faults = newest_checkpoint(steps)
        reason = f"step-30 is damaged or cannot be read now: model.safetensors: {os.strerror(number)}"
        assert folder.name == "step-20" and len(faults) == 1 and reason in faults[0]
        save_checkpoint(steps, 25, card(), state, None, training_state(25))
    assert saved_steps(steps) == [30, 25, 20]
    assert newest_checkpoint(steps)[0].name == "step-30"  # it can be read again


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_empty(steps, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(eit.UserError, match="checkpoints cannot be read: Permission denied"):
        saved_steps(steps)


def test_names_that_are_almost_those_of_checkpoints_are_not_theirs(steps):
    for name in ("step-٣٠", "step-030", "step-" + "9" * 200, "step-", "step-x"):
        (steps / "checkpoints" / name).mkdir()
    assert saved_steps(steps) == [30, 20]


def test_a_checkpoint_that_is_a_link_is_damaged_and_only_the_link_is_deleted(steps, state):
    (steps / "other").mkdir()
    (steps / "other" / "file").write_text("precious")
    (steps / "checkpoints" / "step-40").symlink_to("../other")
    folder, faults = newest_checkpoint(steps)
    assert folder.name == "step-30" and "step-40 is damaged: it is a link" in faults[0]
    save_checkpoint(steps, 40, card(), state, None, training_state(40))
    assert saved_steps(steps) == [40, 30] and (steps / "other" / "file").read_text() == "precious"


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(steps, state, monkeypatch, capsys):
    def busy(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert save_checkpoint(steps, 40, card(), state, None, training_state(40)).name == "step-40"
    assert "cannot be deleted (step-20: Device or resource busy); training goes on" in capsys.readouterr().err


def test_no_whole_checkpoint_is_an_error(steps):
    for step in (20, 30):
        truncate(steps / "checkpoints" / f"step-{step}" / "state.pt")
    with pytest.raises(eit.UserError, match="no whole checkpoint is left"):
        newest_checkpoint(steps)


def test_a_half_written_checkpoint_does_not_count(steps, state):
    (steps / "checkpoints" / ".step-40.tmp").mkdir()
    (steps / "checkpoints" / ".step-40.tmp" / "state.pt").write_bytes(b"half")
    assert newest_checkpoint(steps)[0].name == "step-30"
    save_checkpoint(steps, 50, card(), state, None, training_state(50))  # and does not stay
    assert sorted(p.name for p in (steps / "checkpoints").iterdir()) == ["step-30", "step-50"]


def test_checkpoints_that_a_run_went_back_behind_are_dropped(steps, state):
    """One that is damaged, and newer than where the run goes on, must not count among those that are kept."""
    truncate(steps / "checkpoints" / "step-30" / "state.pt")
    save_checkpoint(steps, 25, card(), state, None, training_state(25))
    assert saved_steps(steps) == [25, 20]


# -- A checkpoint that is whole, and not of this run


STATES = {
    "fixed is missing": lambda state: state["progress"].pop("fixed"),
    "seconds is missing": lambda state: state["progress"].pop("seconds"),
    "step: Input should be a valid integer": lambda state: state["progress"].update(step="x"),
    "step: Input should be greater": lambda state: state["progress"].update(step=-10),
    "step is 1000000000": lambda state: state["progress"].update(step=10**9),
    "best_top1: Input should be a valid number": lambda state: state["progress"].update(best_top1="x"),
    "loss_sum: Input should be a finite number": lambda state: state["progress"].update(loss_sum=float("nan")),
    "last: Input should be a valid dictionary": lambda state: state["progress"].update(last=[1]),
    "last has no lr": lambda state: state["progress"].update(last=dict(epoch=1, step=10)),
    "epoch: Field required": lambda state: state["progress"].update(last=dict(step=10)),
    "moon: Extra inputs are not permitted": lambda state: state["progress"].update(moon=1),
    "not a state of training, with optimizer, scaler, progress": lambda state: state.pop("scaler"),
    "not a state of training": lambda state: state.update(optimizer=3),
}


@pytest.mark.parametrize("message", STATES)
def test_a_state_of_another_version_is_one_line_with_a_way_out(tmp_path, state, message):
    written = training_state(10)
    STATES[message](written)
    save_checkpoint(tmp_path, 10, card(), state, None, written)
    folder, faults = newest_checkpoint(tmp_path)
    assert not faults
    with pytest.raises(
        eit.UserError, match=f"state.pt is .*{message}.*; to continue from .*, delete .*step-10"
    ) as error:
        load_state(folder)
    assert "\n" not in str(error.value)


def recorded(*overrides):
    recipe = load_recipe("digits", list(overrides))
    return card().model_copy(update=dict(recipe=recipe.model_dump(mode="json")))


@pytest.mark.parametrize(
    ("overrides", "change"),
    [
        (["optim.lr=0.5"], "optim.lr: 0.5 -> "),
        (["model.embed_dim=32"], "model.embed_dim: 32 -> "),
        (["seed=7"], "seed: 7 -> 0"),
        (["augment.mixup=0.3", "data.batch_size=8"], r"augment.mixup: 0.3 -> .*\)"),
    ],
)
def test_a_checkpoint_knows_the_recipe_that_it_is_of(steps, overrides, change):
    folder = steps / "checkpoints" / "step-30"
    state, recipe = training_state(30), load_recipe("digits")
    with pytest.raises(eit.UserError, match=rf"step-30 is of another recipe \({change}"):
        check_unchanged(folder, recorded(*overrides), state, recipe, Progress())
    check_unchanged(folder, recorded("data.workers=3", "data.root=there", "out=x"), state, recipe, Progress())
    with pytest.raises(eit.UserError, match="does not say of which recipe it is"):
        check_unchanged(folder, card(), state, recipe, Progress())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [(Evil(), "is refused: .*mkdir"), (["a list"], "not a state of training"), (dict(progress=3), "not a state of tr")],
)
def test_a_strangers_state_is_refused_though_its_checksum_is_right(tmp_path, monkeypatch, state, content, message):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    monkeypatch.setattr("eit.training.checkpoint.torch.save", lambda _, file: file.write(buffer.getvalue()))
    save_checkpoint(tmp_path, 10, card(), state, None, {})
    folder, faults = newest_checkpoint(tmp_path)
    assert not faults
    with pytest.raises(eit.UserError, match=message) as error:
        load_state(folder)
    assert "\n" not in str(error.value) and "state.pt" in str(error.value)
    assert not (tmp_path / "ran").exists()


# -- A full disk, as a limit on the size of a file


@contextmanager
def largest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_leaves_earlier_checkpoints_whole_and_says_what_is_needed(steps, state, room):
    with largest_file(room), pytest.raises(OSError) as error:
        save_checkpoint(steps, 40, card(), state, None, training_state(40))
    assert "step-40 was not written (File too large; " in str(error.value)
    assert "bytes are needed" in str(error.value) and "earlier ones are intact" in str(error.value)
    assert sorted(p.name for p in (steps / "checkpoints").iterdir()) == ["step-20", "step-30"]
    assert newest_checkpoint(steps) == (steps / "checkpoints" / "step-30", [])


def test_weights_that_do_not_fit_on_the_disk_leave_the_old_ones_and_are_named(tmp_path, state):
    file = tmp_path / "best.safetensors"
    eit.weights.formats.save_weights(file, state, card())
    before = file.read_bytes()
    with largest_file(100), pytest.raises(OSError, match="File too large") as error:
        eit.weights.formats.save_weights(file, state, card())
    assert error.value.filename == str(file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [file.name]


# -- Writing while training goes on


def test_the_writer_writes_what_was_there_when_it_was_asked():
    begin, seen = threading.Event(), []

    def call(name, tensors):
        begin.wait(10)
        seen.append((name, tensors["a"].tolist(), tensors["b"][0].tolist()))

    a, b = torch.zeros(2), torch.ones(1)
    with BackgroundWriter() as writer:
        writer.submit(call, "first", dict(a=a, b=[b]))
        a += 5
        b += 5
        begin.set()
    assert seen == [("first", [0, 0], [1])]


def test_an_error_of_the_writer_is_raised_by_what_follows(capsys):
    def fail():
        raise OSError("no room")

    for following in (lambda w: w.wait(), lambda w: w.submit(print), lambda w: None):
        with pytest.raises(OSError, match="no room"), BackgroundWriter() as writer:
            writer.submit(fail)
            writer._pool.shutdown()
            assert str(writer.error()) == "no room"
            following(writer)
    with pytest.raises(KeyError), BackgroundWriter() as writer:  # the first error is the one to raise
        writer.submit(fail)
        raise KeyError
    assert capsys.readouterr().err == "no room\n"


def test_the_old_checkpoint_goes_only_after_the_new_one_is_durable(steps, state, monkeypatch):
    """Every file and both folders are flushed before, and the new name appears when all of its files are."""
    events = []

    def noted(module, name, describe):
        original = getattr(module, name)

        def call(*arguments, **options):
            events.append((name, describe(arguments[0])))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    noted(os, "fsync", lambda descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
    noted(os, "rename", lambda path: path.name)
    noted(shutil, "rmtree", lambda path: path.name)
    save_checkpoint(steps, 40, card(), state, state, training_state(40))
    renamed = events.index(("rename", ".step-40.tmp"))
    flushed = {name for _, name in events[:renamed]}
    assert flushed >= {f".{file}.tmp" for file in ("model.safetensors", "ema.safetensors", "state.pt", "manifest.json")}
    assert ".step-40.tmp" in flushed
    assert events[renamed + 1 :] == [("fsync", "checkpoints"), ("fsync", steps.name), ("rmtree", "step-20")]


@pytest.mark.parametrize("older", [True, False])
def test_a_kill_at_any_moment_of_saving_the_same_step_again_leaves_it_whole(tmp_path, state, monkeypatch, older):
    """A long epoch is saved before its evaluation and after it. Every change of the disk is a moment to die."""

    class Killed(BaseException):
        pass

    def dying(call):
        def changed(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*arguments, **options)

        return changed

    changes = {name: getattr(os, name) for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir")}
    for moment in range(100):
        run = tmp_path / f"run-{moment}"
        for step in (20, 30) if older else (30,):
            save_checkpoint(run, step, card(), state, None, training_state(step))
        left = moment
        with monkeypatch.context() as patch:
            for name, call in changes.items():
                patch.setattr(os, name, dying(call))
            with suppress(Killed):
                save_checkpoint(run, 30, card(), state, None, training_state(30))
        died = left < 0
        folder, faults = newest_checkpoint(run)
        assert folder is not None and folder.name == "step-30" and not faults, moment
        assert load_checkpoint(folder)[2] == training_state(30)
        if not died:
            break
    assert 15 < moment < 100  # there were as many, and the last run came through
    save_checkpoint(run, 40, card(), state, None, training_state(40))
    assert not [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
