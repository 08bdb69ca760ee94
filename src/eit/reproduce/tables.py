"""Build tables, a figure and verdicts from results. Nothing is measured here; tables have no published figures."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from PIL import Image

from eit import plots
from eit.errors import few
from eit.files import write_file
from eit.models.registry import VARIANTS, published_results
from eit.reproduce.experiment import COUNTED, Cell, Claim, Experiment, experiment_names, level_names, load
from eit.reproduce.runs import Result, read_results
from eit.reproduce.verdict import Effect, Verdict, contrast, correct, judge_claim

PAGE, FIGURE = "README.md", "figure.png"
COLOURS = {  # models with other names are grey
    "eit": "#0057b8",
    "eit_zero": "#56b4e9",
    "eit_mean": "#009e73",
    "no_convolution": "#cc79a7",
    "lsra": "#e69f00",
    "lsra_identity": "#8c5a00",
    "vit": "#d55e00",
    "resnet": "#777777",
}
DASHES: dict[str, Any] = {"initial": (0, (3, 2)), "trained": "-"}


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± standard deviation (ddof 1); of one value, the value; of none, an empty string."""
    if not values:
        return ""
    return f"{fmean(values):{form}} ± {stdev(values):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def values(results: Iterable[Result], metric: str, **levels: str) -> list[float]:
    """A metric of the runs at these levels, in the order of the seeds."""
    measured = (r.value(metric) for r in results if levels.items() <= r.cell.levels.items())
    return [value for value in measured if value is not None]


def unfinished(experiment: Experiment, budget: str, results: Sequence[Result]) -> list[Cell]:
    """The runs of the budget that are not finished."""
    done = {result.cell.name for result in results}
    return [cell for cell in experiment.cells(budget) if cell.name not in done]


def judge_claims(experiment: Experiment, budget: str, results: Path) -> dict[str, Verdict]:
    """The verdict on each claim of an experiment, from the runs of a budget in `results`.

    Primary claims of all included experiments at the same budget are corrected together; those of an experiment without
    this budget count as not yet run. An experiment of the user's own is corrected alone.
    """
    names = experiment_names() if experiment.name in experiment_names() else []
    others = [load(name) for name in names if name != experiment.name]
    verdicts: dict[tuple[str, str], Verdict] = {}
    for judged in [experiment, *others]:
        claims = {key: claim for key, claim in judged.claims.items() if judged is experiment or claim.primary}
        if not claims:
            continue
        runs, planned = [], []
        if budget in judged.runs.budgets:
            runs, planned = read_results(judged, budget, results), judged.cells(budget)
        verdicts |= {
            (judged.name, key): judge_claim(claim, runs, planned, judged.control) for key, claim in claims.items()
        }
    verdicts |= correct({key: verdict for key, verdict in verdicts.items() if verdict.primary})
    return {key: verdicts[experiment.name, key] for key in experiment.claims}


def report_table(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    """The experiment's own table of measurements; of another experiment's runs only those that its claims compare."""
    if experiment.of:
        named = {level for claim in experiment.claims.values() for level in claim.levels}
        axis = next(iter(experiment.claims.values())).axis
        results = [result for result in results if result.cell.levels[axis] in named]
    return own_or_default(TABLES, experiment.name, results, runs_table)(experiment, results)


def own_or_default(functions: dict[str, Any], name: str, results: Sequence[Result], default: Any) -> Any:
    """The experiment's own function, if all runs have the axes that it needs (data, model or variant)."""
    axes = {"data", "variant" if name == "ablation" else "model"}
    return functions.get(name, default) if all(axes <= r.cell.levels.keys() for r in results) else default


def build(experiment: Experiment, budget: str, results: Path) -> Path:
    """Write the page, README.md, and the figure of a budget next to its runs."""
    folder, finished = results / experiment.name / budget, read_results(experiment, budget, results)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / PAGE, page(experiment, budget, results))
    if finished:
        figure(experiment, finished, folder / FIGURE)
    return folder / PAGE


def page(experiment: Experiment, budget: str, folder: Path) -> str:
    """The text of README.md: measurements and verdicts, from the runs in the results folder."""
    results = read_results(experiment, budget, folder)
    left = [cell.name for cell in unfinished(experiment, budget, results)]
    undone = f" Not finished: {few(left)}." if results and left else ""
    lines = [
        f"# {experiment.name}, budget {budget}",
        "",
        f"What it shows: {experiment.shows}.",
        "",
        f"Refuted if: {experiment.refuted}.",
        "",
        f"{extent(experiment, budget)} {len(results)} of {len(results) + len(left)} runs are finished.{undone} "
        f"{machines(results)}".rstrip(),
        "",
    ]
    if results:
        lines += [*report_table(experiment, results), ""]
    lines += claims_table(experiment, judge_claims(experiment, budget, folder))
    if results:
        lines += ["", f"![{experiment.name}, {budget}]({FIGURE})"]
    return "\n".join(lines) + "\n"


def stale_file(experiment: Experiment, budget: str, results: Path) -> Path | None:
    """The page or the figure, if it is missing or was not built from the runs in `results`; otherwise None."""
    folder, finished = results / experiment.name / budget, read_results(experiment, budget, results)
    if not (folder / PAGE).exists() or (folder / PAGE).read_text(encoding="utf-8") != page(experiment, budget, results):
        return folder / PAGE
    return None if is_current_figure(folder / FIGURE, finished) else folder / FIGURE


def is_current_figure(file: Path, results: Sequence[Result]) -> bool:
    """Whether the figure exists and was drawn from these results."""
    return has_digest(file, digest(results))


def has_digest(file: Path, digest: str) -> bool:
    """Whether the figure exists and its metadata has this digest of what it shows."""
    try:
        with Image.open(file) as image:
            return bool(image.info.get("Description") == digest)
    except OSError:
        return False


def verdicts(experiment: Experiment, budget: str, folder: Path) -> dict[str, Any]:
    """The content of the page as JSON."""
    results, claims = read_results(experiment, budget, folder), {}
    for name, verdict in judge_claims(experiment, budget, folder).items():
        fields = asdict(verdict)
        claims[name] = dict(says=experiment.claims[name].says, gaps=fields.pop("effects"), **fields)
    return dict(
        experiment=experiment.name,
        budget=budget,
        runs=[dict(name=r.cell.name, **r.summary, **r.measured) for r in results],
        missing=[cell.name for cell in unfinished(experiment, budget, results)],
        claims=claims,
    )


def extent(experiment: Experiment, budget: str) -> str:
    """Sizes and epochs of a budget's runs of this package's models."""
    epochs: dict[str, dict[str, None]] = {}  # size -> epochs, both in order
    for cell in experiment.cells(budget):
        recipe = cell.recipe(Path(), {})
        if variant := VARIANTS.get(recipe.model.name):
            width, depth = recipe.model.embed_dim or variant.embed_dim, recipe.model.depth or variant.depth
            epochs.setdefault(f"{depth} layers of {width} channels", {})[str(recipe.train.epochs)] = None
    return "; ".join(f"{size}, epochs: {', '.join(counts)}" for size, counts in epochs.items()) + "."


def machines(results: Sequence[Result]) -> str:
    """The machines that trained the runs, and the commits of the code."""
    if not results:
        return ""
    environments = [result.environment for result in results]
    names = set()
    for e in environments:
        processes, threads = e["world_size"], e["threads"]
        each = f"{processes} process{'es' * (processes > 1)} with {threads} thread{'s' * (threads > 1)}"
        names.add(f"{each} on {e['device'].removeprefix('cpu: ')}, torch {e['packages']['torch']}")
    commits = sorted({e["commit"][:10] + e["commit"][40:] for e in environments if e["commit"]})  # + if changed since
    return f"Trained by {'; '.join(sorted(names))}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}."


def claims_table(experiment: Experiment, verdicts: dict[str, Verdict]) -> list[str]:
    """One line per claim."""
    rows = [
        [
            claim.says,
            claim.paper or "ours",
            f"`{claim.code}`",
            effects_text(verdicts[key], claim),
            verdict_text(verdicts[key]),
        ]
        for key, claim in experiment.claims.items()
    ]
    return markdown(["claim", "paper", "in the code", "difference [interval]", "verdict"], rows)


def verdict_text(verdict: Verdict) -> str:
    """The verdict, its evidence, and whether it is exploratory."""
    text = f"**{verdict.word}**" + (f", {verdict.evidence}" if verdict.evidence else "")
    return f"{text} (exploratory)" if verdict.p is not None and not verdict.primary else text


def scaled(metric: str) -> tuple[float, str, str]:
    """Factor, format and unit for showing a metric."""
    kind = metric.rpartition(".")[2]
    if kind.startswith("share"):
        return 100, "+.2f", " points"
    if kind in ("diversity", "distance"):
        return 1, "+.3f", " px"
    if kind == "seconds":
        return 1, "+.0f", " s"
    if kind in COUNTED:
        return 1e-6, "+.3f", " M"
    return 1, "+.2f", " points"


def effects_text(verdict: Verdict, claim: Claim) -> str:
    """The difference and its interval on each data set, and the mean over the data sets."""
    differences = [*verdict.effects, verdict.mean] if verdict.mean else verdict.effects
    parts = [effect_text(effect, claim.metric, interval=claim.metric not in COUNTED) for effect in differences]
    return ", ".join(parts) + (" (90% intervals)" if claim.equal and differences else "")


def effect_text(effect: Effect, metric: str, interval: bool = True) -> str:
    """`cifar10 +6.55 [+4.10, +9.00] points (5 and 4 runs)`."""
    factor, form, unit = scaled(metric)
    text = f"{effect.data} {factor * effect.difference:{form}}"
    if interval and effect.low is not None and effect.high is not None:
        text += f" [{factor * effect.low:{form}}, {factor * effect.high:{form}}]"
    text += unit
    if interval and effect.low is None and min(effect.runs) > 1:
        text += " (interval not available)"
    if not effect.judged and interval and effect.runs != (0, 0):
        text += f" ({effect.runs[0]} and {effect.runs[1]} runs)"
    return text


# -- Tables of each experiment ----------------------------------------------------------------------------------------


def runs_table(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    """Accuracy and cost, one row for the runs that differ only in their seed."""
    cells = [result.cell for result in results]
    axes = [axis for axis in cells[0].levels if axis != "seed"]
    sizes = experiment.runs.measure.sizes
    rows = []
    for key in dict.fromkeys(tuple(cell.levels[axis] for axis in axes) for cell in cells):
        levels = dict(zip(axes, key, strict=True))
        last, best = (values(results, metric, **levels) for metric in ("last_top1", "best_top1"))
        rows.append(
            [
                *key,
                str(len(last)),
                spread(last),
                spread(best),
                *(spread(values(results, f"size.{percent}", **levels)) for percent in sizes),
                f"{values(results, 'params', **levels)[0]:,.0f}",
                f"{values(results, 'macs', **levels)[0] / 1e6:.2f} M",
            ]
        )
    at_sizes = [f"at {percent}% of the size" for percent in sizes]
    return markdown([*axes, "seeds", "top-1 (%), last epoch", "best epoch", *at_sizes, "parameters", "MACs"], rows)


def by_layer(results: Sequence[Result], metric: str) -> Iterator[tuple[str, str, str, list[list[float]]]]:
    """(data set, model, weights, runs): `weights` is initial or trained, `runs` has the layers' values of each run."""
    data, model = (level_names([r.cell for r in results], axis) for axis in ("data", "model"))
    for levels in itertools.product(data, model):
        own = [r.measured for r in results if (r.cell.levels["data"], r.cell.levels["model"]) == levels]
        for state in ("initial", "trained"):
            if runs := [measures[state][metric] for measures in own if measures.get(state, {}).get(metric)]:
                yield *levels, state, runs


def layers_table(metric: str, factor: float, unit: str, form: str) -> Any:
    """A function for the table of a metric by layer: mean ± standard deviation over seeds, initial and trained."""

    def table(experiment: Experiment, results: Sequence[Result]) -> list[str]:
        rows, depth = [], 0
        for data, model, state, runs in by_layer(results, metric):
            depth = max(depth, len(runs[0]))
            layers = [spread([factor * value for value in layer], form) for layer in zip(*runs, strict=True)]
            mean = spread([factor * fmean(run) for run in runs], form)
            rows.append([data, model, state, str(len(runs)), *layers, mean])
        head = ["data", "model", "weights", "seeds", *(f"layer {i + 1}" for i in range(depth)), "mean"]
        return [*markdown(head, rows), "", f"{unit}; mean ± standard deviation over seeds."]

    return table


def frequency_table(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    """The shares without and with DC."""
    lines = []
    for metric, name in (("share", "without DC"), ("share_with_dc", "with DC")):
        noise = {round(100 * r.measured["trained"][f"noise_{metric}"], 1) for r in results if "trained" in r.measured}
        unit = f"Percent of the energy {name} above half the Nyquist frequency"
        unit += f" (white noise has {', '.join(map(str, sorted(noise)))})"
        lines += [*layers_table(metric, 100, unit, ".1f")(experiment, results), ""]
    return lines[:-1]


def diversity_table(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    """Diversity, and the entropy that decides whether diversity can be tested."""
    pixels = layers_table("diversity", 1, "Standard deviation of the heads' attention distances, in pixels", ".3f")
    entropy = "Percent of the entropy of uniform attention, mean over heads (above 95: diversity is not testable)"
    lines = pixels(experiment, results)
    if any(r.measured.get("trained", {}).get("entropy") for r in results):
        lines += ["", *layers_table("entropy", 100, entropy, ".1f")(experiment, results)]
    return lines


# The eight variants of the ablation's factorial design: does it have each of the FACTORS?
FACTORIAL = {
    "eit": (1, 0, 1),
    "no_convolution": (1, 0, 0),
    "position_embedding": (1, 1, 1),
    "no_convolution_position": (1, 1, 0),
    "patch_stem": (0, 0, 1),
    "patch_no_convolution": (0, 0, 0),
    "patch_position": (0, 1, 1),
    "vit": (0, 1, 0),
}
FACTORS = ("the conv + max-pool stem", "the position embedding", "convolution in the layers")


def ablation_table(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    """All variants, and the effects of the factorial design if each of its variants has at least two runs."""
    lines, rows = runs_table(experiment, results), []
    for data in level_names([result.cell for result in results], "data"):
        top1s = [values(results, "last_top1", data=data, variant=variant) for variant in FACTORIAL]
        if min(map(len, top1s)) < 2:
            continue
        for chosen in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
            signs = [math.prod(2 * has[factor] - 1 for factor in chosen) for has in FACTORIAL.values()]
            name = " x ".join(FACTORS[factor] for factor in chosen)
            effect = contrast(top1s, [sign / 4 for sign in signs], data)
            rows.append([name, effect_text(effect, "last_top1")])
    if rows:
        lines += ["", *markdown(["effect of (x: interaction)", "on top-1 after the last epoch [95% interval]"], rows)]
    return lines


TABLES: dict[str, Any] = {"ablation": ablation_table, "frequency": frequency_table, "diversity": diversity_table}


# -- Figures ----------------------------------------------------------------------------------------------------------


def figure(experiment: Experiment, results: Sequence[Result], file: Path) -> None:
    """Draw finished runs. The metadata of the picture has a digest of what it shows."""
    metadata = {"Software": None, "Description": digest(results)}
    if experiment.name == "imagenet":
        plots.results(with_measured(results), file, metadata=metadata)
        return
    from matplotlib.figure import Figure

    shown = Figure(dpi=110, layout="constrained")
    own_or_default(DRAWINGS, experiment.name, results, draw_accuracy)(shown, results)
    plots.save(shown, file, metadata=metadata)


def with_measured(results: Sequence[Result]) -> list[plots.Point]:
    """Published ImageNet-1K results up to 100 M parameters, and runs of the experiment imagenet."""
    points = [point for point in published_results() if point.params_m <= 100]
    for result in results:
        cost = result.summary["params"] / 1e6, result.measured["macs"] / 1e9
        points.append(plots.Point("EIT", result.cell.name, *cost, result.summary["last_top1"], False, True))
    return points


def digest(results: Sequence[Result]) -> str:
    """A digest of everything that a figure can show."""
    content = [[r.cell.name, r.summary, {k: v for k, v in r.measured.items() if k != "environment"}] for r in results]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def draw_accuracy(shown: Any, results: Sequence[Result]) -> None:
    """Last-epoch top-1 of every run, one row for the runs that differ only in their seed."""
    cells = [r.cell for r in results]
    data = list(dict.fromkeys(cell.data for cell in cells))
    variants = list(dict.fromkeys(variant_name(cell) for cell in cells))
    shown.set_size_inches(4.6 * len(data), 1.1 + 0.36 * len(variants))
    for panel, name in zip(shown.subplots(1, len(data), squeeze=False)[0], data, strict=True):
        for y, variant in enumerate(variants):
            own = [r for r in results if r.cell.data == name and variant_name(r.cell) == variant]
            top1s = values(own, "last_top1")
            colour = COLOURS.get(variant, "#555555")
            panel.plot(top1s, [y] * len(top1s), "o", color=colour, alpha=0.55, markeredgewidth=0)
            if top1s:
                panel.plot([fmean(top1s)] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2)
        panel.set_yticks(range(len(variants)), [variant.replace("_", " ") for variant in variants])
        panel.set_ylim(len(variants) - 0.5, -0.5)
        panel.set(title=name, xlabel="top-1 after the last epoch (%)")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)


def variant_name(cell: Cell) -> str:
    """The levels of a run, without data set and seed."""
    return " ".join(level for axis, level in cell.levels.items() if axis not in ("data", "seed")) or cell.data


def draw_layers(factor: float, **labels: str) -> Any:
    """A function that draws metrics by layer, one row each: mean and range over seeds, initial values dashed."""

    def panels_of(shown: Any, results: Sequence[Result]) -> None:
        data = level_names([r.cell for r in results], "data")
        shown.set_size_inches(4.6 * len(data) + 1.2, 3.1 * len(labels) + 0.3)
        rows = shown.subplots(len(labels), len(data), squeeze=False, sharex=True, sharey="row")
        legend = {}
        for (metric, label), row in zip(labels.items(), rows, strict=True):
            panels = dict(zip(data, row, strict=True))
            for name, model, state, runs in by_layer(results, metric):
                layers = [[factor * value for value in layer] for layer in zip(*runs, strict=True)]
                x, colour = range(1, len(layers) + 1), COLOURS.get(model, "#555555")
                panels[name].fill_between(x, list(map(min, layers)), list(map(max, layers)), color=colour, alpha=0.15)
                style: dict[str, Any] = dict(color=colour, linestyle=DASHES[state], marker=".")
                (legend[f"{model}, {state}"],) = panels[name].plot(x, list(map(fmean, layers)), **style)
            for panel in row:
                panel.xaxis.get_major_locator().set_params(integer=True)
                panel.grid(alpha=0.3)
                panel.spines[["top", "right"]].set_visible(False)
            row[0].set_ylabel(label)
        for name, top, bottom in zip(data, rows[0], rows[-1], strict=True):
            top.set_title(name)
            bottom.set_xlabel("layer")
        shown.legend(legend.values(), legend.keys(), loc="outside right center", frameon=False)

    return panels_of


DRAWINGS: dict[str, Any] = {
    "frequency": draw_layers(100, share="share without DC (%)", share_with_dc="share with DC (%)"),
    "diversity": draw_layers(1, diversity="head diversity (px)"),
}
