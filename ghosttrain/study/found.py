"""What the looks of `doctor` have found so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ghosttrain import ranks
from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import worker_count
from ghosttrain.distill.features import Network
from ghosttrain.engine.checkpoint import Checkpoint
from ghosttrain.engine.plan import Plan
from ghosttrain.engine.teacher_source import TeacherSource


@dataclass
class Found:
    """What the looks have found so far, for those after them."""

    config: Config
    device: torch.device = torch.device("cpu")
    halves: tuple[Dataset, Dataset] | None = None
    plan: Plan | None = None
    teacher: TeacherSource | None = None
    network: Network | None = None
    saved: Checkpoint | None = None
    is_finished: bool = False

    @property
    def processes(self) -> int:
        """Return how many the run has."""
        return ranks.world_size(self.config.launch.nproc)

    @property
    def workers(self) -> int:
        """Return how many data workers one of them has."""
        return worker_count(self.config.data.workers, self.device.type)
