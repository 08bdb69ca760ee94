"""Train EIT and ViT on CIFAR-10 with one recipe, both for the same number of epochs: as many as the time allows."""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import eit.training.trainer
from benchmarks.gpu.bench import small_words
from benchmarks.gpu.data import cifar10
from benchmarks.gpu.record import Item, Session, read
from eit.config import Recipe, load_recipe

FAMILIES = ("eit", "vit")
MOST, PROBE = 300, 120  # epochs; steps for measuring the speed
RESERVE = 1.25  # times the measured time: checkpoints, curves, slower phases
GOAL = 95.0  # percent, after 300 epochs


def run(session: Session) -> None:
    if session.data is None and not session.dry:
        session.items.append(dict(name="CIFAR-10", skipped="no --data: pack it with benchmarks/pack.py"))
        session.save()
        return
    (train, val), source = cifar10(session)
    mode = compile_mode(session)
    measured = {family: seconds_of_an_epoch(session, family, mode, train, val) for family in FAMILIES}
    each = sum(measured.values())
    epochs = 2 if session.dry else min(MOST, int(session.left / RESERVE / each))
    plan = dict(images=source, epochs=epochs, compile=mode, seconds_of_an_epoch=measured)
    session.items.append(dict(name="plan", **plan))
    session.save()
    if epochs < 2:
        session.items.append(dict(name="CIFAR-10", skipped=f"no two epochs fit in {session.left:.0f} s"))
        session.save()
        return
    for family in FAMILIES:
        session.run(f"{family} on CIFAR-10", lambda family=family: trained(session, family, epochs, mode, train, val))


def compile_mode(session: Session) -> str:
    """The mode that was faster in the part bench, if bench ran."""
    items = {item["name"]: item for item in read(session.folder).get("bench", {}).get("items", [])}
    eager = items.get("real loop at 32x32, batch 128", {}).get("images_per_s", 0)
    graphs = items.get("real loop with train.compile=reduce-overhead", {}).get("images_per_s", 0)
    return "reduce-overhead" if graphs > 1.05 * eager > 0 else "off"


def recipe(session: Session, family: str, folder: Path, mode: str, *words: str) -> Recipe:
    told = [*small_words(session), f"model.family={family}", f"out={folder / family}", f"name=cifar10-{family}"]
    told += ["data.root=packed", f"train.compile={mode}"]
    told += ["data.batch_size=16"] if session.dry else []
    return load_recipe("cifar10", [*told, *words])


def seconds_of_an_epoch(session: Session, family: str, mode: str, train: Any, val: Any) -> float:
    """Measured before training, because the length of the schedule depends on it."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 4 if session.dry else PROBE
        probe = recipe(session, family, Path(folder), mode, f"train.max_steps={steps}")
        with patch.object(eit.training.trainer, "open_data", lambda _: (train, val)):
            began = time.monotonic()
            done = eit.training.trainer.train(probe)
            took = time.monotonic() - began
        rate = json.loads((Path(folder) / family / "log.jsonl").read_text().splitlines()[-1])["images_per_s"]
    after = max(took - done["seconds"], 0)  # reading, evaluation, checkpoint: mostly once, but counted per epoch
    return len(train) / rate + min(after, 0.2 * len(train) / rate)


def trained(session: Session, family: str, epochs: int, mode: str, train: Any, val: Any) -> Item:
    warmup = min(10.0, epochs / 10)
    words = [f"train.epochs={epochs}", f"train.warmup_epochs={warmup:g}", "train.save_minutes=10"]
    with tempfile.TemporaryDirectory() as folder:
        chosen = recipe(session, family, Path(folder), mode, *words)
        with patch.object(eit.training.trainer, "open_data", lambda _: (train, val)):
            done = eit.training.trainer.train(chosen)
        run = chosen.run_folder()
        shutil.copy(run / "log.jsonl", session.folder / f"{family}.jsonl")
        shutil.copy(run / "final.safetensors", session.folder / f"{family}.safetensors")
        curve = [json.loads(line)["val_top1"] for line in (run / "log.jsonl").read_text().splitlines()]
    reached = None if epochs < MOST or family != "eit" else done["last_top1"] >= GOAL
    shown = {key: done[key] for key in ("last_top1", "best_top1", "best_epoch", "epochs", "params")}
    return dict(ok=reached, **shown, training_seconds=done["seconds"], curve=curve)
