"""Benchmarks: sides take turns, round by round; medians and quartiles; ratios; peak memory.

A side is a function of the round's number that does the work once and returns the times of its
parts. What happens to the machine meanwhile (another job, a warmer processor) meets all sides.
"""

from __future__ import annotations

import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Time(NamedTuple):
    """What one call took, in milliseconds."""

    cpu: float
    """CPU time of this process."""
    wall: float
    """Elapsed time."""

    def __add__(self, other: tuple[Any, ...]) -> Time:
        """Return the time of both."""
        return Time(self.cpu + other[0], self.wall + other[1])


Side = Callable[[int], Mapping[str, Time]]
"""Number of the round -> part -> time."""


class Quartiles(NamedTuple):
    """Of the values of all rounds."""

    low: float
    median: float
    high: float

    def text(self, digits: int) -> str:
        """Return `12.3 (12.1 to 12.8)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Timings:
    """The times of one side's part over all rounds."""

    cpu: tuple[float, ...]
    wall: tuple[float, ...]

    def clock(self, device: torch.device) -> tuple[float, ...]:
        """Return what counts: CPU time on a CPU, elapsed time elsewhere."""
        return self.cpu if device.type == "cpu" else self.wall

    def ratio(self, base: Timings, device: torch.device) -> float:
        """Return the median over that of `base`."""
        return statistics.median(self.clock(device)) / statistics.median(base.clock(device))


def timed(call: Callable[[], Any], device: torch.device) -> Time:
    """Return the time that a call takes, work that it left on the device included."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Time(1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall))


def take_turns(
    sides: Mapping[str, Side],
    rounds: int,
    warm_up: int,
    threads: int,
    there_and_back: bool = False,
) -> dict[tuple[str, str], Timings]:
    """Let the sides work in turn; return (side, part) -> times of the rounds that count.

    Args:
        sides: name -> what it does.
        rounds: that count.
        warm_up: rounds before them: they make states and compile kernels.
        threads: of PyTorch on a CPU; restored afterwards.
        there_and_back: every second round in the opposite order, where a side leaves something
            behind (caches of the system) that must not always meet the same other side.
    """
    found: dict[tuple[str, str], list[Time]] = {}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number in range(warm_up + rounds):
            backwards = there_and_back and number % 2 == 0
            for name in reversed([*sides]) if backwards else sides:
                for part, value in sides[name](number).items():
                    if number >= warm_up:
                        found.setdefault((name, part), []).append(value)
    finally:
        torch.set_num_threads(threads_before)
    return {
        key: Timings(tuple(t.cpu for t in times), tuple(t.wall for t in times))
        for key, times in found.items()
    }


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def paired_ratios(values: Sequence[float], base: Sequence[float]) -> Quartiles:
    """Return the quartiles of value over base, round by round."""
    return quartiles([value / other for value, other in zip(values, base, strict=True)])


# --- memory ---------------------------------------------------------------------------------------


def peak_mib(module: str, function: str, arguments: Sequence[Any], device: torch.device) -> float:
    """Return the most memory of two calls above what there was before the first, in MiB.

    Measured in a fresh process. There, `function` of `module`, given `arguments` (JSON values),
    returns what is called.
    """
    asked = json.dumps([module, function, list(arguments), str(device)])
    command = [sys.executable, "-m", "ghosttrain.study.harness", asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak(module: str, function: str, arguments: Sequence[Any], device_text: str) -> float:
    device = torch.device(device_text)
    call = getattr(importlib.import_module(module), function)(*arguments)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(), call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = _resident("VmRSS")
    call(), call()
    return (_resident("VmHWM") - before) / 2**20


def _resident(what: str) -> int:
    """Return the resident memory of this process in bytes: now (VmRSS), or at its peak (VmHWM).

    Systems without /proc give the peak for both. (Linux too has a peak in getrusage, but a process
    inherits it from the one that started it.)
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith(what))
        return 2**10 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 2**10
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(_peak(*json.loads(sys.argv[1])))
