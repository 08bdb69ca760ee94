"""Runs that are broken from outside: signals, dead processes, lost links. docs/reliability.md says what is promised."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import eit
from eit.config import Data
from eit.data.datasets import open_data
from eit.data.images import Images
from eit.data.shards import write_shards
from eit.randomness import Stream
from eit.training import checkpoint as checkpoint_module
from eit.training import trainer as train_module
from eit.training.checkpoint import load_checkpoint, newest_checkpoint, saved_steps
from eit.training.trainer import train
from eit.weights.formats import read_safetensors
from tests.helpers.commands import run_eit, start_ranks, wait_for_all
from tests.helpers.images import save_digits
from tests.helpers.shared import require
from tests.helpers.training import (
    LONG,
    TINY,
    children,
    finish,
    long_run,
    recipe,
    same,
    train_until_killed,
    wait_for,
    weights,
)
from tests.test_distributed import DETERMINISTIC

ROOT = Path(__file__).parents[2]
FIVE = ["train.epochs=5", "train.warmup_epochs=1", "train.save_every=5", "data.batch_size=32"]


# -- kill -9


def chaos(trials, tmp_path, *words, timeout=500):
    command = [sys.executable, ROOT / "tests" / "helpers" / "chaos.py", str(trials), "--seed", "1", *words]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


@pytest.mark.project
def test_runs_killed_at_random_come_back_identical(tmp_path):
    done = chaos(1, tmp_path, "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 trials came back identical" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no-step-seed", "no-sample-seed", "last-step-again"])
def test_the_comparison_can_fail(tmp_path, fault):
    """Negative controls: with a fault in the code, chaos.py says so."""
    done = chaos(1, tmp_path, "--fault", fault)
    assert done.returncode == 1
    assert "DIFFERS in weights, moving average, optimizer" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_runs_killed_at_random_come_back_identical(tmp_path):
    done = chaos(100, tmp_path, timeout=7000)
    assert done.returncode == 0, done.stdout + done.stderr
    same, trials, kills, after, saving, evaluation = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert same == trials == 100
    assert after >= 0.8 * kills and saving >= 5 and evaluation >= 5


# -- Saving


def test_training_goes_on_while_a_checkpoint_is_written(folder, monkeypatch):
    """The writer waits for a later step, which would never come if training waited for the writer."""
    steps, waited = [], {}
    seed, write = train_module.set_seed, train_module.write_checkpoint

    def noted_seed(*counters):
        if counters[0] == Stream.STEP:
            steps.append(counters[2])
        seed(*counters)

    def slow_write(run, step, *rest):
        deadline = time.monotonic() + 30
        while step == 2 and max(steps) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        waited[step] = max(steps)
        write(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "set_seed", noted_seed)
        patch.setattr(train_module, "write_checkpoint", slow_write)
        train(recipe(folder, "train.save_every=2", "train.max_steps=4", f"out={folder.parent / 'slow'}"))
    assert waited[2] >= 3
    train(recipe(folder, "train.save_every=2", "train.max_steps=4", f"out={folder.parent / 'plain'}"))
    slow, plain = (read_safetensors(folder.parent / name / STEP_2)[0] for name in ("slow", "plain"))
    assert same(slow, plain)  # what is written is the state of its step, not of a later one


STEP_2 = "checkpoints/step-2/model.safetensors"


def test_saving_by_minutes(folder, monkeypatch):
    saved, write = [], train_module.write_checkpoint
    monkeypatch.setattr(train_module, "write_checkpoint", lambda r, s, *a: (saved.append(s), write(r, s, *a)))
    train(recipe(folder, "train.save_minutes=1e-9"))
    assert saved == [2, 4, 6, 8]  # of four steps in an epoch; what a step reports is read in the next one
    train(recipe(folder, "train.save_minutes=60", f"out={folder.parent / 'other'}"))
    assert saved[4:] == [4, 8]


def test_a_full_disk_ends_the_run_and_keeps_what_was_there(folder, monkeypatch):
    """It ends at a step, not at the next checkpoint, and goes on when there is room."""
    words = ["data.batch_size=2", "train.save_every=6", "train.max_steps=36"]  # 18 steps an epoch
    r = recipe(folder, *words)
    steps, seed, write = [], train_module.set_seed, checkpoint_module.write_file

    def noted_seed(*counters):
        if counters[0] == Stream.STEP:
            steps.append(counters[2])
            time.sleep(0.2 if counters[2] > 12 else 0)  # time for the writer to fail
        seed(*counters)

    def full(file, content):
        if file.parent.name == ".step-12.tmp" and file.name == "state.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        write(file, content)

    whole = recipe(folder, *words, f"out={folder.parent / 'whole'}")
    train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "set_seed", noted_seed)
        patch.setattr(checkpoint_module, "write_file", full)
        with pytest.raises(
            OSError, match=r"step-12 was not written \(No space left on device; .* earlier ones are intact"
        ):
            train(r)
    assert max(steps) < 17
    assert saved_steps(r.run_folder()) == [6]
    train(r)
    assert same(weights(whole.run_folder()), weights(r.run_folder()))


# -- Processes


def test_a_dead_loader_process_ends_the_run_with_its_cause(tmp_path):
    with long_run(tmp_path, "data.cache=false", "data.workers=2") as process:
        os.kill(children(process.pid)[0], signal.SIGKILL)
        status, err = finish(process)
    assert status == 1 and "eit: a loader process died (DataLoader worker (pid" in err


# -- Ranks


def test_a_dead_rank_ends_the_others(tmp_path):
    (error := tmp_path / "stderr").touch()
    words = ["train", "digits", *LONG, "data.batch_size=32"]
    ranks = start_ranks(words, [tmp_path] * 2, [(Path(os.devnull), error)] * 2)
    try:
        wait_for(lambda: "epoch 2" in error.read_text() or not ranks[0].is_alive())
        ranks[1].kill()
    finally:
        statuses = wait_for_all(ranks, 60)
    assert statuses == [1, -signal.SIGKILL], error.read_text()
    assert error.read_text().splitlines()[-1] == ("eit: another process of this run ended; its own error line says why")


@pytest.mark.slow
def test_torchrun_says_which_rank_died(tmp_path):
    with long_run(tmp_path, "data.batch_size=32", ranks=2) as process:
        os.kill(children(process.pid)[1], signal.SIGKILL)
        err = process.communicate(timeout=60)[1]
    assert process.returncode not in (0, None) and "Signal 9 (SIGKILL) received by PID" in err


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank_and_the_weights_are_the_same(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    words = ["train", "digits", *LONG, *FIVE]
    assert run_eit(*words, cwd=tmp_path / "whole", ranks=2, torchrun=True).returncode == 0
    with long_run(tmp_path / "broken", *FIVE, ranks=2, options=["--max-restarts=3"]) as process:
        ranks = [pid for pid in children(process.pid) if b"eit" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(ranks[1], signal.SIGKILL)
        err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert "continuing runs/digits from step" in err
    assert same(*(weights(tmp_path / name / "runs" / "digits") for name in ("whole", "broken")))


def test_a_run_goes_on_with_another_number_of_ranks_in_the_same_order(folder, tmp_path, monkeypatch):
    """With the same global batch: what differs is rounding alone."""
    words = [*DETERMINISTIC, "train.save_every=1"]
    whole, moved = (
        recipe(folder, *words, "data.batch_size=8", f"out={tmp_path / name}") for name in ("whole", "moved")
    )
    train(whole)
    train_until_killed(moved, 3, monkeypatch)
    two = ["data.batch_size=4", f"data.root={folder}", f"out={tmp_path / 'moved'}"]
    done = run_eit("train", "cifar10", *TINY, *words, *two, ranks=2)
    assert done.returncode == 0 and "from step 3" in done.stderr, done.stderr
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "moved")[name], atol=2e-4, rtol=0)
    train_until_killed(recipe(folder, f"out={tmp_path / 'third'}", "train.save_every=1"), 3, monkeypatch)
    with pytest.raises(eit.UserError, match="another global_batch: 8, now 4"):
        train(recipe(folder, "data.batch_size=4", f"out={tmp_path / 'third'}"))


def two_machines(tmp_path, *overrides, prepare=None):
    """Exit status and stderr of the two ranks of a run, each in a folder of its own with data/ in it."""
    words = ["train", "cifar10", *TINY, "data.root=data", "data.batch_size=4", *overrides]
    folders, errors = ([tmp_path / f"{name}{rank}" for rank in range(2)] for name in ("machine", "stderr"))
    for file in errors:
        file.touch()
    processes = start_ranks(words, folders, [(Path(os.devnull), file) for file in errors], prepare)
    return wait_for_all(processes, 60), [file.read_text() for file in errors]


def test_ranks_that_see_different_data_refuse_at_the_start(tmp_path):
    """The same data.root on two machines, one of which lacks an image."""
    for rank in range(2):
        save_digits(tmp_path / f"machine{rank}" / "data", train=12 - rank)
    status, errors = two_machines(tmp_path)
    assert status == [2, 2], errors
    for error in errors:
        assert error.count("\n") == 1 and "the ranks see different data at data: names or labels differ" in error
    assert not list(tmp_path.rglob("log.jsonl"))


def seed_by_rank():
    sys.argv.append(f"seed={os.environ['RANK']}")


def test_ranks_with_another_recipe_refuse_at_the_start(tmp_path):
    for rank in range(2):
        save_digits(tmp_path / f"machine{rank}" / "data")
    status, errors = two_machines(tmp_path, prepare=seed_by_rank)
    assert status == [2, 2] and errors[1] == "", errors
    assert errors[0].startswith("eit: the ranks do not agree: seed is 0 on rank 0, 1 on rank 1; start all with one")
    assert not list(tmp_path.rglob("recipe.yaml"))


SIZES = dict(kernel_size=3, stride=1, pool_size=4, embed_dim=16, depth=2, num_heads=2)


def test_ranks_with_other_weights_of_one_name_refuse_at_the_start(tmp_path):
    for rank in range(2):
        save_digits(tmp_path / f"machine{rank}" / "data")
        model = eit.create_model("eit_mini", num_classes=3, img_size=16, **SIZES)
        torch.save({k: v + rank for k, v in model.state_dict().items()}, tmp_path / f"machine{rank}" / "w.pth")
    status, errors = two_machines(tmp_path, "model.pretrained=w.pth")
    assert status == [2, 2] and errors[1] == "", errors
    assert errors[0].startswith("eit: the ranks do not agree: the content of model.pretrained is ")
    assert not list(tmp_path.rglob("recipe.yaml"))


def contents_are_not_compared():
    Images.content_digest = lambda _: ""


@pytest.mark.parametrize(
    "prepare, says",
    [
        (None, "the ranks do not agree: training data (sizes and a sample of the content) is"),
        (contents_are_not_compared, "3 of 36 training images are unreadable"),
    ],
)
def test_images_that_one_rank_alone_cannot_read_stop_both(tmp_path, prepare, says):
    """The same names and labels on two machines; on one of them three files are damaged."""
    for rank in range(2):
        folder = save_digits(tmp_path / f"machine{rank}" / "data")
    for name in ("000.png", "001.png", "002.png"):
        (folder / "train" / "digit1" / name).write_bytes(b"nothing")
    status, errors = two_machines(tmp_path, prepare=prepare)
    assert status == [2, 2] and says in errors[0], errors


def test_an_environment_that_describes_half_a_group_is_one_line(tmp_path):
    done = run_eit("train", "digits", cwd=tmp_path, env=dict(RANK="0", WORLD_SIZE="2"))
    assert done.returncode == 2
    assert done.stderr == (
        "eit: RANK is set, as torchrun does, but MASTER_ADDR, MASTER_PORT not: set it, or unset RANK\n"
    )


def nan_on_rank_1():
    make = train_module.make_criterion

    def broken(*arguments):
        criterion, calls = make(*arguments), []

        def loss(logits, target):
            calls.append(0)
            return criterion(logits, target) * (float("nan") if len(calls) == 6 and os.environ["RANK"] == "1" else 1)

        return loss

    train_module.make_criterion = broken


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(tmp_path):
    for rank in range(2):
        save_digits(tmp_path / f"machine{rank}" / "data")
    status, errors = two_machines(tmp_path, "train.save_every=1", "out=run", prepare=nan_on_rank_1)
    assert status == [1, 1], errors
    assert "eit: the loss is nan in epoch 2, step 5, on images" in errors[0] and "Traceback" not in "".join(errors)
    assert errors[1] == ""  # said once
    run = tmp_path / "machine0" / "run"
    assert len((run / "not-finite-5.txt").read_text().splitlines()) == 8  # of both ranks
    folder, _ = newest_checkpoint(run)
    assert folder.name == "step-5" and all(v.isfinite().all() for v in load_checkpoint(folder)[0].values())


def test_a_stream_is_not_continued_on_another_number_of_ranks(folder, tmp_path, monkeypatch):
    """The order of shards that come in turn depends on it."""
    require(find_spec("webdataset") is not None, "webdataset is not installed")
    train_images, val_images = open_data(Data(root=str(folder)))
    write_shards(train_images, val_images, tmp_path / "shards", 2, 2)
    wds = [f"data.root={tmp_path / 'shards'}", "data.dataset=wds/digits", f"out={tmp_path / 'run'}"]
    train_until_killed(recipe(folder, *wds, "data.batch_size=8", "train.save_every=1"), 3, monkeypatch)
    with pytest.raises(eit.UserError, match="another data.batch_size: 8, now 4; set data.batch_size=8"):
        train(recipe(folder, *wds, "data.batch_size=4", "train.accumulate=2"))
    done = run_eit("train", "cifar10", *TINY, *wds, "data.batch_size=4", "train.accumulate=1", ranks=2)
    assert done.returncode != 0 and "was trained with another data.batch_size: 8, now 4" in done.stderr
    words = ["data.batch_size=8", "train.accumulate=2"]
    train_until_killed(recipe(folder, *wds, *words, "train.save_every=1", f"out={tmp_path / 'two'}"), 1, monkeypatch)
    wds[-1] = f"out={tmp_path / 'two'}"
    done = run_eit("train", "cifar10", *TINY, *wds, "data.batch_size=8", "train.accumulate=1", ranks=2)
    assert done.returncode != 0 and "was trained with another number of processes: 1, now 2" in done.stderr


# -- Two nodes


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes():
    """Two network namespaces joined by a cable: [(namespace, address, interface)]."""
    require(os.geteuid() == 0 and shutil.which("ip") is not None, "iproute2 and root are needed for two nodes")
    ends = [(f"eit-node{i}-{os.getpid()}", f"10.77.0.{i + 1}", f"eit{i}") for i in (0, 1)]
    try:
        for name, *_ in ends:
            ip("netns", "add", name)
        ip("link", "add", "eit0", "netns", ends[0][0], "type", "veth", "peer", "name", "eit1", "netns", ends[1][0])
        for name, address, interface in ends:
            for words in (["addr", "add", f"{address}/24", "dev", interface], ["link", "set", interface, "up"]):
                ip("-n", name, *words)
            ip("-n", name, "link", "set", "lo", "up")
        yield ends
    finally:
        for name, *_ in ends:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_nodes_survive_a_cut_link(nodes, tmp_path):
    """2 x 2 processes with addresses of their own; the link is cut in the middle of training and restored."""
    words = ["train", "digits", "train.epochs=4", "train.warmup_epochs=1", "data.batch_size=16", "train.save_every=5"]

    def start(folder, cut):
        folder.mkdir()
        processes = []
        for rank, (name, _, interface) in enumerate(nodes):
            join = ["--nnodes=2", "--nproc-per-node=2", f"--node-rank={rank}", f"--master-addr={nodes[0][1]}"]
            command = [sys.executable, "-m", "torch.distributed.run", *join, "--master-port=12355", "-m", "eit", *words]
            env = os.environ | dict(GLOO_SOCKET_IFNAME=interface, OMP_NUM_THREADS="1")
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            inside = ["ip", "netns", "exec", name, *command]
            processes.append(subprocess.Popen(inside, cwd=folder, env=env, stderr=out, text=True))
        lines = []
        for line in processes[0].stderr:
            lines.append(line)
            if cut and line.startswith("epoch 2"):
                ip("-n", nodes[1][0], "link", "set", "eit1", "down")
                reached = max(saved_steps(folder / "runs" / "digits"))
                time.sleep(6)
                assert max(saved_steps(folder / "runs" / "digits")) <= reached + 5  # nothing moves
                assert all(p.poll() is None for p in processes)
                ip("-n", nodes[1][0], "link", "set", "eit1", "up")
        try:
            assert [p.wait(120) for p in processes] == [0, 0], "".join(lines)
        finally:
            for process in processes:
                for pid in (*children(process.pid), process.pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        return weights(folder / "runs" / "digits")

    assert same(start(tmp_path / "whole", cut=False), start(tmp_path / "cut", cut=True))


# -- Long runs


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    soak(tmp_path, 20, 10, ["data.cache=false", "data.workers=1"])


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_epochs_hold_on_to_nothing(tmp_path):
    print(soak(tmp_path, 2000, 50))


SOAK = """
import json, os, sys, time
from eit.training.run_folder import RunFolder
from eit.config import load_recipe
from eit.training.trainer import train
show, seen = RunFolder.show_epoch, {}
def open_files():
    time.sleep(0.02)
    files = [os.path.realpath(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd')]
    return [f for f in files if not f.endswith('.ttf')]  # matplotlib's fonts, which it keeps open
def note(name):
    pages = int(open('/proc/self/statm').read().split()[1])
    files = min((open_files() for _ in range(20)), key=len)  # a checkpoint may be being written at the moment
    children = open(f'/proc/self/task/{os.getpid()}/children').read().split()
    seen[name] = dict(memory=pages * os.sysconf('SC_PAGE_SIZE'), files=len(files), children=len(children))
def watched(self, line, classes):
    show(self, line, classes)
    if line['epoch'] + 1 in (int(sys.argv[1]), int(sys.argv[2])):
        note(line['epoch'] + 1)
RunFolder.show_epoch = watched
note('start')
train(load_recipe('digits', sys.argv[3:]))
for _ in range(100):  # the thread that feeds a loader process closes its pipe a moment after that process is gone
    note('end')
    if seen['end']['files'] == seen['start']['files']:
        break
    time.sleep(0.1)
print(json.dumps(seen))
"""


def soak(tmp_path, epochs, early, more=()):
    """Memory, open files and child processes of a run, early and at its end."""
    small = ["model.embed_dim=16", "model.depth=1", "data.batch_size=479", "train.warmup_epochs=1", *more]
    words = [sys.executable, "-c", SOAK, str(early), str(epochs), *small]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = [*words, f"train.epochs={epochs}", f"out={tmp_path / 'run'}"]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=7000, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    first, last, start, end = seen[str(early)], seen[str(epochs)], seen["start"], seen["end"]
    assert last["memory"] <= 1.05 * first["memory"], seen
    assert last["files"] == first["files"] and end["files"] == start["files"], seen
    assert last["children"] == first["children"] and end["children"] == start["children"] == 0, seen
    return seen
