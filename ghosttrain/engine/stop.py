"""Ending a run because someone asks for it: it saves its state first, and the same command goes on.

Schedulers ask by SIGTERM or SIGUSR1, a person by Ctrl-C (SIGINT). The first signal lets the step
that is computed end; all ranks save after the same one. A second signal ends at once. Nobody waits
for the device: a rank that was asked writes into the store of the process group after which step
all stop, and every rank looks there once a step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ghosttrain.engine import distributed
from ghosttrain.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
KEY = "ghosttrain/stop"


class Stop:
    """Whether a run was asked to end. All ranks of a run look at the same places."""

    def __init__(
        self, device: torch.device, log_every: int, alive: Callable[[int], object] = int
    ) -> None:
        """Listen to nothing yet.

        Args:
            device: of this rank.
            log_every: steps between two rows, at which all ranks of GPUs have reached the same
                step: between them one may be ahead of another.
            alive: called at each look with the steps done, 0 in an evaluation: the run goes on.
        """
        self.number = 0
        """The signal that this rank got; 0: none."""
        self.apart = log_every if device.type == "cuda" else 1
        self.told = False
        self.alive = alive

    @contextmanager
    def saving(self, save: Callable[[], None]) -> Iterator[None]:
        """Listen to signals within the block; where the run is asked to end, save before it does.

        A signal that somebody else handles already (a launcher of Slurm jobs) is left to them.
        """
        before = {number: signal.getsignal(number) for number in SIGNALS}
        ours = [number for number, handler in before.items() if _is_free(handler)]
        if threading.current_thread() is not threading.main_thread():
            ours = []  # Python lets no other thread listen
        for number in ours:
            signal.signal(number, self._asked)
        try:
            yield
        except Stopped:
            save()
            raise
        finally:
            for number in ours:
                signal.signal(number, before[number])

    def _asked(self, number: int, frame: object) -> None:
        if self.number:
            at_once(number, frame)
        self.number = number

    def poll(self, step: int) -> None:
        """Raise Stopped where all ranks stop after `step` optimizer steps; once a step."""
        self.alive(step)
        if self._when(step) <= step:
            raise Stopped(self._number())

    def poll_alone(self) -> None:
        """Raise Stopped where the run is asked to end, on this rank alone."""
        if self.is_asked():
            raise Stopped(self._number())

    def is_asked(self) -> bool:
        """Whether this rank or another one was asked to end."""
        self.alive(0)
        return self.number > 0 or self._told() is not None

    def agree(self, asked: bool) -> None:
        """Raise Stopped on all ranks where one was asked; all call it at the same place."""
        if distributed.any_of(asked):
            raise Stopped(self._number())

    def _when(self, step: int) -> float:
        """Return the step after which the run stops; infinite: nobody has asked."""
        if distributed.world_size() == 1:
            return step if self.number else float("inf")
        if self.number and not self.told:
            self.told = True
            # The others cannot have ended the next step (or row) without this rank.
            at = (step // self.apart + 1) * self.apart
            _store().compare_set(KEY, "", f"{at} {self.number}")
        told = self._told()
        return float(told[0]) if told else float("inf")

    def _told(self) -> tuple[int, int] | None:
        """Return step and signal that some rank wrote down; None: none did."""
        if distributed.world_size() == 1 or not _store().check([KEY]):
            return None
        at, number = map(int, _store().get(KEY).split())
        return at, number

    def _number(self) -> int:
        told = self._told()
        return self.number or (told[1] if told else signal.SIGTERM)


def at_once(number: int, frame: object) -> None:
    """End as an error does, so that workers, files and trackers are closed."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the work within the block as Ctrl-C does: it keeps what is done
    by itself.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS[1:]}
    for number in before:
        signal.signal(number, _stopped)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(number: int, frame: object) -> None:
    raise Stopped(number)


def _is_free(handler: object) -> bool:
    ours = (distributed.terminated, _stopped)
    return handler in (signal.SIG_DFL, signal.default_int_handler, *ours)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
