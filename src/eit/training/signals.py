"""Signals that ask a run to save and stop."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from eit.data.workers import STOP_SIGNALS, waiting


@contextmanager
def stop_signals() -> Iterator[Callable[[], list[float]]]:
    """`STOP_SIGNALS` do not end the process; yields a function that returns 1.0 for each that was received, else 0.0.

    The training loop reads it and stops. A second SIGINT ends the process at once.

    Raises:
        StopRequested: in the context, as `eit.data.workers.waiting` says.
    """
    received: set[int] = set()

    def handle(signum: int, _: Any) -> None:
        received.add(signum)
        waiting.request_stop()

    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield lambda: [0.0] * len(STOP_SIGNALS)
        return
    previous_handlers = {signum: signal.signal(signum, handle) for signum in STOP_SIGNALS}
    read_end, write_end = socket.socketpair()  # Windows cannot set a pipe to non-blocking
    write_end.setblocking(False)
    previous_wakeup = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_exit_at_second_interrupt, args=(read_end,), daemon=True)
    watcher.start()
    try:
        yield lambda: [float(signum in received) for signum in STOP_SIGNALS]
    finally:
        waiting.stop.clear()
        signal.set_wakeup_fd(previous_wakeup)
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)
        write_end.send(bytes(1))  # loader processes have the socket too: closing it would not end the thread
        watcher.join()
        write_end.close()


def _exit_at_second_interrupt(read_end: socket.socket) -> None:
    """End the process at its second SIGINT, also while the main thread waits for other ranks and runs no handler."""
    interrupts = 0
    with read_end:
        while signum := read_end.recv(1)[0]:
            interrupts += signum == signal.SIGINT
            if interrupts == 2:
                show_cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""  # a progress bar hides it
                os.write(2, show_cursor + b"eit: interrupted; checkpoints saved before are kept\n")
                os._exit(130)


if hasattr(os, "register_at_fork"):  # a loader process must not write to our socket
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def first_signal(counts: Sequence[float]) -> int:
    """The first of `STOP_SIGNALS` that any rank received."""
    return next(signum for signum, count in zip(STOP_SIGNALS, counts, strict=True) if count)
