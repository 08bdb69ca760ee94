"""`eit lr RECIPE [KEY=VALUE...]`."""

from typing import Annotated

import typer

from eit.cli.options import Json, Overrides, RecipeName, file_to_write, start_alone
from eit.cli.output import print_result
from eit.files import expand_path
from eit.imports import quick_imports


def lr(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        str, typer.Option(metavar="FILE", parser=expand_path, help="Draw the curve into FILE (.png, .pdf or .svg).")
    ] = "lr.png",
    steps: Annotated[int, typer.Option(metavar="N", min=10, max=10_000, help="Number of training steps.")] = 100,
    as_json: Json = False,
) -> None:
    """Find a learning rate by a sweep, and draw the loss.

    \b
    eit lr photos data.root=pets
    eit lr cifar10 data.root=pets --steps 200 --out lr.pdf

    Some steps are trained while the rate rises from 1e-6 to 1. The suggestion is the rate at which the loss falls
    fastest. No run folder is made.
    """
    with quick_imports(freeze=True):
        from eit.config import load_recipe
        from eit.console import say
        from eit.plots import lr_curve
        from eit.training.lr_finder import find_lr

    file = file_to_write(out, "--out")
    resolved = load_recipe(recipe, overrides or (), say)
    start_alone(resolved.train.device, "eit lr")
    sweep = find_lr(resolved, steps)
    lr_curve(sweep.rates, sweep.losses, sweep.lr, file)
    text = f"suggestion: optim.lr={sweep.optim_lr:.1e} (the recipe has {resolved.optim.lr:.1e}); the curve is in {out}"
    result = dict(optim_lr=sweep.optim_lr, lr=sweep.lr, rates=sweep.rates, losses=sweep.losses, picture=out)
    print_result(result, as_json, text)
