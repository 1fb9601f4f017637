"""`launch.devices=0,1,2,3`: runs that go on at once on one machine share its devices.

A run takes the devices that it needs by locking a file for each (a token), before torch starts, and
waits while too few are free. The system drops a lock when the last process that holds it ends,
however it ends: the tokens are handed to the ranks of the run, so a device is free when none of
them is left. Tokens are one user's, on one machine. Imports no torch.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ghosttrain.errors import UserError
from ghosttrain.locks import locked
from ghosttrain.terminal import cell

POLL = 0.5
"""Seconds between two looks for free devices."""


@contextmanager
def taken(devices: Sequence[int], count: int) -> Iterator[dict[int, int]]:
    """Own `count` of these devices inside this block: device -> open file that holds it.

    All or none: two runs that need two devices each never hold one each for ever. A line says so
    where it has to wait.

    Raises:
        UserError: CUDA_VISIBLE_DEVICES leaves one of them out.
    """
    validate_visible(devices)
    folder = _folder()
    held = _free(folder, devices, count)
    if not held:
        numbers = ", ".join(map(str, devices))
        line = f"waiting for {count} of the devices {numbers}: other runs have them"
        print(*filter(None, [cell(), line]), flush=True)
    while not held:
        time.sleep(POLL)
        held = _free(folder, devices, count)
    try:
        yield held
    finally:
        _release(held)


def _free(folder: Path, devices: Sequence[int], count: int) -> dict[int, int]:
    """Lock the tokens of the first `count` devices that are free; none where there are fewer."""
    held: dict[int, int] = {}
    with ExitStack() as undo, locked(folder, busy=None, patience=60):
        undo.callback(_release, held)
        for device in devices:
            handle = os.open(folder / f"{device}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held[device] = handle
            except BlockingIOError:
                os.close(handle)
            if len(held) == count:
                undo.pop_all()
                return held
    return {}


def _release(held: dict[int, int]) -> None:
    for handle in held.values():
        with suppress(OSError):  # a worker that was forked meanwhile may hold it a moment longer
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _folder() -> Path:
    """Return the folder of this user's tokens on this machine.

    Raises:
        UserError: somebody else made it.
    """
    mine = Path(tempfile.gettempdir()) / f"ghosttrain-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    about = mine.lstat()
    others = about.st_mode & 0o077
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or others:
        raise UserError(f"{mine} is not a folder of yours alone: remove it, or set TMPDIR")
    folder = mine / f"devices-{socket.gethostname()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def validate_visible(devices: Sequence[int]) -> None:
    """Raise UserError where CUDA_VISIBLE_DEVICES leaves one of them out."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return
    names = [name.strip() for name in visible.split(",")]
    if missing := [str(device) for device in devices if str(device) not in names]:
        raise UserError(
            f"launch.devices={missing[0]}: CUDA_VISIBLE_DEVICES={visible} of the environment leaves"
            " it out; name devices of it, or unset it"
        )
