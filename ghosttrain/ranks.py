"""Where this process stands among those of a job, by the variables of torchrun or our own `spawn`.

The only place that reads or writes these variables. Imports no torch.
"""

from __future__ import annotations

import os


def rank() -> int:
    """Return this process's rank, 0 when there is one process."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size(default: int = 1) -> int:
    """Return the number of processes; `default` where nobody launched this one as a rank."""
    return int(os.environ.get("WORLD_SIZE", default))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether this process is a rank already: started by torchrun, or by `spawn`."""
    return "WORLD_SIZE" in os.environ


def must_spawn(nproc: int) -> bool:
    """Whether this process must start `nproc` ranks (`launch.nproc`) and is none of them."""
    return nproc > 1 and not is_launched()


def environment(number: int, nproc: int, rendezvous: str) -> dict[str, str]:
    """Return the variables of rank `number` of `nproc`, which meet in the file `rendezvous`."""
    variables = {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GHOSTTRAIN_RENDEZVOUS": rendezvous,
        "GHOSTTRAIN_PARENT": str(os.getpid()),
    }
    return dict(os.environ) | variables


def rendezvous() -> str | None:
    """Return where the ranks of our own `spawn` meet; None under torchrun, which says it itself."""
    return os.environ.get("GHOSTTRAIN_RENDEZVOUS")


def parent() -> int:
    """Return the process that spawned this rank."""
    return int(os.environ["GHOSTTRAIN_PARENT"])
