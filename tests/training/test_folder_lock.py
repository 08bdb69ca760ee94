"""One process at a time holds a run folder: with flock, and on file systems without it."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import eit
from eit.config import load_recipe
from eit.training import folder_lock
from eit.training.run_folder import RunFolder
from eit.training.trainer import save_epoch
from tests.helpers.commands import FORKS
from tests.helpers.training import wait_for

HERE = socket.gethostname()
NONE = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


def refuse(number):
    """flock of a file system that has none."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture
def no_flock(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the lock sleeps, and only then. `clock.then` is called after each sleep."""

    def sleep(seconds):
        clock.now += seconds
        clock.then()

    clock = SimpleNamespace(now=1000.0, then=lambda: None)
    monkeypatch.setattr(folder_lock, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def open_run(folder, *overrides):
    return RunFolder(folder, load_recipe("digits", list(overrides)))


def hold(folder, **process):
    """`.lock` and `.lock-soft` as another process leaves them."""
    folder.mkdir(exist_ok=True)
    process = folder_lock._describe(os.getpid()) | process
    (folder / ".lock").write_text(json.dumps(process))
    (folder / ".lock-soft").write_text(f"{process['pid']}\n{process['host']}\n")  # as filelock writes it
    os.utime(folder / ".lock-soft", (1, 1))  # not in the same tick as the test makes another


def refresh(folder, count=iter(range(1, 10**6))):  # noqa: B008 (a clock of its own, for files)
    now = next(count)
    os.utime(folder / ".lock", (now, now))


HOLDER = """
import fcntl, multiprocessing, os, sys, time
from pathlib import Path

def live(file):
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    from eit.config import load_recipe
    from eit.training.run_folder import RunFolder
    def flock(*_):
        raise OSError(number, os.strerror(number))
    if number:
        fcntl.flock = flock
    run = RunFolder(folder, load_recipe("digits"))
    if not os.fork():
        sys.exit()
    os.wait()
    files = [folder.parent / kind for kind in ("fork", "spawn", "forkserver")]
    for file in files:
        multiprocessing.get_context(file.name).Process(target=live, args=(file,)).start()
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.05)
    print(flush=True)
    time.sleep(600)
"""


@contextmanager
def other_process(folder, number=0):
    """A process that holds `folder` and has loader workers of each kind; `number`: the error of its flock, if any."""
    script = folder.parent / "holder.py"
    script.write_text(HOLDER)
    words = [sys.executable, str(script), str(folder), str(number)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout.readline() == b"\n"
        yield holder
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()


@pytest.mark.parametrize("number", [0, pytest.param(errno.ENOSYS, marks=pytest.mark.slow)])
def test_a_folder_is_held_until_its_process_is_killed_though_its_workers_live(
    folder, monkeypatch, clock, capsys, number
):
    with other_process(folder, number) as holder:
        if number:
            monkeypatch.setattr(fcntl, "flock", refuse(number))
        with pytest.raises(
            eit.UserError, match=f"in use by another process .process {holder.pid} on {HERE}.; set another out="
        ):
            open_run(folder)
        assert clock.now == 1000, "it waited"
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead too
        with open_run(folder):
            for kind in ("fork", "spawn", "forkserver"):
                os.kill(int((folder.parent / kind).read_text()), 0)
        assert clock.now < 1002
    assert "took over" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, *NONE])
def test_a_process_holds_a_folder_once_and_again_after_its_run(folder, monkeypatch, capfd, recwarn, number):
    if number:
        monkeypatch.setattr(fcntl, "flock", refuse(number))
    for _ in range(2):
        with open_run(folder):
            if number:  # older versions of filelock leave it empty, and newer ones remove such a file
                assert (folder / ".lock-soft").read_text().startswith(f"{os.getpid()}\n{HERE}")
            for _ in range(2):
                with pytest.raises(eit.UserError, match="is in use by another run of this process"):
                    open_run(folder)
    out, err = capfd.readouterr()
    said = err.splitlines()
    assert not out and not [w for w in recwarn if "filelock" in w.filename or "flock" in str(w.message)]
    assert len(said) == (6 if number else 0)
    name = errno.errorcode.get(number)
    assert all(line.endswith(f"has no flock ({name}); the file .lock-soft locks it instead") for line in said)
    assert not (folder / ".lock-soft").exists() and not (folder / ".lock").read_text()


def test_another_error_of_flock_is_told(folder, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(eit.UserError, match="cannot be written: Input/output error"):
        open_run(folder)


@pytest.mark.parametrize("number", [0, errno.ENOSYS])
def test_a_run_that_is_refused_holds_nothing(folder, monkeypatch, number):
    if number:
        monkeypatch.setattr(fcntl, "flock", refuse(number))
    with open_run(folder):
        pass
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    with pytest.raises(eit.UserError, match="another recipe") as refused:
        open_run(folder, "optim.lr=0.5")
    with open_run(folder):
        pass
    del refused


# -- A holder on another machine


@pytest.fixture
def held_elsewhere(folder):
    """Another open file has the flock; the holder's name says that this is on another machine."""
    hold(folder, host="elsewhere", pid=7)
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def test_another_machine_is_waited_for(folder, clock, held_elsewhere, capsys):
    def end():
        if clock.now > 1060:
            fcntl.flock(held_elsewhere, fcntl.LOCK_UN)

    clock.then = end
    with open_run(folder):
        assert json.loads((folder / ".lock").read_text())["host"] == HERE
    said = f"{folder} is in use by process 7 on elsewhere; waiting up to 120 s for it to end\n"
    assert capsys.readouterr().err == said and 1060 < clock.now < 1062


def test_another_machine_that_goes_on_is_waited_for_two_minutes(folder, clock, held_elsewhere):
    refused = "in use by another process .process 7 on elsewhere.; .*; if its machine is gone, delete .*/run/.lock$"
    with pytest.raises(eit.UserError, match=refused):
        open_run(folder)
    assert 1120 <= clock.now < 1122


# -- Without flock


def test_a_holder_elsewhere_that_refreshes_its_lock_keeps_it(folder, clock, no_flock, capsys):
    hold(folder, host="elsewhere", pid=7)
    clock.then = lambda: clock.now % 20 or refresh(folder)
    with pytest.raises(eit.UserError, match="in use by another process .process 7 on elsewhere.; set another out="):
        open_run(folder)
    assert 1120 <= clock.now < 1122 and (folder / ".lock-soft").exists()
    assert capsys.readouterr().err.count("waiting up to 120 s") == 1


@pytest.mark.parametrize("process", [dict(host="elsewhere", pid=7), dict(namespace=7), None])
def test_a_holder_elsewhere_that_is_silent_for_two_minutes_loses_it(folder, clock, no_flock, capsys, process):
    hold(folder, **(process or dict(host="elsewhere", pid=7)))
    if process is None:  # killed before it wrote its name
        (folder / ".lock").write_text("{")
    with open_run(folder):
        assert 1120 <= clock.now < 1122
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    *_, last = capsys.readouterr().err.splitlines()
    assert "took over the lock of" in last and last.endswith("which did not refresh its lock for 120 s")
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "recipe.yaml"]


def test_a_holder_elsewhere_that_ends_is_followed_at_once(folder, clock, no_flock):
    hold(folder, host="elsewhere", pid=7)
    clock.then = lambda: clock.now < 1060 or (folder / ".lock-soft").unlink(missing_ok=True)
    with open_run(folder):
        assert 1060 <= clock.now < 1062


def test_a_dead_process_whose_number_another_has_is_dead(folder, clock, no_flock):
    hold(folder, start="1")
    with open_run(folder):
        assert clock.now < 1002


def test_a_marker_that_another_process_just_made_stays(folder, clock, no_flock):
    """Two processes find the same dead holder: the slower one must not remove the faster one's lock."""
    hold(folder, start="1")
    lock = folder_lock.FolderLock.__new__(folder_lock.FolderLock)
    lock.file, lock.marker = folder / ".lock", folder / ".lock-soft"
    before = lock._state()
    with open_run(folder):
        assert not lock._remove_marker(before)
        assert (folder / ".lock-soft").exists()
        with pytest.raises(eit.UserError, match="in use"):
            open_run(folder)


def test_a_name_that_is_older_than_the_marker_is_not_trusted_at_once(folder, clock, no_flock):
    """A new holder makes the marker, then writes its name: in between, `.lock` names the dead one before it."""
    hold(folder, start="1")

    def write_name():
        hold(folder, pid=os.getppid(), start=folder_lock._describe(os.getppid())["start"])

    clock.then = write_name
    with pytest.raises(eit.UserError, match=f"process {os.getppid()} on"):
        open_run(folder)


def refreshers():
    return [thread for thread in threading.enumerate() if thread.name == "run folder's lock"]


def test_the_holder_refreshes_its_lock_until_it_ends(folder, monkeypatch, no_flock):
    monkeypatch.setattr(folder_lock, "REFRESH", 0.01)
    with open_run(folder):
        os.utime(folder / ".lock", (0, 0))
        wait_for(lambda: (folder / ".lock").stat().st_mtime > 0)
    assert not refreshers()


def test_a_run_whose_lock_was_taken_over_ends_and_leaves_it_alone(folder, monkeypatch, no_flock):
    monkeypatch.setattr(folder_lock, "REFRESH", 0.01)
    with open_run(folder) as run:
        (folder / ".lock-soft").unlink()
        hold(folder, host="elsewhere", pid=7)
        wait_for(lambda: not refreshers())  # which would keep the other's lock alive
        for write in (run.check, run.finish):
            with pytest.raises(eit.UserError, match="was taken over by process 7 on elsewhere"):
                write()
    assert (folder / ".lock-soft").exists() and "elsewhere" in (folder / ".lock").read_text()


def remake(folder):
    """Another process removed the folder, and its run holds the new one."""
    shutil.rmtree(folder)
    hold(folder, pid=os.getppid(), start=folder_lock._describe(os.getppid())["start"])


def remake_and_end(folder):
    remake(folder)
    (folder / ".lock").write_text("")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, "was removed while this process trained in it"),
        (lambda folder: folder.rename(folder.with_name("moved")), "was removed while"),
        (lambda folder: (folder / ".lock").unlink(), "was removed while"),
        (remake, f"was taken over by process {os.getppid()} on .*: it was replaced; this process ends here"),
        (remake_and_end, "was taken over by an unknown process: it was replaced"),
    ],
)
def test_a_folder_that_was_removed_or_remade_is_noticed_before_the_next_save(folder, change, said):
    with open_run(folder) as run:
        run.check()
        change(folder)
        before = sorted(folder.rglob("*"))
        for write in (run.check, run.finish, lambda: save_epoch(run, None, 1)):
            with pytest.raises(eit.UserError, match=said):
                write()
        assert sorted(folder.rglob("*")) == before


def test_a_file_system_whose_file_numbers_change_does_not_end_a_run(folder, monkeypatch):
    with open_run(folder) as run:
        monkeypatch.setattr(os.path, "samestat", lambda *_: False)
        run.check()


@pytest.mark.parametrize("content", ["[" * 100000, "9" * 5000, '{"pid": "x", "host": 3}', "\ud800", "null"])
def test_a_lock_with_any_content_names_an_unknown_process(folder, content):
    folder.mkdir()
    (folder / ".lock").write_text(content, errors="surrogatepass")
    with open(folder / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            eit.UserError, match="in use by another process .an unknown process.|in use by another proc"
        ):
            open_run(folder)


def test_a_forked_process_does_not_release_the_soft_lock(tmp_path):
    lock = folder_lock._SoftLock(tmp_path / "lock", thread_local=False)
    with lock:
        if not (child := os.fork()):
            lock.release(force=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()


def hold_twice_without_fcntl(folder, said):
    """In a new process."""
    sys.stderr = said.open("w", buffering=1)
    for name in [*sys.modules]:
        if name.split(".")[0] == "filelock" or name in ("eit.training.folder_lock", "eit.training.run_folder"):
            del sys.modules[name]
    sys.modules["fcntl"] = None
    from eit.training.run_folder import RunFolder

    run = RunFolder(folder, load_recipe("digits"))
    with pytest.raises(eit.UserError, match="is in use by another run of this process"):
        RunFolder(run.path, load_recipe("digits"))


def test_a_system_without_fcntl_has_the_soft_lock(folder, tmp_path):
    process = FORKS.Process(target=hold_twice_without_fcntl, args=(folder, tmp_path / "said"))
    process.start()
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0 and said.count("the file .lock-soft locks it instead") == 2, said
