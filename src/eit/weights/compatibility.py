"""Whether weights fit a model, and what differs if they do not."""

import sys
from typing import Any

from torch import Tensor

from eit.errors import UserError, first_line
from eit.models.registry import head_names
from eit.weights.formats import StateDict


def check_compatible(model: Any, state: StateDict, source: str) -> None:
    """Raise a UserError that says how `state` differs from what `model` needs."""
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    types = [k for k in own if k in state and own[k].is_floating_point() != state[k].is_floating_point()]
    heads = tuple(f"{head}." for head in head_names(model))
    if shapes and all(k.startswith(heads) and state[k].ndim for k in shapes) and not missing and not extra:
        have, want = len(state[shapes[0]]), len(own[shapes[0]])
        raise UserError(
            f"{source} has a head for {have} classes, {want} are needed; model.reset_head=true makes a new one"
        )
    faults = [
        *(f"{k} is {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in shapes),
        *(f"{k} is of {state[k].dtype} instead of {own[k].dtype}" for k in types),
        *(f"{k} is missing" for k in missing),
        *(f"{k} is unknown" for k in extra),
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{source} does not fit the model: {', '.join(faults[:3])}{more}")


def resample_positions(model: Any, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """`state` with its tables of positions interpolated to the model's resolution."""
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # by timm's conventions
    own = model.state_dict()
    if fit is None or all(k not in own or own[k].shape == v.shape for k, v in state.items()):
        return state
    try:
        return fit(state, model)
    except Exception as error:
        raise UserError(f"{source} does not fit the model: {first_line(error)}") from None
