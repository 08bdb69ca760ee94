"""A learning rate by trying: the rate rises exponentially from step to step, until the loss grows.

Smith 2017, "Cyclical learning rates for training neural networks". The suggestion is where the loss falls most.
"""

import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from eit import distributed
from eit.config import Recipe
from eit.console import progress
from eit.errors import UserError
from eit.precision import deterministic_algorithms, float32_products, resolve_precision
from eit.training.checkpoint import BackgroundWriter
from eit.training.optim import peak_lr
from eit.training.trainer import Trainer, prepare

LOWEST, HIGHEST = 1e-6, 1.0
SMOOTHING = 0.9  # of the moving average of the loss
DIVERGED = 3  # times the lowest loss: the sweep ends


class Sweep(NamedTuple):
    rates: list[float]
    losses: list[float]  # smoothed
    lr: float  # suggested peak rate, as the optimizer takes it
    optim_lr: float  # the same as `optim.lr` of the recipe


def find_lr(recipe: Recipe, steps: int = 100) -> Sweep:
    """Train `steps` steps of the recipe with rising rates. Nothing is written.

    Raises:
        UserError: wrong data, values or weights; or the loss does not fall at any rate.
    """
    with ExitStack() as resources:
        out = Path(resources.enter_context(tempfile.TemporaryDirectory())) / "run"
        recipe = recipe.model_copy(update=dict(out=str(out)))
        resources.enter_context(deterministic_algorithms(recipe.train.deterministic))
        device = distributed.start(recipe.train.device)
        precision = resolve_precision(recipe.train.precision, device)
        resources.enter_context(float32_products(precision))
        prepared = prepare(recipe, device, precision)
        trainer = Trainer(prepared, None, resources.enter_context(BackgroundWriter()))
        rates, losses = _sweep(trainer, steps)
    lr = steepest(rates, losses)
    return Sweep(rates, losses, lr, lr * prepared.recipe.optim.lr / peak_lr(prepared.recipe, prepared.order))


def _sweep(trainer: Trainer, steps: int) -> tuple[list[float], list[float]]:
    """Rates, and the smoothed loss after each, until it has grown."""
    factor = (HIGHEST / LOWEST) ** (1 / max(steps - 1, 1))
    rates: list[float] = []
    losses: list[float] = []
    average, lowest, epoch = 0.0, math.inf, 0
    trainer.network.train()
    batches = trainer.loader.epoch(epoch)
    with progress("learning rates", steps) as advance:
        for step in range(steps):
            if step and step % trainer.order.steps == 0:
                epoch += 1
                batches = trainer.loader.epoch(epoch)
            rate = LOWEST * factor**step
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            try:
                trainer.step(batches)
                trainer.handle_report(trainer.reports.flush())
            except FloatingPointError:  # the loss or its gradient is not finite
                break
            loss = trainer.displayed["loss"]
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            smooth = average / (1 - SMOOTHING ** (step + 1))
            lowest = min(lowest, smooth)
            if step > steps // 10 and smooth > DIVERGED * lowest:
                break
            rates.append(rate)
            losses.append(smooth)
            advance(loss=smooth)
    return rates, losses


def steepest(rates: list[float], losses: list[float]) -> float:
    """The rate at which the loss falls most steeply over the logarithm of the rate, before its minimum.

    Raises:
        UserError: the loss never falls.
    """
    end = losses.index(min(losses)) if losses else 0
    if end < 2:
        raise UserError(
            f"the loss fell at no learning rate in {len(losses)} steps: give more --steps, or look at the data with "
            "eit data show RECIPE"
        )
    slopes = [losses[i + 1] - losses[i - 1] for i in range(1, end)]
    return rates[1 + slopes.index(min(slopes))]
