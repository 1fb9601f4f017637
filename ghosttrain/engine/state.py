"""What a run needs to go on: the one place that knows what a checkpoint holds.

It holds the trained network (student and projection), its average, the optimizer, how far the run
is, what it was begun with (classes, data, settings, cached teacher outputs) and under which
conditions it is computed. The teacher's own weights are not in it.
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
from ghosttrain.engine.checkpoint import Checkpoint
from ghosttrain.engine.conditions import Conditions
from ghosttrain.engine.guard import Guard
from ghosttrain.engine.track import Meter
from ghosttrain.models.weights.fit import fit_state
from ghosttrain.optim.ema import Ema

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
    settings: Mapping[str, Any]
    """Dotted name -> value of every setting that can change the result (`identity`)."""
    total_steps: int
    """Optimizer steps of the whole run."""
    conditions: Conditions
    """Under which this process computes."""
    guard: Guard
    """The steps that were left out."""
    meter: Meter = field(default_factory=Meter)
    """The losses since the last row of the metrics."""
    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Time spent, over all processes that worked on this run."""
    best: dict[str, float] = field(default_factory=lambda: dict(NO_BEST))
    """Best held-out accuracy of the average in per cent, by the name of `train.best_by`, and the
    epoch after which it was measured."""

    def snapshot(self, teacher: Mapping[str, Any]) -> Checkpoint | None:
        """Return a copy of everything on the CPU, on rank 0; the others take part, and return None.

        Args:
            teacher: `TeacherSource.state()`.
        """
        several = distributed.world_size() > 1
        buffers = distributed.gathered([b.cpu() for b in self._buffers()]) if several else []
        meter = distributed.gathered(self.meter.state())
        if distributed.rank():
            return None
        return _copied(
            {
                "student": self.network.student.state_dict(),
                "projection": self.network.projection.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "buffers": buffers,
                "meter": meter,
                "guard": self.guard.state(),
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best,
                "classes": self.classes,
                "data": self.data_record,
                "teacher": teacher,
                "conditions": self.conditions,
                "settings": self.settings,
                "total_steps": self.total_steps,
            }
        )

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a checkpoint holds."""
        modules = (self.network.student, self.network.projection, self.ema.model)
        weights = [t.detach() for module in modules for t in module.state_dict().values()]
        kept = [t for each in self.optimizer.state.values() for t in each.values()]
        return weights + [t for t in kept if isinstance(t, Tensor)]

    def bytes(self) -> int:
        """Return about how large a checkpoint becomes: an optimizer keeps two tensors a weight."""
        weights = sum(p.nbytes for p in self.network.parameters() if p.requires_grad)
        held = sum(t.nbytes for t in self.tensors())
        return held if self.optimizer.state else held + 2 * weights

    def restore(self, saved: Checkpoint, path: Path) -> None:
        """Go on from a checkpoint, which was read from `path`.

        Raises:
            UserError: it holds the weights of another network.
        """
        self._restore_weights(saved, path)
        self.step, self.seconds, self.best = saved["step"], saved["seconds"], saved["best"]
        if saved.get("guard"):  # as below
            self.guard.restore(saved["guard"])
        # Checkpoints of earlier versions were written at rows only, and have none.
        if saved.get("meter"):
            self.meter.restore(saved["meter"], next(self.network.parameters()).device)
        if saved["data"]["held_out"] != self.data_record["held_out"]:
            self.best = dict(NO_BEST)  # it was measured on other images

    def roll_back(self, saved: Checkpoint, path: Path) -> None:
        """Take weights, average and optimizer of a checkpoint of this run, which was read from
        `path`; the steps that were done since then count as done.
        """
        self._restore_weights(saved, path)
        self.guard.rolled_back(self.step)

    def _restore_weights(self, saved: Checkpoint, path: Path) -> None:
        fit_saved(self.network.student, saved["student"], path)
        fit_saved(self.network.projection, saved["projection"], path)
        fit_saved(self.ema.model, saved["ema"]["model"], path)
        self.ema.updates = saved["ema"]["updates"]
        self.optimizer.load_state_dict(saved["optimizer"])
        if len(saved["buffers"]) > 1:
            self._restore_buffers(saved["buffers"])

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


def _copied(value: Any) -> Any:
    """Return nested content with a copy of every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(each) for each in value]
    return value
