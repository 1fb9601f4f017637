"""How many threads compute on a CPU: as many as cores are free when a run begins.

Threads that wait for each other in a spin loop keep their cores from whoever could work: beside one
busy process a step with a thread on every core takes many times as long (docs/performance.md). So
waiting threads sleep soon, and none is started for a core that another process keeps busy. What
other processes do is read from /proc, from when this module was imported on; where there is none
(macOS) nothing is known of them. Imports no torch.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ghosttrain import ranks

SPIN = "2000"
"""Turns of its loop in which a thread of GNU's OpenMP waits before it sleeps (its own default is
300,000 with a thread a core, and for ever where OMP_WAIT_POLICY=active)."""
BUSY = 0.5
"""Cores that other processes keep busy before it is worth a word."""
LEAST = 0.5
"""Seconds over which the load is looked at."""


@dataclass(frozen=True)
class Load:
    """What the system had counted at one moment, in seconds of CPU time."""

    at: float
    busy: float
    """Of all processes, on the cores that this process may use."""
    own: float
    """Of this process and those that it started; of all ranks, where it is one."""


def wait_asleep() -> None:
    """Let the threads of OpenMP sleep soon when they wait; before torch is imported. What the user
    has set stays.
    """
    if not any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        os.environ["GOMP_SPINCOUNT"] = SPIN


def are_given() -> bool:
    """Whether the user, or who started this rank, has said how many threads."""
    return "OMP_NUM_THREADS" in os.environ


def cores() -> float:
    """Return how many cores this process may use: those it is bound to, or less where its control
    group has a limit (containers), shared among the ranks of its machine and the runs that go on
    there at once (`launch.devices`).
    """
    sharing = ranks.processes_sharing_cores() * ranks.runs_at_once()
    return min(float(len(_bound_to())), _group_limit()) / sharing


def free_cores() -> float:
    """Return how many of them nobody else has kept busy since this process began."""
    if STARTED is None:
        return cores()
    if (early := LEAST - (time.monotonic() - STARTED.at)) > 0:
        time.sleep(early)
    return _left_by(others(STARTED, load()))


def others(before: Load | None, now: Load | None) -> float:
    """Return how many cores other processes kept busy between two moments."""
    if before is None or now is None or now.at <= before.at:
        return 0.0
    return max(now.busy - before.busy - (now.own - before.own), 0.0) / (now.at - before.at)


def _left_by(busy: float) -> float:
    """Return how many cores are left to this process where others keep so many busy."""
    # Of the cores that runs beside this one share with it: what they do counts as busy.
    cores_of_all = cores() * ranks.runs_at_once()
    return max(cores_of_all - busy / ranks.processes_sharing_cores(), 0.0)


def threads_for(free: float, most: int) -> int:
    """Return how many threads compute where so many cores are free: at least 1, at most `most`."""
    return max(1, min(most, int(free + 0.5)))


class Neighbours:
    """Watches, in the course of a run, whether other processes need its cores."""

    def __init__(self, threads: int) -> None:
        self.threads, self.before, self.told = threads, load(), threads == 1

    def note(self) -> list[str]:
        """Return a line, once, where others kept a core busy since the last call that one of this
        run's threads needs; else nothing.
        """
        before, self.before = self.before, load()
        busy = others(before, self.before)
        fewer = threads_for(_left_by(busy), self.threads)
        if self.told or busy < BUSY or fewer >= self.threads:
            return []
        self.told = True
        return [
            f"note: other processes keep {busy:.1f} cores busy, and {self.threads} threads of this "
            f"run wait for each other: Ctrl-C, and type OMP_NUM_THREADS={fewer} before the same "
            "command, which goes on"
        ]


def load() -> Load | None:
    """Return what the system counts now; None where it does not say."""
    try:
        text = Path("/proc/stat").read_text()
    except OSError:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    return Load(time.monotonic(), _busy(text, _bound_to()) / tick, _own() / tick)


def _busy(text: str, cpus: set[int]) -> int:
    """Return the ticks in which some of `cpus` were not idle, by /proc/stat (proc(5))."""
    total = 0
    for line in text.splitlines():
        name, *fields = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system, _idle, _wait, irq, softirq, *steal = map(int, fields[:8])
            total += user + nice + system + irq + softirq + sum(steal)
    return total


def _own() -> int:
    """Return the ticks of this process (of a rank: of who started all ranks) and its descendants,
    those included that have ended and were waited for.
    """
    ticks, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it ended meanwhile
            pid = int(path.parent.name)
            # The second field, a name in brackets, may hold spaces.
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            ticks[pid], parents[pid] = sum(map(int, fields[11:15])), int(fields[1])
    root = os.getppid() if ranks.is_launched() else os.getpid()

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return sum(spent for pid, spent in ticks.items() if is_ours(pid))


def _bound_to() -> set[int]:
    try:
        return set(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return set(range(os.cpu_count() or 1))


def _group_limit() -> float:
    """Return how many cores the control group of this process may use (cgroup v2)."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(float(quota) / float(period), 1.0)
    return float("inf")


STARTED = load()
"""When this process began."""
