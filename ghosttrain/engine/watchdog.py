"""A run that stands still: who is to blame is said, and after a while the run ends.

A thread of each rank sees whether steps, or batches of an evaluation, go on. Where the main thread
stands is read from its stack, so the loop says nothing but that it goes on. The ranks tell each
other through the store of their process group where they stand. What may hang with the run (a disk,
a terminal, the store) is left to threads of its own: the watchdog waits for none of them.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from ghosttrain.engine import distributed
from ghosttrain.errors import SAVED, Stalled
from ghosttrain.files import PACKAGE

LEAST_SECONDS, USUAL_STEPS = 60.0, 20
"""Seconds without a step, and how many usual steps, before a line is printed about it."""
TICK = 5.0
"""Seconds between two looks."""
GRACE = 10.0
"""Seconds in which the main thread may end by itself, and in which a line may be printed."""
WAITS = "waits for the other ranks"
UNLIMITED = "compiles, or waits for room on a disk"
"""Where a thread stands that may take as long as it does."""
ALIVE = "ghosttrain/alive"
"""Of the keys in the store under which each rank says where it stands."""


class Watchdog:
    """Names who stands still after `LEAST_SECONDS` or `USUAL_STEPS`, and ends the run after
    `train.stall_minutes`, with the exit code of one that goes on by the same command.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        """Watch nothing yet.

        Args:
            folder: of the run, which takes the stacks of a rank that stands still.
            minutes: after which a run that stands still ends.
        """
        self.folder, self.most = folder, 60 * minutes
        self.tick = min(TICK, self.most / 8)
        self.beats = 0
        self.has_trained = False
        self.ended = threading.Event()
        self.main = threading.get_ident()
        self.others = _Others() if distributed.world_size() > 1 else None

    def beat(self, step: int) -> None:
        """Say that the run goes on: after each step, or, with 0, after a batch of an evaluation."""
        self.beats += 1
        self.has_trained = self.has_trained or step > 0

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.ended.set()

    def _watch(self) -> None:
        """Look every `tick` seconds. They are counted, not measured: a process that was stopped as
        a whole, or a clock that jumps, is no run that stands still.
        """
        usual, seen, since, is_said = deque([0.0], maxlen=99), 0, 0.0, False
        while not self.ended.wait(self.tick):
            place = place_of(_stack(self.main))
            others = self.others.look(place, self.tick) if self.others else {}
            if self.beats != seen or UNLIMITED in (place, *others.values()):
                usual.append(since / max(self.beats - seen, 1))
                seen, since, is_said = self.beats, 0.0, False
                continue
            if not self.has_trained:  # the first step may build kernels, compile, read cold files
                continue
            since += self.tick
            if since >= self.most:
                return self._end(place, others)
            usually = USUAL_STEPS * statistics.median(usual)
            if since >= min(max(LEAST_SECONDS, usually), self.most / 2) and not is_said:
                is_said = True
                _apart(lambda: self._say_stalled(since, place, others))  # noqa: B023

    def _say_stalled(self, since: float, place: str, others: Mapping[int, str]) -> None:
        rank = distributed.rank()
        name = f"stacks-rank{rank}.txt"
        if _speaks(rank, others):
            _print(
                f"note: no step for {since:.0f} s: {culprit(rank, place, others)}; stacks are in "
                f"{name} of the run folder; after {self.most / 60:g} minutes the run ends "
                "(train.stall_minutes)"
            )
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        with suppress(OSError), os.fdopen(os.open(self.folder / name, flags, 0o666), "w") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)

    def _end(self, place: str, others: Mapping[int, str]) -> None:
        """Raise `Stalled` in the main thread, where Python's code runs there; else, or if it does
        not end, end the process.
        """
        rank = distributed.rank()
        Stalled.reason = (
            f"no step for {self.most / 60:g} minutes (train.stall_minutes): "
            f"{culprit(rank, place, others)}; the same command goes on from the last checkpoint"
        )
        main = ctypes.c_ulong(self.main)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Stalled))
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGCONT)  # one that is stopped cannot be ended
        if self.ended.wait(GRACE):
            return  # `cli.main` says why
        if _speaks(rank, others):
            _apart(lambda: _print(f"error: {Stalled.reason}"))
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(SAVED)


class _Others:
    """What the ranks tell each other: a count that grows while one lives, and where it stands."""

    def __init__(self) -> None:
        self.store: dist.Store = dist.distributed_c10d._get_default_store()
        self.count = 0
        self.heard: dict[int, tuple[str, int]] = {}
        self.asking: threading.Thread | None = None

    def look(self, place: str, patience: float) -> dict[int, str]:
        """Say where this rank stands; return where the others do, "" for one that has said nothing
        for three looks. A store that does not answer lies with rank 0.
        """
        if self.asking is None or not self.asking.is_alive():
            self.count += 1
            self.asking = _apart(lambda: self._ask(place), patience)
        if self.asking.is_alive():
            self.heard = {n: (said, missed + 1) for n, (said, missed) in self.heard.items()}
            return {0: ""} if distributed.rank() else {}
        return {
            rank: "" if missed > 3 else said.partition(" ")[2]
            for rank, (said, missed) in self.heard.items()
        }

    def _ask(self, place: str) -> None:
        me = distributed.rank()
        with suppress(RuntimeError):  # the store is gone with the rank that held it
            self.store.set(f"{ALIVE}/{me}", f"{self.count} {place}")
            for rank in set(range(distributed.world_size())) - {me}:
                said = ""
                if self.store.check([f"{ALIVE}/{rank}"]):
                    said = self.store.get(f"{ALIVE}/{rank}").decode()
                before, missed = self.heard.get(rank, ("", 0))
                self.heard[rank] = said, missed + 1 if said == before else 0


def culprit(rank: int, place: str, others: Mapping[int, str]) -> str:
    """Return who stands still, of all that ranks say: one that says nothing, else one that does not
    wait for others.
    """
    silent = [other for other, said in others.items() if not said]
    if silent:
        return f"rank {silent[0]} does not answer (it is stopped, or its machine is gone)"
    for number, said in sorted({rank: place, **others}.items()):
        if said != WAITS:
            return f"rank {number} {said}" if others else f"this process {said}"
    return "all ranks wait for each other"


def place_of(stack: Iterable[tuple[str, str]]) -> str:
    """Return what a thread does, as `rank 1 ...` goes on, by its stack: (file, function) of each
    frame, the innermost first; or `UNLIMITED`.
    """
    frames = list(stack)
    if any(file.endswith(_COMPILERS) for file, _ in frames):
        return UNLIMITED
    inside = [
        (Path(file).relative_to(PACKAGE).as_posix(), function)
        for file, function in frames
        if Path(file).is_relative_to(PACKAGE)
    ]
    if ("engine/saving.py", "finish") in inside[:1]:
        return UNLIMITED
    several = distributed.world_size() > 1
    for file, function in inside:
        if file in _PLACES:
            return _PLACES[file] + (_workers() if file == "data/loader.py" else "")
        if several and function == "read":
            return WAITS  # of the meter, of the guard: what a GPU has summed over ranks
        if file == "engine/track.py":
            return f"writes to {_sink(name for name, _ in frames)}"
    if several and any("autograd" in file for file, _ in frames):
        return WAITS  # the backward averages gradients
    return "computes a step"


_COMPILERS = (
    "torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py",
    "torch/utils/cpp_extension.py", "triton/compiler/compiler.py", "ghosttrain/native/__init__.py",
)  # fmt: skip
"""Ends of the files in which a compiler is waited for."""
_PLACES = {
    "data/loader.py": "waits for images",
    "engine/saving.py": "waits for the checkpoint that is being written",
    "engine/checkpoint.py": "reads or writes a checkpoint",
    "engine/distributed.py": WAITS,
    "engine/stop.py": WAITS,
    "engine/evaluate.py": "evaluates",
}
"""File of the package -> what a thread that stands there does."""


def _sink(files: Iterable[str]) -> str:
    for file in files:
        for part, sink in (("wandb", "Weights & Biases"), ("tensorboard", "TensorBoard")):
            if f"{os.sep}{part}{os.sep}" in file:
                return sink
    return "the run folder or the terminal"


def _workers() -> str:
    """Return what is wrong with the data workers, in brackets; "" where nothing is seen."""
    states = {"T": "is stopped", "D": "waits for the disk", "Z": "has ended"}
    for pid in (child.pid for child in multiprocessing.active_children()):
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in states:
                return f" (data worker {pid} {states[state]})"
    return ""


def _speaks(rank: int, others: Mapping[int, str]) -> bool:
    """Whether this is the first rank that answers."""
    return all(not said for other, said in others.items() if other < rank)


def _apart(work: Callable[[], object], patience: float = GRACE) -> threading.Thread:
    """Do something in a thread of its own, which is waited for no longer than `patience`."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(patience)
    return thread


def _print(line: str) -> None:
    print(f"ghosttrain: {line}", file=sys.stderr, flush=True)


def _stack(thread: int) -> list[tuple[str, str]]:
    """Return (file, function) of each frame of a thread, the innermost first."""
    frame: FrameType | None = sys._current_frames().get(thread)
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return found
