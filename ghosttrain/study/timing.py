"""Timing of one call, and the spread of many: shared by the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the milliseconds of CPU time and of elapsed time that a call takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
