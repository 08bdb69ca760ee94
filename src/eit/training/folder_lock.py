"""The lock on a run folder: one process holds it at a time.

`.lock` names its holder. flock locks that file, and the system drops the lock when the process ends, however it ends.
On a file system without flock, filelock's soft lock is used: the file `.lock-soft` exists while the folder is held. It
outlives a killed process. So its holder touches `.lock` every 20 s, and another process takes the lock over if its
holder is dead, or did not touch the file for two minutes.
"""

import errno
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from filelock import SoftFileLock, Timeout

from eit.console import say
from eit.errors import UserError
from eit.files import open_regular

NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # Lustre without its option, NFS without lockd
WAIT = 120.0  # seconds for another machine to release a lock, or to refresh a soft one
REFRESH = 20.0  # seconds
POLL = 0.5  # seconds
ADVICE = "set another out="

Process = dict[str, Any]  # host, PID, start time and namespace: PIDs and host names alone may be used again
State = tuple[int | None, int | None, Process | None]  # times of .lock-soft and .lock, the holder


class FolderLock:
    """The lock on `folder`, from now until `release`.

    Raises:
        UserError: another process holds it. One on another machine is waited for, up to `WAIT` seconds.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.marker = folder, folder / ".lock", folder / ".lock-soft"
        self._me = _describe(os.getpid())
        self._soft: _SoftLock | None = None
        self._ended = threading.Event()
        self._refresher = threading.Thread(target=self._refresh, name="run folder's lock", daemon=True)
        self._open = open_regular(self.file, "a+", encoding="utf-8")  # held until released
        try:
            if missing := self._take_flock():
                say(
                    f"{folder}: this file system has no flock ({missing}); the file {self.marker.name} locks it instead"
                )
                self._soft = self._take_soft_lock()
            self._write(json.dumps(self._me) + "\n")
            if self._soft:
                self._refresher.start()
        except BaseException:
            if self._soft:
                self._soft.release()
            self._open.close()
            raise

    def check(self) -> None:
        """Raise a UserError if the folder is not this process's any more: it was removed, or taken over by another."""
        try:
            is_same = os.path.samestat(os.stat(self.file), os.fstat(self._open.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.folder} was removed while this process trained in it; the run ends") from None
        except OSError:  # a server that is away for a while
            return
        if self._is_lost() or not (is_same or self._holder()):  # some file systems give a file another number
            holder = _name(self._holder())
            reason = (
                f"this process did not refresh {self.file.name} for {WAIT:g} s" if self._soft else "it was replaced"
            )
            raise UserError(f"{self.folder} was taken over by {holder}: {reason}; this process ends here")

    def release(self) -> None:
        """Release it, once. A forked process has nothing to release."""
        if self._open.closed or os.getpid() != self._me["pid"]:
            return
        self._ended.set()
        if self._refresher.is_alive():
            self._refresher.join(REFRESH)  # at most: the thread hangs if its file system does
        is_lost = self._is_lost()
        if not is_lost:
            with suppress(OSError):
                self._write("")
        if self._soft:
            self._soft.is_ours = not is_lost
            self._soft.release()
        self._open.close()

    def _take_flock(self) -> str | None:
        """Lock with flock. If the file system has none, the reason."""
        try:
            import fcntl
        except ImportError:
            return "Windows"
        os.register_at_fork(after_in_child=_closer(self._open))
        deadline, told = time.monotonic() + WAIT, False
        while True:
            try:
                fcntl.flock(self._open, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except (BlockingIOError, PermissionError):  # it is held; some file systems raise the second
                holder = self._holder()
            except OSError as error:
                if error.errno in NO_FLOCK:
                    return errno.errorcode[error.errno]
                raise
            if holder is None or holder["host"] == self._me["host"]:
                raise self._in_use(holder)
            if time.monotonic() >= deadline:
                raise self._in_use(holder, f"; if its machine is gone, delete {self.file}")
            if not told:
                self._say_waiting(holder)
                told = True
            time.sleep(POLL)

    def _take_soft_lock(self) -> "_SoftLock":
        """Lock with the file `.lock-soft`."""
        lock = _SoftLock(self.marker, thread_local=False)  # released by any thread
        start = since = time.monotonic()
        previous: State | None = None
        told = False
        while True:
            state = self._state()  # read before the attempt: only the lock in this state is taken over
            with suppress(Timeout):
                lock.acquire(blocking=False)
                if not self.marker.stat().st_size:  # filelock before 3.22; later ones remove a marker without a name
                    self.marker.write_text(f"{self._me['pid']}\n{self._me['host']}\n")
                return lock
            now, holder = time.monotonic(), state[2]
            if state != previous:
                previous, since = state, now
            is_here = holder is not None and os.name == "posix" and _is_here(holder, self._me)
            if holder and is_here and _is_running(holder):
                raise self._in_use(holder)
            # Not at the first attempt: a new holder writes its marker a moment before its name.
            if now - since >= (POLL if is_here else WAIT) and self._remove_marker(state):
                if not is_here:
                    silent = f"did not refresh its lock for {WAIT:g} s"
                    say(f"{self.folder}: took over the lock of {_name(holder)}, which {silent}")
                continue
            if now - start >= WAIT:
                raise self._in_use(holder, f"; if that one is dead, try again in {WAIT:g} s")
            if not is_here and not told and now > since:
                self._say_waiting(holder)
                told = True
            time.sleep(POLL)

    def _state(self) -> State:
        """The state of the soft lock: it changes when the lock is taken, refreshed or released."""
        times: list[int | None] = []
        for file in (self.marker, self.file):
            try:
                with open(file, "rb") as opened:  # NFS asks the server for a file's time when it is opened
                    times.append(os.fstat(opened.fileno()).st_mtime_ns)
            except OSError:
                times.append(None)
        return times[0], times[1], self._holder()

    def _remove_marker(self, state: State) -> bool:
        """Remove the marker of a dead holder; False if another process was faster and the marker is its own."""
        aside = self.marker.with_name(f"{self.marker.name}-{uuid4().hex}")
        try:
            os.rename(self.marker, aside)
            if os.stat(aside).st_mtime_ns != state[0]:
                os.rename(aside, self.marker)
                return False
            os.unlink(aside)
        except OSError:
            return False
        return True

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH):
            if self._is_lost():
                return
            with suppress(OSError):  # the server may be away for a while; `check` notices if it was too long
                os.utime(self.file)

    def _is_lost(self) -> bool:
        holder = self._holder()
        return holder is not None and holder != self._me

    def _holder(self) -> Process | None:
        """The process that holds the lock, or held it until it was killed; None if not known."""
        try:
            with open_regular(self.file) as file:
                holder = json.loads(file.read(4096))
            return holder if isinstance(holder["pid"], int) and isinstance(holder["host"], str) else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def _write(self, text: str) -> None:
        self._open.truncate(0)
        self._open.write(text)
        self._open.flush()

    def _in_use(self, holder: Process | None, also: str = "") -> UserError:
        if holder == self._me:
            return UserError(f"{self.folder} is in use by another run of this process; {ADVICE}")
        who = f" ({_name(holder)})" if holder else ""
        return UserError(f"{self.folder} is in use by another process{who}; {ADVICE}{also}")

    def _say_waiting(self, holder: Process | None) -> None:
        say(f"{self.folder} is in use by {_name(holder)}; waiting up to {WAIT:g} s for it to end")


class _SoftLock(SoftFileLock):
    """Older versions of filelock remove the file even if it has another owner by now, and in forked processes too."""

    is_ours = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._process = os.getpid()

    def release(self, force: bool = False) -> None:
        if self.is_ours and os.getpid() == self._process:
            super().release(force)


def _name(holder: Process | None) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "an unknown process"


def _describe(pid: int) -> Process:
    """What distinguishes process `pid` of this machine from all others."""
    try:
        namespace: int | None = os.stat("/proc/self/ns/pid").st_ino  # containers may share a host name
    except OSError:
        namespace = None
    return dict(host=socket.gethostname(), pid=pid, start=_state_and_start(pid)[1], namespace=namespace)


def _state_and_start(pid: int) -> tuple[str | None, str | None]:
    """State and start time of a process on Linux; None elsewhere."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return after_name[0], after_name[19]
    except (OSError, IndexError):
        return None, None


def _is_here(holder: Process, me: Process) -> bool:
    """Whether the holder is a process of this machine and namespace, so that its PID is valid here."""
    return all(holder.get(key) == me[key] for key in ("host", "namespace"))


def _is_running(holder: Process) -> bool:
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    state, start = _state_and_start(holder["pid"])
    return state != "Z" and (start is None or holder.get("start") in (None, start))


def _closer(file: IO[str]) -> Callable[[], None]:
    """A function that closes `file`. Without it loader workers would keep the lock when their parent is killed."""
    reference = weakref.ref(file)

    def close() -> None:
        if (opened := reference()) is not None:
            opened.close()

    return close
