"""The training loop, on one machine or many and on any device. A stopped run continues to the same weights.

`train` prepares and checks what a run needs, claims its folder, and gives both to a `Trainer`, whose methods are the
loop: `fit`, `train_epoch`, `step`, `evaluate`, `save`, `finish`.
"""

import hashlib
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from eit import distributed, operators
from eit.config import Recipe, is_extended
from eit.console import progress as progress_bar
from eit.console import say
from eit.data.augment import make_mixup
from eit.data.datasets import AnyImages, open_data
from eit.data.images import Images, Preprocessing
from eit.data.loaders import (
    CachedLoader,
    StreamLoader,
    WorkerLoader,
    evaluation_batch_size,
    evaluation_loader,
    train_loader,
)
from eit.data.order import SampleOrder
from eit.data.workers import STOP_SIGNALS, Batch, LoaderStalled, StopRequested
from eit.environment import environment, versions
from eit.errors import UserError, first_line, is_out_of_memory
from eit.files import write_file
from eit.inference.evaluate import evaluate
from eit.models.eit import EIT
from eit.precision import Precision, autocast, deterministic_algorithms, float32_products, resolve_precision
from eit.randomness import Stream, set_seed
from eit.training.checkpoint import (
    BackgroundWriter,
    Progress,
    State,
    advice_without,
    check_unchanged,
    extended_epochs,
    load_card,
    load_checkpoint,
    load_state,
    newest_checkpoint,
    save_checkpoint,
)
from eit.training.choices import find_own_run, resolve_choices
from eit.training.global_batch import check_order, micro_batches_per_step, out_of_memory_advice
from eit.training.loss import Distillation, class_weights, make_criterion
from eit.training.optim import can_skip_updates, largest_lr, load_optimizer, make_lr_scheduler, make_optimizer
from eit.training.run_folder import RunFolder, check_loggers, read_summary, resumable_recipe
from eit.training.setup import (
    build_model,
    check_single_images,
    choose_trainable,
    make_card,
    make_view,
    resolve_architecture,
)
from eit.training.signals import first_signal, stop_signals
from eit.training.step_reports import StepReport, StepReports, share_step
from eit.weights.card import Card
from eit.weights.formats import StateDict, save_weights
from eit.weights.load import find_weights

EARLY_SAVE = 60  # seconds: a longer epoch is saved before it is evaluated
COMPILED_STEPS = 3  # of a process: torch.compile takes its time in them, and CUDA graphs are recorded


class Stopped(Exception):
    """A signal asked the run to end, and its state is saved."""

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again to resume {folder}")
        self.signum = signum


def train(recipe: Recipe) -> dict[str, Any]:
    """Train the run of `recipe`, or continue it; the summary of the finished run and its folder, on every rank.

    Raises:
        UserError: wrong data, values or weights, before anything is trained.
        Stopped: SIGTERM, SIGINT or SIGUSR1 was received; the run is saved.
        FloatingPointError: the loss or its gradient is not finite; the weights were not updated with it.
        OSError: a checkpoint cannot be written; earlier ones are intact.
    """
    try:
        with ExitStack() as resources:
            resources.enter_context(deterministic_algorithms(recipe.train.deterministic))
            device = distributed.start(recipe.train.device)
            distributed.check_agreement(start_facts(recipe))
            precision = distributed.on_main(lambda: resolve_precision(recipe.train.precision, device))
            resources.enter_context(float32_products(precision))
            prepared = prepare(recipe, device, precision)
            folder, summary = claim_run_folder(prepared, resources)
            path = str(prepared.recipe.run_folder())
            if summary:
                say(f"{path} is finished; set another name= or out= to train again, or more train.epochs to go on")
            else:
                writer = resources.enter_context(BackgroundWriter())
                summary = Trainer(prepared, folder, writer).fit()
            return summary | dict(folder=path)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise UserError(out_of_memory_advice(recipe)) from None
        raise


# -- What a run needs


@dataclass
class Prepared:
    """What a run needs, opened, built and checked."""

    recipe: Recipe  # its architecture and choices are resolved
    device: torch.device
    precision: Precision
    train_images: AnyImages
    val_images: AnyImages
    view: Preprocessing
    order: SampleOrder
    loader: CachedLoader | WorkerLoader | StreamLoader
    model: Any
    class_weights: Tensor | None
    distillation: Distillation | None
    card: Card
    progress: Progress = field(default_factory=Progress)


def prepare(recipe: Recipe, device: torch.device, precision: Precision) -> Prepared:
    """Open the data and build the model. A mistake in the recipe is a UserError here, before anything is written."""
    check_loggers(recipe)
    typed = recipe
    recorded = distributed.on_main(lambda: resumable_recipe(typed.run_folder()))
    resolved = resolve_architecture(typed, None if recorded is None else recorded.model)
    train_images, val_images = open_data(resolved.data)
    data = f"{train_images.digest()} {val_images.digest()}"  # computed once: of a million names it takes long
    own, recorded = distributed.on_main(lambda: find_own_run(resolved, recorded, data))
    recipe = resolve_choices(own, recorded, train_images, val_images, device, precision)
    classes = train_images.classes
    view = make_view(recipe)
    order = SampleOrder(
        images=len(train_images),
        batch_size=recipe.data.batch_size,
        accumulate=micro_batches_per_step(recipe),
        world=distributed.world_size(),
        repeats=recipe.augment.repeats,
        seed=recipe.seed,
    )
    check_order(recipe, order)
    loader = train_loader(train_images, view, order, recipe.data, recipe.augment, device)
    model = build_model(recipe, len(classes), initial=recorded is None)
    choose_trainable(recipe, model)
    check_single_images(recipe, model, view)
    weights = class_weights(recipe.loss, classes, getattr(train_images, "labels", None))
    is_longer = recorded is not None and is_extended(recorded, recipe)
    is_done = distributed.on_main(lambda: read_summary(recipe.run_folder())) is not None and not is_longer
    needs_teacher = recipe.loss.teacher and not is_done
    distillation = Distillation(recipe.loss, view, classes, device) if needs_teacher else None
    prepared = Prepared(
        recipe=recipe,
        device=device,
        precision=precision,
        train_images=train_images,
        val_images=val_images,
        view=view,
        order=order,
        loader=loader,
        model=model,
        class_weights=weights,
        distillation=distillation,
        card=make_card(recipe, view, classes),
    )
    prepared.progress.fixed = fixed_properties(prepared, data)
    if len(set(distributed.gather(prepared.progress.fixed["data"]))) > 1:
        raise UserError(f"the ranks see different data at {recipe.data.root}: names or labels differ")
    facts = dict(prepared.progress.fixed)
    if isinstance(recipe.model.pretrained, str) and recorded is None and distributed.world_size() > 1:
        content = find_weights(recipe.model.pretrained).read_bytes()
        facts["the content of model.pretrained"] = hashlib.sha256(content).hexdigest()[:16]
    distributed.check_agreement(facts)
    return prepared


def start_facts(recipe: Recipe) -> dict[str, Any]:
    """What all ranks must share before they start: versions, code, and the recipe but for what belongs to a machine."""
    sections = recipe.model_dump(mode="json")
    facts = {key: value for key, value in sections.items() if not isinstance(value, dict)}
    facts |= {
        f"{name}.{key}": v for name, keys in sections.items() if isinstance(keys, dict) for key, v in keys.items()
    }
    return {key: value for key, value in facts.items() if key not in ("out", "data.root", "data.workers")} | versions()


def fixed_properties(prepared: Prepared, data: str) -> dict[str, Any]:
    """What a continued run must share with its checkpoint besides the recipe. `data` is the digest of the images."""
    order, loader = prepared.order, prepared.loader
    fixed: dict[str, Any] = dict(data=data, global_batch=order.global_batch)
    # Not of the validation images, one of which may have to be repaired before the run can go on
    fixed["training data (sizes and a sample of the content)"] = prepared.train_images.content_digest()
    if isinstance(loader, StreamLoader):  # its order depends on these
        fixed |= {"data.workers": loader.workers, "data.batch_size": order.batch_size}
        fixed["number of processes"] = order.world
    if prepared.distillation:
        fixed["loss.teacher"] = prepared.distillation.digest
    if prepared.recipe.train.precision == "auto":
        fixed["train.precision"] = prepared.precision
    return fixed


def claim_run_folder(prepared: Prepared, resources: ExitStack) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """The run folder, locked by rank 0 and None on the others, and the summary of the run if it is finished."""
    folder: RunFolder | None = None

    def claim() -> dict[str, Any] | None:
        nonlocal folder
        folder = resources.enter_context(RunFolder(prepared.recipe.run_folder(), prepared.recipe))
        if summary := read_summary(folder.path):
            newest, _ = newest_checkpoint(folder.path)
            if newest is not None:
                state, card = load_state(newest), load_card(newest)
                check_unchanged(newest, card, state, prepared.recipe, prepared.progress)
                if extended_epochs(card, state, prepared.recipe):
                    (folder.path / "summary.json").unlink()  # the run is not finished any more
                    return None
        return summary

    summary = distributed.on_main(claim)
    return folder, summary


# -- The loop


class Trainer:
    """Trains what was prepared. Rank 0 has the run folder and writes to it; the rest is the same on all ranks."""

    def __init__(self, prepared: Prepared, folder: RunFolder | None, writer: BackgroundWriter) -> None:
        self.prepared, self.folder, self.writer = prepared, folder, writer
        self.recipe, self.device, self.precision = prepared.recipe, prepared.device, prepared.precision
        self.order, self.loader, self.progress = prepared.order, prepared.loader, prepared.progress
        recipe, device, order, config = self.recipe, self.device, self.order, self.recipe.train
        classes, weights = prepared.train_images.classes, prepared.class_weights
        self.total_steps = min(config.epochs * order.steps, config.max_steps or 2**63)

        self.model = prepared.model.to(device).to(memory_format=torch.channels_last)
        self.ema = None if config.ema_decay is None else ModelEmaV3(self.model, decay=config.ema_decay)
        self.optimizer: Any = make_optimizer(recipe, self.model, order)
        self.skips_updates = can_skip_updates(self.optimizer)
        self.lr_scheduler = make_lr_scheduler(recipe, self.optimizer, order)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.mixup = make_mixup(recipe.augment, len(classes))
        weights = None if weights is None else weights.to(device)
        self.criterion = make_criterion(recipe.loss, recipe.augment.smoothing, weights, len(classes))
        batch_size = evaluation_batch_size(recipe.data.batch_size, len(prepared.val_images), device)
        workers = recipe.data.workers
        self.val_loader = evaluation_loader(prepared.val_images, prepared.view, batch_size, workers, device)
        self.loader.prepare()
        self.resume()
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm) and module.affine]
        self.frozen_norms = [norm for norm in norms if not norm.weight.requires_grad]
        self.network = self.parallel_network()

        self.reports = StepReports(immediate=not self.skips_updates)
        self.signals = (0.0,) * len(STOP_SIGNALS)  # of the newest report
        self.received_signals = lambda: [0.0] * len(STOP_SIGNALS)  # until `fit` handles signals
        self.save_is_due, self.saved_at = False, time.monotonic()
        self.throughput = Throughput(order.global_batch, 0 if config.compile == "off" else COMPILED_STEPS)
        self.displayed: dict[str, Any] = {}
        self.one = torch.ones((), device=device)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one. Rank 0 reads it and hands it to the others."""

        def read() -> tuple[StateDict, StateDict | None, State] | None:
            assert self.folder is not None
            checkpoint, faults = newest_checkpoint(self.folder.path)
            for fault in faults:
                say(fault)
            if checkpoint is None:
                self.folder.cut_log(0, {})
                return None
            weights, averaged, state = load_checkpoint(checkpoint)
            card = load_card(checkpoint)
            check_unchanged(checkpoint, card, state, self.recipe, self.progress)
            if epochs := extended_epochs(card, state, self.recipe):
                state["progress"]["extended_from"] = [*state["progress"].get("extended_from", []), epochs]
            try:
                self.restore(weights, averaged, state)  # here on rank 0 alone, before anything is changed on the disk
            except Exception as error:  # torch raises almost any for what is not its own
                if is_out_of_memory(error):
                    raise
                reason = f"does not fit this run: {first_line(error)}"
                raise UserError(f"{checkpoint} {reason}; {advice_without(checkpoint)}") from None
            step = state["progress"]["step"]
            say(f"continuing {self.folder.path} from step {step}")
            if epochs:
                say(
                    f"{epochs} epochs are extended to {self.recipe.train.epochs}: the learning rate jumps back to the "
                    "cosine of the longer run, so the result differs from one long run (for such a run, set name=NEW)"
                )
            self.folder.cut_log(step, state["progress"]["last"])
            return weights, averaged, state

        checkpoint = distributed.on_main(lambda: read() if self.folder else None)  # eit lr has no folder
        if checkpoint is not None and self.folder is None:
            self.restore(*checkpoint)

    def restore(self, weights: StateDict, averaged: StateDict | None, state: State) -> None:
        """Load what a checkpoint holds. An exception of any type means that it does not fit the recipe."""
        progress, (epoch, step) = state["progress"], (0, state["progress"]["step"])
        if progress["last"]:
            epoch = progress["last"]["epoch"] + 1
        if step != self.total_steps and not 0 <= step - epoch * self.order.steps <= self.order.steps:
            raise ValueError(f"step {step} is not in epoch {epoch + 1} of {self.total_steps} steps")
        self.model.load_state_dict(weights)
        if self.ema:
            self.ema.module.load_state_dict(averaged)
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        vars(self.progress).update(progress)

    def parallel_network(self) -> Any:
        """The model as it is called in training: on several ranks through DDP, and compiled if the recipe says so."""
        network, order, view = self.model, self.order, self.prepared.view
        if order.world > 1:
            gpu = [self.device.index] if self.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=gpu)
        if (mode := self.recipe.train.compile) != "off":  # once, for batches of one size
            if self.device.type == "cpu" and operators.chosen() and isinstance(self.model, EIT):
                say(
                    "train.compile: compiled models lack this package's operators for this processor, so they may be "
                    "slower than train.compile=off; eit bench MODEL --runtime eager --runtime compile measures it"
                )
            network = torch.compile(network, mode=None if mode == "default" else mode, dynamic=False)
        if order.world > 2:
            zeros = torch.zeros(order.batch_size, view.channels, view.size, view.size, device=self.device)
            warm_up(network, zeros.to(memory_format=torch.channels_last), self.precision)
        return network

    def fit(self) -> dict[str, Any]:
        """Train the epochs that are left; the summary of the finished run."""
        self.start_logging()
        with stop_signals() as self.received_signals:
            try:
                self.train_epochs()
            except (StopRequested, LoaderStalled) as error:  # no batch came: the weights are those after the last step
                self.handle_report(self.reports.flush())
                self.save()
                self.writer.wait()
                if isinstance(error, StopRequested):
                    raise Stopped(first_signal(self.received_signals()), self.recipe.run_folder()) from None
                raise
        return distributed.on_main(self.finish)

    def train_epochs(self) -> None:
        """Train, evaluate and save each epoch that is left."""
        while (epoch := self.progress.last.get("epoch", -1) + 1) * self.order.steps < self.total_steps:
            if self.is_stopped_early():
                break
            self.train_epoch(epoch)
            is_best = self.evaluate(epoch)
            self.save(is_best, self.progress.last)
            if self.folder:
                self.folder.show_epoch(self.progress.last, len(self.prepared.train_images.classes))
            if any(self.signals) and self.progress.step < self.total_steps and not self.is_stopped_early():
                self.stop()
        if self.is_stopped_early():
            best = self.progress.best_epoch + 1
            say(f"stopped early: no epoch after epoch {best} was better (train.patience={self.recipe.train.patience})")

    def is_stopped_early(self) -> bool:
        """Whether `train.patience` ends the run before its last epoch: the newest line of the log says it."""
        return bool(self.progress.last.get("stopped_early"))

    def start_logging(self) -> None:
        recipe, order, images = self.recipe, self.order, self.prepared.train_images
        if self.folder:
            used = dict(precision=self.precision, compile=recipe.train.compile, global_batch=order.global_batch)
            self.folder.start_logging(environment(self.device) | used, self.progress.step)
        say(
            f"{recipe.name}: {parameter_count(self.model):,} parameters, {len(images):,} images of "
            f"{len(images.classes)} classes, {order.steps} steps of {order.global_batch} images per epoch, "
            f"on {order.world} x {self.device.type}"
        )

    def train_epoch(self, epoch: int) -> None:
        """Take the steps of the epoch that are left, and save among them when it is due."""
        order, progress = self.order, self.progress
        first_step = progress.step - epoch * order.steps
        end = min((epoch + 1) * order.steps, self.total_steps)
        if first_step == 0:
            progress.loss_sum = 0.0
        self.save_is_due, self.saved_at = False, time.monotonic()
        self.network.train()
        for norm in self.frozen_norms:
            norm.eval()
        batches = self.loader.epoch(epoch, first_step)
        self.throughput.start(progress.step)
        title = f"epoch {epoch + 1}/{self.recipe.train.epochs}"
        with progress_bar(title, order.steps, start=first_step) as advance:
            while progress.step < end:
                self.lr_scheduler.step_update(progress.step)
                self.step(batches)
                progress.seconds += self.throughput.end_step(progress.step, is_last=progress.step == end)
                images_per_s = round(self.throughput.images_per_s)
                self.displayed |= {"lr": largest_lr(self.optimizer), "images/s": images_per_s}
                advance(**self.displayed)
                if progress.step < end:
                    self.save_if_due()
        self.handle_report(self.reports.flush())
        if self.throughput.seconds_since_start() > EARLY_SAVE:  # evaluation may meet an image that cannot be read
            self.save()

    def step(self, batches: Iterator[Batch]) -> None:
        """Update the weights once, unless the loss or the gradient is not finite on any rank."""
        loss = sum((self.backward(batches, micro) for micro in range(self.order.accumulate)), torch.zeros(()))
        self.scaler.unscale_(self.optimizer)
        # Of the mean gradient of all ranks, so it is the same on each.
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        shared = share_step(
            loss,
            norm,
            loss_scale=self.scaler.scale(self.one) if self.scaler.is_enabled() else self.one,
            unreadable_images=len(self.loader.bad.seen),
            writer_failed=self.writer.error() is not None,
            save_is_due=self.folder is not None and self.save_minutes_are_over(),
            signals=self.received_signals(),
        )
        # Raises if the step before was not finite, so that no update follows that one.
        self.handle_report(self.reports.add(self.progress.step, shared))
        if max_norm := self.recipe.optim.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        if self.skips_updates:
            # x - x is NaN for infinity and NaN, otherwise 0. The optimizer changes nothing if found_inf is 1.
            self.optimizer.found_inf = ((shared[:2] - shared[:2]) != 0).any().float()
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        if self.ema:
            self.ema.update(self.model, self.progress.step)

    def backward(self, batches: Iterator[Batch], micro: int) -> Tensor:
        """Add the gradients of the next micro-batch, and return its share of the loss of the step."""
        images, labels, _ = next(batches)
        set_seed(Stream.STEP, self.recipe.seed, self.progress.step, micro, distributed.rank())
        images, target = self.mixup(images, labels) if self.mixup else (images, labels)
        if self.recipe.train.compile != "off":
            images = images.contiguous(memory_format=torch.channels_last)  # one layout is compiled once
            torch.compiler.cudagraph_mark_step_begin()
        is_last = micro + 1 == self.order.accumulate
        # Ranks exchange gradients once in a step, with the last micro-batch.
        with nullcontext() if is_last or self.order.world == 1 else self.network.no_sync():
            with autocast(self.device, self.precision):
                logits = self.network(images).float()
                loss = self.criterion(logits, target)
                if self.prepared.distillation:
                    loss = self.prepared.distillation(loss, logits, images)
            loss = loss / self.order.accumulate
            self.scaler.scale(loss).backward()
        return loss.detach()

    def handle_report(self, report: StepReport | None) -> None:
        """Stop the run, or remember what to do, as the report of a step says. All ranks do the same."""
        if report is None:
            return
        self.loader.bad.check(int(report.unreadable_images))
        if report.writer_failed:
            distributed.on_main(self.writer.wait)  # raises the error of rank 0
        if not math.isfinite(report.loss):
            raise self.not_finite_error("loss", report.loss, report.step)
        # The scaler skips such a step and halves the scale. At 1 the scale is not the cause any more. It is a power of
        # two, and the mean over ranks is rounded.
        if not math.isfinite(report.gradient_norm) and report.loss_scale < 1.5:
            raise self.not_finite_error("gradient", report.gradient_norm, report.step)
        self.progress.loss_sum += report.loss
        self.displayed["loss"] = report.loss
        self.save_is_due, self.signals = bool(report.save_is_due), report.signals

    def not_finite_error(self, name: str, value: float, step: int) -> FloatingPointError:
        """The error of a step whose loss or gradient is not finite. Rank 0 writes a list of its images."""
        epoch, step_of_epoch = divmod(step, self.order.steps)
        text = f"the {name} is {value} in epoch {epoch + 1}, step {step}"
        images = self.prepared.train_images
        if isinstance(images, Images):  # those of a stream have no names
            indices = self.order.samples(epoch)[step_of_epoch, :, 0].tolist()
            text += f", on images {', '.join(images.names[i] for i in indices[:3])}"
            if self.folder:
                file = self.folder.path / f"not-finite-{step}.txt"
                write_file(file, "".join(f"{i}\t{images.names[i]}\n" for i in indices))
                text += f" and others (all {len(indices)} with their numbers: {file})"
        advice = "try a lower optim.lr, a longer train.warmup_epochs or optim.clip_grad=1"
        error = FloatingPointError(f"{text}; the weights were not updated with it; {advice}")
        error.add_note(distributed.ON_MAIN)
        return error

    def evaluate(self, epoch: int) -> bool:
        """Evaluate the weights and their moving average; whether these weights are the best yet."""
        progress = self.progress
        self.network.eval()
        for module in (self.model, self.ema):
            distributed.share_buffers(module)
        metrics = evaluate(self.model, self.val_loader, self.precision)
        averaged = evaluate(self.ema.module.eval(), self.val_loader, self.precision) if self.ema else None
        for name, result in (("weights", metrics), ("moving average of the weights", averaged)):
            if result is not None and not math.isfinite(result.loss):
                advice = "earlier checkpoints are intact; try a lower optim.lr or train.precision=fp32"
                error = FloatingPointError(
                    f"the validation loss of the {name} is {result.loss} after epoch {epoch + 1}; {advice}"
                )
                error.add_note(distributed.ON_MAIN)
                raise error
        patience = self.recipe.train.patience
        is_best = metrics.top1 > progress.best_top1
        if patience and metrics.top1 == progress.best_top1 and progress.best_loss is not None:
            is_best = metrics.loss < progress.best_loss  # few images often have the same top-1
        if is_best:
            progress.best_top1, progress.best_epoch, progress.best_loss = metrics.top1, epoch, metrics.loss
        progress.last = {
            "epoch": epoch,
            "step": progress.step,
            "lr": largest_lr(self.optimizer),
            "train_loss": progress.loss_sum / (progress.step - epoch * self.order.steps),
            "val_loss": metrics.loss,
            "val_top1": metrics.top1,
            "val_top5": metrics.top5,
            "ema_top1": averaged.top1 if averaged else None,
            "images_per_s": round(self.throughput.images_per_s, 1),
        }
        if patience and epoch - progress.best_epoch >= patience and progress.step < self.total_steps:
            progress.last["stopped_early"] = True
        return is_best

    def save_minutes_are_over(self) -> bool:
        """Whether `train.save_minutes` asks for a checkpoint now."""
        minutes = self.recipe.train.save_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def save_if_due(self) -> None:
        """Save between two steps, by number of steps, by the clock, or because a signal asked the run to stop."""
        every = self.recipe.train.save_every
        if not (any(self.signals) or self.save_is_due or (every and self.progress.step % every == 0)):
            return
        self.handle_report(self.reports.flush())
        self.save()
        self.save_is_due, self.saved_at = False, time.monotonic()
        if any(self.signals):
            self.stop()

    def save(self, is_best: bool = False, line: dict[str, Any] | None = None) -> None:
        """Copy the state of training on rank 0, and write it while training goes on, before the epoch's `line`."""
        if self.folder is None:
            return
        optimizer, scaler = self.optimizer.state_dict(), self.scaler.state_dict()
        state = dict(optimizer=optimizer, scaler=scaler, progress=self.progress.model_dump())
        averaged = self.ema.module.state_dict() if self.ema else None
        card = self.prepared.card
        best_card = card_with_metrics(card, self.progress) if is_best else None
        folder, step, weights = self.folder, self.progress.step, self.model.state_dict()
        self.writer.submit(save_epoch, folder, line, step, card, best_card, weights, averaged, state)

    def stop(self) -> NoReturn:
        """Raise Stopped, after the checkpoint has been written."""
        distributed.on_main(self.writer.wait)
        raise Stopped(first_signal(self.signals), self.recipe.run_folder())

    def finish(self) -> dict[str, Any]:
        """Write the final weights and the summary. On rank 0 only."""
        assert self.folder is not None
        self.writer.wait()
        progress, card = self.progress, card_with_metrics(self.prepared.card, self.progress)
        save_weights(self.folder.path / "final.safetensors", self.model.state_dict(), card)
        more: dict[str, Any] = {} if self.recipe.train.patience is None else dict(stopped_early=self.is_stopped_early())
        if progress.extended_from:
            more["extended_from"] = progress.extended_from
        return self.folder.finish(
            best_top1=progress.best_top1,
            best_epoch=progress.best_epoch,
            last_top1=progress.last["val_top1"],
            last_top5=progress.last["val_top5"],
            last_ema_top1=progress.last["ema_top1"],
            epochs=progress.last["epoch"] + 1,
            seconds=round(progress.seconds, 1),
            params=parameter_count(self.model),
            **more,
        )


class Throughput:
    """Images per second in an epoch. The first `compiling` steps of the process do not count."""

    def __init__(self, global_batch: int, compiling: int) -> None:
        self.global_batch, self.compiling, self.images_per_s = global_batch, compiling, 0.0

    def start(self, step: int) -> None:
        self.began = self.step_began = time.monotonic()
        self.first_step = step

    def end_step(self, step: int, is_last: bool) -> float:
        """Count a step, after which `step` steps are taken; return its seconds."""
        now = time.monotonic()
        seconds, self.step_began = now - self.step_began, now
        self.images_per_s = (step - self.first_step) * self.global_batch / (now - self.began)
        if self.compiling and not is_last:
            self.compiling, self.began, self.first_step = self.compiling - 1, now, step
        return seconds

    def seconds_since_start(self) -> float:
        return time.monotonic() - self.began


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


def save_epoch(folder: RunFolder, line: dict[str, Any] | None, step: int, *arguments: Any) -> None:
    """Write a checkpoint, then the epoch's line of the log, if an epoch ended."""
    folder.check()
    write_checkpoint(folder.path, step, *arguments)
    if line is not None:
        folder.append_log(line)


def write_checkpoint(
    run: Path, step: int, card: Card, best_card: Card | None, model: StateDict, ema: StateDict | None, state: State
) -> None:
    """Write a checkpoint, and before it the weights as the best ones if they have a `best_card`.

    The checkpoint says which epoch is the best, so best.safetensors must not be older.
    """
    if best_card is not None:
        save_weights(run / "best.safetensors", model, best_card)
    save_checkpoint(run, step, card, model, ema, state)


def card_with_metrics(card: Card, progress: Progress) -> Card:
    metrics = {key: progress.last[key] for key in ("epoch", "val_top1", "val_top5", "val_loss")}
    return card.model_copy(update=dict(metrics=metrics))


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
