"""Rebuild tables and figures of the pages from code and results/: `make readme`. With --check, name what is stale."""

import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import eit
from eit.models.registry import FAMILIES
from eit.reproduce import experiment as experiments
from eit.reproduce import tables as result_tables
from eit.reproduce.forest import Row, digest, draw_forest
from eit.reproduce.runs import Result, read_results
from eit.reproduce.tables import (
    FIGURE,
    PAGE,
    effect_text,
    effects_text,
    extent,
    has_digest,
    judge_claims,
    machines,
    report_table,
    stale_file,
    verdict_text,
)  # fmt: skip
from eit.reproduce.verdict import FAILS, HOLDS, UNDECIDED, Verdict, judge_claim

ROOT = Path(__file__).parents[1]
CONV, ATTENTION, INK = "#0072b2", "#e69f00", "#333333"


def zoo() -> str:
    command = [sys.executable, "-m", "eit", "models", "--markdown"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def summaries(pattern: str) -> list[dict]:
    """The summaries of runs in results/, in the order of their seeds."""
    runs = sorted((ROOT / "results").glob(pattern))
    assert runs, pattern
    return [json.loads((run / "summary.json").read_text()) for run in runs]


def spread(values: list[float], form: str = ".2f", unit: str = "%") -> str:
    """Median and range, or the value alone."""
    if len(values) == 1:
        return f"{values[0]:{form}}{unit}"
    return f"{statistics.median(values):{form}}{unit} ({min(values):{form}} to {max(values):{form}})"


def table(head: str, rows: list[list[str]]) -> list[str]:
    return [head, "| --- " * head.count(" | ") + "| --- |", *(f"| {' | '.join(row)} |" for row in rows)]


def machine(run: str) -> str:
    environment = json.loads((ROOT / "results" / run / "environment.json").read_text())
    return f"{processor(environment)}; torch {environment['packages']['torch']}"


def processor(environment: dict) -> str:
    return f"{environment['threads']} threads of {environment['device'].removeprefix('cpu: ')}"


def runs() -> str:
    rows = []
    for name, pattern in (("digits", "/seed-*"), ("digits_in_the_wild", ""), ("fashion_mnist", "/seed-*")):
        found = summaries(f"{name}{pattern}")
        (parameters,) = {s["params"] for s in found}
        minutes = statistics.median(s["seconds"] for s in found) / 60
        rows.append(
            [
                f"[{name}](results/{name})",
                str(len(found)),
                f"{parameters:,}",
                spread([s["last_top1"] for s in found]),
                f"{statistics.median(s['best_top1'] for s in found):.2f}%",
                f"{minutes:.1f} min",
            ]
        )
    head = "| recipe | seeds | parameters | last-epoch top-1, median (range) | best-epoch top-1 | training |"
    threads = json.loads((ROOT / "results" / "digits_in_the_wild" / "environment.json").read_text())["threads"]
    note = f"{machine('digits/seed-0')}; digits_in_the_wild: {threads} thread, next to other work."
    return "\n".join([*table(head, rows), "", note])


def finetuning() -> str:
    texts = {
        "digits": "weights trained on scanned digits (results/digits/seed-0)",
        "scratch": "nothing (initial values)",
    }
    rows = []
    for arm, text in texts.items():
        found = summaries(f"finetuning/{arm}-seed-*")
        rows.append([text, str(len(found)), spread([s["last_top1"] for s in found])])
    head = "| one epoch of Fashion-MNIST at 16x16, from | seeds | last-epoch top-1, median (range) |"
    return "\n".join([*table(head, rows), "", "From [results/finetuning](../results/finetuning)."])


def distillation() -> str:
    agreement = json.loads((ROOT / "results" / "distillation" / "agreement.json").read_text())
    texts = {"alone": "none", "soft": "soft, alpha 1, tau 4", "hard": "hard, alpha 1"}
    rows = [
        [text, str(len(agreement[arm])), spread(agreement[arm], ".1f"), spread(top1, ".1f")]
        for arm, text in texts.items()
        for top1 in [[s["last_top1"] for s in summaries(f"distillation/{arm}-seed-*")]]
    ]
    what = "same class as results/digits/seed-0"
    head = f"| 359 digits, teacher | seeds | {what}, median (range) | last-epoch top-1, median (range) |"
    return "\n".join([*table(head, rows), "", "From [results/distillation](../results/distillation)."])


def analysis() -> str:
    """Means over the layers, before and after training."""
    folder = ROOT / "results" / "analysis"

    def mean(table: str, column: str, model: str, state: str, **where: str) -> float:
        with open(folder / "csv" / f"{table}.csv", newline="") as file:
            key = dict(model=model, state=state) | where
            return statistics.fmean(float(row[column]) for row in csv.DictReader(file) if key.items() <= row.items())

    rows = []
    for name in ("eit", "lsra", "vit"):
        summary = json.loads((folder / name / "summary.json").read_text())
        row = [name, f"{summary['params']:,}", f"{summary['best_top1']:.2f}%"]  # of the weights that were analysed
        for column in ("share", "share_with_dc"):
            before, after = (100 * mean("frequency", column, name, s, where="block") for s in ("initial", "trained"))
            row.append(f"{before:.1f} → {after:.1f}%")
        before, after = (mean("diversity", "std_px", name, state) for state in ("initial", "trained"))
        rows.append([*row, f"{before:.2f} → {after:.2f} px"])
    head = "| model | parameters | top-1 (best epoch) | share | share with DC | head diversity |"
    note = "From [results/analysis](../results/analysis): means of the 5 layers, at initial values → trained."
    return "\n".join([*table(head, rows), "", note])


def int8() -> str:
    rows = []
    for name in ("eit", "lsra", "vit"):
        found = json.loads((ROOT / "results" / "export" / f"{name}.json").read_text())
        cost = found["int8"]
        size = f"{cost['fp32_bytes'] / 1e6:.2f} → {found['bytes'] / 1e6:.2f} MB"
        rows.append([name, f"{cost['fp32_top1']:.2f}%", f"{cost['top1']:.2f}%", size])
    head = "| model | top-1, fp32 | top-1, int8 | file |"
    note = f"The models of [results/analysis](../results/analysis) on {cost['images']:,} images of CIFAR-10, "
    note += f"ranges from {cost['calibrated_on']} training images; {found['runtime']}."
    return "\n".join([*table(head, rows), "", f"{note} From [results/export](../results/export)."])


def segmentation() -> str:
    found = [json.loads(f.read_text()) for f in sorted((ROOT / "results" / "segmentation").glob("*/results.json"))]
    rows = []
    for name in ("eit", "vit"):
        scores = [[one["mean_iou"][name][size] for one in found] for size in ("64x64", "96x160")]
        rows.append([name, *(spread(values, ".1f") for values in scores)])
    head = "| backbone | mean IoU at 64x64, median (range) | at 96x160 |"
    note = f"{len(found)} seeds, {found[0]['steps']:,} steps of 16 scenes; {found[0]['scenes']} test scenes."
    return "\n".join([*table(head, rows), "", f"{note} From [results/segmentation](../results/segmentation)."])


def benchmark(name: str) -> dict:
    """A record of `eit bench --json`."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


VARIANTS = ("mini", "tiny", "base", "large")
MEASURED = [(mode, precision) for mode in ("infer", "train") for precision in ("fp32", "bf16")]


def speed_rows(found: dict) -> list[list[str]]:
    """A row for each model and runtime, of the batch."""
    rows: dict = {}
    for row in found["rows"]:
        if row["batch"] == found["batch_size"]:
            key = row["label"], str(row["batch"]), row["runtime"]
            rows.setdefault(key, {})[row["mode"], row["precision"]] = row
    return [
        [*key]
        + [
            f"{cell['images_per_s']:.1f}, {cell['ratio']:.2f}x, {100 * cell['share_of_peak']:.0f}%" if cell else ""
            for cell in map(cells.get, MEASURED)
        ]
        for key, cells in rows.items()
    ]


def about(found: dict) -> str:
    measured = f"medians of {found['rounds']} rounds, {found['date'][:10]}"
    return f"{processor(found)}, torch {found['packages']['torch']}, {measured}."


HEAD = f"| model | batch | runtime | {' | '.join(f'{mode}, {precision}' for mode, precision in MEASURED)} |"


def speed() -> str:
    records = [benchmark(f"bench_{variant}") for variant in VARIANTS]
    rows = [row for found in records for row in speed_rows(found)]
    peaks = records[0]["peaks"]
    best = {precision: found["flops_per_s"] / 1e9 for precision, found in peaks.items()}
    mkl = statistics.median(peaks["fp32"]["routes"]["mm"]) / 1e9
    note = f"Each cell: images/s, speed relative to the naive model in fp32, share of the peak. {about(records[0])} "
    note += f"Peak: {best['fp32']:.0f} GFLOP/s in fp32 (`a @ b` by MKL: {mkl:.0f}), {best['bf16']:.0f} in bf16."
    return "\n".join([*table(HEAD, rows), "", note])


def choices() -> str:
    """The fastest runtime for each model, task and precision."""
    tasks = {"one image": ("infer", 1), "many images": ("infer", None), "training": ("train", None)}
    rows = []
    for variant in VARIANTS:
        found = benchmark(f"bench_{variant}")
        cells = []
        for mode, batch in tasks.values():
            for precision in ("fp32", "bf16"):
                wanted = (f"eit_{variant}", mode, batch or found["batch_size"], precision)
                own = [r for r in found["rows"] if (r["label"], r["mode"], r["batch"], r["precision"]) == wanted]
                best = max(own, key=lambda row: row["images_per_s"])
                speed = f"{1e3 * best['median_s']:.0f} ms" if batch == 1 else f"{best['images_per_s']:.1f}/s"
                cells.append(f"{best['runtime']}, {speed}")
        rows.append([f"`eit_{variant}`", *cells])
    head = f"| model | {' | '.join(f'{task}, {p}' for task in tasks for p in ('fp32', 'bf16'))} |"
    return "\n".join([*table(head, rows), "", f"Fastest runtime and its speed: {about(benchmark('bench_mini'))}"])


def keep_freed() -> str:
    return "\n".join(table(HEAD, speed_rows(benchmark("keep_freed"))))


def latency() -> str:
    """One image, and memory."""
    rows = []
    for row in benchmark("bench_mini")["rows"]:
        if row["batch"] == 1:
            ms = [1e3 * row[key] for key in ("median_s", "min_s", "max_s")]
            rows.append([row["label"], row["runtime"], row["precision"], f"{ms[0]:.1f} ({ms[1]:.1f} to {ms[2]:.1f})"])
    return "\n".join(table("| one image | runtime | precision | ms, median (range) |", rows))


def step_memory() -> str:
    rows = []
    for variant in VARIANTS:
        cells = {}
        for row in benchmark(f"bench_{variant}")["rows"]:
            if row["mode"] == "train" and row["peak_memory_bytes"]:
                cells.setdefault(row["label"], {})[row["precision"]] = row["peak_memory_bytes"] / 2**20
        rows += [[label, *(f"{cell[p]:,.0f}" for p in ("fp32", "bf16"))] for label, cell in cells.items()]
    return "\n".join(table("| training step, batch 16 | MiB, fp32 | MiB, bf16 |", rows))


def gain(middle: float, low: float, high: float) -> str:
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def class_token() -> str:
    found, rows, steps = benchmark("class_token"), {}, {}
    for row in found["rows"]:
        steps[f"{'inference' if row['mode'] == 'infer' else 'training step'}, batch {row['batch']}"] = True
        cell = gain(row["gain"], row["min_gain"], row["max_gain"])
        rows.setdefault(row["model"], [row["model"]]).append(cell)
    lines = table(f"| speed relative to all tokens | {' | '.join(steps)} |", list(rows.values()))
    return "\n".join([*lines, "", f"fp32, eager, {found['cpu']['capability']}, {about(found)}"])


def openvino_forms() -> str:
    found, rows, columns = benchmark("openvino_forms"), {}, {}
    for row in found["rows"]:
        columns[f"{row['model']}, batch {row['batch']}"] = True
        cell = f"{row['images_per_s']:.1f}/s, {gain(row['gain'], row['min_gain'], row['max_gain'])}"
        rows.setdefault(row["form"], [row["form"]]).append(cell)
    lines = table(f"| images/s, relative to one stream | {' | '.join(columns)} |", list(rows.values()))
    versions = f"OpenVINO {found['packages']['openvino'].partition('-')[0]}"
    return "\n".join([*lines, "", f"fp32, {found['cpu']['capability']}, {versions}, {about(found)}"])


def self_check() -> str:
    found = benchmark("self_check")
    rows = []
    for row in found["gains"]:
        pays = "yes" if row["pays"] else "no"
        rows.append([", ".join(row["operators"]), gain(*row["infer"]), gain(*row["train"]), pays])
    lines = table("| operators | inference | training step | pays |", rows)
    note = f"`eit_mini`, fp32, batch {found['batch_size']}, {found['cpu']['capability']}, {about(found)}"
    return "\n".join([*lines, "", note])


def loading() -> str:
    found = benchmark("loading")["figures"]
    rows = []
    for what in ("one thread", "one worker process"):
        by_size = found[f"images/s of {what}"]
        for name in by_size["500x375"]:
            if "simplejpeg" in name:  # not a backend any more: see "What was tried and did not help"
                continue
            cells = [f"{size[name]['median']:.0f} ({size[name]['ratio']:.2f}x)" for size in by_size.values()]
            rows.append([what, name, *cells])
    return "\n".join(table(f"| images/s | loader | {' | '.join(by_size)} |", rows))


def scale() -> str:
    found = benchmark("scale")
    rows = []
    for name, times in found["processes"]["seconds"].items():
        ratios = [one / two for one, two in zip(times["one"], times["two"], strict=True)]
        what = f"speed of two processes, relative to twice that of one: {name}, {times['batch']} images each"
        rows.append([what, spread(ratios, ".3f", ""), "at least 0.9"])
    for what, part, goal in (
        ("from the start of `eit train digits` to its first step", found["start"]["seconds"]["total"], 8),
        ("the whole of `eit train digits`", found["digits"]["seconds"], 40),
    ):
        rows.append([what, spread(part, ".1f", " s"), f"at most {goal} s"])
    return "\n".join(table("| 2 cores | median of 5 rounds (range) | goal |", rows))


def image_counts() -> str:
    rows = []
    for row in benchmark("scale")["images"]["rows"]:
        memory = f"{row['bytes'] / 2**20:,.0f} MiB"
        rows.append([f"{row['images']:,}", f"{row['seconds']:.2f} s", memory, f"{row['first_step']:.1f} s"])
    head = "| training images | time to list and check | memory for that | time to the first step |"
    return "\n".join(table(head, rows))


# -- The paper's claims ------------------------------------------------------------------------------------------------

TESTED = [  # claims that need no training: the claim, the versions of the paper, the code, the test
    (
        'EIT has 3.5, 8.9, 16.0, 25.3 M parameters and 1.73, 3.84, 6.52, 10.0 G "FLOPs" as the paper counts',
        "v2",
        "models/complexity.py, complexity",
        "test_cost.py",
    ),
    (
        "The share of convolution decreases with depth, down to none",
        "v1, v2, v3",
        "models/eit.py, decreasing_conv",
        "test_decreasing_convolution.py",
    ),
    (
        "At 32x32, on the same 8x8 tokens, EIT has fewer parameters and MACs than ViT of equal width",
        "v1, v2",
        "models/registry.py, FAMILIES",
        "test_small_images.py",
    ),
    (
        "At 224x224, on 19x19 tokens against ViT's 14x14, EIT-mini has 2.2 times the MACs of a ViT of its width",
        "ours",
        "models/registry.py, FAMILIES",
        "test_cost.py",
    ),
    (
        "Without a position embedding another input size needs no change of the weights",
        "v1, v2",
        "models/eit.py, EIT",
        "test_no_position_embedding.py",
    ),
]
BUDGETS = ("full", "medium", "short")  # best first
WAITING = "not yet judged, because runs are missing"


@cache
def evidence(name: str) -> tuple[experiments.Experiment, str, list[Result]]:
    """The best budget of an experiment that is complete; otherwise the one with the most results."""
    experiment = experiments.load(name)
    budgets = [budget for budget in BUDGETS if budget in experiment.runs.budgets]
    found = {budget: read_results(experiment, budget, ROOT / "results") for budget in budgets}
    complete = [budget for budget in budgets if len(found[budget]) == len(experiment.cells(budget))]
    budget = (complete or sorted(budgets, key=lambda budget: -len(found[budget])))[0]
    return experiment, budget, found[budget]


def code(place: str) -> str:
    file = place.partition(",")[0]
    return f"`{place}`" if "*" in file else f"[`{place}`](../src/eit/{file})"


@cache
def judged_claims() -> list[tuple[str, str, experiments.Claim, Verdict]]:
    """(name of the experiment, its runs in words, claim, verdict) of every claim; the primary claims first."""
    rows = []
    for name in experiments.experiment_names():
        experiment, budget, found = evidence(name)
        planned = experiment.cells(budget)
        for key, verdict in judge_claims(experiment, budget, ROOT / "results").items():
            claim = experiment.claims[key]
            own = [cell.name for cell in planned if cell.levels[claim.axis] in claim.levels]
            absent = set(claim.levels).difference(cell.levels[claim.axis] for cell in planned)
            done = sum(result.cell.name in own for result in found)
            runs = f"{budget}, " + (f"without {min(absent)}" if absent else f"{done} of {len(own)} runs")
            rows.append((name, runs, claim, verdict))
    return sorted(rows, key=lambda row: not row[2].primary)


def claims() -> str:
    """The primary claims; the others; what is counted."""
    head = "| claim | paper | runs | difference [95% interval] | verdict |"
    parts: dict[bool, list[list[str]]] = {True: [], False: []}
    for name, runs, claim, verdict in judged_claims():
        says = f"{claim.says} ({code(claim.code)})"
        run = f"[{name}](#{ANCHORS[name]}), {runs}"
        parts[claim.primary].append(
            [says, claim.paper or "ours", run, effects_text(verdict, claim), verdict_text(verdict)]
        )
    counted = [
        [f"{says} ({code(place)})", paper, f"[{test}](../tests/claims/{test})", "counted", "**holds**"]
        for says, paper, place, test in TESTED
    ]
    texts = ("Primary, corrected together:", "Exploratory, not corrected:", "Counted, without training:")
    tables = [table(head, parts[True]), table(head, parts[False]), table(head, counted)]
    return "\n".join(line for text, lines in zip(texts, tables, strict=True) for line in (text, "", *lines, ""))[:-1]


def unpooled() -> str:
    """Comparisons with the control by Welch's test, which does not pool the variances of other models, as a check."""
    rows = []
    for name, _, claim, verdict in judged_claims():
        experiment, budget, found = evidence(name)
        if experiment.control in claim.levels and claim.rises and claim.metric not in experiments.COUNTED:
            welch = judge_claim(claim, found, experiment.cells(budget))
            for both in zip(verdict.effects, welch.effects, strict=True):
                rows.append([claim.says, *(effect_text(effect, claim.metric) for effect in both)])
    return "\n".join(table("| claim | Dunnett's test | Welch's test, not corrected |", rows))


def in_short() -> str:
    """The primary claims, grouped by their verdict."""
    found: dict[str, list[str]] = {}
    for _, _, claim, verdict in judged_claims():
        if claim.primary:
            word = verdict.word if verdict.p is not None else WAITING
            found.setdefault(word, []).append(claim.says)
    lines = ["The primary claims, by their verdict:"]
    for word in (HOLDS, FAILS, UNDECIDED, WAITING):
        if word in found:
            lines += ["", f"**{word[0].upper()}{word[1:]}**:", "", *(f"- {says}." for says in found[word])]
    return "\n".join(lines)


def in_five_lines() -> str:
    """What the experiments say so far of the paper, with the figures of CIFAR-10."""
    found = read_results(experiments.load("small_data"), "short", ROOT / "results")
    top1: dict[str, list[float]] = {}
    for result in found:
        if result.cell.levels["data"] == "cifar10":
            top1.setdefault(result.cell.levels["model"], []).append(result.summary["last_top1"])
    mean = {model: statistics.fmean(values) for model, values in top1.items()}

    def figure(model: str) -> str:
        return f"{mean[model]:.1f}% ({len(top1[model])} runs)"

    primary = [verdict for *_, claim, verdict in judged_claims() if claim.primary]
    judged = sum(verdict.p is not None for verdict in primary)
    lines = [
        f"EIT is ahead of ViT on CIFAR-10: {figure('eit')} against {figure('vit')}. Each model has 80 "
        "channels and sees 500,000 training images (10 epochs).",
        "The class token is not on the grid, so it cannot be convolved. In the channels that each layer convolves, the "
        "published code adds the token's own normalised values to it, almost the same ones for every image. Without "
        f"that update EIT has {figure('eit_zero')}, at no cost (`model.cls_conv=zero`).",
        "The paper reports that EIT beats LSRA, which convolves half of the channels in every layer. In our runs "
        "that lead comes mostly from this update, which costs LSRA more: LSRA has "
        f"{figure('lsra_identity')} with it and {figure('lsra')} without.",
        "More high frequencies and more diverse heads do not explain EIT's lead over ViT in our models: EIT has less "
        "of both than ViT ([analysis](docs/analysis.md#three-models-on-cifar-10), one seed).",
        f"Of {len(primary)} primary claims {judged or 'none'} {'have' if judged > 1 else 'has'} a verdict yet: each "
        "needs five runs of each model on all its data sets.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def forest() -> list[Row]:
    """The intervals of all claims that compare the accuracy of two levels."""
    rows = []
    for _, _, claim, verdict in judged_claims():
        if claim.metric == "last_top1" and not claim.reaches:
            found = [*verdict.effects, verdict.mean] if verdict.mean else verdict.effects
            rows += [Row(claim, verdict, effect) for effect in found if effect.low is not None]
    return rows


ANCHORS = dict(
    small_data="small-data-sets",
    ablation="ablation",
    pooling="pooling",
    frequency="high-frequencies",
    diversity="head-diversity",
    imagenet="imagenet-1k",
)


def experiment(name: str) -> str:
    found_experiment, budget, found = evidence(name)
    cells = found_experiment.cells(budget)
    if not found:
        return f"Not yet run ({len(cells)} runs with the budget `{budget}`)."
    folder = f"../results/{found_experiment.name}/{budget}"
    lines = report_table(found_experiment, found)
    done = f"{extent(found_experiment, budget)} {len(found)} of {len(cells)} runs."
    lines += ["", f"Budget `{budget}`: {done} {machines(found)} [Results]({folder})."]
    return "\n".join([*lines, "", f"![{found_experiment.name}, {budget}]({folder}/{FIGURE})"])


def build_results(check: bool) -> None:
    """Build or check the page and the figure of each budget that has runs in results/."""
    for name in experiments.experiment_names():
        loaded = experiments.load(name)
        for budget in loaded.runs.budgets:
            if not read_results(loaded, budget, ROOT / "results"):
                if (page := ROOT / "results" / name / budget / PAGE).exists():
                    sys.exit(f"{page} has no runs in results/: train them, or remove the page")
                continue
            if not check:
                result_tables.build(loaded, budget, ROOT / "results")
            elif stale := stale_file(loaded, budget, ROOT / "results"):
                sys.exit(f"{stale} disagrees with results/: run `make readme`")


def draw(file: Path) -> None:
    """Draw how many channels of each layer are convolved and how many attend, in EIT, LSRA and ViT."""
    figure = Figure(figsize=(9.6, 3.9), dpi=130)
    titles = {"eit": "EIT: convolution decreases with depth", "lsra": "LSRA: half in every layer", "vit": "ViT: none"}
    for column, (family, title) in enumerate(titles.items()):
        model = eit.create_model("eit_tiny", family=family)
        axis = figure.add_axes((0.055 + 0.325 * column, 0.25, 0.275, 0.58))
        depth, dim = len(model.attn_channels), model.embed_dim
        layers = range(1, depth + 1)
        conv = [dim - n for n in model.attn_channels]
        axis.barh(layers, conv, color=CONV, height=0.78)
        axis.barh(layers, model.attn_channels, left=conv, color=ATTENTION, height=0.78)
        axis.set(xlim=(0, dim), ylim=(0.4, depth + 0.6), xticks=[0, dim], yticks=[1, depth])
        axis.set_title(title, fontsize=10.5, color=INK)
        axis.set_xlabel("channels", fontsize=9, labelpad=-8)
        if column == 0:
            axis.set_ylabel("layer (input at the bottom)", fontsize=9, labelpad=-4)
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
        grid = f"{model.grid_size[0]}x{model.grid_size[1]} tokens + class token"
        stem = {
            "conv_pool": "conv 16x16 stride 4, max-pool 3:\noverlapping patches, no position embedding",
            "patch": "patches of 16x16 that do not overlap,\nlearned position embedding",
        }[FAMILIES[family]["stem"]]
        axis.text(dim / 2, -0.75, f"{stem}\n{grid}", ha="center", va="top", fontsize=8.5, color=INK)
    handles = [Patch(color=CONV, label="depthwise 3x3 convolution"), Patch(color=ATTENTION, label="attention")]
    figure.legend(handles=handles, loc="upper center", ncols=2, frameon=False, fontsize=10.5)
    FigureCanvasAgg(figure).print_png(str(file), metadata={"Software": None})


def named(*tables: Callable[[], str]) -> dict[str, Callable[[], str]]:
    return {build.__name__: build for build in tables}


def main() -> None:
    pages = {
        "README.md": named(runs, in_five_lines),
        "docs/models.md": named(zoo),
        "docs/training.md": named(finetuning, distillation),
        "docs/analysis.md": named(analysis),
        "docs/export.md": named(int8),
        "docs/dense.md": named(segmentation),
        "docs/paper.md": named(in_short, claims, unpooled) | {name: partial(experiment, name) for name in ANCHORS},
        "docs/performance.md": named(
            choices,
            speed,
            class_token,
            openvino_forms,
            self_check,
            keep_freed,
            latency,
            step_memory,
            loading,
            scale,
            image_counts,
        ),
    }
    for page, tables in pages.items():
        text = (ROOT / page).read_text()
        for name, build in tables.items():
            start, end = f"<!-- {name}: make readme -->\n", f"<!-- end of {name} -->"
            before, _, rest = text.partition(start)
            after = rest.partition(end)[2]
            text = f"{before}{start}{build()}\n{end}{after}"
        if "--check" not in sys.argv:
            (ROOT / page).write_text(text)
        elif text != (ROOT / page).read_text():
            sys.exit(f"{page} disagrees with the zoo or results/: run `make readme`")
    build_results("--check" in sys.argv)
    images, found = ROOT / "docs" / "images", evidence("imagenet")[2]
    if "--check" in sys.argv:
        if not result_tables.is_current_figure(images / "results.png", found):
            sys.exit("docs/images/results.png disagrees with results/: run `make readme`")
        if not has_digest(images / "forest.png", digest(forest())):
            sys.exit("docs/images/forest.png disagrees with results/: run `make readme`")
        return
    images.mkdir(exist_ok=True)
    draw(images / "eit.png")
    draw_forest(forest(), images / "forest.png")
    result_tables.figure(experiments.load("imagenet"), found, images / "results.png")


if __name__ == "__main__":
    main()
