"""A user's mistake becomes one clear line and exit code 2; a bug keeps its stack trace.

Anything the user can mend (a name, a value, a path, a file) is raised as `UserError` with a message
that says what was given, what was expected and what to type. `cli.main` prints that message and
nothing else.
"""

from __future__ import annotations

import difflib
import errno
import os
import signal
from collections.abc import Iterable

from ghosttrain.text import listed, printable

_ROOM = "make room, then type the same command: what is finished is kept"
_FILES = "allow more: ulimit -n 65536"
_FAILED = "the disk or the network folder failed"
_MENDABLE = {
    errno.ENOENT: "",
    errno.EEXIST: "",
    errno.EACCES: "",
    errno.EPERM: "",
    errno.EROFS: "",
    errno.ENOTDIR: "",
    errno.EISDIR: "",
    errno.ELOOP: "",
    errno.ENAMETOOLONG: "",
    errno.ENOTEMPTY: "",
    errno.EBUSY: "",
    errno.EIO: _FAILED,
    errno.ESTALE: _FAILED,
    errno.ENOTCONN: _FAILED,
    errno.ETIMEDOUT: _FAILED,
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "files may not be that large here: type ulimit -f unlimited, or use another disk",
    errno.ENXIO: "put a file in its place, or remove it",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: "another job uses the memory, or data.workers is too high",
}

_NO_MEMORY = ("failed to map segment", "cannot allocate memory", "cannot create shared object")
"""Words of the dynamic linker for a library that has no room in memory (glibc's dl-load.c)."""


class UserError(ValueError):
    """A mistake the user can mend. `str(error)` is one line, whatever names it quotes; `cli.main`
    prints it and exits with code 2.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.splitlines())))


SAVED = 75
"""Exit code of work that was asked to end by a signal, and goes on by the same command: EX_TEMPFAIL
of sysexits.h, "try again later". After Ctrl-C it is 130, as everywhere."""


BUSY = 69
"""Exit code of work that was not begun because another process does it: EX_UNAVAILABLE of
sysexits.h."""


class Busy(UserError):
    """Another process owns what this one needs."""

    exit_code = BUSY


class Stalled(UserError):
    """The run stood still; the same command goes on from its last checkpoint."""

    exit_code = SAVED
    reason = ""
    """Set before it is raised in another thread, which takes a class and no words."""

    def __init__(self) -> None:
        super().__init__(self.reason)


class Stopped(SystemExit):
    """Somebody asked the work to end, by a signal; what is done is kept."""

    def __init__(self, number: int) -> None:
        """`number`: of the signal."""
        self.number = number
        self.exit_code = 130 if number == signal.SIGINT else SAVED
        super().__init__(self.exit_code)

    def __str__(self) -> str:
        interrupted = self.number == signal.SIGINT
        return "interrupted" if interrupted else signal.Signals(self.number).name


def mistake(error: BaseException) -> str | None:
    """Return the one line about an error that the user can mend: a `UserError`, or one of the
    system about files, memory or disks, also while a library is loaded; None for a bug, whose stack
    trace is worth more.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ImportError) and any(part in str(error) for part in _NO_MEMORY):
        return str(UserError(f"no memory for a library ({error}): allow more, ulimit -v unlimited"))
    if isinstance(error, FileNotFoundError) and error.filename is None and _is_nowhere():
        return "the folder in which this command was started is gone: cd to another one"
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        file = [] if error.filename is None else [os.fsdecode(error.filename)]
        message = ": ".join([*file, error.strerror or type(error).__name__])
        return str(UserError(message + (f"; {hint}" if (hint := remedy(error)) else "")))
    return None


def _is_nowhere() -> bool:
    """Whether the working folder of this process was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def raise_if_of_the_system(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Raise, in a form that `mistake` knows, the failure of the system (no permission, no memory, a
    failing disk) for which reading the file `path` failed. Return where the file is to blame, also
    where it is missing.
    """
    if isinstance(error, FileNotFoundError):
        return
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # the second: torch
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), os.fspath(path)) from None


def remedy(error: OSError) -> str:
    """Return what mends an error of the system, "" where its own words say it."""
    return _MENDABLE.get(error.errno or 0, "")


def did_you_mean(given: str, names: Iterable[str], limit: int = 12) -> str:
    """Return " Did you mean 'x'?" for a near miss, else " Choose from: a, b, c." (both start with a
    space).
    """
    names = sorted(set(names))
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Choose from: {listed(names, limit)}." if names else ""
