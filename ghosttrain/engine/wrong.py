"""The held-out images that a run is most certain of and wrong about: where labels are wrong, or
something can be learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import eval_loader
from ghosttrain.data.order import eval_batches
from ghosttrain.engine.gallery import draw_gallery


@dataclass(frozen=True)
class Mistake:
    """One held-out image that was taken for another class."""

    index: int
    name: str
    """What the user finds it by."""
    label: str
    taken_for: str
    probability: float
    """Of the class that it was taken for."""

    def line(self) -> str:
        """Return `PATH is A, taken for B (99.1 %)`."""
        return f"{self.name} is {self.label}, taken for {self.words()}"

    def words(self) -> str:
        """Return `B (99.1 %)`."""
        return f"{self.taken_for} ({100 * self.probability:.1f} %)"


@torch.inference_mode()
def find_mistakes(model: Any, held_out: Dataset, config: Config, batch: int) -> list[Mistake]:
    """Return all held-out images that `model` is wrong about, the most certain first."""
    found = []
    classes = held_out.classes
    with eval_loader(held_out, config.data, torch.device("cpu")) as loader:
        for each_batch in loader.batches(eval_batches(range(len(held_out)), batch)):
            labels, indices = each_batch.labels, each_batch.indices
            unread = {each.number for each in each_batch.broken}
            best = model(each_batch.images).double().softmax(dim=1).max(dim=1)
            rows = zip(indices.tolist(), labels.tolist(), best.indices.tolist(),
                       best.values.tolist(), strict=True)  # fmt: skip
            found += [
                Mistake(i, held_out.name_of(i), classes[label], classes[guess], p)
                for i, label, guess, p in rows
                if label != guess and i not in unread
            ]
    return sorted(found, key=lambda each: (-each.probability, each.index))


def draw_mistakes(
    mistakes: list[Mistake], held_out: Dataset, data: DataConfig, path: Path, title: str
) -> None:
    """Draw mistakes with what they are and what they were taken for."""
    shown = [
        (partial(held_out.open, each.index), f"is {each.label}\ntaken for {each.words()}")
        for each in mistakes
    ]
    draw_gallery(shown, data, path, title)
