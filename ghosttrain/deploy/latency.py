"""How long one pass takes: of networks in PyTorch and of files in their runtimes, taking turns."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ghosttrain.deploy.formats import FORMATS, Runner, find, of_file
from ghosttrain.errors import UserError
from ghosttrain.files import write_text
from ghosttrain.study.harness import Timings, peak_mib, quartiles, take_turns, timed

IN_PYTORCH = {
    "torch": "PyTorch, the inference form, layer by layer",
    "torch_unfused": "PyTorch, the training form in evaluation",
    "torch_compile": "PyTorch, the inference form by torch.compile",
}
"""What a network can be run by without being exported -> what that is."""
BACKENDS = {**IN_PYTORCH, "onnx_unfused": "ONNX of the training form", **FORMATS}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Latency:
    """Of one backend with so many threads, in milliseconds of elapsed time per pass."""

    backend: str
    threads: int
    low: float
    """Lower quartile."""
    median: float
    high: float
    """Upper quartile."""
    p99: float
    peak: float
    """Most memory of loading it and running it twice, in MiB above an idle process; NaN where it
    was not measured."""


def measure(
    sides: Mapping[str, Callable[[int], Callable[[], Any]]],
    threads: Sequence[int],
    rounds: int,
    peaks: Mapping[str, Callable[[int], float]] | None = None,
) -> list[Latency]:
    """Time sides in turn, for each number of threads.

    Args:
        sides: name -> what makes, for a number of threads, the call that is one pass.
        threads: numbers of threads.
        rounds: passes of each that count; a quarter as many, at least 5, come before them.
        peaks: name -> what measures its memory for a number of threads.
    """
    found = []
    for count in threads:
        calls = {name: make(count) for name, make in sides.items()}
        timings = take_turns(
            {name: _one_pass(call) for name, call in calls.items()},
            rounds,
            max(5, rounds // 4),
            count,
            there_and_back=True,
        )
        for name in sides:
            peak = peaks[name](count) if peaks and name in peaks else float("nan")
            found.append(_latency(name, count, timings[name, "pass"], peak))
    return found


def one_pass(path: Path, runner: Runner, size: tuple[int, int]) -> float:
    """Return the median of 20 passes of a file, in milliseconds: on one thread, of one image or as
    many as the file takes.
    """
    images = input_of(path, runner, size, 1)
    return measure({"file": lambda threads: lambda: runner(images)}, [1], 20)[0].median


def _one_pass(call: Callable[[], Any]) -> Callable[[int], Mapping[str, Any]]:
    return lambda number: {"pass": timed(call, _CPU)}


def _latency(name: str, threads: int, timings: Timings, peak: float) -> Latency:
    low, median, high = quartiles(timings.wall)
    ordered = sorted(timings.wall)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return Latency(name, threads, low, median, high, p99, peak)


# --- sides ----------------------------------------------------------------------------------------


def network_side(network: nn.Module, images: torch.Tensor) -> Callable[[int], Callable[[], Any]]:
    """Return a side that runs a network; its threads are those of the process."""

    def make(threads: int) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return network(images)

        return call

    return make


def file_side(path: Path, images: np.ndarray) -> Callable[[int], Callable[[], Any]]:
    """Return a side that runs a file in its own runtime."""

    def make(threads: int) -> Callable[[], Any]:
        runner = find(of_file(path)).load(path, threads)
        return lambda: runner(images)

    return make


def input_of(path: Path, runner: Runner, size: tuple[int, int] | None, batch: int) -> np.ndarray:
    """Return noise as a file takes it.

    Raises:
        UserError: the file does not say what it takes, or it is not what was asked for.
    """
    shape, dtype = runner.shape, runner.dtype
    if shape is None:
        if size is None:
            raise UserError(f"{path} does not say what it takes: type --size S, of its images")
        shape = (batch, 3, *size)
    if len(shape) != 4:
        raise UserError(f"{path} takes an input of shape {list(shape)}: images have four axes")
    axes = (1, 2) if dtype == "uint8" else (2, 3)
    wanted: list[int] = []
    for axis, fixed in enumerate(shape):
        free = batch if axis == 0 else size[axes.index(axis)] if size and axis in axes else None
        if fixed is None and free is None:
            raise UserError(f"{path} takes images of any size: type --size S")
        wanted.append(fixed if fixed is not None else int(free or 0))
    if size and tuple(wanted[axis] for axis in axes) != size:
        raise UserError(f"{path} takes images of {wanted[axes[0]]}x{wanted[axes[1]]} pixels only")
    noise = np.random.default_rng(0)
    if dtype == "uint8":
        return noise.integers(0, 256, wanted, dtype=np.uint8)
    return noise.standard_normal(wanted, dtype=np.float32)


def converted(network: nn.Module, backend: str, images: torch.Tensor, folder: Path) -> Path:
    """Convert a network for a backend into `folder`, and return the file."""
    made = find(backend.removesuffix("_unfused"))
    if reason := made.runs_here():
        raise UserError(f"{backend} cannot be timed here: {reason}")
    path = folder / f"{backend}{made.suffix}"
    made.convert(network, images, path, "fp32", False)
    return path


# --- memory ---------------------------------------------------------------------------------------


def file_peak(path: Path, images: np.ndarray) -> Callable[[int], float]:
    """Return what measures the memory of loading and running a file, in a fresh process."""
    given = [str(path), list(images.shape), images.dtype.name]
    return lambda threads: peak_mib(__name__, "load_and_run", [*given, threads], _CPU)


def load_and_run(path: str, shape: list[int], dtype: str, threads: int) -> Callable[[], Any]:
    """Return a call that loads a file and runs it twice."""
    images = np.zeros(shape, dtype)
    made = find(of_file(Path(path)))

    def call() -> None:
        runner = made.load(Path(path), threads)
        runner(images), runner(images)

    return call


# --- words ----------------------------------------------------------------------------------------


def table(found: Sequence[Latency]) -> list[str]:
    """Return measurements as lines, one for each backend and number of threads."""
    width = max(len(each.backend) for each in found)
    lines = [
        f"{'':{width}} threads  median ms  quartiles         p99      ratio  peak MiB",
    ]
    for each in found:
        base = next(other for other in found if other.threads == each.threads)
        between = f"{each.low:.2f} to {each.high:.2f}"
        peak = "" if each.peak != each.peak else f"{each.peak:8.0f}"
        lines.append(
            f"{each.backend:{width}} {each.threads:7} {each.median:10.2f}  {between:16} "
            f"{each.p99:8.2f} {each.median / base.median:8.2f} {peak:>9}".rstrip()
        )
    return lines


def write_csv(path: Path, found: Sequence[Latency]) -> None:
    """Write measurements as a table."""
    text = io.StringIO()
    rows = csv.DictWriter(text, [*asdict(found[0])], lineterminator="\n")
    rows.writeheader()
    rows.writerows(asdict(each) for each in found)
    write_text(path, text.getvalue())
