"""Speed and memory of models with every installed runtime, relative to the machine's matrix-multiply peak.

Figures are compared only within one run. Each round measures the matrix-multiply peak, then every arm once. An arm is a
model with a runtime, a precision, a batch size, and a mode: inference or training.
"""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eit.benchmark import matmul_peak
from eit.benchmark.naive import make_naive
from eit.config import load_recipe
from eit.console import progress
from eit.data.order import SampleOrder
from eit.environment import environment
from eit.errors import UserError, few, first_line, nearest
from eit.export.exporter import export
from eit.files import temporary_folder
from eit.inference import exported_models as exported
from eit.memory import MALLOC, is_measurable, peak_bytes
from eit.models.complexity import complexity, training_macs
from eit.models.eit import EIT
from eit.models.registry import FAMILIES, MODELS, TIMM, VARIANTS, check_size, check_timm_name, create_model
from eit.precision import Precision, arithmetic, autocast, float32_products, resolve_precision
from eit.randomness import Stream, set_seed
from eit.training.optim import make_optimizer
from eit.weights.card import Card, default_class_names, default_mean_std
from eit.weights.load import INCLUDED, is_weights_name, load

MODES = ("infer", "train")
DEFAULT_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}  # runtime -> format of eit.export.exporter
SECONDS = 0.3  # minimum of one measurement
RECIPE = "imagenet_mini"  # a training step uses its optimizer

Step = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    batch_size: int = 16
    size: int | None = None  # pixels; None: each model's own
    threads: int | None = None  # None: torch's own choice
    modes: Sequence[str] = MODES
    precisions: Sequence[Precision] = DEFAULT_PRECISIONS
    runtimes: Sequence[str] | None = None  # None: all that are installed
    rounds: int = 5
    naive: bool = False
    memory: bool = True
    fixed: bool = False  # export with a fixed batch
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Arm:
    """One combination to measure. `naive`: the plain implementation of the model."""

    model: str
    runtime: str
    precision: Precision
    mode: str
    batch: int
    naive: bool = False

    @property
    def label(self) -> str:
        return f"naive {self.model}" if self.naive else self.model


@dataclass
class Measurement:
    """The measurements of an arm.

    Attributes:
        arm: the arm.
        macs: multiply-accumulates per image, including the backward pass in training.
        seconds: of a step, one value per round.
        ratios: speed relative to the baseline of the same mode and batch, one value per round.
        share: of the matrix-multiply peak in the arm's precision: MACs x 2 x batch / median seconds / peak.
        memory: peak bytes of a step beyond model and batch; None if it was not measured.
    """

    arm: Arm
    macs: int
    seconds: list[float]
    ratios: list[float] = field(default_factory=list)
    share: float = 0.0
    memory: int | None = None

    @property
    def images_per_s(self) -> float:
        return self.arm.batch / median(self.seconds)


@dataclass(frozen=True)
class Record:
    """One run of the benchmark.

    Attributes:
        rows: one measurement per arm.
        peaks: precision -> operator of torch -> FLOP/s, one value per round.
        left_out: what was not measured, and why.
        about: date, machine, versions, options.
    """

    rows: list[Measurement]
    peaks: dict[str, dict[str, list[float]]]
    left_out: list[str]
    about: dict[str, Any]

    def peak(self, precision: str) -> float:
        """FLOP/s of the fastest operator."""
        return max(map(median, self.peaks[precision].values()))

    @property
    def baseline(self) -> str:
        """The baseline of the ratios in words, see `compare`."""
        if naive := [row.arm for row in self.rows if row.arm.naive]:
            return f"the naive model, eager {naive[0].precision}, same mode and batch"
        return "the first row of the same mode and batch"

    def as_json(self) -> dict[str, Any]:
        rows = [
            asdict(row.arm)
            | dict(label=row.arm.label, macs=row.macs, images_per_s=row.images_per_s, share_of_peak=row.share)
            | dict(median_s=median(row.seconds), min_s=min(row.seconds), max_s=max(row.seconds))
            | dict(ratio=median(row.ratios), min_ratio=min(row.ratios), max_ratio=max(row.ratios))
            | dict(peak_memory_bytes=row.memory, seconds=row.seconds)
            for row in self.rows
        ]
        peaks = {
            precision: dict(flops_per_s=self.peak(precision), routes=routes) for precision, routes in self.peaks.items()
        }
        return self.about | dict(baseline=self.baseline, peaks=peaks, rows=rows, left_out=self.left_out)


def bench(names: Sequence[str], options: Options) -> Record:
    """Measure models: NAME or FAMILY/NAME of this package, timm/NAME, or trained weights.

    Raises:
        UserError: an unknown name, a runtime that is not installed, or options that contradict each other.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for precision in options.precisions:
        resolve_precision(precision, options.device)
    runtimes, left_out = check_runtimes(options)
    models = open_models(names, options)
    with temporary_folder() as folder, _many_compilations():
        arms = [arm for name in models for arm in arms_of(name, models[name], runtimes, options, left_out)]
        steps, files = prepare(arms, models, folder, options, left_out)
        if not steps:
            raise UserError(f"nothing to measure: {'; '.join(left_out)}")
        seconds, peaks = interleave(steps, options)
        rows = [Measurement(arm, macs_of(arm, models[arm.model]), times) for arm, times in seconds.items()]
        if options.memory and is_measurable(options.device):
            left_out += measure_memory(rows, files, options)
    record = Record(rows, peaks, left_out, about(options))
    compare(record)
    return record


def about(options: Options) -> dict[str, Any]:
    """Date, command, machine and versions of a record."""
    facts = environment(options.device)
    for runtime in FORMATS:
        if importlib.util.find_spec(runtime):
            facts["packages"][runtime] = version(runtime)
    given = dict(batch_size=options.batch_size, size=options.size, rounds=options.rounds, naive=options.naive)
    return dict(date=datetime.now(UTC).isoformat(timespec="seconds"), **facts, **given)


# -- What is measured -------------------------------------------------------------------------------------------------


def check_runtimes(options: Options) -> tuple[list[str], list[str]]:
    """The runtimes to measure, and why others are left out; a runtime in the options that is missing is an error."""
    kept, left_out = [], []
    for runtime in options.runtimes or RUNTIMES:
        if runtime in FORMATS and options.runtimes is None and "infer" not in options.modes:
            continue
        try:
            _check_runtime(runtime, options)
        except UserError as error:
            if options.runtimes:
                raise
            left_out.append(str(error))
        else:
            kept.append(runtime)
    return kept, left_out


def _check_runtime(runtime: str, options: Options) -> None:
    if runtime in FORMATS:
        if options.device.type != "cpu":
            raise UserError(f"--runtime {runtime} runs on the CPU, not on {options.device.type}")
        if "infer" not in options.modes:
            raise UserError(f"--runtime {runtime} cannot train: give --mode infer")
        for module in ("onnx", "onnxscript", "onnxruntime", runtime):
            exported.import_runtime(module, f"--runtime {runtime}")
    if runtime == "compile" and options.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                "--runtime compile needs a C++ compiler: install one, such as apt-get install g++"
            ) from None


def open_models(names: Sequence[str], options: Options) -> dict[str, Any]:
    """Name -> model in evaluation mode, with its card.

    Raises:
        UserError: an unknown name, a name that is given twice, or a model that does not accept the size.
    """
    if double := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"{double[0]} is given twice: give each model once")
    models = {name: open_model(name, options.size) for name in names}
    if options.naive and not any(isinstance(model, EIT) for model in models.values()):
        raise UserError(f"--naive is for models of this package, not for {few(names)}")
    return models


def open_model(name: str, size: int | None) -> Any:
    """A model with a card, whose `size` is the input size; without weights, it has initial values."""
    kind, _, plain = name.partition("/")
    if exported.is_exported(name):
        raise UserError(f"{name} is an exported file: give the weights, and choose runtimes with --runtime")
    if is_weights_name(name):
        model: Any = load(name)
        if size is not None:
            check_size(model, size, model.card.size, name)
            model.card = model.card.model_copy(update=dict(size=size, resize=size))
        return model
    if name in MODELS:
        family, plain = None, name
    elif kind in FAMILIES and plain in VARIANTS:
        family = kind
    elif name.startswith(TIMM):
        check_timm_name(name)
        family, plain = None, name
    else:
        raise UserError(
            f"unknown model {name!r}{nearest(name, [*MODELS, *INCLUDED])} (known: {', '.join(MODELS)}, lsra/eit_mini "
            f"and so on, timm/NAME, a weights file, a run folder, {', '.join(INCLUDED)})"
        )
    set_seed(Stream.INITIAL_VALUES, 0)
    model = create_model(plain, family, **({} if size is None else dict(img_size=size)))
    own = size or model.pretrained_cfg["input_size"][-1]
    mean, std = default_mean_std(3)
    classes = default_class_names(model.num_classes)
    arguments = {} if family is None else dict(family=family)
    look: dict[str, Any] = dict(mean=mean, std=std, size=own, resize=own, interpolation="bicubic")
    model.card = Card(model=plain, arguments=arguments, classes=classes, **look)
    return model.eval()


def arms_of(name: str, model: Any, runtimes: Sequence[str], options: Options, left_out: list[str]) -> list[Arm]:
    """The arms of a model, the baseline first."""
    arms = []
    lacking = {(r, p): reason for r in runtimes for p in options.precisions if (reason := _why_not(r, p))}
    left_out += [reason for reason in lacking.values() if reason not in left_out]
    for mode in options.modes:
        for batch in sorted({1, options.batch_size}) if mode == "infer" else [options.batch_size]:
            if options.naive and isinstance(model, EIT):
                arms += [Arm(name, "eager", precision, mode, batch, naive=True) for precision in options.precisions]
            for runtime in runtimes:
                if mode == "train" and runtime in FORMATS:
                    continue
                arms += [
                    Arm(name, runtime, precision, mode, batch)
                    for precision in options.precisions
                    if (runtime, precision) not in lacking
                ]
    return arms


def _why_not(runtime: str, precision: Precision) -> str | None:
    """Why a runtime lacks a precision; None if it has it."""
    if runtime not in FORMATS or precision == "fp32":
        return None
    if runtime == "onnxruntime" or precision != "bf16":
        return f"{runtime} {precision}: not available on the CPU"
    has = exported.openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if "BF16" in has else "openvino bf16: not available on this processor"


def macs_of(arm: Arm, model: Any) -> int:
    input_size = (model.card.in_chans, model.card.size, model.card.size)
    network = make_naive(model) if arm.naive else model
    return training_macs(network, input_size) if arm.mode == "train" else complexity(network, input_size).logits_macs


# -- Steps ------------------------------------------------------------------------------------------------------------


def prepare(
    arms: Sequence[Arm], models: dict[str, Any], folder: Path, options: Options, left_out: list[str]
) -> tuple[dict[Arm, Step], dict[Arm, Path]]:
    """The step of each arm, after one run, and the exported file of those that need one.

    Arms that cannot be exported or compiled are left out, with the reason.
    """
    steps: dict[Arm, Step] = {}
    written: dict[tuple[str, str, int | None], Path] = {}
    files: dict[Arm, Path] = {}
    failed: dict[tuple[str, str], str] = {}
    with progress("preparing", len(arms)) as advance:
        for arm in arms:
            if (arm.model, arm.runtime) not in failed:
                try:
                    if arm.runtime in FORMATS:
                        fixed = arm.batch if options.fixed else None
                        key = arm.model, arm.runtime, fixed
                        if key not in written:
                            written[key] = _export(models[arm.model], arm.runtime, folder, len(written), fixed)
                        files[arm] = written[key]
                    step = make_step(arm, models[arm.model], files.get(arm), options.device)
                    step()
                    steps[arm] = step
                except (UserError, FloatingPointError, RuntimeError) as error:
                    if arm.runtime == "eager":
                        raise
                    failed[arm.model, arm.runtime] = f"{arm.runtime} of {arm.model}: {first_line(error)}"
            advance()
    left_out += failed.values()
    return steps, files


def _export(model: Any, runtime: str, folder: Path, number: int, fixed: int | None) -> Path:
    format = FORMATS[runtime]
    file = folder / f"{number}{'.onnx' if format == 'onnx' else '.xml'}"
    export(model, file, format, fixed=fixed)
    return file


def make_step(arm: Arm, model: Any, file: Path | None, device: torch.device) -> Step:
    """A function that runs one step of the arm on random images. Runtimes of exported files read `file`."""
    card = model.card
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(arm.batch, card.in_chans, card.size, card.size, generator=generator).to(device)
    if arm.runtime in FORMATS:
        assert file is not None
        openvino_precision = {"fp32": "f32", "bf16": "bf16"}[arm.precision]
        is_onnx = arm.runtime == "onnxruntime"
        run = exported.open_onnx(file) if is_onnx else exported.open_openvino(file, openvino_precision)
        return lambda: run(x)
    if arm.naive:
        network: nn.Module = make_naive(model).to(device)
    else:
        network = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last)
    called: Any = torch.compile(network, dynamic=False) if arm.runtime == "compile" else network
    if arm.mode == "infer":
        return inference_step(called, x, arm.precision)
    y = torch.randint(len(card.classes), (arm.batch,), generator=generator).to(device)
    return training_step(network.train(), called, x, y, arm.precision)


def inference_step(network: Any, x: Tensor, precision: Precision) -> Step:
    """A forward pass, as `eit.inference.evaluate` does it."""

    @torch.no_grad()
    def step() -> None:
        with arithmetic(x.device, precision):
            network(x)

    return step


def training_step(model: nn.Module, network: Any, x: Tensor, y: Tensor, precision: Precision) -> Step:
    """Forward pass, cross-entropy, backward pass, optimizer step. `network` is `model`, or a compiled version of it."""
    order = SampleOrder(images=len(x), batch_size=len(x), accumulate=1, world=1, repeats=1, seed=0)
    optimizer = make_optimizer(load_recipe(RECIPE), model, order)

    def step() -> None:
        with float32_products(precision):
            with autocast(x.device, precision):
                loss = F.cross_entropy(network(x).float(), y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _many_compilations() -> Any:
    """Raise torch.compile's limit of eight variants of a function, after which it runs uncompiled."""
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000)


# -- Measuring --------------------------------------------------------------------------------------------------------


def interleave(
    steps: dict[Arm, Step], options: Options
) -> tuple[dict[Arm, list[float]], dict[str, dict[str, list[float]]]]:
    """Seconds of each arm's step and FLOP/s of each operator of the peaks, one value per round.

    Every second round has the reverse order, so that an arm does not always follow the same one.
    """
    device = options.device
    products = {precision: matmul_peak.routes(precision, device) for precision in options.precisions}
    rates: dict[str, dict[str, list[float]]] = {p: {name: [] for name in routes} for p, routes in products.items()}
    calls = {arm: max(1, math.ceil(SECONDS / seconds_of(step, 1, device))) for arm, step in steps.items()}
    seconds: dict[Arm, list[float]] = {arm: [] for arm in steps}
    with progress("measuring", options.rounds * len(steps)) as advance:
        for turn in range(options.rounds):
            for precision, routes in products.items():
                for name, product in routes.items():
                    rates[precision][name].append(matmul_peak.flops_per_second(product, device, precision))
            for arm in list(steps)[:: 1 if turn % 2 == 0 else -1]:
                if calls[arm] > 1:
                    steps[arm]()  # warm up the caches
                seconds[arm].append(seconds_of(steps[arm], calls[arm], device))
                advance()
    return seconds, rates


def seconds_of(step: Step, calls: int, device: torch.device) -> float:
    """Mean seconds of `calls` calls."""
    matmul_peak.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        step()
    matmul_peak.synchronize(device)
    return (time.perf_counter() - began) / calls


def compare(record: Record) -> None:
    """Fill in the ratios of each row to its baseline, and its share of the peak.

    The baseline has the same mode and batch. It is the naive version of the model in the first precision, otherwise
    that of another model, otherwise the first row.
    """
    for row in record.rows:
        same = [other for other in record.rows if (other.arm.mode, other.arm.batch) == (row.arm.mode, row.arm.batch)]
        naive = [other for other in same if other.arm.naive]
        own = [other for other in naive if other.arm.model == row.arm.model]
        base = (own or naive or same)[0]
        row.ratios = speeds_relative_to(base.seconds, row.seconds)
        flops = 2 * row.macs * row.arm.batch
        row.share = flops / median(row.seconds) / record.peak(row.arm.precision)


def speeds_relative_to(base: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """How many times as fast a step is as the base, one value per round."""
    return [before / now for before, now in zip(base, seconds, strict=True)]


def measure_memory(rows: Sequence[Measurement], files: dict[Arm, Path], options: Options) -> list[str]:
    """Fill in the peak memory of rows with the whole batch, each from its own process; return the failures.

    Compiled models are left out, because memory of the compiler would be counted.
    """
    failed = []
    chosen = [row for row in rows if row.arm.batch == options.batch_size and row.arm.runtime != "compile"]
    with progress("memory", len(chosen)) as advance:
        for row in chosen:
            try:
                row.memory = memory_of(row.arm, files.get(row.arm), options)
            except RuntimeError as error:
                failed.append(str(error))
            advance()
    return failed


def memory_of(arm: Arm, file: Path | None, options: Options) -> int:
    """Peak bytes of the arm's step, from a new process, which runs this file and calls `_memory_here`."""
    given = dict(size=options.size, threads=torch.get_num_threads(), device=str(options.device))
    request = dict(arm=asdict(arm), file=None if file is None else str(file), **given)
    done = subprocess.run(
        [sys.executable, "-m", "eit.benchmark.bench", json.dumps(request)],
        env=os.environ | MALLOC,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(f"the memory of {arm.label}, {arm.runtime} {arm.precision}: {lines[-1]}")
    return int(done.stdout.split()[-1])


def _memory_here(request: dict[str, Any]) -> int:
    torch.set_num_threads(request["threads"])
    arm, device = Arm(**request["arm"]), torch.device(request["device"])
    file = None if request["file"] is None else Path(request["file"])
    model = open_model(arm.model, request["size"])
    if arm.runtime not in FORMATS:  # torch loads code in its first step; that is not measured
        first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 8)).to(device)
        x, y = torch.randn(2, 3, 8, 8, device=device), torch.zeros(2, dtype=torch.long, device=device)
        training_step(first, first, x, y, arm.precision)()
    return peak_bytes(make_step(arm, model, file, device), device)


if __name__ == "__main__":
    print(_memory_here(json.loads(sys.argv[1])))
