"""What a run needs to go on: the one place that knows the keys of a checkpoint.

`checkpoints/last.pt` holds the trained network (student and projection), its average, the
optimizer, how far the run is, and what it was begun with (classes, data, cached teacher outputs).
It is written atomically and read with `weights_only`: it can hold data, never code. The teacher's
own weights are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ghosttrain.distill.features import Network
from ghosttrain.engine import distributed
from ghosttrain.errors import UserError, raise_if_of_the_system
from ghosttrain.files import replacing
from ghosttrain.models.weights.fit import fit_state
from ghosttrain.optim.ema import Ema

Checkpoint = dict[str, Any]
NO_BEST = {"top1": -1.0, "epoch": 0}


@dataclass
class TrainState:
    """The state of a run. It saves itself, and restores itself from what it saved."""

    network: Network
    optimizer: Optimizer
    ema: Ema
    classes: Sequence[str]
    """Names of the classes in the order of the logits."""
    data_record: Mapping[str, Any]
    """What the data are (`same_data.describe_data`)."""
    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Time spent, over all processes that worked on this run."""
    best: dict[str, float] = field(default_factory=lambda: dict(NO_BEST))
    """Best held-out top-1 of the average in per cent, and the epoch after which it was measured."""

    def save(self, path: Path, teacher: Mapping[str, Any], is_last: bool) -> None:
        """Write a checkpoint atomically, on rank 0; the others take part.

        Args:
            path: the file.
            teacher: `TeacherSource.state()`.
            is_last: no step follows: the optimizer's state is left out.
        """
        several = distributed.world_size() > 1
        buffers = distributed.gathered([b.cpu() for b in self._buffers()]) if several else []
        if distributed.rank():
            return
        write_checkpoint(
            path,
            {
                "student": self.network.student.state_dict(),
                "projection": self.network.projection.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": {} if is_last else self.optimizer.state_dict(),
                "buffers": buffers,
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best,
                "classes": self.classes,
                "data": self.data_record,
                "teacher": teacher,
            },
        )

    def restore(self, saved: Checkpoint, path: Path) -> None:
        """Go on from a checkpoint, which was read from `path`.

        Raises:
            UserError: it holds the weights of another network.
        """
        fit_saved(self.network.student, saved["student"], path)
        fit_saved(self.network.projection, saved["projection"], path)
        fit_saved(self.ema.model, saved["ema"]["model"], path)
        self.ema.updates = saved["ema"]["updates"]
        if saved["optimizer"]:
            self.optimizer.load_state_dict(saved["optimizer"])
        if len(saved["buffers"]) > 1:
            self._restore_buffers(saved["buffers"])
        self.step, self.seconds, self.best = saved["step"], saved["seconds"], saved["best"]
        if saved["data"]["held_out"] != self.data_record["held_out"]:
            self.best = dict(NO_BEST)  # it was measured on other images

    def _buffers(self) -> list[Tensor]:
        """Running statistics of the student and of its average: within an epoch each rank's own."""
        return [*self.network.student.buffers(), *self.ema.model.buffers()]

    def _restore_buffers(self, saved: Sequence[Sequence[Tensor]]) -> None:
        """Take this rank's running statistics; with another number of ranks their mean."""
        if len(saved) == distributed.world_size():
            values = saved[distributed.rank()]
        else:
            values = [torch.stack(each).double().mean(0) for each in zip(*saved, strict=True)]
        for buffer, value in zip(self._buffers(), values, strict=True):
            buffer.copy_(value)


def fit_saved(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load what a run saved in `path`; every key and shape must match.

    Raises:
        UserError: naming what does not fit: these are the weights of another network.
    """
    remedy = " Choose another run.name or run.fresh=true."
    fit_state(module, state, "the network of these settings", str(path), remedy=remedy)


def student_weights(saved: Checkpoint, kind: str) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint's student: `raw`, or `ema`, its average."""
    return saved["student"] if kind == "raw" else saved["ema"]["model"]


def write_checkpoint(path: Path, saved: Checkpoint) -> None:
    """Write a checkpoint atomically."""
    with replacing(path) as file:
        torch.save(saved, file)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: the file is damaged, or is no checkpoint of this project.
        OSError: it cannot be read now: no permission, no memory, a failing disk.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler lets anything out: KeyError, struct.error
        raise_if_of_the_system(error, path)
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())[:80]}); move it away to start this "
            "run anew"
        ) from None
    if not isinstance(saved, dict) or "student" not in saved:
        raise UserError(
            f"{path} is no checkpoint of ghosttrain; move it away to start this run anew"
        )
    return saved
