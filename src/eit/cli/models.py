"""`eit models`, `eit models plot FILE`."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from eit.cli.help import Program
from eit.cli.options import Json, RedirectingGroup, file_to_write, refuse_before_command
from eit.cli.output import print_table
from eit.files import expand_path
from eit.imports import quick_imports


class ModelsGroup(RedirectingGroup):
    def redirect(self, words: list[str]) -> list[str] | None:
        for number, word in enumerate(words):
            option, _, value = word.partition("=")
            if option == "--plot":
                return ["models", "plot", value or next(iter(words[number + 1 :]), "FILE")]
        return None


models = Program(cls=ModelsGroup, invoke_without_command=True)


@models.callback()
def list_all(
    context: typer.Context,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """List models and weights, and where the weights are.

    \b
    eit models
    eit models --json
    eit models plot published.png
    """
    refuse_before_command(context, json=as_json, markdown=markdown)
    if context.invoked_subcommand is not None:
        return
    rows, weights = describe_models(), describe_weights()
    if as_json:
        print(json.dumps(rows + weights, indent=2))
        return
    cells = [
        (
            r["name"],
            f"{r['params']:,}",
            *(f"{r[key] / 1e9:.3f} G" for key in ("macs", "logits_macs", "published_macs")),
            str(r["tokens"]),
            *("-" if r[key] is None else f"{r[key]}%" for key in ("published_top1", "published_top5")),
        )
        for r in rows
    ]
    head = ("model", "parameters", "MACs", "for logits", "paper's FLOPs", "tokens", "top-1", "top-5")
    if markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)))
        return
    print_table(head, cells)
    print_legend()
    print_table(
        ("weights", "here", "size", "top-1", "how to get them"),
        [weights_row(row) for row in weights + rows if "use" in row or row["weights"]],
        text=("here", "how to get them"),
    )
    print(
        "top-1 of weights that are here: on the validation images of their run. eit predict, eit eval and eit convert\n"
        "read the authors' .pth files. docs/weights.md lists more weights."
    )


@models.command()
def plot(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", parser=expand_path, help="The picture to write: .png, .pdf or .svg.", show_default=False
        ),
    ],
) -> None:
    """Draw published top-1 against model size.

    \b
    eit models plot published.png
    eit models plot published.pdf

    One panel has parameters on its axis, the other has multiply-accumulates. Many model families are shown.
    """
    with quick_imports(freeze=True):
        from eit.models.registry import published_results
        from eit.plots import results

    picture = file_to_write(file, "FILE")
    points = [point for point in published_results() if point.params_m <= 100]
    results(points, picture)
    print(f"{file}: {len(points)} published models of {len({p.family for p in points})} families, up to 100 M")
    print("parameters; ImageNet-1K alone, 224x224, no teacher. The sources are in published.csv of the package.")


def describe_models() -> list[dict[str, Any]]:
    """Name, sizes, costs, and published results (None if there are none) of each model."""
    with quick_imports(freeze=True):
        import torch

        from eit.models.complexity import complexity
        from eit.models.registry import MODELS, VARIANTS, create_model

    rows: list[dict[str, Any]] = []
    for name, (variant, _) in MODELS.items():
        with torch.device("meta"):  # shapes are enough
            model = create_model(name)
        size = dict(tokens=model.grid_size[0] * model.grid_size[1], **asdict(complexity(model)))
        own = asdict(variant)
        if name not in VARIANTS:
            own |= dict.fromkeys(key for key in own if key.startswith("published") or key == "weights")
        rows.append(dict(name=name, **size, **own, weights_ship=False))
    return rows


def describe_weights() -> list[dict[str, Any]]:
    """Like `describe_models`, for the weights of this package; `weights` is their file, or None if it is not here."""
    with quick_imports(freeze=True):
        from eit.models.complexity import complexity
        from eit.weights.load import FOR, INCLUDED, load

    rows: list[dict[str, Any]] = []
    for name, use in FOR.items():
        row: dict[str, Any] = dict(name=name, use=use, weights=None, weights_ship=name in INCLUDED)
        if name in INCLUDED:
            model, file = load(name), INCLUDED[name]
            card, cost = model.card, complexity(model, (model.card.in_chans, model.card.size, model.card.size))
            found = dict(
                weights=str(file), weights_bytes=file.stat().st_size, top1=(card.metrics or {}).get("val_top1")
            )
            row |= found | dict(tokens=model.grid_size[0] * model.grid_size[1], **asdict(cost))
        rows.append(row)
    return rows


def weights_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Name, here, size, top-1, and how to get them, of a row of `describe_models` or `describe_weights`."""
    if row["weights_ship"]:
        size, top1 = row["weights_bytes"], "-" if row["top1"] is None else f"{row['top1']:.1f}%"
        return row["name"], "yes", f"{size / 1e6:.1f} MB", top1, f"eit predict {row['name']}: {row['use']}"
    if "use" in row:
        return row["name"], "no", "-", "-", "not included in this version"
    return (
        f"the authors' {row['name']}",
        "no",
        f"{4 * row['params'] / 1e6:.0f} MB",
        f"{row['published_top1']}%",
        row["weights"],
    )


def print_legend() -> None:
    print(
        "MACs: multiply-accumulates of one 224x224 image. for logits: those of model(images), which does not compute\n"
        "the tokens that the head does not read. paper's FLOPs: as the paper counts (no attention products, but norms\n"
        "and pooling). top-1, top-5: ImageNet-1K as published, not measured here; eit_plus has no published results."
    )
