"""`bench step`: forward and backward of a student by every forward, against plain and timm's.

Sides take turns within a round, so that whatever else the machine does falls on all of them. Peak
memory comes from a process of its own per side: what one side left behind must not hide another's.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghosttrain import native
from ghosttrain.config.schema import FORWARDS, PLAIN
from ghosttrain.engine.summary import device_name
from ghosttrain.models.cost import count_macs
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.study.timing import quartiles, timed

Row = dict[str, Any]

PLAIN_SIDE, TIMM = "plain", "timm"
WARM_UP = 2
"""Rounds before the first that counts."""


def bench_step(
    model_name: str,
    batch: int = 16,
    size: int = 224,
    rounds: int = 10,
    threads: int = 1,
    device: torch.device | None = None,
    forwards: tuple[str, ...] = FORWARDS,
    input_stride: str = "standard",
) -> list[Row]:
    """Return a row for every forward, for the plain network and, if timm has it, for timm's.

    A step is forward and backward of (batch, 3, size, size) images in float32, channels-last; the
    plain network is `reparam=none`, trained as PyTorch does it. A row names `side`; `cpu_ms` and
    `wall_ms` are (lower quartile, median, upper quartile); `ratio` is the median over that of the
    plain network, in CPU time on a CPU and in elapsed time elsewhere; `peak_mib` is the most
    memory of a step above the start; `macs` are multiply-accumulates of the convolutions per
    image, as written branch by branch. What all rows share stands in each.
    """
    device = device or torch.device("cpu")
    sides = [*forwards, PLAIN_SIDE]
    if in_timm(model_name) and input_stride == "standard":
        sides.append(TIMM)
    arguments = (model_name, input_stride, batch, size, threads, device)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = {
            side: one_step(build(model_name, input_stride, side), batch, size, device)
            for side in sides
        }
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for round_ in range(WARM_UP + rounds):
            for side, step in steps.items():
                pair = timed(step, device)
                if round_ >= WARM_UP:
                    times[side].append(pair)
    finally:
        torch.set_num_threads(threads_before)
    about = {
        "model": model_name,
        "batch": batch,
        "size": size,
        "rounds": rounds,
        "threads": threads,
        "device": device_name(device),
        "torch": torch.__version__,
    }
    rows = []
    for side in sides:
        cpu, wall = zip(*times[side], strict=True)
        row: Row = {"side": side, "cpu_ms": quartiles(cpu), "wall_ms": quartiles(wall)}
        row["macs"] = count_macs(build(model_name, input_stride, side), size)
        row["peak_mib"] = peak_in_fresh_process(side, *arguments)
        rows.append(row | about)
    clock = "cpu_ms" if device.type == "cpu" else "wall_ms"
    plain = next(row for row in rows if row["side"] == PLAIN_SIDE)
    for row in rows:
        row["ratio"] = row[clock][1] / plain[clock][1]
        row["memory_ratio"] = row["peak_mib"] / plain["peak_mib"]
    return rows


def describe(rows: list[Row]) -> str:
    """Return the rows as a Markdown table below a line that says what was measured, and on what."""
    about = rows[0]
    lines = [
        f"{about['model']}: forward and backward of {about['batch']} images of {about['size']} "
        f"pixels, float32, channels-last; {about['device']}, torch "
        f"{about['torch']}",
        f"median of {about['rounds']} rounds (lower to upper quartile), sides taking turns; "
        "memory: peak above the start, each in a fresh process",
        "",
        "| side | CPU ms | wall ms | times plain | peak MiB | times plain | MMACs an image |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cpu, wall = (
            f"{median:.0f} ({low:.0f} to {high:.0f})"
            for low, median, high in (row["cpu_ms"], row["wall_ms"])
        )
        side = f"`forward={row['side']}`" if row["side"] in FORWARDS else row["side"]
        if side == TIMM and not row["model"].startswith("ghostnetv3"):
            side = "timm (plain)"
        lines.append(
            f"| {side} | {cpu} | {wall} | {row['ratio']:.2f} | {row['peak_mib']:.0f} | "
            f"{row['memory_ratio']:.2f} | {row['macs'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def in_timm(model_name: str) -> bool:
    """Whether timm is installed and has a network of this name.

    `ghostnetv3_*` have branches there as here; what else it has is plain.
    """
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(model_name)


def build(model_name: str, input_stride: str, side: str) -> nn.Module:
    """Return one side's network, in training mode."""
    torch.manual_seed(0)
    if side == TIMM:
        return create_timm_model(model_name)
    plain = PLAIN.model_copy(update={"forward": "branches"})
    reparam = plain if side == PLAIN_SIDE else {"forward": side}
    return create_model(model_name, reparam=reparam, input_stride=input_stride)


def one_step(model: nn.Module, batch: int, size: int, device: torch.device) -> Callable[[], None]:
    """Return a function that runs forward and backward once, on images made here."""
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    return step


def peak_in_fresh_process(
    side: str,
    model_name: str,
    input_stride: str,
    batch: int,
    size: int,
    threads: int,
    device: torch.device,
) -> float:
    """Return the peak memory in MiB of two steps above what there was before the first."""
    arguments = json.dumps([side, model_name, input_stride, batch, size, threads, str(device)])
    command = [sys.executable, "-m", "ghosttrain.study.bench_step", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak(
    side: str,
    model_name: str,
    input_stride: str,
    batch: int,
    size: int,
    threads: int,
    device_text: str,
) -> float:
    device = torch.device(device_text)
    torch.set_num_threads(threads)
    native.load()
    step = one_step(build(model_name, input_stride, side), batch, size, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(), step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = _resident("VmRSS")
    step(), step()
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
