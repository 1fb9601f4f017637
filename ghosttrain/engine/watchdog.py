"""A run that stands still: who is to blame is said, and after a while the run ends.

A thread of each rank sees whether steps, or batches of the evaluation, go on. Where the main thread
stands is read from its stack, so the loop says nothing but that it goes on. The ranks tell each
other through the store of their process group where they stand.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import statistics
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from ghosttrain.engine import distributed
from ghosttrain.errors import SAVED
from ghosttrain.files import PACKAGE

LEAST, TIMES = 60.0, 20
"""Seconds, and how many usual steps, without one, before it is said."""
TICK = 5.0
"""Seconds between two looks."""
OTHERS = "waits for the other ranks"
BUSY = "may take as long as it does"
"""Where a rank stands that compiles, or waits for room on a disk."""
LIFE = "ghosttrain/alive"
"""Of the keys in the store under which each rank says where it stands."""


class Watchdog:
    """Names who stands still after `LEAST` seconds or `TIMES` steps, and ends the process after
    `train.stall_minutes`, with the exit code of a run that goes on by the same command.
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
        self.ended = threading.Event()
        self.main = threading.get_ident()
        self.others = _Others() if distributed.world_size() > 1 else None

    def beat(self) -> None:
        """Say that the run goes on: after each step, each batch of an evaluation."""
        self.beats += 1

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.ended.set()

    def _watch(self) -> None:
        """Look every `tick` seconds. They are counted, not measured: a process that was stopped as
        a whole, or a clock that jumps, is no run that stands still.
        """
        usual, seen, since, told = deque([0.0], maxlen=99), 0, 0.0, False
        while not self.ended.wait(self.tick):
            place = place_of(_stack(self.main))
            others = self.others.look(place) if self.others else {}
            if self.beats != seen or BUSY in (place, *others.values()):
                usual.append(since / max(self.beats - seen, 1))
                seen, since, told = self.beats, 0.0, False
                continue
            if seen == 0:  # the first step may build kernels, compile, read cold files
                continue
            since += self.tick
            if since >= self.most:
                self._end(place, others)
            limit = min(max(LEAST, TIMES * statistics.median(usual)), self.most / 2)
            if since >= limit and not told:
                told = True
                self._tell(since, place, others)

    def _tell(self, since: float, place: str, others: Mapping[int, str]) -> None:
        rank = distributed.rank()
        file = self.folder / f"stacks-rank{rank}.txt"
        with suppress(OSError), open(file, "w", encoding="utf-8") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
        if _speaks(rank, others):
            print(
                f"ghosttrain: note: no step for {since:.0f} s: {culprit(rank, place, others)}; "
                f"stacks are in {file.name} of the run folder; after {self.most / 60:g} minutes "
                "the run ends (train.stall_minutes)",
                file=sys.stderr,
                flush=True,
            )

    def _end(self, place: str, others: Mapping[int, str]) -> None:
        rank = distributed.rank()
        if _speaks(rank, others):
            print(
                f"ghosttrain: error: no step for {self.most / 60:g} minutes "
                f"(train.stall_minutes): {culprit(rank, place, others)}; the same command goes on "
                "from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        for child in multiprocessing.active_children():
            child.kill()  # one that is stopped would stay
        os._exit(SAVED)  # the main thread cannot


class _Others:
    """What the ranks tell each other: a count that grows while one lives, and where it stands."""

    def __init__(self) -> None:
        self.store: dist.Store = dist.distributed_c10d._get_default_store()
        self.count = 0
        self.heard: dict[int, tuple[str, int]] = {}

    def look(self, place: str) -> dict[int, str]:
        """Say where this rank stands; return where the others do, "" for one that has said nothing
        for three looks.
        """
        self.count += 1
        found = {}
        with suppress(RuntimeError):  # the store is gone with the rank that held it
            self.store.set(f"{LIFE}/{distributed.rank()}", f"{self.count} {place}")
            for rank in set(range(distributed.world_size())) - {distributed.rank()}:
                said = ""
                if self.store.check([f"{LIFE}/{rank}"]):
                    said = self.store.get(f"{LIFE}/{rank}").decode()
                before, missed = self.heard.get(rank, ("", 0))
                self.heard[rank] = said, missed + 1 if said == before else 0
        for rank, (said, missed) in self.heard.items():
            found[rank] = "" if missed > 3 else said.partition(" ")[2]
        return found


def culprit(rank: int, place: str, others: Mapping[int, str]) -> str:
    """Return who stands still, of all that ranks say: one that says nothing, else one that does not
    wait for others.
    """
    silent = [other for other, said in others.items() if not said]
    if silent:
        return f"rank {silent[0]} gives no sign of life (stopped, or its machine is gone)"
    for number, said in sorted({rank: place, **others}.items()):
        if said != OTHERS:
            return f"rank {number} {said}" if others else f"it {said}"
    return "all ranks wait for each other"


def place_of(stack: Iterable[traceback.FrameSummary]) -> str:
    """Return what a thread does by its stack, the innermost frame first, as `rank 1 ...` goes on;
    or `BUSY`.
    """
    files = [(frame.filename, frame.name) for frame in stack]
    if any(part in name for name, _ in files for part in ("_dynamo", "_inductor", "cpp_extension")):
        return BUSY
    inside = [
        (Path(name).relative_to(PACKAGE).as_posix(), function)
        for name, function in files
        if Path(name).is_relative_to(PACKAGE)
    ]
    if ("engine/saving.py", "finish") in inside[:1]:
        return BUSY
    several = distributed.world_size() > 1
    for file, function in inside:
        if file in _PLACES:
            return _PLACES[file] + (_workers() if file == "data/loader.py" else "")
        if several and function == "read":
            return OTHERS  # of the meter, of the guard: what a GPU has summed over ranks
        if file == "engine/track.py":
            return f"writes to {_sink(name for name, _ in files)}"
    if several and any("autograd" in name for name, _ in files):
        return OTHERS  # the backward averages gradients
    return "computes a step"


_PLACES = {
    "data/loader.py": "waits for images",
    "engine/saving.py": "waits for the checkpoint that is being written",
    "engine/checkpoint.py": "reads or writes a checkpoint",
    "engine/distributed.py": OTHERS,
    "engine/evaluate.py": "evaluates",
}
"""File of the package -> what a thread that stands there does."""


def _sink(names: Iterable[str]) -> str:
    for name in names:
        for part, sink in (("wandb", "Weights & Biases"), ("tensorboard", "TensorBoard")):
            if f"{os.sep}{part}{os.sep}" in name:
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
    """Whether this is the first rank that lives."""
    return all(not said for other, said in others.items() if other < rank)


def _stack(thread: int) -> list[traceback.FrameSummary]:
    """Return the stack of a thread, the innermost frame first; without reading source files."""
    frame, found = sys._current_frames().get(thread), []
    while frame is not None:
        code = frame.f_code
        found.append(
            traceback.FrameSummary(
                code.co_filename, frame.f_lineno, code.co_name, lookup_line=False
            )
        )
        frame = frame.f_back
    return found
