"""A folder that one job at a time may write: run folders and caches.

The system drops the lock when its process ends, however it ends, so none goes stale. Imports no
torch.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghosttrain.config.errors import UserError


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Own an existing folder until the block or the process ends.

    Raises:
        UserError: with the message `busy`, when another process does.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing leaves it to forked workers, if there are any
        os.close(handle)
