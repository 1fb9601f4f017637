"""When a run writes a checkpoint, and the thread that writes it while training goes on.

The state is copied at its step; a thread brings the rows of that step, then the copy, to disk. A
write that fails (a full disk) is said and tried again while training goes on with the last good
checkpoint on disk, until `train.patience` is over.
"""

from __future__ import annotations

import re
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ghosttrain.config.schema import TrainConfig
from ghosttrain.engine import distributed
from ghosttrain.engine.checkpoint import NEWEST, Checkpoint, write_checkpoint
from ghosttrain.errors import Stopped, UserError
from ghosttrain.files import write_bytes
from ghosttrain.text import byte_size

RETRY = 60.0
"""Seconds from a failed attempt to the next."""
YOUNG = 60.0
"""Seconds: at the end of an epoch, a checkpoint of this age is new enough."""


class Saver:
    """Steps, minutes or epochs since the last checkpoint; writes the next. All ranks decide alike,
    rank 0 writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        step: int,
        device: torch.device,
        sync_rows: Callable[[], object],
        say: Callable[[str], object],
    ) -> None:
        """Begin at `step`.

        Args:
            config: `save_every`, `keep`, `patience`.
            folder: of the checkpoints.
            step: optimizer steps done.
            device: of this rank.
            sync_rows: brings the metrics and the log to disk.
            say: tells the user.
        """
        match = re.fullmatch(r"(\d+)(min|step|epoch)s?", config.save_every)
        assert match is not None  # the schema knows no other
        self.every, self.unit = int(match[1]), match[2]
        self.path, self.keep, self.patience = folder / NEWEST, config.keep, 60 * config.patience
        self.device, self.sync_rows, self.say = device, sync_rows, say
        self.step, self.since = step, time.monotonic()
        self.tried = self.since
        self.failure: BaseException | None = None
        self.failing_since: float | None = None
        self.writer: threading.Thread | None = None
        self.newest: Checkpoint | None = None
        self.others: dict[Path, bytes] = {}
        self.waited = 0.0
        """Seconds that training waited for checkpoints."""
        self.is_over = False
        """Whether the last step is taken and copied: nothing waits for a write but its end."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Let the write under way end, also when training failed or was interrupted."""
        self._join()
        asked_meanwhile = self.is_over and isinstance(exc_info[1], Stopped)
        if (self.others and self.failure is None) or (self.newest is not None and asked_meanwhile):
            self._begin()
            self._join(is_last=True)

    def is_due(self, step: int, epochs_ended: int | None = None) -> bool:
        """Whether a checkpoint should be written after `step` steps; rank 0's time counts.

        Args:
            step: optimizer steps done.
            epochs_ended: how many, where one has just ended; None within an epoch.

        Raises:
            UserError: none could be written for `train.patience`.
        """
        due = distributed.rank() == 0 and self._is_due(step, epochs_ended)
        return bool(distributed.all_max(torch.tensor(float(due), device=self.device)).item())

    def _is_due(self, step: int, epochs_ended: int | None) -> bool:
        now = time.monotonic()
        if self.failure is not None and not self._is_writing():
            self._raise_if_over(now)
            if now - self.tried >= RETRY:
                return True
        if self.unit == "epoch":
            return epochs_ended is not None and epochs_ended % self.every == 0
        if epochs_ended is not None and now - self.since >= YOUNG:
            return True
        if self.unit == "step":
            return step - self.step >= self.every
        return now - self.since >= 60 * self.every

    def save(self, step: int, snapshot: Callable[[], Checkpoint | None]) -> None:
        """Copy the state of `step` on every rank, and let the thread of rank 0 write it.

        A write under way is waited for first: there is never a second one.
        """
        started = time.perf_counter()
        self._join()
        self.newest = snapshot()
        self.step, self.since = step, time.monotonic()
        if self.newest is not None:
            self._begin()
        self.waited += time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the write under way."""
        self._join()

    def finish(self, poll: Callable[[], object]) -> None:
        """Wait until the newest state and all other files are on disk, after the last step.

        Args:
            poll: called every second while a disk that fails is waited for; it raises `Stopped`
                where the run is asked to end; leaving the block then tries once more.

        Raises:
            UserError: they could not be written for `train.patience`.
        """
        started, self.is_over = time.perf_counter(), True
        self._join()
        while self.newest is not None or self.others:
            if self.failure is not None:
                self._raise_if_over(time.monotonic())
                until = time.monotonic() + min(RETRY, self.patience)
                while (left := until - time.monotonic()) > 0:
                    poll()
                    time.sleep(min(left, 1.0))
            self._begin()
            self._join()
        self.waited += time.perf_counter() - started

    def add(self, path: Path, content: bytes) -> None:
        """Write another file before the next checkpoint, which may speak of it."""
        self.others[path] = content

    def _begin(self) -> None:
        self.tried = time.monotonic()
        self.writer = threading.Thread(target=self._write, name="checkpoint writer")
        self.writer.start()

    def _write(self) -> None:
        newest = self.newest
        try:
            self.sync_rows()
            for path, content in list(self.others.items()):
                write_bytes(path, content)
                if self.others[path] is content:
                    del self.others[path]
            if newest is not None:
                write_checkpoint(self.path, newest, self.keep)
        except BaseException as error:  # said, or raised, by the thread that trains
            self.failure = error
            self.failing_since = self.failing_since or self.tried
            return
        self.failure = self.failing_since = self.newest = None

    def _is_writing(self) -> bool:
        return self.writer is not None and self.writer.is_alive()

    def _join(self, is_last: bool = False) -> None:
        """Wait for the write under way, the last one if `is_last`; say what went wrong with it."""
        if self.writer is None:
            return
        self.writer.join()
        self.writer = None
        if self.failure is None:
            return
        if not isinstance(self.failure, UserError | OSError):
            raise self.failure
        kept = "the last good checkpoint stays" if self.path.is_file() else "there is none yet"
        if is_last:
            self.say(f"{self.failure}: {kept}")
            return
        doing = "the run ends when it is written" if self.is_over else "training goes on"
        self.say(
            f"{self.failure}: {doing}, {kept}; tried again for {self.patience / 60:g} minutes "
            "(train.patience)"
        )

    def _raise_if_over(self, now: float) -> None:
        if self.failing_since is not None and now - self.failing_since > self.patience:
            raise UserError(
                f"no checkpoint could be written for {self.patience / 60:g} minutes "
                f"(train.patience): {self.failure}"
            )


def validate_room(folder: Path, size: int) -> None:
    """Refuse to begin where two checkpoints of `size` bytes have no room, or one is larger than a
    file may be (`ulimit -f`).

    Raises:
        UserError: with what is free and what is needed.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most != resource.RLIM_INFINITY and most < size:
        raise UserError(
            f"a file may have {byte_size(most)} here (ulimit -f), a checkpoint of this run takes "
            f"about {byte_size(size)}: type ulimit -f unlimited"
        )
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise UserError(
            f"{folder}: {byte_size(free)} are free, two checkpoints of this run need about "
            f"{byte_size(2 * size)}; make room, or type run.root=/a/larger/disk"
        )
