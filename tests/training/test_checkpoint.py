"""Checkpoints of training: whole or not there."""

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
from eit.training.checkpoint import (
    BackgroundWriter,
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
    return dict(optimizer={}, scaler={}, progress=dict(step=step))


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
