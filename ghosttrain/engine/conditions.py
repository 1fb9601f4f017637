"""What can make two runs of the same settings differ in their last bits, beside the settings.

Sums of floating-point numbers depend on the order in which they are added: on the number of threads
and ranks, on the size of a forward pass, on which kernel computes it. A checkpoint records this, so
that a run that goes on under other conditions says so.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch

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
