"""`eit bench MODEL...`."""

import json
import os
import sys
from enum import StrEnum
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from eit.cli.options import Device, Json, Precision, Size, complete_model, file_to_write, start_alone
from eit.cli.output import print_table
from eit.errors import UserError, printable
from eit.files import expand_path
from eit.imports import quick_imports

if TYPE_CHECKING:
    from eit.benchmark.bench import Measurement, Record
    from eit.benchmark.self_check import SelfCheck


class Mode(StrEnum):
    """As `eit.benchmark.bench.MODES`."""

    infer = "infer"
    train = "train"


class Runtime(StrEnum):
    """As `eit.benchmark.bench.RUNTIMES`."""

    eager = "eager"
    compile = "compile"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            parser=expand_path,
            help="eit_mini, lsra/eit_mini; timm/NAME; weights files, run folders, the included weights digits.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    modes: Annotated[
        list[Mode] | None,
        typer.Option("--mode", metavar="infer|train", help="Measure inference or training; repeatable; default: both."),
    ] = None,
    precisions: Annotated[
        list[Precision] | None,
        typer.Option(
            "--precision",
            metavar="fp32|tf32|bf16|fp16",
            help="Compute in this precision; repeatable; default: fp32 and bf16.",
        ),
    ] = None,
    runtimes: Annotated[
        list[Runtime] | None,
        typer.Option(
            "--runtime",
            metavar="eager|compile|onnxruntime|openvino",
            help="Run the models with this runtime; repeatable; default: all that are installed.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Images per batch; inference of a single image is also measured."),
    ] = 16,
    size: Size = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of CPU threads; default: torch's choice.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of rounds; each round measures every combination once.")
    ] = 5,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Export with a fixed batch, as eit export --fixed does.")
    ] = False,
    naive: Annotated[
        bool, typer.Option("--naive", help="Also time a plain PyTorch implementation, as the baseline.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Also measure the peak memory of a step.")
    ] = True,
    keep: Annotated[
        bool, typer.Option("--keep-freed", help="Keep freed memory for the next step, as eit train does (Linux).")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--self-check",
            help="Time each of this package's CPU operators against PyTorch's on this machine, with MODEL or eit_mini.",
        ),
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Use the operators that --self-check found to be faster from now on.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", parser=expand_path, help="Draw a bar chart into FILE (.png, .pdf or .svg)."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure speed, and its share of the machine's peak.

    \b
    eit bench eit_mini timm/deit_tiny_patch16_224
    eit bench runs/pets --batch-size 64 --out speed.png
    eit bench --self-check --save

    It measures inference of one image and of a batch, training steps on random images, and the peak of this machine,
    by matrix products. Every round measures each combination once. The tables show medians and spread over the rounds.
    """
    if not names and not check:
        raise UserError("eit bench needs a model, such as eit_mini; or --self-check")
    if save and not check:
        raise UserError("--save keeps what --self-check finds: give --self-check too")
    if save and rounds < 5:
        raise UserError(
            f"--rounds {rounds} is too few for --save: give at least 5, because the choice is used from then on"
        )
    if check and len(names or ()) > 1:
        raise UserError(f"--self-check takes one model, not {len(names or ())}")
    of_models = {
        "--mode": modes,
        "--precision": precisions,
        "--runtime": runtimes,
        "--fixed": fixed,
        "--naive": naive,
        "--no-memory": not memory,
        "--keep-freed": keep,
        "--out": out,
    }
    if check and (given := [option for option, value in of_models.items() if value]):
        raise UserError(
            f"--self-check does not take {', '.join(given)}: it times fp32 inference and training in PyTorch"
        )
    picture = file_to_write(out, "--out") if out else None
    if threads is not None and threads > (cores := os.cpu_count() or 1):
        raise UserError(f"--threads {threads}: this machine has {cores} cores; give at most {cores}")
    with quick_imports(freeze=True):
        from eit.benchmark.bench import DEFAULT_PRECISIONS, MODES, Options
        from eit.benchmark.bench import bench as run
        from eit.benchmark.sections import panels
        from eit.benchmark.self_check import self_check
        from eit.memory import keep_freed
        from eit.plots import bars
        from eit.precision import PRECISIONS

    if keep:
        keep_freed()
    options = Options(
        batch_size,
        size,
        threads,
        _values(modes) or MODES,
        [name for name in PRECISIONS if name in (_values(precisions) or DEFAULT_PRECISIONS)],
        _values(runtimes) or None,
        rounds,
        naive,
        memory,
        fixed,
        start_alone(device, "eit bench"),
    )
    if check:
        print_self_check(self_check((names or ["eit_mini"])[0], options), save, as_json)
        return
    record = run(names or [], options)
    if picture:
        bars(panels(record), picture)
    if as_json:
        print(json.dumps(record.as_json(), indent=2))
    else:
        print_record(record)


def _values(given: list[Mode] | list[Precision] | list[Runtime] | None) -> list[str]:
    """Each value once, in the order in which they were given."""
    return list(dict.fromkeys(member.value for member in given or ()))


def print_self_check(found: "SelfCheck", save: bool, as_json: bool) -> None:
    from eit.operators import choice_file, save_choice

    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        head = ["operators", "inference", "training", "pays"]
        rows = []
        for gain in found.gains:
            speeds = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in (gain.infer, gain.train)]
            rows.append([", ".join(gain.operators), *speeds, "yes" if gain.pays else "no"])
        print_table(head, rows)
        about = found.about
        print(
            f"{about['device']}, {about['threads']} threads, fp32, batch {about['batch_size']}; speed relative to "
            f"PyTorch's operators, medians and spread of {about['rounds']} rounds"
        )
        print(f"faster here: {', '.join(found.choice) or 'none'}; in use: {', '.join(found.in_use) or 'none'}")
    if save:
        save_choice(found.choice)
        print(f"saved in {choice_file()}; delete it to undo this", file=sys.stderr)
    elif set(found.choice) != set(found.in_use):
        print("add --save to use those that are faster here", file=sys.stderr)


def print_record(record: "Record") -> None:
    """A table for each mode and batch, and the lines below the tables."""
    from eit.benchmark.sections import is_latency, sections
    from eit.console import out

    for title, rows in sections(record).items():
        out.print(f"\n{title}")
        with_memory = any(row.memory is not None for row in rows)
        unit = "ms" if is_latency(rows[0]) else "images/s"
        head = ["model", "runtime", "precision", unit, "spread", "ratio", "of peak", *(["MiB"] if with_memory else [])]
        print_table(head, [_cells(row, with_memory) for row in rows])
    print(_footer(record))


def _cells(row: "Measurement", with_memory: bool) -> list[str]:
    from rich.markup import escape

    from eit.benchmark.sections import rounded, speeds

    values = speeds(row)
    return [
        escape(printable(row.arm.label)),
        row.arm.runtime,
        row.arm.precision,
        rounded(median(values)),
        f"{rounded(min(values))} to {rounded(max(values))}",
        f"{median(row.ratios):.2f}",
        f"{100 * row.share:.0f}%",
        *(["-" if row.memory is None else f"{row.memory / 2**20:,.0f}"] if with_memory else []),
    ]


def _footer(record: "Record") -> str:
    about = record.about
    rounds = f"{about['rounds']} round{'s' if about['rounds'] > 1 else ''}"
    lines = [f"{about['device']}, {about['threads']} threads; medians and spread of {rounds}"]
    for precision, routes in record.peaks.items():
        ways = sorted(((median(rates), name) for name, rates in routes.items()), reverse=True)
        others = "".join(f"; {name} {rate / 1e9:,.0f}" for rate, name in ways[1:])
        lines.append(f"matrix multiply peak, {precision}: {ways[0][0] / 1e9:,.0f} GFLOP/s by {ways[0][1]}{others}")
    lines.append(f"ratio: speed / that of {record.baseline}; of peak: MACs x 2 x batch / time / peak of the precision")
    if any(row.memory is not None for row in record.rows):
        lines.append("MiB: peak memory of a step beyond the model and its images")
    lines += [f"not measured: {reason}" for reason in record.left_out]
    return "\n".join(map(printable, lines))
