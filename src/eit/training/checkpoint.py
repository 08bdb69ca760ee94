"""The state of training on disk: `checkpoints/step-N/` of a run folder.

A checkpoint has model.safetensors, ema.safetensors, state.pt and manifest.json (sha256 of each). It gets its name only
when all of it is on the disk. Older checkpoints are deleted after that.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError
from torch import Tensor

from eit.config import Recipe, differences, is_extended, parse_recipe
from eit.console import say
from eit.errors import UserError, few, shorten
from eit.files import open_regular, read_json, sync_folder, write_file
from eit.weights.card import Card
from eit.weights.formats import StateDict, read_pickle, read_safetensors, weights_bytes

KEPT = 2  # checkpoints of a run
State = dict[str, Any]  # of optimizer, scaler and progress


class EpochLine(BaseModel):
    """An epoch in the log; other keys are allowed. Losses are means, accuracies percentages. None: not known."""

    model_config = ConfigDict(strict=True, extra="allow")

    epoch: NonNegativeInt
    step: NonNegativeInt | None = None
    lr: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    val_top1: float | None = None
    val_top5: float | None = None
    ema_top1: float | None = None


class Progress(BaseModel):
    """What a checkpoint holds of a run besides weights, optimizer and scaler. The names are those of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: NonNegativeInt = 0  # optimizer steps taken
    loss_sum: FiniteFloat = 0.0  # over the steps of this epoch so far
    best_top1: FiniteFloat = -1.0
    best_epoch: int = -1
    seconds: FiniteFloat = 0.0  # of training steps, over all continuations
    last: dict[str, Any] = {}  # the newest line of the log, an EpochLine
    fixed: dict[str, Any] = {}  # what a continued run must share: data, global batch
    best_loss: FiniteFloat | None = None  # of the best epoch, on the validation images
    extended_from: list[int] = []  # epochs of the schedules before this one


LATER = {"best_loss", "extended_from"}  # fields that checkpoints of earlier versions lack


def check_unchanged(folder: Path, card: Card | None, state: State, recipe: Recipe, progress: Progress) -> None:
    """Raise a UserError if a checkpoint is of another recipe, or its run had other data or another global batch."""
    run = folder.parent.parent
    if card is None or card.recipe is None:
        raise UserError(f"{folder} does not say of which recipe it is; {advice_without(folder)}")
    changes = differences(of_older_version(parse_recipe(card.recipe)), recipe)
    if changes and not extended_epochs(card, state, recipe):
        shown = few(changes, separator="; ")
        raise UserError(f"{folder} is of another recipe ({shown}); undo the changes, or set another out=")
    saved = state["progress"]["fixed"]
    for key, now in progress.fixed.items():
        if (before := saved.get(key, now)) != now:  # earlier versions recorded less
            advice = f"set {key}={before}" if key.startswith("data.") else "set another out="
            raise UserError(f"{run} was trained with another {key}: {before}, now {now}; {advice}")


def extended_epochs(card: Card | None, state: State, recipe: Recipe) -> int | None:
    """The epochs that a checkpoint was planned with, if all of them are trained and `recipe` only adds some."""
    if card is None or card.recipe is None:
        return None
    before, last = of_older_version(parse_recipe(card.recipe)), state["progress"].get("last")
    is_at_end = bool(last) and last["epoch"] + 1 == before.train.epochs
    return before.train.epochs if is_at_end and is_extended(before, recipe) else None


def of_older_version(recipe: Recipe) -> Recipe:
    """A recorded recipe. Keys that were added later have the values that its version used."""
    if recipe.model.family == "lsra" and "cls_conv" not in recipe.model.model_fields_set:
        return recipe.model_copy(update=dict(model=recipe.model.model_copy(update=dict(cls_conv="identity"))))
    return recipe


def advice_without(folder: Path) -> str:
    """How to go on without a checkpoint that is whole, but cannot be used."""
    return f"to continue from the checkpoint before it, delete {folder}; to start again, set another out="


class BackgroundWriter:
    """Writes while training goes on: `submit` starts copies to host memory, and a thread does the rest.

    An error of a call, such as an OSError, is raised by the `submit` or `wait` that follows, or at the end.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Any] | None = None

    def submit(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Run `call` with copies of the tensors in `arguments`, after the call before it has ended."""
        self.wait()
        gpus: set[torch.device] = set()
        copies = _copy_to_host(arguments, gpus)
        copied = {gpu: torch.cuda.current_stream(gpu).record_event(torch.cuda.Event(blocking=True)) for gpu in gpus}
        self._pending = self._pool.submit(_call_when_copied, copied, call, copies)

    def wait(self) -> None:
        """Wait until the call has ended."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def error(self) -> BaseException | None:
        """The error of a call that has failed, which `wait` will raise."""
        return self._pending.exception() if self._pending is not None and self._pending.done() else None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._pool.shutdown()  # waits for the call, whatever ended the run
        if error is None:
            self.wait()
        elif later := self.error():  # the first error is the one to raise
            say(str(later))


def _copy_to_host(value: Any, gpus: set[torch.device]) -> Any:
    """A copy in host memory, also of tensors inside dictionaries, lists and tuples.

    Copies from CUDA go to pinned memory, and nothing waits for them here: the devices are added to `gpus`. A device
    copies before it starts later work, such as the update of the next step.
    """
    if isinstance(value, Tensor):
        if value.is_cuda:
            gpus.add(value.device)
        return value.detach().to("cpu", copy=True, non_blocking=value.is_cuda)
    if isinstance(value, Mapping):
        return {key: _copy_to_host(item, gpus) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy_to_host(item, gpus) for item in value)
    return value


def _call_when_copied(
    copied: Mapping[torch.device, torch.cuda.Event], call: Callable[..., Any], arguments: Sequence[Any]
) -> Any:
    """`call(*arguments)`, once each GPU has copied them to host memory."""
    for gpu, event in copied.items():
        with torch.cuda.device(gpu):  # this thread would otherwise open a context on the first GPU
            event.synchronize()
    return call(*arguments)


def save_checkpoint(run: Path, step: int, card: Card, model: StateDict, ema: StateDict | None, state: State) -> Path:
    """Write `checkpoints/step-N/` durably, then delete all but the newest two.

    Raises:
        OSError: the disk is full, for example; earlier checkpoints are intact.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files = {"model.safetensors": weights_bytes(model, card), "state.pt": buffer.getvalue()}
    if ema is not None:
        files["ema.safetensors"] = weights_bytes(ema, card)
    manifest = dict(step=step, sha256={name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    files["manifest.json"] = json.dumps(manifest, indent=2).encode()
    folder = _checkpoints(run)
    target, temporary, aside = (folder / name for name in (f"step-{step}", f".step-{step}.tmp", f".step-{step}.old"))
    try:
        for unfinished in folder.glob(".step-*.tmp"):  # left by a process that was killed
            _remove(unfinished)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            write_file(temporary / name, content)
        if os.path.lexists(target):  # a long epoch is saved before and after its evaluation
            os.rename(target, aside)
        os.rename(temporary, target)
        sync_folder(folder)
        sync_folder(run)
        if os.path.lexists(aside):
            _remove(aside)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        need, free = sum(map(len, files.values())), shutil.disk_usage(run).free
        reason = f"{os.strerror(error.errno or 0)}; {need:,} bytes are needed, {free:,} are free"
        raise OSError(f"checkpoint {target} was not written ({reason}); earlier ones are intact") from None
    saved = saved_steps(run)
    try:
        for old in [old for old in saved if old <= step][KEPT:]:
            _remove(folder / f"step-{old}")
        for later in [later for later in saved if later > step]:  # the run continued from an older step
            if _is_damaged(folder / f"step-{later}"):
                _remove(folder / f"step-{later}")
    except OSError as error:
        say(f"an old checkpoint cannot be deleted ({_reason(error)}); training goes on")
    return target


def _is_damaged(folder: Path) -> bool:
    """Whether a checkpoint is damaged for certain. One that cannot be read now may be whole."""
    try:
        _check_files(folder)
    except DamagedCheckpoint:
        return True
    except OSError:
        pass
    return False


def _remove(path: Path) -> None:
    """Remove a folder; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _checkpoints(run: Path) -> Path:
    """The folder of the checkpoints. What a link leads to belongs to somebody else, and checkpoints are deleted."""
    folder = run / "checkpoints"
    if folder.is_symlink():
        raise UserError(
            f"{folder} is a link. Old checkpoints are deleted there, which is not done through a link: "
            "link the whole run folder"
        )
    return folder


def saved_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, newest first.

    Raises:
        UserError: the folder cannot be read, which does not mean that it is empty.
    """
    try:
        names = os.listdir(_checkpoints(run))
    except (FileNotFoundError, NotADirectoryError):  # the run folder may be a file: its caller says so
        return []
    except OSError as error:
        raise UserError(f"{run / 'checkpoints'} cannot be read: {error.strerror}") from None
    steps = (re.fullmatch(r"step-(0|[1-9][0-9]{0,17})", name) for name in names)
    return sorted((int(found[1]) for found in steps if found), reverse=True)


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a line about each newer one. For the process that holds the run.

    Raises:
        UserError: there are checkpoints and all are damaged.
    """
    for aside in _checkpoints(run).glob(".step-*.old"):  # a process was killed while it replaced a checkpoint
        if (target := aside.with_name(aside.stem[1:])).exists():
            _remove(aside)
        else:
            os.rename(aside, target)
    faults: list[str] = []
    for step in saved_steps(run):
        folder = run / "checkpoints" / f"step-{step}"
        try:
            _check_files(folder)
            return folder, faults
        except DamagedCheckpoint as error:
            faults.append(f"{folder} is damaged: {error}")
        except OSError as error:
            faults.append(f"{folder} is damaged or cannot be read now: {_reason(error)}")
    if faults:
        raise UserError("; ".join(faults) + "; no whole checkpoint is left: set another out= to start again")
    return None, []


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, State]:
    """Model, moving average (or None) and state of a checkpoint of `newest_checkpoint`, which checks the files."""
    model, _ = read_safetensors(folder / "model.safetensors")
    ema = read_safetensors(folder / "ema.safetensors")[0] if (folder / "ema.safetensors").exists() else None
    return model, ema, load_state(folder)


def load_card(folder: Path) -> Card | None:
    """What the weights of a checkpoint say about themselves, with their recipe."""
    return read_safetensors(folder / "model.safetensors")[1]


def load_state(folder: Path) -> State:
    """Optimizer, scaler and progress of a checkpoint of `newest_checkpoint`.

    Raises:
        UserError: the file is not a state of training, or a field is missing or wrong; nothing in it is executed.
    """
    file = folder / "state.pt"
    state = read_pickle(file)
    parts = ("optimizer", "scaler", "progress")
    if not isinstance(state, dict) or not all(isinstance(state.get(key), dict) for key in parts):
        raise UserError(f"{file} is not a state of training, with {', '.join(parts)}; {advice_without(folder)}")
    progress = state["progress"]
    try:
        if missing := Progress.model_fields.keys() - progress.keys() - LATER:
            raise ValueError(f"{min(missing)} is missing")
        Progress.model_validate(progress)
        if last := progress["last"]:
            EpochLine.model_validate(last)
            if unknown := [key for key in EpochLine.model_fields if last.get(key) is None and key != "ema_top1"]:
                raise ValueError(f"last has no {unknown[0]}")
        if f"step-{progress['step']}" != folder.name:
            raise ValueError(f"step is {progress['step']}")
    except (ValueError, RecursionError) as error:
        reason = shorten(str(error), 60)
        if isinstance(error, ValidationError):
            reason = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
        raise UserError(f"{file} is of another version, or damaged: {reason}; {advice_without(folder)}") from None
    return state


class DamagedCheckpoint(Exception):
    """A file of a checkpoint is not what was written. One that cannot be read now is an OSError."""


def _check_files(folder: Path) -> None:
    """Compare the files of a checkpoint with their checksums.

    Raises:
        DamagedCheckpoint: one is missing or differs.
        OSError: one cannot be read.
    """
    if folder.is_symlink():
        raise DamagedCheckpoint("it is a link")
    try:
        digests = read_json(folder / "manifest.json")["sha256"]
        for name in ("model.safetensors", "state.pt", *digests):
            if name != os.path.basename(name):
                raise DamagedCheckpoint(f"manifest.json names {name}, which is not in the folder of the checkpoint")
            with open_regular(folder / name) as file:
                try:
                    digest = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
                except OSError as error:  # of a bad sector, which does not name the file
                    raise OSError(error.errno, error.strerror, name) from None
            if digest != digests[name]:
                raise DamagedCheckpoint(f"{name} does not match its checksum")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedCheckpoint(_reason(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint("manifest.json is not readable") from None


def _reason(error: OSError) -> str:
    return f"{Path(error.filename).name}: {error.strerror}" if error.filename else error.strerror or str(error)
