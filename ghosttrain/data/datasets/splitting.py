"""Which images of one set are held out: a pure function of their names, classes and the settings.

Owns the rule. Images are put in the order of a hash of (data.split_seed, name), so that the same
files are split alike on every machine, and adding files leaves most of the others where they are.
What belongs together (`data.group_by`, near-duplicates) stays together. Imports no torch.

Legend: N images, K classes, P parts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence

import numpy as np

from ghosttrain.config.schema import DataConfig
from ghosttrain.errors import UserError
from ghosttrain.text import listed

SPLIT_SETTINGS = (
    "train_split", "val_split", "val_classes", "split", "fold", "folds", "split_seed", "group_by",
    "near_duplicates", "split_column",
)  # fmt: skip
"""Settings that decide which images are held out."""


def is_split_here(data: DataConfig) -> bool:
    """Whether the data come as one set, of which a part is held out here."""
    return data.split is not None or data.fold is not None


def held_out_mask(
    data: DataConfig,
    names: Sequence[bytes],
    labels: np.ndarray,
    classes: Sequence[str],
    alike: Sequence[tuple[int, int]] = (),
) -> np.ndarray:
    """Return which of N images are held out: (N,) bool.

    A part of `data.split` of every class, or fold `data.fold` of `data.folds`.

    Args:
        data: the settings.
        names: of the images, relative to the folder of the data.
        labels: (N,) int64.
        classes: names of the K classes.
        alike: pairs of images that must be in one half.

    Raises:
        UserError: a class would have no image in one of the halves; `data.group_by` matches
            nothing.
    """
    if data.fold is not None:
        shares, wanted = [1 / data.folds] * data.folds, data.fold
    else:
        assert data.split is not None
        shares, wanted = [data.split, 1 - data.split], 0
    units = groups_of(data.group_by, names)
    if alike:
        units = _joined(units, alike)
    if len(np.unique(units)) == len(units):
        parts = _parts_of_images(data, names, labels, shares)
    else:
        parts = _parts_of_groups(data, names, labels, units, shares)
    held = parts == wanted
    _validate_halves(data, held, labels, classes, units)
    return held


def groups_of(pattern: str | None, names: Sequence[bytes]) -> np.ndarray:
    """Return the number of each image's group (N,): images in which the pattern finds the same text
    (its first group, else all of it) belong together; one in which it finds nothing stands alone.

    Raises:
        UserError: it finds something in no name, or one and the same in all.
    """
    if pattern is None:
        return np.arange(len(names))
    found: dict[str, int] = {}
    units = []
    for place, name in enumerate(names):
        match = re.search(pattern, os.fsdecode(name))
        text = (match[1] if match.re.groups else match[0]) if match else None
        units.append(place if text is None else found.setdefault(text, place))
    if len(found) < 2:
        what = "matches no file name" if not found else f"finds {next(iter(found))!r} in every name"
        raise UserError(
            f"data.group_by={pattern} {what} (first: {os.fsdecode(names[0])}): give a regular "
            "expression whose first group is the same in the names of what belongs together"
        )
    return np.array(units)


def _joined(units: np.ndarray, alike: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return groups in which the images of every pair are together."""
    above = {int(unit): int(unit) for unit in units}

    def top(unit: int) -> int:
        while above[unit] != unit:
            unit = above[unit] = above[above[unit]]
        return unit

    for first, other in alike:
        low, high = sorted((top(int(units[first])), top(int(units[other]))))
        above[high] = low
    return np.array([top(int(unit)) for unit in units])


def rank_of(seed: int, name: bytes) -> bytes:
    """Return what images are put in order by, to draw some of them."""
    return hashlib.sha256(b"%d\0%s" % (seed, name)).digest()


def _parts_of_images(
    data: DataConfig, names: Sequence[bytes], labels: np.ndarray, shares: Sequence[float]
) -> np.ndarray:
    """Cut the images of every class, in the order of their hashes."""
    parts = np.zeros(len(labels), dtype=np.int64)
    begun = 0  # folds of one class end where those of the next begin: all become equally large
    for label in np.unique(labels):
        numbers = np.flatnonzero(labels == label).tolist()
        own = np.array(sorted(numbers, key=lambda i: rank_of(data.split_seed, names[i])))
        if data.fold is not None:
            parts[own] = (np.arange(len(own)) + begun) % len(shares)
            begun += len(own)
        else:
            count = int(np.clip(round(shares[0] * len(own)), 1, max(len(own) - 1, 0)))
            parts[own] = np.arange(len(own)) >= count
    return parts


def _parts_of_groups(
    data: DataConfig,
    names: Sequence[bytes],
    labels: np.ndarray,
    units: np.ndarray,
    shares: Sequence[float],
) -> np.ndarray:
    """Give whole groups, the largest first, to the part that lacks most of their classes."""
    members: dict[int, list[int]] = {}
    for place, unit in enumerate(units.tolist()):
        members.setdefault(unit, []).append(place)
    order = sorted(
        members, key=lambda unit: (-len(members[unit]), rank_of(data.split_seed, names[unit]))
    )
    totals_K = np.bincount(labels).astype(float)
    lacks_PK = np.outer(shares, totals_K)
    parts = np.zeros(len(labels), dtype=np.int64)
    for unit in order:
        kinds, counts = np.unique(labels[members[unit]], return_counts=True)
        score_P = (lacks_PK[:, kinds] / totals_K[kinds] * counts).sum(axis=1)
        part = int(score_P.argmax())
        lacks_PK[part, kinds] -= counts
        parts[members[unit]] = part
    return parts


def _validate_halves(
    data: DataConfig,
    held: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    units: np.ndarray,
) -> None:
    K = len(classes)
    in_train, in_held = (np.bincount(labels[mask], minlength=K) for mask in (~held, held))
    if data.val_classes == "subset":
        held[np.isin(labels, np.flatnonzero(in_train == 0))] = False  # a class must be trained
        return
    for half, counts in (("training", in_train), ("held-out", in_held)):
        if missing := [classes[k] for k in np.flatnonzero(counts == 0).tolist()]:
            totals = in_train + in_held
            shown = (
                f"{name!r} ({totals[classes.index(name)]:,} images in "
                f"{len(np.unique(units[labels == classes.index(name)])):,} groups)"
                for name in missing
            )
            raise UserError(
                f"this split leaves {listed(shown)} without a {half} image: add images, type "
                "another data.split_seed, or data.val_classes=subset where validation may lack "
                "classes"
            )
