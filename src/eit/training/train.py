"""`eit.train`: a run from Python."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from eit.config import Recipe, load_recipe, parse_overrides, parse_recipe
from eit.console import say
from eit.errors import UserError
from eit.training import trainer


def train(recipe: str | os.PathLike[str] | Recipe, /, **keys: Any) -> dict[str, Any]:
    """Train a model from a recipe, or resume a stopped run, as `eit train` does.

    Args:
        recipe: the name of an included recipe, the path of a .yaml file, or a `Recipe`.
        **keys: keys of the recipe that are changed, section by section: `train=dict(epochs=3)`,
            `data=dict(root=folder)`, `out="runs/mine"`, `seed=1`. `eit recipes show NAME` prints all of them.

    Returns:
        What summary.json of the run folder holds, and `folder`, for `eit.load`: best_top1, best_epoch (from 0),
        last_top1, last_top5, last_ema_top1 (None without a moving average), epochs, seconds, params; accuracies in
        percent, on the validation images.

    Raises:
        UserError: no such recipe or key, or wrong data, values or weights, before anything is trained.
        eit.training.trainer.Stopped: SIGINT or SIGTERM was received; the run is saved, and the same call resumes it.
        FloatingPointError: the loss is not finite.

    Examples:
        >>> import eit
        >>> small = dict(embed_dim=8, depth=1, num_heads=1)
        >>> run = eit.train("digits", model=small, train=dict(epochs=1, warmup_epochs=0), out="runs/small")
        >>> run["epochs"], run["folder"]
        (1, 'runs/small')
        >>> eit.load(run["folder"]).card.classes[-1]
        '9'
    """
    words = list(_overrides(keys))
    if isinstance(recipe, Recipe):
        resolved = parse_recipe(parse_overrides(words, recipe.model_dump(mode="json")))
    elif isinstance(recipe, str | os.PathLike):
        resolved = load_recipe(os.fspath(recipe), words, say)
    else:
        raise UserError(f"train takes the name or path of a recipe, or a Recipe, not {type(recipe).__name__}")
    return dict(folder=str(resolved.run_folder())) | trainer.train(resolved)


def _overrides(keys: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The `key=value` words of the command line, so that both are read and refused in the same way."""
    for key, value in keys.items():
        name = f"{prefix}{key}"
        if not prefix and name in Recipe.model_fields and isinstance(value, Mapping):
            yield from _overrides(value, f"{name}.")
            continue
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            try:
                plain = list(value) if isinstance(value, tuple) else value
                value = yaml.safe_dump([plain], default_flow_style=True, width=10**6).strip()[1:-1]
            except yaml.YAMLError:
                raise UserError(
                    f"{name} is of the type {type(value).__name__}: a number, text or a list is expected"
                ) from None
        yield f"{name}={value}"
