"""Measure how training scales: `python benchmarks/scale.py [PART...]`.

processes  two processes on one core each, with DDP and gloo, compared with one process on one core
curves     time of a training step against batch, resolution and depth
memory     peak memory of the same steps, each in a separate process
images     time and memory to list 10 to 1,000,000 images, and time from `eit train` to the first step
start      time from the start of `eit train digits` to its first optimizer step, by phase
digits     time of all of `eit train digits`, as `make demo` runs it
figure     draw docs/images/scale.png from the saved results

Without arguments, all parts run. Measurements take turns, in five rounds; medians and spread are printed. Each part is
saved in benchmarks/results/scale.json when it ends, with date, machine and versions.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import eit
from eit import distributed, plots
from eit.benchmark import matmul_peak
from eit.benchmark.bench import seconds_of, training_step
from eit.config import load_recipe
from eit.environment import environment
from eit.memory import MALLOC, keep_freed, peak_bytes
from eit.models.complexity import training_macs
from eit.training.setup import build_model

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "scale.json"
CPU = torch.device("cpu")
ROUNDS = 5
MIDDLE = dict(batch=8, size=224, depth=5)  # the point that all curves share
AXES = dict(batch=(1, 2, 4, 8, 16, 32, 64, 128, 256), size=(96, 160, 224, 288, 384, 512), depth=(2, 5, 8, 12))
POINTS = list(dict.fromkeys(tuple((MIDDLE | {a: v}).items()) for a, values in AXES.items() for v in values))


def save(part: str, **found: object) -> None:
    """Add a part to the results file, with machine, versions and command."""
    whole = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    about = environment(CPU) | dict(command=f"python benchmarks/scale.py {part}")
    whole[part] = dict(date=datetime.now(UTC).isoformat(timespec="seconds"), **about, **found)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(whole, indent=1) + "\n")


def spread(values: list[float], form: str = ".2f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# -- Two processes ----------------------------------------------------------------------------------------------------


def small_models() -> dict[str, tuple[torch.nn.Module, int, int]]:
    """Name -> model, pixels, images per process."""
    return {
        "eit_mini at 224": (eit.create_model("eit_mini"), 224, 8),
        "cifar10 recipe": (build_model(load_recipe("cifar10"), 10), 32, 32),
    }


def processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "_rank"]
    done = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    found = json.loads(done.stdout)
    for name, times in found.items():
        for kind in ("one", "two"):
            rates = [times["batch"] * (1 + (kind == "two")) / s for s in times[kind]]
            print(f"{name}, {kind} process{'es' if kind == 'two' else ''}: {spread(rates)} images/s")
        print(f"  {spread([a / b for a, b in zip(times['one'], times['two'], strict=True)], '.3f')} of twice one")
    save("processes", seconds=found)


def rank() -> None:
    """Run one rank. Each round times a step of rank 0 alone, then a step of both ranks. Times are those of rank 0."""
    distributed.start("cpu")
    torch.set_num_threads(1)
    found: dict[str, dict] = {}
    for name, (model, size, batch) in small_models().items():
        x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
        model = model.to(memory_format=torch.channels_last).train()
        alone = training_step(model, model, x, y, "fp32")
        network = DistributedDataParallel(model)
        local = training_step(model, network, x, y, "fp32")

        def together(local=local) -> None:
            local()
            distributed.sum_over_ranks(torch.zeros(7))  # as the training loop does once per step

        alone(), together()
        calls = max(1, round(3 / seconds_of(alone, 1, CPU)))
        calls = distributed.gather(calls)[0]
        times: dict[str, list[float]] = dict(one=[], two=[])
        for _ in range(ROUNDS):
            torch.distributed.barrier()  # gloo waits without spinning, so the other rank's core is idle
            if distributed.is_main():
                times["one"].append(seconds_of(alone, calls, CPU))
            torch.distributed.barrier()
            times["two"].append(seconds_of(together, calls, CPU))
        found[name] = dict(batch=batch, calls=calls, **times)
    if distributed.is_main():
        print(json.dumps(found))
    distributed.stop()


# -- Curves -----------------------------------------------------------------------------------------------------------


def step_of(batch: int, size: int, depth: int):
    torch.manual_seed(0)
    model = eit.create_model("eit_mini", img_size=size, depth=depth).to(memory_format=torch.channels_last).train()
    x, y = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    return model, x, training_step(model, model, x, y, "fp32")


def curves() -> None:
    keep_freed()  # as `eit train` does
    steps = {point: step_of(**dict(point)) for point in POINTS}
    seconds: dict[tuple, list[float]] = {point: [] for point in POINTS}
    rates: list[float] = []
    ways = matmul_peak.routes("fp32", CPU)
    for _, _, step in steps.values():
        step()
    for _ in range(ROUNDS):
        rates.append(max(matmul_peak.flops_per_second(way, CPU) for way in ways.values()))
        for point, (_, _, step) in steps.items():
            seconds[point].append(seconds_of(step, 1, CPU))
    rows = []
    for point, (model, x, _) in steps.items():
        macs = training_macs(model, tuple(x.shape[1:])) * len(x)
        rows.append(dict(point) | dict(macs=macs, seconds=seconds[point]))
        share = 2 * macs / statistics.median(seconds[point]) / statistics.median(rates)
        print(f"{dict(point)}: {spread(seconds[point], '.3f')} s, {100 * share:.0f}% of peak")
    save("curves", points=rows, peak_flops_per_s=rates)


def memory() -> None:
    rows = []
    for point in POINTS:
        command = [sys.executable, __file__, "_memory", json.dumps(dict(point))]
        done = subprocess.run(command, env=os.environ | MALLOC, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(dict(point) | json.loads(done.stdout))
        print(f"{rows[-1]}", flush=True)
    save("memory", points=rows, malloc=MALLOC)


def memory_of(point: dict) -> None:
    """Print the peak memory of a step, the activations kept for the backward pass, and the optimizer's state."""
    _, _, first = step_of(1, 96, 2)  # excludes what torch loads at its first step from the measured step
    first()
    model, x, step = step_of(**point)
    peak_of_step = peak_bytes(step, CPU)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(x)
    moments = 8 * sum(p.numel() for p in model.parameters())
    del logits
    print(json.dumps(dict(peak=peak_of_step, activations=sum(kept.values()), moments=moments)))


# -- Number of images -------------------------------------------------------------------------------------------------

COUNTS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
FILES = 20  # that the images are links to
TINY = ["model.depth=1", "model.embed_dim=20", "model.num_heads=2", "data.batch_size=4", "optim.lr_batch=null"]


def images() -> None:
    rows = []
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            link_images(Path(folder), count)
            command = [sys.executable, "-c", LISTER, f"{folder}/data"]
            listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            words = ["train", "imagenet_mini", f"data.root={folder}/data", f"out={folder}/run", "data.workers=1", *TINY]
            command = [sys.executable, "-c", DRIVER, str(time.time()), *words]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            marks = json.loads(done.stdout.partition("MARKS")[2])
            rows.append(dict(images=count) | listed | dict(first_step=sum(marks.values()), imports=marks["imports"]))
            print(rows[-1], flush=True)
    save("images", rows=rows)


def link_images(folder: Path, count: int) -> None:
    """`count` training images, and a tenth as many to validate on, in at most 1,000 classes; links to few files."""
    for i in range(FILES):
        Image.effect_noise((64, 64), 60).convert("RGB").save(folder / f"{i}.jpg")
    classes = min(1000, count // 5)
    for part, images in (("train", count), ("val", max(count // 10, classes))):
        for name in range(classes):
            (folder / "data" / part / f"class{name:04d}").mkdir(parents=True)
        for i in range(images):
            os.link(folder / f"{i % FILES}.jpg", folder / "data" / part / f"class{i % classes:04d}" / f"{i:07d}.jpg")


LISTER = """
import json, sys, time
from eit.config import data_config
from eit.data.datasets import open_data
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before, began = resident(), time.perf_counter()
found = open_data(data_config(root=sys.argv[1]))
print(json.dumps(dict(seconds=time.perf_counter() - began, bytes=resident() - before)))
"""

# -- Start ------------------------------------------------------------------------------------------------------------

DRIVER = """
import json, os, sys, time
began = float(sys.argv.pop(1))
from eit.imports import quick_imports
with quick_imports(freeze=True):
    import eit.cli, eit.config, eit.training.trainer
imported = time.time()
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
marks = dict(imports=imported - began)
def forward(*_):
    marks.setdefault("set-up", time.time() - imported)
def stepped(*_):
    marks["first step"] = time.time() - imported - marks["set-up"]
    print("MARKS" + json.dumps(marks), flush=True)
    os._exit(0)
torch.nn.modules.module.register_module_forward_pre_hook(forward)
register_optimizer_step_post_hook(stepped)
eit.cli.main()
"""


def start() -> None:
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS + 1):  # the first round fills the file cache
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", DRIVER, str(time.time()), "train", "digits", f"out={folder}/run"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        marks = json.loads(done.stdout.partition("MARKS")[2])
        for name, value in (marks | dict(total=sum(marks.values()))).items():
            found.setdefault(name, []).append(value)
    found = {name: values[1:] for name, values in found.items()}
    for name, values in found.items():
        print(f"{name}: {spread(values)} s")
    save("start", seconds=found)


def digits() -> None:
    times = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            command = [sys.executable, "-m", "eit", "train", "digits", f"out={folder}/run"]
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - began)
    print(f"eit train digits: {spread(times, '.1f')} s")
    save("digits", seconds=times)


# -- Figure -----------------------------------------------------------------------------------------------------------


def figure() -> None:
    """Draw time and memory against each axis: points are measured, lines are theory."""
    whole = json.loads(RESULT.read_text())
    shown = Figure(figsize=(10, 5.4), dpi=110, layout="constrained")
    axes = shown.subplots(2, 3, sharex="col", sharey="row")
    names = dict(batch="images a step", size="pixels of a side", depth="layers")
    middle = next(p for p in whole["curves"]["points"] if all(p[k] == v for k, v in MIDDLE.items()))
    rate = middle["macs"] / statistics.median(middle["seconds"])
    best = statistics.median(whole["curves"]["peak_flops_per_s"]) / 2
    for column, axis_name in enumerate(AXES):
        times, sizes = (
            sorted(
                (p for p in whole[part]["points"] if all(p[k] == v for k, v in MIDDLE.items() if k != axis_name)),
                key=lambda p: p[axis_name],
            )
            for part in ("curves", "memory")
        )
        x = [p[axis_name] for p in times]
        top, bottom = axes[0][column], axes[1][column]
        middles = [statistics.median(p["seconds"]) for p in times]
        ends = [[m - min(p["seconds"]) for m, p in zip(middles, times, strict=True)]]
        ends += [[max(p["seconds"]) - m for m, p in zip(middles, times, strict=True)]]
        top.plot(x, [p["macs"] / rate for p in times], color="#0057b8", label="MACs, at the rate of 8 images")
        top.plot(x, [p["macs"] / best for p in times], "--", color="#777777", label="MACs, at the machine's peak")
        top.errorbar(x, middles, ends, fmt="o", color="#d55e00", capsize=3, label="measured")
        theory = [(p["activations"] + p["moments"]) / 2**20 for p in sizes]
        bottom.plot(x, theory, color="#0057b8", label="kept for backward, and moments")
        bottom.plot(x, [p["peak"] / 2**20 for p in sizes], "o", color="#d55e00", label="measured")
        bottom.set_xlabel(names[axis_name])
        for axis in (top, bottom):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(x, [str(value) for value in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds a training step")
    axes[1][0].set_ylabel("peak memory, MiB")
    axes[0][0].legend(frameon=False, fontsize=8)
    axes[1][0].legend(frameon=False, fontsize=8)
    about = whole["curves"]
    shown.suptitle(
        f"eit_mini, fp32: 8 images of 224 pixels, 5 layers, but for the axis; {about['threads']} threads of "
        f"{about['device'].removeprefix('cpu: ')}",
        fontsize=10,
    )
    plots.save(shown, ROOT / "docs" / "images" / "scale.png")


PARTS = dict(
    processes=processes, curves=curves, memory=memory, images=images, start=start, digits=digits, figure=figure
)

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["_rank"]:
            rank()
        case ["_memory", point]:
            memory_of(json.loads(point))
        case given if set(given) <= set(PARTS):
            for part in given or PARTS:
                PARTS[part]()
        case _:
            sys.exit(__doc__)
