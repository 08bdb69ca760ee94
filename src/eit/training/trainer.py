"""The one training loop. One machine or many, any device; a stopped run continues to the same weights."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from eit import distributed
from eit.config import Recipe
from eit.console import progress, say
from eit.data.datasets import AnyImages, open_data
from eit.data.images import Images, View
from eit.data.loaders import StreamLoader, evaluation_batch_size, evaluation_loader, train_loader
from eit.data.order import Plan
from eit.data.workers import STOP_SIGNALS
from eit.environment import environment
from eit.errors import UserError, is_out_of_memory
from eit.files import write_file
from eit.inference.evaluate import evaluate
from eit.models.registry import TIMM
from eit.precision import Precision, autocast, deterministic_algorithms, float32_products, resolve_precision
from eit.randomness import Stream, set_seed
from eit.training.checkpoint import State, Writer, load_state, load_step, newest_step, save_step, saved_steps
from eit.training.loss import Distillation, class_weights, make_criterion
from eit.training.run_folder import Run, read_recipe, read_summary
from eit.training.setup import build_model, choose_trainable, model_of_begun, settle
from eit.training.step_reports import StepReports, from_host
from eit.weights.card import Card
from eit.weights.convert import default_mean_std
from eit.weights.formats import StateDict, save_weights

EARLY_SAVE = 60  # seconds: a longer epoch is saved before it is evaluated
COMPILED_STEPS = 3  # of a process: torch.compile takes its time in them, and CUDA graphs are recorded


class Stopped(Exception):
    """The run was asked to end by a signal, and has saved its state."""

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the same command continues from {folder}")
        self.signum = signum


@dataclass
class Progress:
    """What a checkpoint knows of a run beside weights and optimizer."""

    step: int = 0  # optimizer steps taken
    loss_sum: float = 0.0  # of this epoch's steps so far
    best_top1: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0  # of training steps, over all continuations
    last: dict[str, Any] = field(default_factory=dict)  # the newest line of the log
    fixed: dict[str, Any] = field(default_factory=dict)  # what a continuation must share: data, global batch


def train(recipe: Recipe) -> dict[str, Any]:
    """Train, or continue, the run of `recipe`; the summary of the finished run, on every rank.

    Raises:
        UserError: bad data, values or weights, before anything is trained.
        Stopped: SIGTERM, SIGINT or SIGUSR1 came; the run is saved.
        FloatingPointError: the loss or its gradient is not finite; the weights were not updated with it.
        OSError: a checkpoint cannot be written; earlier ones are intact.
    """
    try:
        with ExitStack() as held:
            return _train(recipe, held)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise UserError(out_of_memory(recipe)) from None
        raise


def _train(recipe: Recipe, held: ExitStack) -> dict[str, Any]:
    # What is trained on what. All that can be wrong is found here.
    held.enter_context(deterministic_algorithms(recipe.train.deterministic))
    device = distributed.start(recipe.train.device)
    precision = distributed.on_main(lambda: resolve_precision(recipe.train.precision, device))
    held.enter_context(float32_products(precision))
    recipe = settle(recipe, begun := distributed.on_main(lambda: model_of_begun(recipe)))
    train_images, val_images = open_data(recipe.data)
    view = make_view(recipe)
    plan = Plan(
        images=len(train_images),
        batch_size=recipe.data.batch_size,
        accumulate=accumulation(recipe),
        world=distributed.world_size(),
        repeats=recipe.augment.repeats,
        seed=recipe.seed,
    )
    check_plan(recipe, plan)
    loader = train_loader(train_images, view, plan, recipe.data, recipe.augment, device)
    classes = train_images.classes
    model = build_model(recipe, len(classes), initial=begun is None)
    choose_trainable(recipe, model)
    weights = class_weights(recipe.loss, classes, getattr(train_images, "labels", None))
    needs_teacher = recipe.loss.teacher and not distributed.on_main(lambda: read_summary(recipe.run_folder()))
    distillation = Distillation(recipe.loss, view, classes, device) if needs_teacher else None
    card = make_card(recipe, view, classes)
    at = Progress(fixed=dict(data=f"{train_images.digest()} {val_images.digest()}", global_batch=plan.global_batch))
    if isinstance(loader, StreamLoader):  # whose order depends on it
        at.fixed |= {"data.workers": loader.workers, "data.batch_size": plan.batch_size}
        at.fixed["number of processes"] = plan.world
    if distillation:
        at.fixed["loss.teacher"] = distillation.digest
    if recipe.train.precision == "auto":
        at.fixed["train.precision"] = precision
    if len(set(distributed.gather(at.fixed["data"]))) > 1:
        raise UserError(f"the ranks see different data at {recipe.data.root}: names or labels differ")

    # The run folder, which rank 0 alone holds
    run: Run | None = None

    def open_run() -> dict[str, Any] | None:
        nonlocal run
        run = held.enter_context(Run(recipe.run_folder(), recipe))
        if summary := read_summary(run.path):
            newest, _ = newest_step(run.path)
            if newest is not None:
                check_same(load_state(newest), at, run)
        return summary

    if finished := distributed.on_main(open_run):
        say(f"{recipe.run_folder()} is finished; give another out= to train again")
        return finished

    # The machinery of a step
    model = model.to(device).to(memory_format=torch.channels_last)
    ema = None if recipe.train.ema_decay is None else ModelEmaV3(model, decay=recipe.train.ema_decay)
    optimizer = make_optimizer(recipe, model, plan)
    skips = bool(getattr(optimizer, "_step_supports_amp_scaling", False))  # honours found_inf, as torch's fused ones do
    schedule = make_schedule(recipe, optimizer, plan)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    mix = make_mixup(recipe, len(classes))
    weights = None if weights is None else weights.to(device)
    criterion = make_criterion(recipe.loss, recipe.augment.smoothing, weights, len(classes))
    at_a_time = evaluation_batch_size(recipe.data.batch_size, len(val_images), device)
    val_loader = evaluation_loader(val_images, view, at_a_time, recipe.data.workers, device)
    loader.prepare()
    resume(run, model, ema, optimizer, scaler, at)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
    frozen_norms = [norm for norm in norms if not norm.weight.requires_grad]
    network: Any = model
    if plan.world > 1:
        network = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    network = compiled(network, recipe.train.compile)
    if plan.world > 2:
        shape = plan.batch_size, view.channels, view.size, view.size
        zeros = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
        warm_up(network, zeros, precision)

    def backward(micro: int, batches: Iterator[Any]) -> Tensor:
        """One micro-batch's share of the step's loss, its gradients added."""
        x, y, _ = next(batches)
        set_seed(Stream.STEP, recipe.seed, at.step, micro, distributed.rank())
        x, target = mix(x, y) if mix else (x, y)
        if recipe.train.compile != "off":
            x = x.contiguous(memory_format=torch.channels_last)  # in one layout it is compiled once
            torch.compiler.cudagraph_mark_step_begin()
        hold_gradients = plan.world > 1 and micro + 1 < plan.accumulate
        with network.no_sync() if hold_gradients else nullcontext():
            with autocast(device, precision):
                logits = network(x).float()
                loss = criterion(logits, target)
                if distillation:
                    loss = distillation(loss, logits, x)
            loss = loss / plan.accumulate
            scaler.scale(loss).backward()
        return loss.detach()

    writer = held.enter_context(Writer())

    def save(best: bool = False) -> None:
        """Rank 0 copies the state of training, and writes it while training goes on."""
        if run:
            state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), progress=asdict(at))
            averaged = ema.module.state_dict() if ema else None
            best_card = measured(card, at) if best else None
            writer.submit(write_state, run.path, at.step, card, best_card, model.state_dict(), averaged, state)

    def stop(signals: list[float]) -> NoReturn:
        """When what was saved is on the disk."""
        distributed.on_main(writer.wait)
        raise Stopped(which_signal(signals), recipe.run_folder())

    images_per_s, saved = 0.0, time.monotonic()
    due, signals = 0.0, [0.0] * len(STOP_SIGNALS)  # as the newest step that was looked at has them
    shown: dict[str, Any] = {}

    def look(step: int, numbers: list[float]) -> None:
        """Act on what a step reported; the same on every rank."""
        nonlocal signals, due
        mean_loss, mean_norm, scale, bad_images, failed, due, *signals = numbers
        loader.bad.check(int(bad_images))
        if failed:
            distributed.on_main(writer.wait)
        if not math.isfinite(mean_loss):
            raise not_finite("loss", mean_loss, step, plan, train_images, run)
        # A scaler skips such a step by itself, and halves the scale: at 1 it is no longer to blame.
        if not math.isfinite(mean_norm) and scale < 1.5:  # a power of two, and rounded: it is a sum over ranks
            raise not_finite("gradient", mean_norm, step, plan, train_images, run)
        at.loss_sum += mean_loss
        shown["loss"] = mean_loss

    reports = StepReports(look, at_once=not skips)
    one = torch.ones((), device=device)

    def update(loss: Tensor) -> None:
        """A step of the optimizer with the gradients, unless loss or gradient are not finite on any rank."""
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        # One small collective: mean loss, norm of the gradient (each rank's is that of all), scale, unreadable images,
        # whether saving failed, whether rank 0 wants to save by its clock, signals that any rank was sent.
        scale = scaler.scale(one) if scaler.is_enabled() else one
        by_clock = run is not None and minutes_are_over(recipe, saved)
        own = [len(loader.bad.seen), writer.fault() is not None, by_clock, *asked()]
        shared = torch.cat((torch.stack((loss, norm, scale)) / plan.world, from_host(own, device)))
        distributed.sum_over_ranks(shared)
        reports.add(at.step, shared)  # raises where the step before was not finite: no update follows that one
        if recipe.optim.clip_grad:
            nn.utils.clip_grads_with_norm_(model.parameters(), recipe.optim.clip_grad, norm)
        if skips:
            # Infinity and NaN differ from themselves by NaN. The optimizer changes nothing where this is 1.
            optimizer.found_inf = ((shared[:2] - shared[:2]) != 0).any().float()  # type: ignore[attr-defined]
            optimizer.step()
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    total_steps = min(recipe.train.epochs * plan.steps, recipe.train.max_steps or 2**63)
    if run:
        used = dict(precision=precision, compile=recipe.train.compile, global_batch=plan.global_batch)
        run.start_logging(environment(device) | used, at.step)
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{recipe.name}: {parameters:,} parameters, {len(train_images):,} images of {len(classes)} classes, "
        f"{plan.steps} x {plan.global_batch} of them an epoch, on {plan.world} x {device.type}"
    )
    to_compile = 0 if recipe.train.compile == "off" else COMPILED_STEPS
    with stop_signals() as asked:
        while (epoch := at.last.get("epoch", -1) + 1) * plan.steps < total_steps:
            first_step = at.step - epoch * plan.steps
            end = min((epoch + 1) * plan.steps, total_steps)
            if first_step == 0:
                at.loss_sum = 0.0
            due, saved = 0.0, time.monotonic()
            network.train()
            for frozen in frozen_norms:
                frozen.eval()
            batches = loader.epoch(epoch, first_step)
            began = mark = time.monotonic()
            began_step = at.step
            title = f"epoch {epoch + 1}/{recipe.train.epochs}"
            with progress(title, plan.steps, start=first_step) as advance:
                while at.step < end:
                    schedule.step_update(at.step)
                    update(sum((backward(micro, batches) for micro in range(plan.accumulate)), torch.zeros(())))
                    at.step += 1
                    if ema:
                        ema.update(model, at.step)

                    now = time.monotonic()
                    at.seconds, mark = at.seconds + now - mark, now
                    images_per_s = (at.step - began_step) * plan.global_batch / (now - began)
                    if to_compile and at.step < end:  # what is compiled then is no part of the rate
                        to_compile, began, began_step = to_compile - 1, now, at.step
                    shown |= {"lr": largest_rate(optimizer), "images/s": round(images_per_s)}
                    advance(**shown)
                    every = recipe.train.save_every
                    if at.step < end and (any(signals) or due or (every and at.step % every == 0)):
                        reports.flush()
                        save()
                        due, saved = 0.0, time.monotonic()
                        if any(signals):
                            stop(signals)
            reports.flush()

            network.eval()
            if time.monotonic() - began > EARLY_SAVE:  # evaluation may meet an image that it cannot read
                save()
            for module in (model, ema):
                distributed.share_buffers(module)
            metrics = evaluate(model, val_loader, precision)
            averaged = evaluate(ema.module.eval(), val_loader, precision) if ema else None
            best = metrics.top1 > at.best_top1
            if best:
                at.best_top1, at.best_epoch = metrics.top1, epoch
            at.last = {
                "epoch": epoch,
                "step": at.step,
                "lr": largest_rate(optimizer),
                "train_loss": at.loss_sum / (at.step - epoch * plan.steps),
                "val_loss": metrics.loss,
                "val_top1": metrics.top1,
                "val_top5": metrics.top5,
                "ema_top1": averaged.top1 if averaged else None,
                "images_per_s": round(images_per_s, 1),
            }
            if run:
                run.log(at.last, len(classes))
            save(best)
            if any(signals) and at.step < total_steps:
                stop(signals)

    def finish() -> dict[str, Any]:
        assert run is not None
        writer.wait()
        save_weights(run.path / "final.safetensors", model.state_dict(), measured(card, at))
        return run.finish(
            best_top1=at.best_top1,
            best_epoch=at.best_epoch,
            last_top1=at.last["val_top1"],
            last_top5=at.last["val_top5"],
            last_ema_top1=at.last["ema_top1"],
            epochs=at.last["epoch"] + 1,
            seconds=round(at.seconds, 1),
            params=parameters,
        )

    return distributed.on_main(finish)


def compiled(network: nn.Module, mode: str) -> Any:
    """`network` through torch.compile: once, for batches of one size."""
    if mode == "off":
        return network
    return torch.compile(network, mode=None if mode == "default" else mode, dynamic=False)


def accumulation(recipe: Recipe) -> int:
    """Micro-batches in a step: the recipe's, or as many as keep the global batch of a run on another number of ranks.

    Raises:
        UserError: no whole number of them does.
    """
    world, batch = distributed.world_size(), recipe.data.batch_size
    begun = distributed.on_main(lambda: recorded_global_batch(recipe))
    if begun is None or begun == batch * recipe.train.accumulate * world:
        return recipe.train.accumulate
    accumulate, rest = divmod(begun, batch * world)
    if rest:
        raise distributed.same_everywhere(
            f"the run has a global batch of {begun}, which {world} processes x data.batch_size={batch} cannot make: "
            "start another number of processes, or set a data.batch_size that divides it"
        )
    say(f"{world} process{'es' * (world > 1)}: {accumulate} micro-batches in a step keep the global batch of {begun}")
    return accumulate


def recorded_global_batch(recipe: Recipe) -> int | None:
    """That of the begun run in the recipe's folder; None where there is none, or the recipe's own batch has changed."""
    folder = recipe.run_folder()
    if not saved_steps(folder) or not (folder / "recipe.yaml").is_file():
        return None
    before = read_recipe(folder)
    if (before.data.batch_size, before.train.accumulate) != (recipe.data.batch_size, recipe.train.accumulate):
        return None
    try:
        return json.loads((folder / "environment.json").read_text()).get("global_batch")
    except (OSError, ValueError):
        return None


def warm_up(network: nn.Module, x: Tensor, precision: Precision) -> None:
    """A backward pass without an effect: DDP arranges its buckets after the first one.

    The sum over three or more ranks depends on the arrangement, so a continued run must have it from its first step.
    """
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with autocast(x.device, precision):
        network(x).float().sum().backward()
    network.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(before)


def largest_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the parts that learn fastest."""
    return max(group["lr"] for group in optimizer.param_groups)


def minutes_are_over(recipe: Recipe, saved: float) -> bool:
    """Whether to save inside an epoch, by the clock, where the last time was `saved` on it."""
    minutes = recipe.train.save_minutes
    return minutes is not None and time.monotonic() - saved >= 60 * minutes


def write_state(
    run: Path, step: int, card: Card, best: Card | None, model: StateDict, ema: StateDict | None, state: State
) -> None:
    """A checkpoint, and before it the best weights, where these are the best: it says that they are there."""
    if best is not None:
        save_weights(run / "best.safetensors", model, best)
    save_step(run, step, card, model, ema, state)


def not_finite(
    name: str, value: float, at_step: int, plan: Plan, images: AnyImages, run: Run | None
) -> FloatingPointError:
    """The error of a step that was not finite. Rank 0 writes down its images."""
    epoch, step = divmod(at_step, plan.steps)
    what = f"the {name} is {value} in epoch {epoch + 1}, step {at_step}"
    if isinstance(images, Images):  # those that come in turn have no names
        indices = plan.order(epoch)[step, :, 0].tolist()
        what += f", on images {', '.join(images.names[i] for i in indices[:3])}"
        if run:
            file = run.path / f"not-finite-{at_step}.txt"
            write_file(file, "".join(f"{i}\t{images.names[i]}\n" for i in indices))
            what += f" and others (all {len(indices)} with their numbers: {file})"
    advice = "try a lower optim.lr, a longer train.warmup_epochs or optim.clip_grad=1"
    error = FloatingPointError(f"{what}; the weights were not updated with it; {advice}")
    error.add_note(distributed.ON_MAIN)
    return error


# -- Parts, each from the recipe --------------------------------------------------------------------------------------


def make_view(recipe: Recipe) -> View:
    """What the model sees of an image."""
    data, channels = recipe.data, recipe.model.in_chans or 3
    if channels not in (1, 3):
        raise UserError(f"model.in_chans={channels}: images are read with 1 or 3 channels")
    mean, std = default_mean_std(channels)
    mean, std = data.mean or mean, data.std or std
    if channels == 1:  # a recipe's colour statistics serve grey images too, and the other way round
        mean, std = (fmean(mean),), (fmean(std),)
    else:
        mean, std = (v if len(v) == channels else v * channels for v in (mean, std))
    resize = math.floor(data.image_size / data.crop_ratio)
    return View(data.image_size, resize, data.interpolation, mean, std)


def check_plan(recipe: Recipe, plan: Plan) -> None:
    """Raise a UserError where batches cannot be made as asked."""
    if plan.steps == 0:
        parts = f"data.batch_size={plan.batch_size} x train.accumulate={plan.accumulate} x {plan.world} processes"
        most = plan.images // (plan.accumulate * plan.world)
        raise UserError(
            f"a batch of {plan.global_batch} ({parts}) is larger than the {plan.images} training images"
            + (f"; set data.batch_size={most} or less" if most else "")
        )
    if recipe.optim.min_lr > base_rate(recipe, plan):
        rate = f"optim.lr={recipe.optim.lr:g}, {base_rate(recipe, plan):g} for a batch of {plan.global_batch}"
        raise UserError(f"optim.min_lr={recipe.optim.min_lr:g} is more than the rate itself ({rate})")
    if (recipe.augment.mixup or recipe.augment.cutmix) and plan.batch_size % 2:
        raise UserError(f"data.batch_size={plan.batch_size} is odd: mixup and cutmix mix pairs")


def measured(card: Card, at: Progress) -> Card:
    """The card of weights with what the run measured of them."""
    metrics = {key: at.last[key] for key in ("epoch", "val_top1", "val_top5", "val_loss")}
    return card.model_copy(update=dict(metrics=metrics))


def out_of_memory(recipe: Recipe) -> str:
    """What to set, with the same global batch."""
    batch, accumulate = recipe.data.batch_size, recipe.train.accumulate
    mixes = bool(recipe.augment.mixup or recipe.augment.cutmix)
    smaller = [n for n in range(1, batch // 2 + 1) if batch % n == 0 and not (mixes and n % 2)]
    what = f"out of memory with data.batch_size={batch} at data.image_size={recipe.data.image_size}"
    if not smaller:
        return f"{what}: set a smaller data.image_size, or take a smaller model"
    same = f"data.batch_size={smaller[-1]} train.accumulate={accumulate * batch // smaller[-1]}"
    return f"{what}: set {same}, which make the same global batch"


def make_card(recipe: Recipe, view: View, classes: list[str]) -> Card:
    """What the weights will say about themselves."""
    timms = recipe.model.name.startswith(TIMM)
    return Card(
        model=recipe.model.name,
        arguments=recipe.model.arguments() | ({} if timms else {"family": recipe.model.family}),
        classes=classes,
        mean=view.mean,
        std=view.std,
        size=view.size,
        resize=view.resize,
        interpolation=view.interpolation,
        recipe=recipe.model_dump(mode="json"),
    )


def make_optimizer(recipe: Recipe, model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """Weight decay spares norms, biases, the class token and position embeddings."""
    o, lr = recipe.optim, base_rate(recipe, plan)
    options: dict[str, Any] = dict(betas=o.betas, eps=o.eps, layer_decay=o.layer_decay)
    if o.name == "adamw":
        # A third of the time of a loop over the parameters. On MPS it ignored `found_inf` before torch's pull request
        # 186360, so that a gradient that is not finite would reach the weights.
        options["fused"] = next(model.parameters()).device.type != "mps"
    return create_optimizer_v2(model, o.name, lr=lr, weight_decay=o.weight_decay, **options)


def base_rate(recipe: Recipe, plan: Plan) -> float:
    """The peak learning rate: `optim.lr`, in proportion to the global batch where `optim.lr_batch` is set."""
    return recipe.optim.lr * plan.global_batch / (recipe.optim.lr_batch or plan.global_batch)


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, plan: Plan) -> CosineLRScheduler:
    """Linear warm-up, then cosine, step by step from step 0 (the published runs were an epoch late)."""
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.train.epochs * plan.steps,
        lr_min=recipe.optim.min_lr,
        warmup_t=round(recipe.train.warmup_epochs * plan.steps),
        warmup_lr_init=recipe.optim.warmup_lr,
        t_in_epochs=False,
    )


def make_mixup(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    a = recipe.augment
    if not (a.mixup or a.cutmix):
        return None
    return Mixup(
        mixup_alpha=a.mixup,
        cutmix_alpha=a.cutmix,
        prob=a.mixup_prob,
        switch_prob=a.mixup_switch_prob,
        label_smoothing=a.smoothing,
        num_classes=classes,
    )


def check_same(state: dict[str, Any], at: Progress, run: Run) -> None:
    """Raise a UserError where a checkpoint's run had other data, another global batch or another teacher."""
    saved = state["progress"]["fixed"]
    for key, now in at.fixed.items():
        if (before := saved.get(key)) != now:
            advice = f"set {key}={before}" if key.startswith("data.") else "use another out="
            raise UserError(f"{run.path} was trained with another {key}: {before}, now {now}; {advice}")


def resume(
    run: Run | None,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    at: Progress,
) -> None:
    """Continue from the newest whole checkpoint, if there is one. Rank 0 reads it and hands it to the others."""

    def read() -> tuple[Any, Any, Any] | None:
        assert run is not None
        folder, faults = newest_step(run.path)
        for fault in faults:
            say(fault)
        if folder is None:
            run.cut_log(0)
            return None
        weights, averaged, state = load_step(folder)
        check_same(state, at, run)
        step = state["progress"]["step"]
        say(f"continuing {run.path} from step {step}")
        run.cut_log(step)
        return weights, averaged, state

    if (found := distributed.on_main(read)) is None:
        return
    weights, averaged, state = found
    model.load_state_dict(weights)
    if ema:
        ema.module.load_state_dict(averaged)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    vars(at).update(state["progress"])


@contextmanager
def stop_signals() -> Iterator[Callable[[], list[float]]]:
    """Signals that ask a run to end are noted for the loop to see: 1.0 for each that came. A second SIGINT ends it."""
    seen: set[int] = set()

    def note(signum: int, _: Any) -> None:
        seen.add(signum)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield lambda: [0.0] * len(STOP_SIGNALS)
        return
    before = {signum: signal.signal(signum, note) for signum in STOP_SIGNALS}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    waked = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_at_the_second, args=(reading,), daemon=True)
    watch.start()
    try:
        yield lambda: [float(signum in seen) for signum in STOP_SIGNALS]
    finally:
        signal.set_wakeup_fd(waked)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.write(writing, bytes(1))  # loader processes have the pipe too: closing it would not end the thread
        watch.join()
        os.close(writing)


def _end_at_the_second(reading: int) -> None:
    """End the process at its second SIGINT, also while the main thread waits for other ranks and runs no handler."""
    interrupts = 0
    with os.fdopen(reading, "rb", buffering=0) as signums:
        while signum := signums.read(1)[0]:
            interrupts += signum == signal.SIGINT
            if interrupts == 2:
                cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""  # which a progress bar hides
                os.write(2, cursor + b"eit: interrupted; what was saved before stays\n")
                os._exit(130)


os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # signals of loader processes are their own


def which_signal(signals: list[float]) -> int:
    return next(signum for signum, sent in zip(STOP_SIGNALS, signals, strict=True) if sent)
