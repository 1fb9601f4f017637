"""Who owns a folder: one process at a time, on any file system. Imports no torch.

`.lock` in the folder is locked by the system (flock), which drops the lock with its process,
however that ends. Where a file system has no such locks (some mounts of NFS and Lustre) `.lease`
says who owns the folder: the owner counts in it, and one that has stopped counting is gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ghosttrain.errors import BUSY, Busy

LOCK, LEASE = ".lock", ".lease"
PATIENCE = 10.0
"""Seconds to wait for another owner before it is said: one that was killed may be ending."""
BEAT, STALE = 5.0, 60.0
"""Seconds between two counts of a lease, and without one after which its owner is gone."""
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What a file system says that has no locks."""
_held: set[int] = set()


@contextmanager
def locked(folder: Path, busy: str | None, patience: float | None = None) -> Iterator[None]:
    """Own an existing folder until the block or the process ends.

    Args:
        folder: an existing one.
        busy: what to say when another process owns it: `{owner}` in it becomes its number and
            machine. None: say nothing and go on, for work that may be done twice.
        patience: seconds to wait for the other process; None: `PATIENCE`.

    Raises:
        Busy: with the message `busy`, when another process owns it.
        OSError: the folder cannot be written.
    """
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    lease = _Lease(folder / LEASE)
    while (handle := _lock(folder / LOCK, lease)) is None:
        if time.monotonic() < deadline or lease.may_be_gone:
            time.sleep(0.1)
        elif busy is None:
            yield
            return
        else:
            raise Busy(busy.replace("{owner}", owner_of(folder)))
    try:
        with suppress(OSError):  # a full disk: nobody is named, no more
            os.ftruncate(handle, 0)
            os.pwrite(handle, _me().encode(), 0)
        yield
    finally:
        lease.give_back()
        with suppress(OSError):
            if _is_there(handle, folder / LOCK):
                (folder / LOCK).unlink()
        _release(handle)


def is_locked(folder: Path) -> bool:
    """Whether another process owns a folder now, as far as can be known. Two that ask at once do
    not see each other.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        owned = _flock(handle, fcntl.LOCK_SH)
        return not owned if owned is not None else _Lease(folder / LEASE).is_counted()
    finally:
        _release(handle)


def owner_of(folder: Path) -> str:
    """Return `process 4711 on gpu07` of a folder's last owner, as far as it is known."""
    with suppress(OSError, ValueError):
        pid, host = (folder / LOCK).read_text(encoding="utf-8")[:300].split()
        return f"process {int(pid)} on {ascii(host)[1:-1]}"
    return "another process"


def _lock(path: Path, lease: _Lease) -> int | None:
    """Return the open file `path` where this process has the lock now, None where another has."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    _held.add(handle)
    try:
        owned = _flock(handle)
        owned = lease.take() if owned is None else owned and _is_there(handle, path)
    except BaseException:
        _release(handle)
        raise
    if owned:
        return handle
    _release(handle)
    return None


def _is_there(handle: int, path: Path) -> bool:
    """Whether an open file still has this name: its owner before may just have removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    return False


def _release(handle: int) -> None:
    _held.discard(handle)
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _forget() -> None:
    """Let no worker that is forked hold a lock too: it would outlive this process by seconds."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _flock(handle: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Return whether this process has the lock now; None where the file system has no locks."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _me() -> str:
    return f"{os.getpid()} {socket.gethostname()}"


class _Lease:
    """A file that one process owns by counting in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.token = path, f"{_me()} {secrets.token_hex(8)}"
        self.seen: str | None = None
        self.since = time.monotonic()
        self.may_be_gone = False
        """Whether there is an owner who has not counted since the first look."""
        self.ended = threading.Event()
        self.counter: threading.Thread | None = None

    def take(self) -> bool:
        """Take the lease if nobody has it, or its owner is gone; whether this process has it."""
        now, content = time.monotonic(), self._read()
        if content != self.seen:
            self.may_be_gone = content is not None and self.seen is None
            self.seen, self.since = content, now
        if content is not None and not _is_dead(content) and now - self.since < STALE:
            return False
        if not self._write(0, over=content is not None):
            return False
        time.sleep(BEAT / 10)  # of two that take over at once, the second has it
        if not self._is_mine():
            return False
        self.counter = threading.Thread(target=self._count, name="lease", daemon=True)
        self.counter.start()
        return True

    def is_counted(self) -> bool:
        """Whether the owner counts, or may do so in a moment: waits for two counts at the most."""
        first, until = self._read(), time.monotonic() + 2 * BEAT
        if first is None or _is_dead(first):
            return False
        while (content := self._read()) == first and time.monotonic() < until:
            time.sleep(BEAT / 10)
        return content is not None and content != first

    def give_back(self) -> None:
        """End the lease, if this process has it."""
        self.ended.set()
        if self.counter is not None:
            self.counter.join()
            if self._is_mine():
                self.path.unlink(missing_ok=True)

    def _count(self) -> None:
        count = 0
        while not self.ended.wait(BEAT):
            with suppress(OSError):
                content = self._read()
                if content is not None and not content.startswith(self.token):
                    print(
                        f"ghosttrain: error: {self.path.parent} was taken by another process while "
                        "this one stood still; this one ends",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(BUSY)
                count += 1
                self._write(count, over=content is not None)  # else somebody removed it

    def _is_mine(self) -> bool:
        return (self._read() or "").startswith(self.token)

    def _read(self) -> str | None:
        """Return what the file holds; None where there is none."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _write(self, count: int, over: bool) -> bool:
        """Write the file as a whole, `over` one that is there or only where there is none; whether
        it was written.
        """
        part = self.path.with_name(f"{LEASE}.{self.token[-8:]}")
        part.write_text(f"{self.token} {count}", encoding="utf-8")
        if over:
            part.replace(self.path)
            return True
        try:
            os.link(part, self.path)
        except FileExistsError:
            return False
        finally:
            part.unlink()
        return True


def _is_dead(said: str) -> bool:
    """Whether the owner of a lease was a process of this machine, and is none any more."""
    pid, host, *_ = [*said.split(), "", ""]
    return host == socket.gethostname() and pid.isdecimal() and not Path(f"/proc/{pid}").exists()
