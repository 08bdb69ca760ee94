"""Signals that ask a run to save and stop."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from eit.data.workers import STOP_SIGNALS
from eit.randomness import Stream
from eit.training import trainer
from eit.training.checkpoint import saved_steps
from tests.helpers.commands import Running, run_eit
from tests.helpers.training import children, finish, long_run


def test_a_signal_saves_and_the_same_command_continues(tmp_path):
    """Ctrl-C here; SIGTERM and SIGUSR1 are in test_reliability."""
    words = ["train", "digits", "train.epochs=3", "train.warmup_epochs=1"]
    process = Running(*words, cwd=tmp_path)
    for line in process.stderr:
        if line.startswith("epoch 1"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "the same command" in err and "Traceback" not in err
    done = run_eit(*words, cwd=tmp_path)
    assert done.returncode == 0 and "continuing" in done.stderr


def test_slurms_warning_saves_and_ends(tmp_path):
    with long_run(tmp_path) as process:
        process.send_signal(signal.SIGUSR1)
        status, err = finish(process)
    assert status == 128 + signal.SIGUSR1 and "stopped by SIGUSR1" in err and "the same command" in err
    assert saved_steps(tmp_path / "runs" / "digits")


def stick_in_a_step():
    def stuck(*counters):
        if counters[0] == Stream.STEP:
            print("in a step", file=sys.stderr, flush=True)
            for _ in range(3):  # once for each signal, without a way for Python to run its handler
                ctypes.CDLL(None).pause()

    trainer.set_seed = stuck


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """Also where the main thread hangs in a call that is none of Python's, as in a collective."""
    process = Running("train", "digits", cwd=tmp_path, prepare=stick_in_a_step)
    try:
        while "in a step" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None  # it waits for the end of the step
        process.send_signal(signal.SIGINT)
        status, err = finish(process, 10)
    finally:
        process.process.kill()
    assert status == 130 and "eit: interrupted" in err and "saved before" in err


def test_loader_processes_leave_signals_to_the_trainer(tmp_path):
    """They reach all of a group; the workers go on until it ends them."""
    with long_run(tmp_path, "data.cache=false", "data.workers=2") as process:
        workers = children(process.pid)
        assert len(workers) >= 2
        for signum in (*STOP_SIGNALS, signal.SIGINT):
            for pid in workers:
                os.kill(pid, signum)
            time.sleep(0.5)
        assert process.poll() is None and set(workers) <= set(children(process.pid))
        os.killpg(process.pid, signal.SIGTERM)
        status, err = finish(process)
        assert status == 128 + signal.SIGTERM and "stopped by SIGTERM" in err and "the same command" in err
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.project
@pytest.mark.parametrize(
    ("whom", "signum", "status"),
    [("one rank", signal.SIGTERM, 0), pytest.param("torchrun", signal.SIGUSR1, 1, marks=pytest.mark.slow)],
)
def test_a_signal_under_torchrun_saves_once_and_does_not_restart(tmp_path, whom, signum, status):
    slurm = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    with long_run(tmp_path, "data.batch_size=32", ranks=2, options=["--max-restarts=3", slurm]) as process:
        os.kill(process.pid if whom == "torchrun" else children(process.pid)[1], signum)
        err = process.communicate(timeout=60)[1]
    assert err.count(f"stopped by {signum.name}; run the same command again") == 1, err
    assert "continuing" not in err and process.returncode == status
    run = tmp_path / "runs" / "digits"
    assert saved_steps(run) and not (run / "final.safetensors").exists()
