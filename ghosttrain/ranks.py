"""Where this process stands among those of a job, by the variables of torchrun, of our own `spawn`,
of a step of Slurm or of submitit's local jobs.

The only place that reads or writes these variables. Imports no torch.

torchrun and `spawn` set RANK, and what they set counts. Else a process is a rank where Slurm
started it as one of several tasks of a step. The variables of the step decide that, not
SLURM_NTASKS and SLURM_PROCID: a batch script has these too, with SLURM_PROCID=0, and is one
process. SLURM_STEP_NUM_TASKS is srun's (its manual, output environment variables); the shell of
`salloc` may have it too, in a step of a reserved number (slurm.h: SLURM_MAX_NORMAL_STEP_ID
0xfffffff0). PyTorch Lightning goes by SLURM_NTASKS and the job's name (`bash`, `interactive`), timm
by SLURM_NTASKS: both take such a batch script for a rank.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence

SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
}
"""torchrun's name -> Slurm's; the tasks of this node are those of SLURM_GTIDS."""
SUBMITIT_LOCAL = {
    "RANK": "SUBMITIT_LOCAL_GLOBALID",
    "LOCAL_RANK": "SUBMITIT_LOCAL_LOCALID",
    "WORLD_SIZE": "SUBMITIT_LOCAL_NTASKS",
    "LOCAL_WORLD_SIZE": "SUBMITIT_LOCAL_NTASKS",
}
"""torchrun's name -> that of submitit's local jobs, all of one machine."""
RESERVED_STEPS = 0xFFFFFFF0
"""Steps from this number on are no srun of the user: batch script, `salloc`'s shell (slurm.h)."""


def rank() -> int:
    """Return this process's rank, 0 when there is one process."""
    return int(_value("RANK") or 0)


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return int(_value("LOCAL_RANK") or 0)


def world_size(default: int = 1) -> int:
    """Return the number of processes; `default` where nobody launched this one as a rank."""
    return int(_value("WORLD_SIZE") or default)


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    if is_slurm_task():
        return len(os.environ.get("SLURM_GTIDS", "0").split(","))
    return int(_value("LOCAL_WORLD_SIZE") or 1)


def processes_sharing_cores() -> int:
    """Return how many processes share the cores that this one may use: those of its machine, but
    one where Slurm bound each task to its own (`--cpus-per-task`).
    """
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if is_slurm_task() and own.isdecimal() and len(os.sched_getaffinity(0)) <= int(own):
        return 1
    return local_world_size()


def is_launched() -> bool:
    """Whether this process is a rank already: started by torchrun, `spawn`, srun or submitit."""
    return _value("WORLD_SIZE") is not None


def is_slurm_task() -> bool:
    """Whether Slurm started this process as one of several tasks of a step."""
    step, tasks = (os.environ.get(f"SLURM_STEP_{name}", "") for name in ("ID", "NUM_TASKS"))
    is_task = step.isdecimal() and int(step) < RESERVED_STEPS and tasks.isdecimal()
    return is_task and int(tasks) > 1 and "SLURM_PROCID" in os.environ and "RANK" not in os.environ


def is_on_its_own() -> bool:
    """Whether this process is a rank, and nobody ends the others when one fails."""
    return is_slurm_task() or _is_task_of_submitit()


def runs_at_once() -> int:
    """Return how many runs share the cores of this machine (`launch.devices`)."""
    return int(os.environ.get("GHOSTTRAIN_RUNS_AT_ONCE", "1"))


def given_devices() -> str | None:
    """Return the devices that `launch.devices` gave to this run, as `0,2`; None without it."""
    return (
        os.environ.get("CUDA_VISIBLE_DEVICES") if "GHOSTTRAIN_RUNS_AT_ONCE" in os.environ else None
    )


def must_spawn(nproc: int, devices: Sequence[int] = ()) -> bool:
    """Whether this process must start `nproc` ranks (`launch.nproc`) and is none of them. Also a
    single one where it has to take one of `devices` (`launch.devices`): that is done before torch.
    """
    return (nproc > 1 or bool(devices)) and not is_launched()


def environment(
    number: int, nproc: int, rendezvous: str, mine: Sequence[int] = (), runs_at_once: int = 1
) -> dict[str, str]:
    """Return the variables of rank `number` of `nproc`, which meet in the file `rendezvous`.

    `mine`: the devices that the ranks have, numbered as nvidia-smi does; none: all that there are.
    """
    variables = {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GHOSTTRAIN_RENDEZVOUS": rendezvous,
        "GHOSTTRAIN_PARENT": str(os.getpid()),
    }
    if mine:
        variables["CUDA_DEVICE_ORDER"] = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        variables["GHOSTTRAIN_RUNS_AT_ONCE"] = str(runs_at_once)
    return dict(os.environ) | variables


def environment_of_cell(prefix: str) -> dict[str, str]:
    """Return the variables of this rank's process for one cell of a sweep under torchrun: the ranks
    of the cell meet in torchrun's store, under keys that begin with `prefix`.
    """
    ours = {"GHOSTTRAIN_RENDEZVOUS": f"store:{prefix}", "GHOSTTRAIN_PARENT": str(os.getpid())}
    return dict(os.environ) | ours


def rendezvous() -> str | None:
    """Return where ranks meet that no torchrun started: a file of our own `spawn`, torchrun's store
    (`store:PREFIX`, of the cells of a sweep), or a port of the machine of rank 0. None under
    torchrun, which says it itself.

    MASTER_ADDR and MASTER_PORT count where they are set, also alone.
    """
    if is_slurm_task():
        host = first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        job = ".".join(os.environ.get(name, "0") for name in names)
    elif _is_task_of_submitit():
        host, job = "127.0.0.1", os.environ["SUBMITIT_LOCAL_JOB_ID"]
    else:
        return os.environ.get("GHOSTTRAIN_RENDEZVOUS")
    port = 10_000 + zlib.crc32(job.encode()) % 20_000  # below those that Linux gives to clients
    place = os.environ.get("MASTER_ADDR", host), os.environ.get("MASTER_PORT", port)
    return "tcp://{}:{}".format(*place)


def first_host(nodes: str) -> str:
    """Return the first machine of a list as Slurm writes it: `gpu[07-09,12],cpu3` -> `gpu07`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def parent() -> int | None:
    """Return the process that spawned this rank; None where another program started it."""
    number = os.environ.get("GHOSTTRAIN_PARENT")
    return None if number is None else int(number)


def _value(name: str) -> str | None:
    """Return the value of a variable of torchrun, by the name that the starter of this process has
    for it; None where nobody started it as a rank.
    """
    if is_slurm_task():
        name = SLURM[name]
    elif _is_task_of_submitit():
        name = SUBMITIT_LOCAL[name]
    return os.environ.get(name)


def _is_task_of_submitit() -> bool:
    """Whether submitit started this process on this machine, as one of several tasks of a job."""
    tasks = os.environ.get("SUBMITIT_LOCAL_NTASKS", "1")
    number = os.environ.get("SUBMITIT_LOCAL_GLOBALID")
    return number is not None and tasks != "1" and "RANK" not in os.environ
