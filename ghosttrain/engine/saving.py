"""When a run writes a checkpoint within an epoch: `train.save_every`."""

from __future__ import annotations

import re
import time

import torch

from ghosttrain.engine import distributed


class SaveClock:
    """Steps or minutes since the last checkpoint; all ranks agree."""

    def __init__(self, setting: str, step: int, device: torch.device) -> None:
        """Begin at `step`; `setting` is `10min` or `500steps`."""
        match = re.fullmatch(r"(\d+)(min|steps)", setting)
        assert match is not None  # the schema knows no other
        self.every, self.unit = int(match[1]), match[2]
        self.device = device
        self.saved(step)

    def saved(self, step: int) -> None:
        """Count from here."""
        self.step, self.since = step, time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint should be written after `step` steps; rank 0's time counts."""
        if self.unit == "steps":
            return step - self.step >= self.every
        late = distributed.rank() == 0 and time.monotonic() - self.since >= 60 * self.every
        return bool(distributed.all_max(torch.tensor(float(late), device=self.device)).item())
