"""How many images there are, before they are listed, and what a budget makes of it: batch, epochs,
warm-up. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghosttrain.files import expanded

LIMIT = 50_000
"""Training images below which `budget=small` is chosen."""
COUNTED = ("folder", "table")
"""Data whose images are counted."""
LARGEST_BATCH, LEAST_BATCH, STEPS = 64, 8, 16
"""Images of a step: the largest power of two, between the first two, of which an epoch has
`STEPS`."""
EPOCHS = 5, 200
"""Fewest and most epochs."""
WARMUP = 0.05
"""Share of the run."""


def training_images(data: Mapping[str, Any]) -> int | None:
    """Return about how many training images the settings of `data` name, counted up to a few more
    than `LIMIT`; None where they are not in class folders or a table, or not there.

    Files are counted by their names; what is among them besides images is said when they are
    listed.
    """
    if data["name"] not in COUNTED:
        return None
    share = 1.0
    if data["split"] is not None or data["fold"] is not None:
        share = 1 - (data["split"] if data["split"] is not None else 1 / data["folds"])
    root = expanded(data["root"] or ".")
    most = int(LIMIT / share) + 1
    if data["name"] == "table":
        table = expanded(str(data["table"] or ""))
        table = table if table.is_file() else root / table
        count = _lines(table, most) if table.is_file() else None
    else:
        folder = root if share < 1 else root / data["train_split"]
        count = _of_classes(folder, data, most) if folder.is_dir() and data["root"] else None
    if count is None:
        return None
    return int(count * share * (data["fraction"] or 1))


def _lines(table: Path, most: int) -> int:
    with open(table, "rb") as file:
        return sum(1 for _ in zip(range(most + 1), file, strict=False)) - 1


def _of_classes(folder: Path, data: Mapping[str, Any], most: int) -> int:
    """Count the files of the classes that are used, of each no more than are used."""
    if not data["classes"] and data["max_per_class"] is None:
        return _files(folder, most)
    each = most if data["max_per_class"] is None else data["max_per_class"]
    names = data["classes"] or sorted(path.name for path in folder.iterdir() if path.is_dir())
    return sum(min(_files(folder / name, each), each) for name in names)


def _files(folder: Path, most: int) -> int:
    count = 0
    for _, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += sum(not name.startswith(".") for name in names)
        if count > most:
            break
    return count


def computed(images: int, images_seen: float) -> dict[str, str]:
    """Return the values that the lines of a budget may name: `{batch}`, `{epochs}`, `{warmup}`.

    Args:
        images: training images.
        images_seen: images that the run should see, over all epochs.
    """
    batch = LEAST_BATCH
    while batch < LARGEST_BATCH and 2 * batch * STEPS <= images:
        batch *= 2
    batch = min(batch, max(images // 2, 1))
    epochs = min(max(round(images_seen / max(images, 1)), EPOCHS[0]), EPOCHS[1])
    return {"batch": str(batch), "epochs": str(epochs), "warmup": f"{WARMUP * epochs:g}"}
