"""Measure where the time of a step goes, by kind of operator: `python benchmarks/operators.py [MODEL]`.

It compares the naive implementation with ours, in inference and training, in fp32 and bf16, with batch 16 at the
model's own size. Each figure is the median of five profiled steps; the variants take turns. It draws
docs/images/operators.png and writes benchmarks/results/operators.json.
"""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from eit import plots
from eit.benchmark.bench import Arm, Options, about, make_step, open_model

ROOT = Path(__file__).parents[1]
ROUNDS, BATCH = 5, 16
KINDS = {  # kinds of operators, with their colours
    "stem": "#56b4e9",
    "linear layers": "#0072b2",
    "attention": "#e69f00",
    "GELU": "#009e73",
    "norms and sums": "#cc79a7",
    "copies and fills": "#d55e00",
    "rest": "#999999",
}
COPIES = ("copy_", "fill_", "cat", "clone", "constant_pad_nd", "zero_", "index", "stack")
ATTENTION = ("flash_attention", "bmm", "softmax", "dropout")
SUMS = ("layer_norm", "add", "mul", "sum", "mean", "div")


def kind(event: FunctionEventAvg) -> str:
    name = event.key.removeprefix("aten::")
    shapes = [list(shape) for shape in event.input_shapes if isinstance(shape, list | tuple)]
    if "convolution" in name:
        kernels = [shape for shape in shapes if len(shape) == 4][:3]
        if any(shape[2:] == [1, 1] and shape[0] > 1 for shape in kernels):
            return "linear layers"
        return "rest" if any(shape[1:] == [1, 3, 3] for shape in kernels) else "stem"
    if "max_pool" in name:
        return "stem"
    if any(part in name for part in ATTENTION):
        return "attention"
    if name in ("mm", "addmm"):
        return "linear layers"
    if "gelu" in name:
        return "GELU"
    if name in COPIES:
        return "copies and fills"
    if any(len(shape) == 4 and shape[-1] == shape[-2] for shape in shapes) and name in ("mul", "div"):
        return "attention"
    return "norms and sums" if any(part in name for part in SUMS) else "rest"


def milliseconds(step) -> Counter:
    """Milliseconds per image, of each kind of operator."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step()
    times: Counter = Counter()
    for event in found.key_averages(group_by_input_shape=True):
        times[kind(event)] += event.self_cpu_time_total / 1e3 / BATCH
    return times


def picture(rows: list[dict]) -> None:
    figure = Figure(figsize=(9.6, 4.2), dpi=130)
    axis = figure.add_axes((0.21, 0.2, 0.76, 0.77))
    names = [f"{'naive' if row['naive'] else 'ours'}, {row['mode']}, {row['precision']}" for row in rows]
    y = [i + 0.5 * (i // 2) for i in range(len(rows))]
    left = [0.0] * len(rows)
    for name, colour in KINDS.items():
        widths = [row["ms"][name] for row in rows]
        axis.barh(y, widths, left=left, color=colour, height=0.8, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in zip(y, left, strict=True):
        axis.text(total, place, f"  {total:.0f}", va="center", fontsize=8.5)
    axis.set(yticks=y, yticklabels=names, xlim=(0, 1.07 * max(left)))
    axis.invert_yaxis()
    axis.set_xlabel(f"ms an image, {rows[0]['model']}, batch {BATCH}", fontsize=9)
    axis.tick_params(length=0, labelsize=8.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="lower center", ncols=len(KINDS), frameon=False, fontsize=8.5, handlelength=1, columnspacing=1.2)
    plots.save(figure, ROOT / "docs" / "images" / "operators.png")


def main(name: str) -> None:
    device = torch.device("cpu")
    modes = [(mode, precision) for mode in ("infer", "train") for precision in ("fp32", "bf16")]
    arms = [Arm(name, "eager", precision, mode, BATCH, naive) for mode, precision in modes for naive in (True, False)]
    model = open_model(name, None)
    steps = {arm: make_step(arm, model, None, device) for arm in arms}
    found: dict[Arm, list[Counter]] = {arm: [] for arm in arms}
    for turn in range(ROUNDS + 1):
        for arm, step in steps.items():
            times = milliseconds(step)
            if turn:  # the first turn is a warm-up
                found[arm].append(times)
    rows = []
    for arm, turns in found.items():
        ms = {name: statistics.median(times[name] for times in turns) for name in KINDS}
        rows.append(dict(model=name, mode=arm.mode, precision=arm.precision, naive=arm.naive, ms=ms))
        print(arm.label, arm.mode, arm.precision, {name: round(value, 2) for name, value in ms.items()})
    record = about(Options(batch_size=BATCH, rounds=ROUNDS, naive=True)) | dict(rows=rows)
    record["command"] = f"python benchmarks/operators.py {name}"
    (ROOT / "benchmarks" / "results" / "operators.json").write_text(json.dumps(record, indent=1) + "\n")
    picture(rows)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["eit_mini"])
