"""Ranks: joining the others, what rank 0 tells the others, sums over ranks. One process needs
none of it.

Every function does the obvious thing when there is one process, so that the training loop has no
special cases.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghosttrain import ranks
from ghosttrain.errors import UserError
from ghosttrain.ranks import rank, world_size
from ghosttrain.text import one_line


def start(patience: timedelta | None = None) -> None:
    """Join the other ranks, where `ranks.rendezvous` says, or torchrun's variables.

    `patience` is how long a rank waits for the others before it gives up; None: as torch does.

    Raises:
        UserError: the ranks that Slurm or submitit started do not find each other.
    """
    parent = None if dist.is_initialized() else ranks.parent()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        meeting = ranks.rendezvous()
        shared = _store(meeting)
        try:
            dist.init_process_group(
                backend,
                init_method=None if shared else meeting or "env://",
                store=shared,
                timeout=patience,
                rank=rank(),
                world_size=world_size(),
            )
        except dist.DistError as error:
            if not ranks.is_on_its_own():
                raise
            raise UserError(
                f"the {world_size()} processes do not meet at {meeting} ({one_line(error)[:200]}); "
                "see what process 0 wrote; where that place is wrong or taken, set MASTER_ADDR and "
                "MASTER_PORT for all of them"
            ) from None
    if parent is not None:  # not before: no handler runs while torch waits
        signal.signal(signal.SIGTERM, terminated)


def _store(meeting: str | None) -> dist.Store | None:
    """Return the part of torchrun's store in which the ranks of a cell meet; None elsewhere."""
    if meeting is None or not meeting.startswith("store:"):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)
    return dist.PrefixStore(meeting.removeprefix("store:"), store)


def wait_at_most(minutes: float) -> None:
    """Let a rank that waits for others give up after `minutes`, and not before torch's own 30: one
    of them may compile meanwhile.
    """
    if world_size() > 1:
        # The first is its name from PyTorch 2.13 on, the second warns there.
        name = "set_timeout" if hasattr(dist, "set_timeout") else "_set_pg_timeout"
        getattr(dist.distributed_c10d, name)(timedelta(minutes=max(minutes, 30)))


def call_off() -> None:
    """Tell the other ranks, which wait for the settings, that none come; nothing where this one has
    joined them already: its end is seen.
    """
    if not dist.is_initialized():
        with suppress(UserError, RuntimeError):  # they may be gone
            start(timedelta(minutes=2))
            broadcast(None)
            stop()


def terminated(number: int, frame: object) -> None:
    """End as an error does, so that worker processes, logs and trackers are closed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report ended workers
    raise SystemExit(128 + number)


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended, however it ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def stop_soon(seconds: float = 5) -> None:
    """Leave the group after an error, where the others may still wait for this rank: for at most
    `seconds`. Without it a thread of gloo that ends its last work while Python ends aborts the
    process: exit code 134 in place of ours (2 of 60 processes, and 17 of 80 of a bare script).
    """

    def leave() -> None:
        with suppress(RuntimeError):  # a group that is broken already
            stop()

    if dist.is_initialized():
        leaving = threading.Thread(target=leave, daemon=True)
        leaving.start()
        leaving.join(seconds)


def pick_device(setting: str, key: str = "launch.device") -> torch.device:
    """Return the device of this rank for a setting of auto, cpu or cuda; `key` is its name.

    Raises:
        UserError: CUDA was asked for and there is none, or fewer GPUs than ranks.
    """
    mine = ranks.given_devices()
    if mine is not None and setting != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"launch.devices gave this run {mine}, where PyTorch sees no CUDA device; with "
            f"{key}=cpu they only say how many runs compute at once"
        )
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"{key}=cuda, but PyTorch sees no CUDA device; type {key}=cpu or auto")
    local = ranks.local_rank()
    if ranks.is_slurm_task() and torch.cuda.device_count() == 1:
        local = 0  # --gpus-per-task: every task sees its own, as number 0
    validate_gpus(local + 1)
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def validate_gpus(processes: int) -> None:
    """Raise UserError where this machine has fewer GPUs than processes."""
    if processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes on {torch.cuda.device_count()} GPUs; start one process per GPU"
        )


def say(text: str) -> None:
    """Print on rank 0 what a person waits for."""
    if rank() == 0:
        print(text, flush=True)


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def validate_same(name: str, value: str, remedy: str) -> None:
    """Refuse to go on where ranks have other values than rank 0, on all of them alike.

    Args:
        name: what is compared, such as "checkpoint".
        value: this rank's.
        remedy: what to do about a difference.

    Raises:
        UserError: naming the first rank that has another one, and its machine.
    """
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, (value, socket.gethostname()))
    first, host = found[0]
    for number, (other, where) in enumerate(found):
        if other != first:
            raise UserError(
                f"{name}: {other} on rank {number} ({where}), {first} on rank 0 ({host}); {remedy}"
            )


def gathered(value: Any) -> list[Any]:
    """Return every rank's value on rank 0, in their order; an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, values if rank() == 0 else None, dst=0)
    return values


def all_sum(x: Tensor) -> Tensor:
    """Return the sum of `x` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Return the element-wise maximum of `x` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def any_of(yes: bool) -> bool:
    """Whether any rank says yes; all ranks ask."""
    return bool(all_max(torch.tensor(float(yes))).item())


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model whose backward averages gradients over ranks; the model itself when there is
    one process.
    """
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    # torch moves towards another name for this, with other semantics; and it notes that the
    # gradients of channels-last 1x1 convolutions have other strides than its buckets: they do.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Running statistics stay each rank's own in training; `average_buffers` joins them before use.
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def no_sync(model: nn.Module, active: bool) -> AbstractContextManager[None]:
    """Skip the gradient average (all but the last accumulation step)."""
    if active and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


@torch.no_grad()
def average_buffers(*models: nn.Module) -> None:
    """Replace floating buffers (the running statistics of batch norm) by their mean over ranks."""
    if world_size() == 1:
        return
    for model in models:
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        if buffers:
            flat = all_sum(torch.cat([b.flatten() for b in buffers])) / world_size()
            for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))
