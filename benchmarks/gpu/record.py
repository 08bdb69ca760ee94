"""The results of `make gpu`: gpu.json, rewritten after each item, and gpu.md, which is made from it."""

import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from eit.environment import environment
from eit.errors import first_line
from eit.files import write_file

Item = dict[str, Any]
LONG = ("rows", "curve", "traceback")  # keys of an item that are not shown in its line


def card_folder(out: Path, dry_run: bool) -> Path:
    name = "dry-run" if dry_run else torch.cuda.get_device_name(0)
    return out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass
class Session:
    """One part of `make gpu`, with its time limit.

    Attributes:
        part: check, bench or train.
        device: the device that it runs on.
        folder: where the results of all parts go.
        data: packed images, or None.
        dry: whether it only tests the program, on the CPU.
        ends: time limit, on the clock of `time.monotonic`.
        about: date, command, machine and versions.
        items: results, in order.
    """

    part: str
    device: torch.device
    folder: Path
    data: Path | None
    dry: bool
    ends: float
    about: dict[str, Any]
    items: list[Item] = field(default_factory=list)

    @classmethod
    def open(cls, part: str, seconds: float, out: Path, data: Path | None, dry: bool) -> "Session":
        device = torch.device("cpu") if dry else torch.device("cuda:0")
        folder = card_folder(out, dry)
        folder.mkdir(parents=True, exist_ok=True)
        about = dict(date=datetime.now(UTC).isoformat(timespec="seconds"), **environment(device))
        about["command"] = " ".join(["python -m benchmarks.gpu", *sys.argv[1:-2]])  # without --child
        seconds *= 10 if dry else 1  # the CPU may be busy with other things
        return cls(part, device, folder, data, dry, time.monotonic() + seconds, about)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.ends - time.monotonic()

    @property
    def failed(self) -> bool:
        return any(item.get("ok") is False for item in self.items)

    def run(self, name: str, call: Callable[[], Item], seconds: float = 0) -> Item:
        """Record the result of `call`, or why there is none: it raised, or less than `seconds` are left."""
        began = time.monotonic()
        if self.left < seconds:
            item: Item = dict(skipped=f"{self.left:.0f} s were left, about {seconds:.0f} s are needed")
        else:
            try:
                item = call()
            except Exception as error:
                traceback.print_exc()
                item = dict(ok=False, error=f"{type(error).__name__}: {first_line(error)}")
                item["traceback"] = traceback.format_exc()[-4000:]  # the printed output may be lost
        item = dict(name=name, **item, seconds=round(time.monotonic() - began, 1))
        self.items.append(item)
        self.save()
        shown = {key: value for key, value in item.items() if key not in ("name", *LONG)}
        print(f"{self.part}: {name}: {shown}", file=sys.stderr, flush=True)
        return item

    def save(self) -> None:
        found = read(self.folder)
        found[self.part] = dict(about=self.about, items=self.items)
        write_file(self.folder / "gpu.json", json.dumps(found, indent=1) + "\n")
        write_file(self.folder / "gpu.md", as_markdown(found))


def read(folder: Path) -> dict[str, Any]:
    file = folder / "gpu.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def as_markdown(found: dict[str, Any]) -> str:
    """The page of a card."""
    about = next(iter(found.values()))["about"]
    gpu = about.get("gpu", {})
    lines = [f"# {about['device']}", ""]
    versions = [f"{name} {version}" for name, version in about["packages"].items()]
    versions += [f"{name} {gpu[name]}" for name in ("driver", "cuda", "cudnn", "nccl") if gpu.get(name)]
    lines += [f"Python {about['python']}, {', '.join(versions)}.", ""]
    for part, one in found.items():
        lines += [
            f"## {part}",
            "",
            f"`{one['about']['command']}`, {one['about']['date']}, commit {one['about']['commit']}",
        ]
        for item in one["items"]:
            lines += ["", *_item(item)]
        lines.append("")
    return "\n".join(lines)


def _item(item: Item) -> list[str]:
    rows = item.get("rows") or []
    verdict = {True: "**holds**", False: "**FAILS**", None: ""}[item.get("ok")]
    about = {k: v for k, v in item.items() if k not in ("name", "ok", *LONG) and v not in (None, [])}
    said = ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in about.items())
    lines = [f"- {item['name']}: {verdict}{' ' if verdict else ''}{said}"]
    if rows:
        head = list(rows[0])
        lines += ["", "  | " + " | ".join(head) + " |", "  | " + " | ".join("---" for _ in head) + " |"]
        lines += ["  | " + " | ".join(_text(row.get(key)) for key in head) + " |" for row in rows]
    return lines


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value).replace("|", "/")
