"""What can make two runs of the same settings differ in their last bits, beside the settings.

Sums of floating-point numbers depend on the order in which they are added: on the number of threads
and ranks, on the size of a forward pass, on which kernel computes it. A checkpoint records this, so
that a run that goes on under other conditions says so.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache

import torch

from ghosttrain import threads
from ghosttrain.engine import distributed
from ghosttrain.engine.plan import Plan
from ghosttrain.models.depthwise import compiled

Conditions = dict[str, str]
"""Name of a condition -> what it was, both for people."""


def conditions(plan: Plan, device: torch.device) -> Conditions:
    """Return the conditions of this process."""
    on_cpu = device.type == "cpu"
    return {
        "processes": str(plan.ranks),
        "micro-batch": str(plan.micro_batch),
        "device": processor() if on_cpu else torch.cuda.get_device_name(device),
        "threads": str(torch.get_num_threads()) if on_cpu else "of a GPU",
        "kernels": "on" if compiled(device.type) else "off",
        "torch": str(torch.__version__),  # a class of its own, which a checkpoint cannot hold
    }


def settle_threads(device: torch.device, before: Conditions | None) -> tuple[int, list[str]]:
    """Let as many threads compute on a CPU as a run had before, or as cores are free now; return
    their number on this rank, and a line where that is fewer than it has cores.

    What the user says (OMP_NUM_THREADS) stands, and what torchrun sets; beside a GPU one computes.
    """
    if device.type != "cpu":
        return 1, []
    most = min(default_threads(), max(int(threads.cores()), 1))
    kept, count = (before or {}).get("threads", ""), None
    if kept.isdigit():
        count = int(kept)
    elif not threads.are_given():
        count = threads.threads_for(threads.free_cores(), most)
    count = distributed.broadcast(count)  # of all ranks: what the user says may differ by machine
    if count is None or threads.are_given():
        return torch.get_num_threads(), []
    torch.set_num_threads(count)
    if kept.isdigit() or count == most:
        return count, []
    return count, [
        f"threads: {count} of {most}, other processes keep the cores busy; OMP_NUM_THREADS={most} "
        "before the command takes all"
    ]


@cache
def default_threads() -> int:
    """Return how many threads PyTorch takes by itself: before a run of this process set fewer."""
    return torch.get_num_threads()


def changed_conditions(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return a line naming what differs from the conditions of a checkpoint; None: nothing does."""
    changes = [f"{key} {before.get(key)} -> {value}" for key, value in now.items()
               if before.get(key) != value]  # fmt: skip
    if not changes:
        return None
    return (
        f"conditions changed: {'; '.join(changes)}; from here on its numbers are no longer "
        "bit-equal to those of a run that was not stopped"
    )


def processor() -> str:
    """Return the name of the processor, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return " ".join((names[0] if names else platform.processor() or platform.machine()).split())
