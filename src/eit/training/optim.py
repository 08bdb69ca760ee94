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
