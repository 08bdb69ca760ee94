"""Measure how fast this device is with the package's models, and how much each implementation choice gains.

Each group of arms is prepared, then measured in rounds. Every other round runs in reverse order; medians are shown. The
most important groups come first, until the time is used up.
"""

import gc
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import eit.training.trainer
from benchmarks.gpu.data import cifar10
from benchmarks.gpu.record import Item, Session
from eit.benchmark import bench, matmul_peak
from eit.benchmark.bench import Arm, Step, make_step, open_model, seconds_of, training_step
from eit.config import load_recipe
from eit.memory import is_measurable, peak_bytes
from eit.models import ops
from eit.models.registry import create_model
from eit.precision import Precision, resolve_precision

MODELS = ("eit_mini", "eit_tiny", "eit_base", "eit_large", "timm/deit_tiny_patch16_224", "timm/deit_small_patch16_224")
ROUNDS, SECONDS = 3, 0.15  # rounds, and seconds of each measurement
COMPILING = 40  # seconds per model
DRY = [("train", 128, "bf16", False), ("infer", 256, "fp32", False)]  # groups that a dry run measures
GOALS = dict(naive=2.5, peak=0.4, loop=0.8)
IMAGES = 1_281_167 * 300  # training images in 300 epochs of ImageNet


def run(session: Session) -> None:
    session.run("matrix multiply peak", partial(peaks, session))
    speeds = partial(speed, session)
    session.run("training, batch 128, bf16", partial(speeds, "train", 128, "bf16", variants=True), 20)
    rates(session)
    session.run("inference, batch 256, bf16", partial(speeds, "infer", 256, "bf16"), 15)
    session.run("attention kernels, bf16, forward and backward", partial(attention, session), 5)
    session.run("trace of five steps of eit_mini", partial(trace, session), 6)
    session.run("real loop with train.compile=reduce-overhead", partial(real_loop, session, 128, "reduce-overhead"), 30)
    session.run("whole step as a CUDA graph, fixed batch", partial(graphed, session, 128), 6)
    session.run("training, batch 128, tf32", partial(speeds, "train", 128, "tf32"), 15)
    session.run("training, batch 128, bf16, compiled", partial(speeds, "train", 128, "bf16", compiled=True), 40)
    session.run("training, batch 256, bf16", partial(speeds, "train", 256, "bf16"), 15)
    session.run("inference, batch 256, tf32", partial(speeds, "infer", 256, "tf32"), 12)
    session.run("training, batch 128, fp32", partial(speeds, "train", 128, "fp32"), 30)
    session.run("inference, batch 256, fp32", partial(speeds, "infer", 256, "fp32"), 15)
    session.run("inference, batch 256, bf16, compiled", partial(speeds, "infer", 256, "bf16", compiled=True), 30)


# -- Models at 224 ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """An arm, and the optimisation that is switched in it."""

    arm: Arm
    without: str = ""

    @contextmanager
    def chosen(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.without == "padded heads":
                stack.enter_context(patch.object(ops, "PAD_HEADS_ON", set()))
            if self.without == "strides of the stem":
                stack.enter_context(patch.object(ops, "FOLD_STRIDES_ON", {"cuda"}))
            yield


def peaks(session: Session) -> Item:
    """FLOP/s of torch's fastest matrix product, in each precision."""
    size = 256 if session.dry else None
    found = {p: _peak(session, p, size) for p in _precisions(session)}
    return {f"tflops_{precision}": rate / 1e12 for precision, rate in found.items()}


def _precisions(session: Session) -> list[Precision]:
    return ["fp32", "bf16"] if session.dry else ["bf16", "tf32", "fp32"]


def _peak(session: Session, precision: Precision, size: int | None) -> float:
    routes = matmul_peak.routes(precision, session.device, size)
    return max(matmul_peak.flops_per_second(product, session.device, precision, size) for product in routes.values())


def speed(
    session: Session, mode: str, batch: int, precision: Precision, variants: bool = False, compiled: bool = False
) -> Item:
    """Images/s of the models and of the naive form of ours; ratio to the naive form, share of peak, step memory."""
    if session.dry and (mode, batch, precision, compiled) not in DRY:
        return dict(skipped="as other items" if precision != "tf32" else "tf32 is of CUDA")
    resolve_precision(precision, session.device)
    of_dry = MODELS[4:5] if mode == "infer" else MODELS[:1]
    batch, models, size = (2, of_dry, 32) if session.dry else (batch, MODELS, None)
    runtime = "compile" if compiled else "eager"
    ways = []
    for name in models:
        ours = not name.startswith("timm/")
        if ours and not compiled:
            ways.append(Way(Arm(name, "eager", precision, mode, batch, naive=True)))
        ways.append(Way(Arm(name, runtime, precision, mode, batch)))
        if variants and name in ("eit_mini", "eit_base"):
            ways += [Way(ways[-1].arm, without) for without in ("padded heads", "strides of the stem")]
    own = {name: open_model(name, None if name.startswith("timm/") and session.dry else size) for name in models}
    steps, left_out = _prepare(session, ways, own)
    seconds = _in_turns(session, steps)
    top = _peak(session, precision, 256 if session.dry else None)
    rows = []
    for way, times in seconds.items():
        arm = way.arm
        naive = [other for other in seconds if other.arm.naive and other.arm.model == arm.model]
        ratios = [before / now for before, now in zip(seconds[naive[0]], times, strict=True)] if naive else []
        macs = bench.macs_of(arm, own[arm.model])
        row: dict[str, Any] = dict(model=arm.label, way=f"without {way.without}" if way.without else runtime)
        if way.without == "strides of the stem":
            row["way"] = "strides of the stem as channels"
        row |= dict(images_per_s=arm.batch / median(times), of_naive=median(ratios) if ratios else None)
        row |= dict(share_of_peak=2 * macs * arm.batch / median(times) / top, spread=max(times) / min(times))
        if mode == "train" and is_measurable(session.device) and not (session.dry or arm.naive or compiled):
            with way.chosen():
                row["mib"] = peak_bytes(steps[way], session.device) / 2**20
        if mode == "train" and not arm.naive and not session.dry:
            row["hours_of_300_epochs_on_8"] = IMAGES / (8 * row["images_per_s"]) / 3600
        rows.append(row)
    item: Item = dict(rows=rows, left_out=left_out, peak_tflops=top / 1e12)
    if mode == "train" and precision == "bf16" and batch == 128 and not compiled:
        plain = {row["model"]: row for row in rows if row["way"] == "eager"}
        item["ok"] = all(
            plain[name]["of_naive"] >= GOALS["naive"]
            for name in MODELS[:4]
            if name in plain and plain[name]["of_naive"]
        ) and all(plain[name]["share_of_peak"] >= GOALS["peak"] for name in MODELS[2:4] if name in plain)
    return item


def _prepare(session: Session, ways: Sequence[Way], own: dict[str, Any]) -> tuple[dict[Way, Step], list[str]]:
    """The step of each way, after warm-up. Ways that do not fit in memory or time are named."""
    steps: dict[Way, Step] = {}
    left_out = []
    for way in ways:
        if session.left < (COMPILING if way.arm.runtime == "compile" else 0):
            left_out.append(f"{way.arm.label}: no time left")
            continue
        try:
            with way.chosen():
                step = make_step(way.arm, own[way.arm.model], None, session.device)
                for _ in range(1 if session.dry else 3):
                    step()
                matmul_peak.synchronize(session.device)
        except torch.OutOfMemoryError:
            left_out.append(f"{way.arm.label}: out of memory")
            gc.collect()
            torch.cuda.empty_cache()
        else:
            steps[way] = step
    return steps, left_out


def _in_turns(session: Session, steps: dict[Way, Step]) -> dict[Way, list[float]]:
    """Seconds per step of each way, in each round."""
    seconds: dict[Way, list[float]] = {way: [] for way in steps}
    for turn in range(2 if session.dry else ROUNDS):
        for way in list(steps)[:: 1 if turn % 2 == 0 else -1]:
            with way.chosen():
                once = seconds_of(steps[way], 1, session.device)
                calls = 1 if session.dry else max(2, math.ceil(SECONDS / once))
                seconds[way].append(seconds_of(steps[way], calls, session.device))
    return seconds


# -- The loop of eit train --------------------------------------------------------------------------------------------


def rates(session: Session) -> None:
    for batch in (128, 512, 1024):
        session.run(f"real loop at 32x32, batch {batch}", partial(real_loop, session, batch, "off"), 8)


def small_words(session: Session) -> list[str]:
    """The CIFAR-10 recipe on this device; in a dry run, a small model."""
    words = [f"train.device={session.device.type}", "train.precision=bf16"]
    small = ["model.embed_dim=20", "model.depth=2", "model.num_heads=2", "train.precision=fp32"]
    return words + (small if session.dry else [])


def real_loop(session: Session, batch: int, compile_mode: str) -> Item:
    """Images/s of `eit train` itself, compared with a loop of steps over one batch that stays on the device."""
    if session.dry and (batch > 128 or compile_mode != "off"):
        return dict(skipped="as batch 128")
    batch = 16 if session.dry else batch
    (train, val), source = cifar10(session)
    epoch = len(train) // batch
    steps = 4 if session.dry else max(150, 2 * epoch if batch > 128 else epoch)
    words = [*small_words(session), f"data.batch_size={batch}", f"train.max_steps={steps}", "data.root=packed"]
    words += [f"train.epochs={-(-steps // epoch) + 1}", "train.warmup_epochs=1", f"train.compile={compile_mode}"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("cifar10", [*words, f"out={folder}/run"])
        fixed = fixed_batch(session, batch) if compile_mode == "off" else None
        with patch.object(eit.training.trainer, "open_data", lambda _: (train, val.evenly(1000))):
            eit.training.trainer.train(recipe)
        lines = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
    loop = max(json.loads(line)["images_per_s"] for line in lines)
    item: Item = dict(images_per_s=loop, batch=batch, compile=compile_mode, images=source)
    if fixed is not None:
        item |= dict(fixed_batch=fixed, ratio=loop / fixed, ok=None if session.dry else loop / fixed >= GOALS["loop"])
    return item


def fixed_batch(session: Session, batch: int) -> float:
    """Images/s of forward, loss, backward and optimizer over one batch."""
    step = _small_step(session, batch)
    for _ in range(3):
        step()
    calls = 2 if session.dry else max(20, math.ceil(0.5 / seconds_of(step, 5, session.device)))
    return batch / seconds_of(step, calls, session.device)


def _small_model(session: Session) -> Any:
    recipe = load_recipe("cifar10", small_words(session))
    model = create_model(recipe.model.name, num_classes=10, img_size=32, **recipe.model.arguments())
    return model.to(session.device).to(memory_format=torch.channels_last).train()


def _small_step(session: Session, batch: int) -> Step:
    model = _small_model(session)
    x, y = _small_batch(session, batch)
    return training_step(model, model, x, y, "fp32" if session.dry else "bf16")


def _small_batch(session: Session, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, 32, 32, device=session.device).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(10, (batch,), device=session.device)


def graphed(session: Session, batch: int) -> Item:
    """Images/s of a step recorded once and replayed: an upper bound for what removing launches can gain."""
    if session.dry:
        return dict(skipped="CUDA graphs are of CUDA")
    model = _small_model(session)
    x, y = _small_batch(session, batch)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=torch.tensor(1e-3, device=session.device), fused=True, capturable=True
    )

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return dict(images_per_s=batch / seconds_of(graph.replay, 200, session.device), eager=fixed_batch(session, batch))


# -- Kernels ----------------------------------------------------------------------------------------------------------


def attention(session: Session) -> Item:
    """Milliseconds of each backend for the head widths of the models, unpadded and padded to a multiple of 8."""
    if session.dry:
        return dict(skipped="its backends are of CUDA")
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    rows = []
    for heads, width in ((10, 5), (10, 8), (10, 16), (10, 20), (10, 24), (10, 32), (16, 32)):
        row: dict[str, Any] = dict(heads=heads, width=width)
        q, k, v = (
            torch.randn(128, heads, 362, width, device=session.device, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )

        def step(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            F.scaled_dot_product_attention(q, k, v).sum().backward()

        for backend in [None, *backends]:
            try:
                with ExitStack() as stack:
                    if backend is not None:
                        stack.enter_context(sdpa_kernel(backend))
                    step()
                    row[backend.name.lower() if backend else "torch's choice"] = 1e3 * seconds_of(
                        step, 5, session.device
                    )
            except RuntimeError:
                row[str(backend.name.lower() if backend else "torch's choice")] = None
        rows.append(row)
    return dict(rows=rows)


def trace(session: Session) -> Item:
    """A profiler trace to open in a browser (chrome://tracing, Perfetto), and the slowest operators."""
    from torch.profiler import ProfilerActivity, profile

    batch, size, precision = (2, 32, "fp32") if session.dry else (128, None, "bf16")
    arm = Arm("eit_mini", "eager", precision, "train", batch)
    step = make_step(arm, open_model("eit_mini", size), None, session.device)
    for _ in range(3):
        step()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if session.device.type == "cuda" else [])
    with profile(activities=kinds) as found:
        for _ in range(5):
            step()
        matmul_peak.synchronize(session.device)
    found.export_chrome_trace(str(session.folder / "trace.json.gz"))
    on_device = session.device.type == "cuda"
    key: Callable[[Any], float] = lambda e: e.self_device_time_total if on_device else e.self_cpu_time_total  # noqa: E731
    top = sorted(found.key_averages(), key=key, reverse=True)[:12]
    rows = [dict(operator=e.key[:80], ms_per_step=key(e) / 5e3, calls_per_step=e.count / 5) for e in top]
    return dict(rows=rows)
