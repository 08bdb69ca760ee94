"""Kill -9 training at random moments and continue it: `python tests/helpers/chaos.py N [--seed SEED] [--fault FAULT]`.

Each of N trials takes a variant of the digits recipe (1 or 2 processes, 0 or 2 workers, fp32 or bf16, accumulation,
EMA, dropout), kills all its processes once to three times, at a random step, while a checkpoint is being written or in
evaluation, continues it, and compares with the run that nobody disturbed: weights, moving average, optimizer and log
must be identical, to the bit. A line a kill, and a summary; status 1 where a trial differs.

A fault is put into the code on purpose, to see that the comparison can fail. With --small, the model has 16 channels.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from eit.config import load_recipe
from eit.data import loaders
from eit.randomness import Stream
from eit.training import trainer as train_module
from eit.training.checkpoint import load_checkpoint
from eit.weights.formats import read_safetensors

EPOCHS, STEPS = 3, 22
SHORT = [f"train.epochs={EPOCHS}", "train.warmup_epochs=1", "train.save_every=5", "out=run"]
SHORT += ["train.ema_decay=0.9", "model.attn_drop_rate=0.1", "model.drop_path_rate=0.1"]
SMALL = ["model.embed_dim=16", "model.depth=2", "model.num_heads=2"]
# A global batch of 64 in each, or as near as three can share
VARIANTS = {
    "1 process, 2 workers": (1, ["data.batch_size=64", "data.cache=false", "data.workers=2"]),
    "2 processes, 2 workers, bf16, accumulate 2": (
        2,
        ["data.batch_size=16", "train.accumulate=2", "train.precision=bf16", "data.cache=false", "data.workers=2"],
    ),
    "1 process, bf16, accumulate 2": (1, ["data.batch_size=32", "train.accumulate=2", "train.precision=bf16"]),
    "2 processes": (2, ["data.batch_size=32", "data.workers=0"]),
    "1 process": (1, ["data.batch_size=64"]),
    "3 processes": (3, ["data.batch_size=21", "data.workers=0"]),
}


class Watch:
    """Where rank 0 is, in memory shared with the one that kills: step, saving, evaluating."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def write(self, place: int, value: int) -> None:
        self.memory[4 * place : 4 * place + 4] = struct.pack("i", value)

    def read(self) -> tuple[int, bool, bool]:
        step, saving, evaluating, _ = struct.unpack("4i", self.memory[:])
        return step, bool(saving), bool(evaluating)

    def install(self) -> None:
        """Make the training loop of this process say where it is. Nothing of what it does changes."""
        watch, set_seed = self, train_module.set_seed
        save, evaluate = train_module.save_checkpoint, train_module.evaluate

        def watched_seed(*counters):
            if counters[0] == Stream.STEP:
                watch.write(0, counters[2])
            set_seed(*counters)

        def during(place, call):
            def watched(*arguments, **options):
                watch.write(place, 1)
                try:
                    return call(*arguments, **options)
                finally:
                    watch.write(place, 0)

            return watched

        train_module.set_seed = watched_seed
        train_module.save_checkpoint = during(1, save)
        train_module.evaluate = during(2, evaluate)


def no_sample_seed() -> None:
    """Augmentation draws from whatever state the generators are in."""
    assert loaders.own_randomness and loaders.set_cpu_seed, "a name that is new there would change nothing"
    loaders.own_randomness = nullcontext
    loaders.set_cpu_seed = lambda *counters: None


def no_step_seed() -> None:
    """So does dropout."""
    set_seed = train_module.set_seed
    train_module.set_seed = lambda *counters: counters[0] == Stream.STEP or set_seed(*counters)


def last_step_again() -> None:
    """A continued run takes the last step once more."""
    resume = train_module.Trainer.resume

    def resume_before(trainer):
        resume(trainer)
        trainer.progress.step -= bool(trainer.progress.step % STEPS)

    train_module.Trainer.resume = resume_before


FAULTS = {"no-sample-seed": no_sample_seed, "no-step-seed": no_step_seed, "last-step-again": last_step_again}


def start(folder: Path, variant: str, watch: Watch, fault: str | None) -> list[int]:
    """Fork the ranks of a run in `folder`: torch is imported once, here."""
    world, overrides = VARIANTS[variant]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 1
        try:
            os.setpgid(0, 0)  # so that its loader processes die with it
            os.chdir(folder)
            errors = os.open(f"errors-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(errors, 2)
            torch.set_num_threads(1)
            if world > 1:
                os.environ |= dict(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
                )
                os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if fault:
                FAULTS[fault]()
            if rank == 0:
                watch.install()
            train_module.train(load_recipe("digits", [*SHORT, *overrides]))
            status = 0
        finally:
            os._exit(status)
    return pids


def wait(pids: list[int]) -> bool:
    return all([os.waitpid(pid, 0)[1] == 0 for pid in pids])


def kill(pids: list[int]) -> None:
    for pid in pids:
        for target in (-pid, pid):
            with suppress(ProcessLookupError):
                os.kill(target, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def kill_at(pids: list[int], watch: Watch, moment: str, step: int, delay: float) -> tuple[int, bool, bool] | None:
    """Kill all at the moment; where they were, or None where the run ended before, as it should.

    Raises:
        ChildProcessError: it ended with an error of its own.
    """
    while True:
        at, saving, evaluating = watch.read()
        if at >= step and (
            moment == "step" or (moment == "saving" and saving) or (moment == "evaluation" and evaluating)
        ):
            time.sleep(delay)
            where = watch.read()
            kill(pids)
            return where
        done, status = os.waitpid(pids[0], os.WNOHANG)
        if done:
            if not wait(pids[1:]) or status:
                raise ChildProcessError
            return None
        time.sleep(0.0005)


def identical(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs. In a process of its own: the one that forks must not compute."""
    reading, writing = os.pipe()
    if not os.fork():
        try:
            torch.set_num_threads(1)
            os.write(writing, json.dumps(_differences(a, b)).encode())
        except BaseException as error:
            os.write(writing, json.dumps([f"cannot be compared: {error!r}"]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as f:
        found = json.loads(f.read())
    os.wait()
    return found


def _differences(a: Path, b: Path) -> list[str]:
    found = []
    states = [load_checkpoint(run / "checkpoints" / f"step-{EPOCHS * STEPS}") for run in (a, b)]
    for name, one, other in zip(("weights", "moving average"), *(s[:2] for s in states), strict=True):
        if one.keys() != other.keys() or not all(torch.equal(one[k], other[k]) for k in one):
            found.append(name)
    one, other = (s[2]["optimizer"]["state"] for s in states)
    if one.keys() != other.keys() or not all(torch.equal(one[i][k], other[i][k]) for i in one for k in one[i]):
        found.append("optimizer")
    for file in ("best", "final"):
        one, other = (read_safetensors(run / f"{file}.safetensors")[0] for run in (a, b))
        if not all(torch.equal(one[k], other[k]) for k in one):
            found.append(file)
    logs = [[json.loads(line) | {"images_per_s": 0} for line in (run / "log.jsonl").open()] for run in (a, b)]
    return found + (["log"] if logs[0] != logs[1] or len(logs[0]) != EPOCHS else [])


def disturb(folder: Path, variant: str, draw: random.Random, fault: str | None) -> Iterator[tuple[int, bool, bool]]:
    """Start a run and kill it, one to three times; where it was."""
    kills, killed = draw.randint(1, 3), False
    while kills:
        kills -= 1
        # One in eight before the first step ends; the rest anywhere, a part of them in saving and in evaluation
        moment = draw.choice(["step", "step", "saving", "evaluation"])
        step = 0 if draw.random() < 0.125 else draw.randint(1, EPOCHS * STEPS - 2)
        if fault:  # a place where it shows: within the second epoch, when checkpoints have surely been written
            moment, step, kills = "step", STEPS + 14, 0
        watch = Watch()
        where = kill_at(start(folder, variant, watch, fault), watch, moment, step, draw.random() * 0.02)
        if where is not None:
            killed = True
            yield where
        elif not killed:  # the moment did not come; a run that was never disturbed shows nothing
            shutil.rmtree(folder / "run")
            kills = 1


def main(trials: int, seed: int, fault: str | None) -> int:
    home = Path(tempfile.mkdtemp(prefix="chaos-"))
    draw = random.Random(seed)
    whole: dict[str, Path] = {}
    count: Counter[str] = Counter()
    for trial in range(trials):
        variant = list(VARIANTS)[trial % len(VARIANTS)]
        if variant not in whole:
            whole[variant] = home / f"whole-{len(whole)}"
            whole[variant].mkdir()
            if not wait(start(whole[variant], variant, Watch(), fault)):
                sys.exit(f"{variant} does not train: see {whole[variant]}/errors-0")
        folder = home / f"trial-{trial}"
        folder.mkdir()
        try:
            for where in disturb(folder, variant, draw, fault):
                at, saving, evaluating = where
                count["kills"] += 1
                count["after"] += at > 0
                count["saving"] += saving
                count["evaluation"] += evaluating
                what = " while saving" * saving + " in evaluation" * evaluating
                print(f"trial {trial}  {variant}: killed in step {at}{what}", flush=True)
            if not wait(start(folder, variant, Watch(), fault)):
                raise ChildProcessError
        except ChildProcessError:
            print(f"trial {trial}  {variant}: DOES NOT CONTINUE, see {folder}/errors-0", flush=True)
            continue
        if different := identical(whole[variant] / "run", folder / "run"):
            print(f"trial {trial}  {variant}: DIFFERS in {', '.join(different)}, see {folder}", flush=True)
            continue
        count["same"] += 1
        shutil.rmtree(folder)
    print(
        f"{count['same']} of {trials} trials came back identical after {count['kills']} kills: "
        f"{count['after']} after the first step, {count['saving']} while saving, {count['evaluation']} in evaluation"
    )
    if count["same"] == trials:
        shutil.rmtree(home)
    return count["same"] != trials


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--small", action="store_true", help="train a model of 16 channels")
    words = parser.parse_args()
    SHORT += SMALL if words.small else []
    sys.exit(main(words.trials, words.seed, words.fault))
