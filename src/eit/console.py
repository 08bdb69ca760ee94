"""What people see: a progress bar on a terminal, plain lines elsewhere; results on stdout, all else on stderr."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from eit import distributed
from eit.errors import printable

T = TypeVar("T")


class Messages(Console):
    """Progress and warnings. If nobody reads them any more (`2>&1 | head -1`, a lost terminal), the work goes on."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True


out = Console(highlight=False, soft_wrap=True)
err = Messages(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, any_rank: bool = False) -> None:
    """Print a message for the user: only on rank 0, or with `any_rank` on each rank that calls this."""
    if distributed.is_main():
        err.print(escape(printable(text)))
    elif any_rank:
        err.print(escape(printable(f"[rank {distributed.rank()}] {text}")))


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages, for work that is repeated: its messages were printed before."""
    before, err.quiet = err.quiet, True
    try:
        yield
    finally:
        err.quiet = before


class Advance(Protocol):
    def __call__(self, steps: int = 1, **fields: Any) -> None: ...


@contextmanager
def progress(title: str, total: int, start: int = 0, every: float = 10.0) -> Iterator[Advance]:
    """A progress bar of `total` steps; yields a function of the steps done and `name=value` fields to show after it.

    Without a terminal, a plain line appears every `every` seconds, so a short task prints nothing.
    """
    done, began, last = start, time.monotonic(), time.monotonic()
    if not distributed.is_main():
        yield lambda steps=1, **fields: None
        return
    if not err.is_terminal:

        def line(steps: int = 1, **fields: Any) -> None:
            nonlocal done, last
            done += steps
            now = time.monotonic()
            if now - last >= every:
                last = now
                left = (now - began) / max(done - start, 1) * (total - done)
                say("  ".join([f"{title} {done}/{total}", *_fields(fields), f"{left:.0f} s left"]))

        yield line
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )
    with bar:
        task = bar.add_task(escape(title), total=total, completed=start, shown="")

        def advance(steps: int = 1, **fields: Any) -> None:
            bar.update(
                task, advance=steps, shown="  ".join(_fields(fields)) if fields else bar.tasks[0].fields["shown"]
            )

        yield advance


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """`items` with a progress bar."""
    with progress(title, total) as advance:
        for item in items:
            yield item
            advance()


def _fields(fields: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()]
