"""A run folder: recipe, lock, environment, log, curves, summary, weights."""

import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from eit import plots
from eit.config import Recipe, differences, is_extended, parse_recipe, parse_yaml
from eit.console import say
from eit.errors import UserError, few, first_line
from eit.files import open_regular, read_json, read_regular, write_file
from eit.training.checkpoint import EpochLine, of_older_version, saved_steps
from eit.training.folder_lock import FolderLock

CURVES_EVERY = 5  # seconds: drawing takes 0.1 s, as long as some recipes' epochs
MARKS = ("environment.json", "log.jsonl", "checkpoints")  # of a run, besides its recipe.yaml


class Summary(BaseModel):
    """What summary.json has at least."""

    model_config = ConfigDict(strict=True, extra="allow")

    best_top1: float
    best_epoch: int
    last_top1: float
    epochs: int


class RunFolder:
    """The folder `path` of a run of `recipe`. This process alone holds it until the end of the context."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        try:
            _check_is_run(path)
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(path)
        except FileExistsError:
            raise UserError(f"out={path} is a file: a folder is needed") from None
        except OSError as error:
            at = "" if error.filename in (None, str(path)) else f"{error.filename}: "
            raise UserError(f"out={path} cannot be written: {at}{error.strerror}") from None
        try:
            self._lines = self.lines()
            steps = saved_steps(path)
            if self._lines and not steps and read_summary(path) is None:
                raise UserError(
                    f"{path} has a log ({len(self._lines)} lines), but no checkpoint to continue from: "
                    f"put {path / 'checkpoints'} back, or set another out= to train anew"
                )
            was_trained = steps or self._lines  # until then the recipe may change
            if was_trained:
                before = read_recipe(path)
                changes = differences(before, recipe)
                if changes and not (is_finished(path, before) and is_extended(before, recipe)):
                    shown = few(changes, separator="; ")
                    raise UserError(f"{path} holds a run of another recipe ({shown}); set another name= or out=")
            write_file(path / "recipe.yaml", recipe.to_yaml())
        except BaseException:
            self._lock.release()
            raise
        self._recipe = recipe
        self._boards: dict[str, _TensorBoard | _WeightsAndBiases] = {}
        self._undrawn, self._drawn_at = False, -math.inf
        self._failed: set[str] = set()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self._draw_curves()
            for name, board in self._boards.items():
                self._try(name, board.close)
        finally:
            self._lock.release()

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        lines = read_log(self.path) if os.path.lexists(self.path / "log.jsonl") else []
        return [line for line in lines if line.get("step") is not None]

    def check(self) -> None:
        """Raise a UserError if the folder is not this process's any more."""
        self._lock.check()

    def cut_log(self, step: int, last: dict[str, Any]) -> None:
        """Drop the lines after `step`, the checkpoint that the run continues from. `last` is its newest line, or {}."""
        self._lines = [line for line in self._lines if line["step"] <= step]
        if last and last["step"] not in [line["step"] for line in self._lines]:  # killed before it was written
            self._lines.append(last)
        write_file(self.path / "log.jsonl", "".join(map(_json_line, self._lines)))

    def start_logging(self, environment: dict[str, Any], step: int) -> None:
        """Write environment.json, with earlier starts. Open the loggers of `train.log`, which go on after `step`."""
        earlier: list[Any] = []
        try:
            before = read_json(self.path / "environment.json")
            if not isinstance(before, dict) or not isinstance(before.get("earlier_starts", []), list):
                raise ValueError("it is not of a run")
            earlier = [*before.pop("earlier_starts", []), before]
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            say(f"{self.path / 'environment.json'} is damaged ({first_line(error)}); it is written anew")
        self.write_json("environment.json", environment | dict(step=step, earlier_starts=earlier))

        def open_board(name: str) -> None:
            if name == "wandb":
                self._boards[name] = _WeightsAndBiases(self.path, self._recipe)
            else:
                self._boards[name] = _TensorBoard(self.path / name, step + 1)

        for name in self._recipe.train.log:
            self._try(name, partial(open_board, name))

    def append_log(self, line: dict[str, Any]) -> None:
        """Write an epoch's line to log.jsonl. It follows the checkpoint: a log without one is an error."""
        file = self.path / "log.jsonl"
        try:
            with open_regular(file, "a", encoding="utf-8") as f:
                f.write(_json_line(line))
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:  # that of a full disk does not name the file
            raise OSError(error.errno, error.strerror, str(file)) from None

    def show_epoch(self, line: dict[str, Any], classes: int) -> None:
        """Show an epoch on the screen (top-5 of more than 5 classes), in TensorBoard and in curves.png."""
        top5 = f"  top-5 {line['val_top5']:.2f}%" if classes > 5 else ""
        ema = "" if line["ema_top1"] is None else f"  ema {line['ema_top1']:.2f}%"
        say(
            f"epoch {line['epoch'] + 1}  train loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}  "
            f"top-1 {line['val_top1']:.2f}%{top5}{ema}  lr {line['lr']:.2e}  "
            f"{line['images_per_s']:.0f} images/s"
        )
        self._lines.append(line)
        self._undrawn = True
        numbers = {k: v for k, v in line.items() if k not in ("epoch", "step", "stopped_early") and v is not None}
        for name, board in self._boards.items():
            self._try(name, partial(board.add, line["step"], numbers))
        if time.monotonic() - self._drawn_at > CURVES_EVERY:
            self._draw_curves()

    def _draw_curves(self) -> None:
        """Draw curves.png, if there are lines that it does not show."""
        if self._undrawn:
            self._try("curves.png", lambda: plots.curves(self._lines, self.path / "curves.png"))
            self._undrawn, self._drawn_at = False, time.monotonic()

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """Write what is only looked at. An error is said once, and training goes on."""
        try:
            call()
        except Exception as error:  # of Matplotlib, TensorBoard or the disk
            if name not in self._failed:
                said = f"{self.path / name} cannot be written"
                reason = first_line(error).removeprefix(f"{said}: ")
                say(f"{said} ({reason}); training goes on without it")
            self._failed.add(name)

    def finish(self, **summary: Any) -> dict[str, Any]:
        """Write summary.json and return it."""
        self.check()
        self._draw_curves()
        self.write_json("summary.json", summary)
        return summary

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_file(self.path / name, json.dumps(content, indent=2, allow_nan=False) + "\n")


class _TensorBoard:
    """Scalars for TensorBoard. torch's SummaryWriter writes in a thread, which a full disk ends with a traceback."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a new file. TensorBoard drops what earlier files have from `first_step` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = folder / name
        self._write(Event(file_version="brain.Event:2"), "xb")
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Nothing: each event is on the disk."""

    def _write(self, event: Any, mode: str = "ab") -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = time.time()
        with open(self._file, mode) as file:
            RecordWriter(file).write(event.SerializeToString())


class _WeightsAndBiases:
    """The same numbers for Weights & Biases, which reads its own settings (WANDB_MODE, WANDB_PROJECT ...)."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        import wandb

        file = folder / "wandb-id"  # a run that continues is the same one there
        if not file.is_file():
            write_file(file, uuid.uuid4().hex[:12])
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "eit"),
            name=recipe.name,
            id=read_regular(file).decode(),
            resume="allow",
            dir=folder,
            config=recipe.model_dump(mode="json"),
        )

    def add(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


def check_loggers(recipe: Recipe) -> None:
    """Raise a UserError if a package that `train.log` names is not installed."""
    spec = find_spec("wandb") if "wandb" in recipe.train.log else None
    if "wandb" in recipe.train.log and (spec is None or spec.origin is None):  # a folder `wandb` has no origin
        raise UserError(
            "train.log=wandb: the package wandb is not installed; pip install 'eit[wandb]', or leave it out"
        )


def _check_is_run(path: Path) -> None:
    """Raise a UserError if the folder has files that are not of a run: nothing of them is to be written over."""
    names = {name for name in os.listdir(path) if not name.startswith(".")} if path.is_dir() else set()
    if not names:
        return
    if "recipe.yaml" not in names:
        raise UserError(f"{path} is not empty and is not a run folder (it has no recipe.yaml); set another out=")
    if names.isdisjoint(MARKS):  # the user's recipe, or that of a run that wrote nothing else
        text = read_regular(path / "recipe.yaml").decode(errors="replace")
        try:
            is_written = parse_recipe(parse_yaml(text, "recipe.yaml")).to_yaml() == text
        except UserError:
            is_written = False
        if not is_written:
            raise UserError(
                f"{path} is not a run folder: its recipe.yaml is not one that a run has written; set another out="
            )


def read_recipe(path: Path) -> Recipe:
    """The recipe of the run in the folder `path`."""
    file = path / "recipe.yaml"
    try:
        recipe = parse_recipe(parse_yaml(read_regular(file).decode("utf-8"), str(file)))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}; was it made by another version?") from None
    return of_older_version(recipe)


def resumable_recipe(path: Path) -> Recipe | None:
    """The recipe of the run in the folder `path`, or None if there is no checkpoint to resume from."""
    return read_recipe(path) if saved_steps(path) and (path / "recipe.yaml").is_file() else None


def is_finished(path: Path, recipe: Recipe) -> bool:
    """Whether the run of `recipe` in the folder `path` has had all its epochs. One that stopped early has not."""
    summary = read_summary(path)
    return summary is not None and summary["epochs"] == recipe.train.epochs


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of the finished run in the folder `path`; None if it is not finished, or summary.json is damaged."""
    if not (path / "final.safetensors").exists():
        return None
    try:
        summary: dict[str, Any] = read_json(path / "summary.json")
        Summary.model_validate(summary)
        return summary
    except (OSError, ValueError):
        return None


def best_line(log: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """The line of the best epoch, as the trainer chooses it: by top-1; with `train.patience`, if equal by loss."""
    if recipe.train.patience:
        return max(log, key=lambda line: (line["val_top1"], -line["val_loss"]))
    return max(log, key=lambda line: line["val_top1"])


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a log, one per epoch. Damaged lines, such as one that a killed process left, are left out.

    Raises:
        UserError: there is no log.
    """
    try:
        text = read_regular(folder / "log.jsonl").decode("utf-8-sig", errors="replace")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} has no log of a run: {error.strerror}") from None
    except OSError as error:
        raise UserError(f"{folder / 'log.jsonl'} cannot be read: {error.strerror}") from None
    lines, damaged = [], []
    texts = text.rstrip("\n").split("\n")
    for number, line in enumerate(texts, 1):
        if not line.strip():
            continue
        try:
            # NaN, which earlier versions wrote, and numbers too large for a float are read as None: not known
            values = json.loads(line, parse_constant=lambda _: None, parse_float=_finite)
            EpochLine.model_validate(values)
            lines.append(values)
        except (ValueError, RecursionError):
            if number < len(texts):  # the last one is torn if a process was killed
                damaged.append(str(number))
    if damaged:
        say(f"{folder / 'log.jsonl'}: damaged lines are left out ({few(damaged)})")
    return lines


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _json_line(line: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
