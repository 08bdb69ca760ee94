"""The state of training on disk: `checkpoints/step-N/` of a run folder.

A checkpoint has model.safetensors, ema.safetensors, state.pt and manifest.json (sha256 of each). It gets its name only
when all of it is on the disk. Older checkpoints are deleted after that.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eit.console import say
from eit.errors import UserError
from eit.files import sync_folder, write_file
from eit.weights.card import Card
from eit.weights.formats import StateDict, read_pickle, read_safetensors, weights_bytes

KEPT = 2  # checkpoints of a run
State = dict[str, Any]  # of optimizer, scaler and progress


@dataclass
class Progress:
    """What a checkpoint holds of a run besides weights, optimizer and scaler. The names are those of the file."""

    step: int = 0  # optimizer steps taken
    loss_sum: float = 0.0  # over the steps of this epoch so far
    best_top1: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0  # of training steps, over all continuations
    last: dict[str, Any] = field(default_factory=dict)  # the newest line of the log
    fixed: dict[str, Any] = field(default_factory=dict)  # what a continued run must share: data, global batch


def check_unchanged(state: State, progress: Progress, run: Path) -> None:
    """Raise a UserError if the run of a checkpoint had other data, another global batch or another teacher."""
    saved = state["progress"]["fixed"]
    for key, now in progress.fixed.items():
        if (before := saved.get(key, now)) != now:  # earlier versions recorded less
            advice = f"set {key}={before}" if key.startswith("data.") else "set another out="
            raise UserError(f"{run} was trained with another {key}: {before}, now {now}; {advice}")


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
    folder = run / "checkpoints"
    target, temporary, aside = (folder / name for name in (f"step-{step}", f".step-{step}.tmp", f".step-{step}.old"))
    try:
        for unfinished in folder.glob(".step-*.tmp"):  # left by a process that was killed
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            write_file(temporary / name, content)
        if target.exists():  # a long epoch is saved before and after its evaluation
            os.rename(target, aside)
        os.rename(temporary, target)
        sync_folder(folder)
        sync_folder(run)
        if aside.exists():
            shutil.rmtree(aside)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        need, free = sum(map(len, files.values())), shutil.disk_usage(run).free
        reason = f"{os.strerror(error.errno or 0)}; {need:,} bytes are needed, {free:,} are free"
        raise OSError(f"checkpoint {target} was not written ({reason}); earlier ones are intact") from None
    kept = [old for old in saved_steps(run) if old <= step][:KEPT]
    for old in set(saved_steps(run)) - set(kept):  # later ones are damaged: the run continued from an older step
        shutil.rmtree(folder / f"step-{old}")
    return target


def saved_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, newest first."""
    names = [p.name for p in (run / "checkpoints").glob("step-*")]
    return sorted((int(n[5:]) for n in names if n[5:].isdigit()), reverse=True)


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a line about each newer one. For the process that holds the run.

    Raises:
        UserError: there are checkpoints and all are damaged.
    """
    for aside in (run / "checkpoints").glob(".step-*.old"):  # a process was killed while it replaced a checkpoint
        if (target := aside.with_name(aside.stem[1:])).exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, target)
    faults = []
    for step in saved_steps(run):
        folder = run / "checkpoints" / f"step-{step}"
        if fault := _damage(folder):
            faults.append(f"{folder} is damaged: {fault}")
        else:
            return folder, faults
    if faults:
        raise UserError("; ".join(faults) + "; no whole checkpoint is left: set another out= to start again")
    return None, []


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, State]:
    """Model, moving average (or None) and state of a checkpoint of `newest_checkpoint`, which checks the files."""
    model, _ = read_safetensors(folder / "model.safetensors")
    ema = read_safetensors(folder / "ema.safetensors")[0] if (folder / "ema.safetensors").exists() else None
    return model, ema, load_state(folder)


def load_state(folder: Path) -> State:
    """Optimizer, scaler and progress of a checkpoint of `newest_checkpoint`.

    Raises:
        UserError: the file is not a state of training; nothing in it is executed.
    """
    file = folder / "state.pt"
    state = read_pickle(file)
    if not isinstance(state, dict) or not all(isinstance(state.get(key), dict) for key in ("optimizer", "progress")):
        raise UserError(f"{file} is not a state of training")
    return state


def _damage(folder: Path) -> str | None:
    try:
        digests = json.loads((folder / "manifest.json").read_text())["sha256"]
        for name in ("model.safetensors", "state.pt", *digests):
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != digests[name]:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is not readable"
    return None
