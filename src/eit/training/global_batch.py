"""The global batch: checked before a run starts, and kept when the number of processes changes."""

from eit import distributed
from eit.config import Recipe
from eit.console import say
from eit.data.order import SampleOrder
from eit.errors import UserError
from eit.files import read_json
from eit.training.optim import peak_lr
from eit.training.run_folder import resumable_recipe


def micro_batches_per_step(recipe: Recipe) -> int:
    """The recipe's `train.accumulate`, or what keeps the global batch of a run that had another number of processes.

    Raises:
        UserError: no whole number of micro-batches keeps it.
    """
    world, batch = distributed.world_size(), recipe.data.batch_size
    recorded = distributed.on_main(lambda: recorded_global_batch(recipe))
    if recorded is None or recorded == batch * recipe.train.accumulate * world:
        return recipe.train.accumulate
    accumulate, rest = divmod(recorded, batch * world)
    if rest:
        raise distributed.same_everywhere(
            f"the run has a global batch of {recorded}, which {world} processes x data.batch_size={batch} cannot make: "
            "start another number of processes, or set a data.batch_size that divides it"
        )
    processes = f"{world} process{'es' * (world > 1)}"
    say(f"{processes}: {accumulate} micro-batches in a step keep the global batch of {recorded}")
    return accumulate


def recorded_global_batch(recipe: Recipe) -> int | None:
    """The global batch of the run in the recipe's folder. None if there is none, or the recipe has another batch."""
    folder = recipe.run_folder()
    before = resumable_recipe(folder)
    if before is None:
        return None
    if (before.data.batch_size, before.train.accumulate) != (recipe.data.batch_size, recipe.train.accumulate):
        return None
    try:
        recorded = read_json(folder / "environment.json")["global_batch"]
        return recorded if type(recorded) is int and recorded > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_order(recipe: Recipe, order: SampleOrder) -> None:
    """Raise a UserError if the images do not fill a batch, or the recipe does not fit the batch."""
    if order.steps == 0:
        parts = f"data.batch_size={order.batch_size} x train.accumulate={order.accumulate} x {order.world} processes"
        most = order.images // (order.accumulate * order.world)
        raise UserError(
            f"a batch of {order.global_batch} ({parts}) is larger than the {order.images} training images"
            + (f"; set data.batch_size={most} or less" if most else "")
        )
    if recipe.optim.min_lr > peak_lr(recipe, order):
        rate = f"optim.lr={recipe.optim.lr:g}, {peak_lr(recipe, order):g} for a batch of {order.global_batch}"
        raise UserError(f"optim.min_lr={recipe.optim.min_lr:g} is larger than the peak rate ({rate})")
    if (recipe.augment.mixup or recipe.augment.cutmix) and order.batch_size % 2:
        raise UserError(f"data.batch_size={order.batch_size} is odd: mixup and cutmix mix pairs")


def out_of_memory_advice(recipe: Recipe) -> str:
    """The settings that need less memory and keep the global batch."""
    batch, accumulate = recipe.data.batch_size, recipe.train.accumulate
    mixes = bool(recipe.augment.mixup or recipe.augment.cutmix)
    smaller = [n for n in range(1, batch // 2 + 1) if batch % n == 0 and not (mixes and n % 2)]
    problem = f"out of memory with data.batch_size={batch} at data.image_size={recipe.data.image_size}"
    if not smaller:
        return f"{problem}: set a smaller data.image_size, or use a smaller model"
    settings = f"data.batch_size={smaller[-1]} train.accumulate={accumulate * batch // smaller[-1]}"
    return f"{problem}: set {settings}, which keeps the global batch"
