"""Images that cannot be read, under `data.on_error=skip`: counted over all ranks and listed in the
run folder.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import Loader
from ghosttrain.engine import distributed
from ghosttrain.files import open_file, write_text

SKIPPED = "skipped.csv"


class Skipped(NamedTuple):
    """One image that could not be read."""

    split: str
    """`train` or `held_out`."""
    number: str
    image: str
    reason: str


def list_skipped(folder: Path, images: Mapping[str, tuple[Dataset, Loader]]) -> list[str]:
    """Add the images that the loaders of any rank could not read to the list in `folder`; return a
    line about them where there are new ones. All ranks call it; rank 0 writes.
    """
    found: set[Skipped] = set()
    for split, (dataset, loader) in images.items():
        for number, reason in all_broken(loader).items():
            found.add(Skipped(split, str(number), dataset.name_of(number), reason))
    if distributed.rank() or not (new := found - read_skipped(folder)):
        return []
    listed = sorted(found | read_skipped(folder), key=lambda each: (each.split, int(each.number)))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(Skipped._fields)
    rows.writerows(listed)
    write_text(folder / SKIPPED, text.getvalue())
    first = min(new)
    return [
        f"note: {len(new):,} images could not be read and are skipped (first: {first.image}); "
        f"listed in {SKIPPED}"
    ]


def all_broken(loader: Loader) -> dict[int, str]:
    """Return the images that the loaders of all ranks could not read, with the reasons."""
    return {n: why for part in distributed.gathered(loader.broken) for n, why in part.items()}


def read_skipped(folder: Path) -> set[Skipped]:
    """Return the list in `folder`; nothing where there is none, or it is damaged."""
    try:
        with open_file(folder / SKIPPED) as file:
            _, *rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        found = {Skipped(*row) for row in rows}
    except (OSError, ValueError, TypeError, csv.Error):
        return set()
    return {each for each in found if each.number.isdecimal()}


def count_skipped(folder: Path) -> dict[str, int]:
    """Return how many images of each half the list in `folder` has."""
    splits = [each.split for each in read_skipped(folder)]
    return {split: splits.count(split) for split in ("train", "held_out")}


def skipped_note(train: int, held_out: int) -> list[str]:
    """Return a line about how many images were skipped; nothing where none was."""
    parts = [f"{held_out:,} held-out images could not be read and count as wrong"] * bool(held_out)
    parts += [f"the places of {train:,} training images were taken by others"] * bool(train)
    return [f"note: {', '.join(parts)} ({SKIPPED})"] if parts else []
