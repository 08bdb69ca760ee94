"""A run folder: recipe, lock, environment, log, curves, summary, weights."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from eit import plots
from eit.config import Recipe, differences, load_recipe
from eit.console import say
from eit.errors import UserError
from eit.files import write_file
from eit.training.checkpoint import saved_steps
from eit.training.folder_lock import FolderLock

CURVES_EVERY = 5  # seconds: drawing takes 0.1 s, as long as some recipes' epochs


class RunFolder:
    """The folder `path` of a run of `recipe`. This process alone holds it until the end of the context."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        if (
            path.is_dir()
            and not (path / "recipe.yaml").exists()
            and any(not p.name.startswith(".") for p in path.iterdir())
        ):
            raise UserError(f"{path} is not empty and is not a run folder (it has no recipe.yaml); set another out=")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(path)
        except FileExistsError:
            raise UserError(f"out={path} is a file: a folder is needed") from None
        except OSError as error:
            raise UserError(f"out={path} cannot be written: {error.strerror}") from None
        try:
            was_trained = saved_steps(path) or self.lines()  # until then the recipe may change
            if was_trained and (changes := differences(read_recipe(path), recipe)):
                raise UserError(f"{path} holds a run of another recipe ({'; '.join(changes)}); set another out=")
            write_file(path / "recipe.yaml", recipe.to_yaml())
        except BaseException:
            self._lock.release()
            raise
        self._undrawn, self._drawn_at = False, -math.inf

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self._draw_curves()
        except Exception:
            if error is None:  # otherwise the error that ended the run is the one to show
                raise
        finally:
            self._lock.release()

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        return read_log(self.path) if (self.path / "log.jsonl").exists() else []

    def cut_log(self, step: int) -> None:
        """Drop the lines after `step`, the checkpoint that the run continues from."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step]
        write_file(self.path / "log.jsonl", "".join(kept))

    def start_logging(self, environment: dict[str, Any], step: int) -> None:
        """Write environment.json, and open TensorBoard's file, in which events after `step` are purged."""
        from torch.utils.tensorboard import SummaryWriter

        self.write_json("environment.json", environment)
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log_epoch(self, line: dict[str, Any], classes: int) -> None:
        """Write an epoch's line to log.jsonl, TensorBoard, the screen (top-5 of more than 5 classes) and curves.png."""
        self._lock.check()
        file = self.path / "log.jsonl"
        try:
            with open(file, "a") as f:
                f.write(json.dumps(line) + "\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:  # that of a full disk does not name the file
            raise OSError(error.errno, error.strerror, str(file)) from None
        for key, value in line.items():
            if key not in ("epoch", "step") and value is not None:
                self._board.add_scalar(key, value, line["step"])
        self._board.flush()
        self._undrawn = True
        if time.monotonic() - self._drawn_at > CURVES_EVERY:
            self._draw_curves()
        top5 = f"  top-5 {line['val_top5']:.2f}%" if classes > 5 else ""
        ema = "" if line["ema_top1"] is None else f"  ema {line['ema_top1']:.2f}%"
        say(
            f"epoch {line['epoch'] + 1}  train loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}  "
            f"top-1 {line['val_top1']:.2f}%{top5}{ema}  lr {line['lr']:.2e}  "
            f"{line['images_per_s']:.0f} images/s"
        )

    def _draw_curves(self) -> None:
        """Draw curves.png, if there are lines that it does not show."""
        if self._undrawn:
            plots.curves(self.lines(), self.path / "curves.png")
            self._undrawn, self._drawn_at = False, time.monotonic()

    def finish(self, **summary: Any) -> dict[str, Any]:
        """Write summary.json and return it."""
        self._lock.check()
        self._board.close()
        self._draw_curves()
        self.write_json("summary.json", summary)
        return summary

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_file(self.path / name, json.dumps(content, indent=2) + "\n")


def read_recipe(path: Path) -> Recipe:
    """The recipe of the run in the folder `path`."""
    file = path / "recipe.yaml"
    try:
        recipe = load_recipe(str(file))
    except UserError as error:
        raise UserError(f"{file}: {error}; was it made by another version?") from None
    if recipe.model.family == "lsra" and "cls_conv" not in recipe.model.model_fields_set:  # an older file
        recipe = recipe.model_copy(update=dict(model=recipe.model.model_copy(update=dict(cls_conv="identity"))))
    return recipe


def resumable_recipe(path: Path) -> Recipe | None:
    """The recipe of the run in the folder `path`, or None if there is no checkpoint to resume from."""
    return read_recipe(path) if saved_steps(path) and (path / "recipe.yaml").is_file() else None


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of the finished run in the folder `path`; None if it is not finished, or summary.json is damaged."""
    try:
        return json.loads((path / "summary.json").read_text()) if (path / "final.safetensors").exists() else None
    except (OSError, ValueError):
        return None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a log, one per epoch. A torn line, left by a killed process, ends it.

    Raises:
        UserError: there is no log.
    """
    try:
        text = (folder / "log.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{folder} has no log of a run: {error.strerror}") from None
    lines = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        if not isinstance(values, dict):
            break
        lines.append(values)
    return lines
