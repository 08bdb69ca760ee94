"""Check that the package is correct on this device: each check compares it with the CPU in float64, or with itself."""

import copy
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import eit
import eit.training.trainer
from benchmarks.gpu.bench import small_words
from benchmarks.gpu.data import random_images
from benchmarks.gpu.record import Item, Session
from eit import distributed
from eit.config import Data, Recipe, load_recipe
from eit.data.datasets import open_data
from eit.data.loaders import evaluation_loader
from eit.inference.evaluate import evaluate
from eit.models import ops
from eit.precision import Precision, arithmetic, autocast, float32_products
from eit.randomness import Stream
from eit.training.checkpoint import load_checkpoint, newest_checkpoint
from eit.weights.formats import read_safetensors

MODELS = [("eit", name) for name in ("eit_mini", "eit_tiny", "eit_base", "eit_large")]
MODELS += [("lsra", "eit_mini"), ("vit", "eit_mini")]
LIMITS: dict[Precision, float] = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 2e-2}  # limits of the relative error
SMALL = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, patch_size=4, num_classes=10)
Gradients = dict[str, Tensor]


def run(session: Session) -> None:
    for family, name in MODELS:
        session.run(f"accuracy of {family}/{name}", partial(accuracy, session, family, name), 8)
    session.run("heads with padded weights", partial(padded_heads, session), 4)
    session.run("evaluation counts as the CPU does", partial(evaluation, session), 4)
    for precision, words in RESUMED.items():
        session.run(f"stopped and continued, {precision}", partial(resumed, session, precision, words, True), 8)
    session.run("stopped and continued, not deterministic", partial(resumed, session, "bf16", [], False), 8)
    session.run("a NaN changes no weight", partial(nan_guard, session), 6)
    session.run("distillation", partial(distillation, session), 4)
    session.run("waits in a step", partial(waits, session), 4)
    session.run("a group of one, DDP and torch.compile", partial(group_of_one, session), 20)
    session.run("cost of train.deterministic", partial(cost_of_determinism, session), 12)
    session.run("compiled as eager", partial(compiled, session), 15)
    session.run("stopped and continued, compiled", partial(resumed, session, "bf16", COMPILED, True), 25)
    session.run("tests marked gpu", partial(marked_tests, session), 15)


# -- The model --------------------------------------------------------------------------------------------------------


def spread_out(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give `model` values with which every part matters; at initial values the logits of two images hardly differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1:
            drawn = 0.1 * drawn + (1 if name.endswith("weight") else 0)
        elif parameter.shape[:2] == (1, 1) or name == "pos_embed":
            drawn *= 0.5
        else:
            drawn /= parameter[0].numel() ** 0.5
        parameter.data.copy_(drawn)
    return model


class ChosenPool(nn.Module):
    """A max-pool with given places, because rounding decides which of two nearly equal pixels is larger."""

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).gather(2, self.places.flatten(2)).view(self.places.shape)


def accuracy(session: Session, family: str, name: str) -> Item:
    """Compare logits and all gradients with float64 on the CPU, in each precision."""
    small = dict(SMALL, embed_dim=40, depth=2, num_heads=4) if session.dry else {}
    reference = spread_out(eit.create_model(name, family=family, **small)).double()
    size = reference.img_size[0]
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.randn(reference.num_classes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows, ok = [], True
    for precision, limit in LIMITS.items():
        if precision == "tf32" and session.dry:
            continue
        model = copy.deepcopy(reference).float().to(session.device).to(memory_format=torch.channels_last)
        convolved: list[Tensor] = []
        model.patch_embed.proj.register_forward_hook(lambda _, __, y, seen=convolved: seen.append(y.detach()))
        with float32_products(precision):
            with autocast(session.device, precision):
                logits = model(x.float().to(session.device)).float()
            (logits * weights.float().to(session.device)).sum().backward()
        twin = copy.deepcopy(reference)
        if hasattr(twin.patch_embed, "pool"):
            side = twin.patch_embed.pool_size
            places = F.max_pool2d(convolved[0].float(), side, side, return_indices=True)[1]
            twin.patch_embed.pool = ChosenPool(places.cpu())
        expected = twin(x)
        (expected * weights).sum().backward()
        errors = {
            n: relative(p.grad, q.grad) for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True)
        }
        worst = max(errors, key=errors.__getitem__)
        row = dict(
            precision=precision, limit=limit, logits=relative(logits, expected), gradient=errors[worst], worst=worst
        )
        row["median_gradient"] = sorted(errors.values())[len(errors) // 2]
        ok = ok and row["logits"] < limit and errors[worst] < limit
        rows.append(row)
    return dict(ok=ok, rows=rows)


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference / norm of the expected value. NaN never passes; an expected 0 must be exactly 0.

    LSRA's last convolution has no gradient: the head reads the class token, which bypasses it unchanged.
    """
    assert found is not None and expected is not None
    if not expected.any():
        return float("inf") if found.any() else 0.0
    error = (found.detach().double().cpu() - expected.detach()).norm() / expected.detach().norm()
    return float(error) if error.isfinite() else float("inf")


def gradients_of(model: nn.Module, call: Any, x: Tensor) -> tuple[Tensor, Gradients]:
    logits = call(x)
    logits.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


def largest_difference(one: tuple[Tensor, Gradients], other: tuple[Tensor, Gradients]) -> float:
    """Largest relative difference of logits and gradients."""
    pairs = [(one[0], other[0]), *((one[1][name], other[1][name]) for name in one[1])]
    return max(relative(a, b.double().cpu()) for a, b in pairs)


def padded_heads(session: Session) -> Item:
    """Compare heads padded to a multiple of 8 channels (zeros in the weights) with unpadded heads, in float32."""
    small = dict(SMALL, embed_dim=40, depth=2, num_heads=4) if session.dry else {}
    model: Any = spread_out(eit.create_model("eit_mini", **small)).float().to(session.device)
    size = model.img_size[0]
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1)).to(session.device)
    with float32_products("fp32"):
        with patch.object(ops, "PAD_HEADS_ON", set()):
            plain = gradients_of(model, model, x)
        with patch.object(ops, "PAD_HEADS_ON", {session.device.type}):
            padded = gradients_of(model, model, x)
            model.eval()
            with torch.no_grad():
                kept = relative(model(x), padded[0].double().cpu())
    difference = largest_difference(padded, plain)
    return dict(ok=difference < 1e-5 and kept < 1e-5, difference=difference, in_evaluation=kept)


def compiled(session: Session) -> Item:
    """Compare torch.compile with eager, forward and backward, in float32."""
    backend = "aot_eager" if session.dry else "inductor"  # Inductor on the CPU needs a compiler, and is slow
    model: Any = (
        spread_out(eit.create_model("eit_mini", **dict(SMALL, embed_dim=80, depth=2))).float().to(session.device)
    )
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(session.device)
    x = x.contiguous(memory_format=torch.channels_last)
    with float32_products("fp32"):
        eager = gradients_of(model, model, x)
        difference = largest_difference(
            gradients_of(model, torch.compile(model, dynamic=False, backend=backend), x), eager
        )
    return dict(ok=difference < 1e-4, difference=difference)


# -- Training ---------------------------------------------------------------------------------------------------------

EPOCHS, STOPPED_AT = 2, 30  # of 22 steps each
RESUMED: dict[str, list[str]] = {
    "fp32": [],
    "bf16": [],
    "fp16": ["optim.clip_grad=1", "train.ema_decay=0.9", "train.accumulate=2", "data.batch_size=32"],
}
COMPILED = ["train.compile=default", "model.depth=1"]


class Killed(BaseException):
    pass


def digits(session: Session, folder: str | Path, *words: str) -> Recipe:
    told = [f"out={folder}", f"train.device={session.device.type}", f"train.epochs={EPOCHS}", "train.warmup_epochs=1"]
    told += ["train.max_steps=32"] if session.dry else []
    return load_recipe("digits", [*told, *words])


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Training is killed at the start of a step."""
    set_seed = eit.training.trainer.set_seed

    def die(stream: Stream, *counters: int) -> None:
        if stream is Stream.STEP and counters[1] == step:
            raise Killed
        set_seed(stream, *counters)

    with patch.object(eit.training.trainer, "set_seed", die):
        yield


def final_weights(recipe: Recipe) -> dict[str, Tensor]:
    return read_safetensors(recipe.run_folder() / "final.safetensors")[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def resumed(session: Session, precision: str, words: list[str], deterministic: bool) -> Item:
    """Compare a run that is killed in its second epoch and resumed with an undisturbed run."""
    if session.dry and (words or precision != "fp32"):
        return dict(skipped="as fp32")
    words = [*words, f"train.precision={precision}", f"train.deterministic={str(deterministic).lower()}"]
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = (digits(session, f"{folder}/{name}", *words) for name in ("whole", "broken"))
        eit.training.trainer.train(whole)
        with killed_at(STOPPED_AT), suppress(Killed):
            eit.training.trainer.train(broken)
        eit.training.trainer.train(broken)
        one, other = final_weights(whole), final_weights(broken)
        largest = max(float((one[name] - other[name]).abs().max()) for name in one)
    return dict(ok=same(one, other) if deterministic else None, identical=same(one, other), largest_difference=largest)


def cost_of_determinism(session: Session) -> Item:
    """Images/s of the CIFAR-10 recipe in bf16 with and without train.deterministic, in turns, on random pixels."""
    images = random_images(64 if session.dry else 8192)
    rates: dict[str, list[float]] = {"false": [], "true": []}
    for deterministic in ["false", "true"] * (1 if session.dry else 2):
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.object(eit.training.trainer, "open_data", lambda _: (images, images)),
        ):
            words = [
                *small_words(session),
                f"train.deterministic={deterministic}",
                "train.epochs=2",
                f"out={folder}/run",
            ]
            words += ["train.warmup_epochs=1", "data.root=random", *(["data.batch_size=16"] if session.dry else [])]
            eit.training.trainer.train(load_recipe("cifar10", words))
            last = Path(folder, "run", "log.jsonl").read_text().splitlines()[-1]
        rates[deterministic].append(json.loads(last)["images_per_s"])
    off, on = (max(rates[key]) for key in ("false", "true"))
    return dict(images_per_s=off, deterministic=on, ratio=on / off)


def nan_guard(session: Session) -> Item:
    """A NaN loss ends the run and leaves the weights unchanged, although one more step was launched."""
    built: list[nn.Module] = []
    build, make = eit.training.trainer.build_model, eit.training.trainer.make_criterion

    def broken(*arguments: Any) -> Callable[[Tensor, Tensor], Tensor]:
        criterion, calls = make(*arguments), []

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            calls.append(0)
            return criterion(logits, target) * (float("nan") if len(calls) == 6 else 1)

        return loss

    with tempfile.TemporaryDirectory() as folder:
        words = ["train.deterministic=true", "train.save_every=1"]
        sound = digits(session, f"{folder}/sound", *words, "train.max_steps=5")
        eit.training.trainer.train(sound)
        bad = digits(session, f"{folder}/bad", *words)
        said = ""
        with (
            patch.object(
                eit.training.trainer, "build_model", lambda *a, **k: (built.append(build(*a, **k)), built[-1])[1]
            ),
            patch.object(eit.training.trainer, "make_criterion", broken),
        ):
            try:
                eit.training.trainer.train(bad)
            except FloatingPointError as error:
                said = str(error)
        weights = {name: tensor.cpu() for name, tensor in built[-1].state_dict().items()}
        newest, _ = newest_checkpoint(bad.run_folder())
        saved = newest is not None and all(v.isfinite().all() for v in load_checkpoint(newest)[0].values())
        kept = same(weights, final_weights(sound))
    return dict(ok="step 5" in said and kept and saved, weights_unchanged=kept, said=said.partition(",")[0])


def distillation(session: Session) -> Item:
    with tempfile.TemporaryDirectory() as folder:
        done = eit.training.trainer.train(digits(session, folder, "loss.teacher=digits", "train.max_steps=30"))
    return dict(ok=done["last_top1"] > 5, top1=done["last_top1"])


def waits(session: Session) -> Item:
    """How often torch reports that a step waits for the GPU. torch does not count the one read of the previous step."""
    if session.dry:
        return dict(skipped="torch reports waits on CUDA alone; benchmarks/launches.py counts them without a GPU")
    first, last = 10, 20
    set_seed = eit.training.trainer.set_seed

    def watch(stream: Stream, *counters: int) -> None:
        if stream is Stream.STEP and counters[1] in (first, last):
            torch.cuda.set_sync_debug_mode("warn" if counters[1] == first else "default")
        set_seed(stream, *counters)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with patch.object(eit.training.trainer, "set_seed", watch):
            eit.training.trainer.train(
                digits(session, folder, "augment.mixup=0.8", "train.max_steps=22", "optim.clip_grad=1")
            )
    torch.cuda.set_sync_debug_mode("default")
    where = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    return dict(ok=not where, in_steps=last - first, waits=len(where), where=sorted(set(where))[:8])


def evaluation(session: Session) -> Item:
    """The included digits weights on the held-out digits."""
    model = eit.load("digits")
    _, val = open_data(Data(root="sklearn:digits"))
    cpu = evaluate(model, evaluation_loader(val, model.card.view, 64, 0, torch.device("cpu")))
    model = model.to(session.device)
    found = evaluate(model, evaluation_loader(val, model.card.view, 64, 0, session.device))
    apart = abs(found.loss / cpu.loss - 1)
    return dict(ok=found.confusion == cpu.confusion and apart < 1e-5, top1=found.top1, loss_apart=apart)


def group_of_one(session: Session) -> Item:
    """Start NCCL and gloo groups as under torchrun; run a compiled DDP step, a sum, and the exchange of an object."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with patch.dict(os.environ, torchrun):
        device = distributed.start(session.device.type)
        try:
            backend = dist.get_backend()
            small: Any = eit.create_model("eit_mini", **dict(SMALL, embed_dim=80, depth=1))
            model = spread_out(small).float().to(device).to(memory_format=torch.channels_last)
            ids = [device.index] if device.type == "cuda" else None
            network: Any = DistributedDataParallel(model, device_ids=ids)
            if not session.dry:
                network = torch.compile(network, dynamic=False)
            x = torch.zeros(8, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
            with arithmetic(device, "bf16") if device.type == "cuda" else nullcontext():
                network(x).float().square().sum().backward()
            numbers = torch.ones(3, device=device)
            dist.all_reduce(numbers)
            told = [None]
            dist.all_gather_object(told, "word", group=distributed._waiting)
            finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        finally:
            distributed.stop()
    ok = finite and numbers.tolist() == [1, 1, 1] and told == ["word"]
    return dict(ok=ok, backend=backend)


def marked_tests(session: Session) -> Item:
    """Run the tests of the suite that need a GPU."""
    if session.dry or importlib.util.find_spec("pytest") is None:
        return dict(skipped="they need a GPU" if session.dry else "pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(session.left, 10))
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    return dict(ok=done.returncode in (0, 5), said=last)  # 5: no test is marked
