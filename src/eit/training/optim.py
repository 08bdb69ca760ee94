"""The optimizer, its learning rate and the schedule of the rate."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from eit.config import Recipe
from eit.data.order import SampleOrder


def make_optimizer(recipe: Recipe, model: nn.Module, order: SampleOrder) -> torch.optim.Optimizer:
    """The optimizer of the recipe. Norms, biases, the class token and position embeddings have no weight decay."""
    config, lr = recipe.optim, peak_lr(recipe, order)
    options: dict[str, Any] = dict(betas=config.betas, eps=config.eps, layer_decay=config.layer_decay)
    if config.name == "adamw":
        # A fused step takes a third of the time of a loop over the parameters. On MPS it ignored `found_inf` before
        # torch's pull request 186360, so that a gradient that is not finite would reach the weights.
        options["fused"] = next(model.parameters()).device.type != "mps"
    return create_optimizer_v2(model, config.name, lr=lr, weight_decay=config.weight_decay, **options)


def peak_lr(recipe: Recipe, order: SampleOrder) -> float:
    """The peak learning rate: `optim.lr`, in proportion to the global batch if `optim.lr_batch` is set."""
    return recipe.optim.lr * order.global_batch / (recipe.optim.lr_batch or order.global_batch)


def make_lr_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, order: SampleOrder) -> CosineLRScheduler:
    """Linear warm-up, then cosine; updated each step, from step 0 on (the published runs were an epoch late)."""
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.train.epochs * order.steps,
        lr_min=recipe.optim.min_lr,
        warmup_t=round(recipe.train.warmup_epochs * order.steps),
        warmup_lr_init=recipe.optim.warmup_lr,
        t_in_epochs=False,
    )


def largest_lr(optimizer: torch.optim.Optimizer) -> float:
    """The largest rate of the parameter groups, which differ if `optim.layer_decay` is set."""
    return max(group["lr"] for group in optimizer.param_groups)


def can_skip_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step changes nothing if `optimizer.found_inf` is 1, as in the fused optimizers of torch."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore the state of an optimizer of the same recipe.

    Raises:
        ValueError: a setting is not of the kind that the optimizer has, or a tensor does not fit its parameter.
        Exception: what torch raises for a state of another kind.
    """
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for old, new in zip(before, optimizer.param_groups, strict=True):
        if wrong := [key for key in old.keys() & new.keys() if not _are_alike(old[key], new[key])]:
            raise ValueError(f"{min(wrong)} of the optimizer is {new[min(wrong)]!r}")
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if not isinstance(value, torch.Tensor):
                continue
            is_factor = value.ndim < parameter.ndim and set(value.shape) <= set(parameter.shape)  # of adafactor
            if not (is_factor or value.numel() == 1 or value.shape == parameter.shape):
                raise ValueError(
                    f"{name} of the optimizer has shape {tuple(value.shape)}, not {tuple(parameter.shape)}"
                )


def _are_alike(old: Any, new: Any) -> bool:
    """Whether two settings are of one kind, as an int and a float are. None leaves the choice to torch."""
    if old is None:
        return True
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(map(_are_alike, old, new))
    return isinstance(new, int | float | type(old)) if isinstance(old, int | float) else isinstance(new, type(old))
