"""Fewer classes and fewer training images: a pure function of names, classes and the settings.

Images of a class are taken in the order of a hash of (data.split_seed, name), so that a smaller
share is part of a larger one, and the same files give the same choice on every machine. Imports no
torch.

Legend: N images.
"""

from __future__ import annotations

import numpy as np

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.base import Dataset
from ghosttrain.data.datasets.splitting import rank_of
from ghosttrain.errors import UserError, did_you_mean

SELECTION_SETTINGS = ("classes", "fraction", "max_per_class")


def unselected(data: DataConfig) -> DataConfig:
    """Return the settings with which no image is left out."""
    return data.model_copy(update={"classes": (), "fraction": None, "max_per_class": None})


def selected(data: DataConfig, train: Dataset, held_out: Dataset) -> tuple[Dataset, Dataset]:
    """Return both halves with the classes of `data.classes`, and of the training images of every
    class the share `data.fraction` (at least one), at most `data.max_per_class`.

    Raises:
        UserError: a class that there is not.
    """
    if data.classes:
        train, held_out = (of_classes(half, data.classes) for half in (train, held_out))
    if data.fraction is None and data.max_per_class is None:
        return train, held_out
    kept = np.zeros(len(train), dtype=bool)
    for label in np.unique(train.labels):
        numbers = np.flatnonzero(train.labels == label).tolist()
        count = max(1, round(len(numbers) * (data.fraction or 1)))
        count = min(count, data.max_per_class or count)
        if count < len(numbers):
            numbers.sort(key=lambda i: rank_of(data.split_seed, train.short_name(i)))
        kept[numbers[:count]] = True
    return train.part(kept, (*train.left_out, _note(data, kept))), held_out


def of_classes(half: Dataset, wanted: tuple[str, ...]) -> Dataset:
    """Return the images of the classes `wanted`.

    Raises:
        UserError: a class that there is not.
    """
    unknown = [name for name in wanted if name not in half.classes]
    if unknown:
        raise UserError(
            f"data.classes: {half.source} has no class {unknown[0]!r}."
            f"{did_you_mean(unknown[0], half.classes)}"
        )
    kept = [k for k, name in enumerate(half.classes) if name in wanted]  # in the data's order
    return half.of_classes(np.array(kept))


def _note(data: DataConfig, kept: np.ndarray) -> str:
    given = [
        f"data.{name}={getattr(data, name)}"
        for name in ("fraction", "max_per_class")
        if getattr(data, name) is not None
    ]
    return f"{' '.join(given)}: {kept.sum():,} of {len(kept):,} training images"
