"""What detection data hold besides images: boxes, checked before anything is trained on them.

What is done about faults, each counted and said at the start:

- a box that is not finite: refused, nobody knows what was meant;
- a box that leaves its image: cut at the image's edge;
- a box of less than a pixel each way (after that), or of a category that nobody named: left out;
- a crowd (VOC: difficult): not trained on; what is found there counts neither for nor against;
- an image without boxes: kept, it shows what is no object;
- an image whose file is missing: refused, or left out with `data.on_error=skip`.

Legend: N images, M boxes of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ghosttrain.errors import UserError

SMALLEST = 1.0
"""Pixels that a box has each way at least."""
LARGEST = 2**31
"""No image has so many pixels each way, and no box lies so far out."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of N images, in the order of the images."""

    starts: np.ndarray
    """(N + 1,) int64: those of image i are numbers `starts[i]` to `starts[i + 1]`."""
    corners: np.ndarray
    """(M, 4) float64: left, top, right, bottom in pixels."""
    labels: np.ndarray
    """(M,) int64: classes."""
    crowd: np.ndarray
    """(M,) bool: a region that holds several objects, or one that is too hard to tell."""
    areas: np.ndarray
    """(M,) float64: pixels of the object, which say whether it is small, medium or large."""
    sizes: np.ndarray
    """(N, 2) int64: width and height of the images."""

    def of(self, index: int) -> slice:
        """Return which boxes are those of image `index`."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return corners (m, 4) and classes (m,) of what image `index` trains on."""
        own = self.of(index)
        kept = ~self.crowd[own]
        return self.corners[own][kept], self.labels[own][kept]

    def at(self, indices: Sequence[int]) -> Boxes:
        """Return the boxes of some of the images, in this order."""
        own = [np.arange(self.starts[index], self.starts[index + 1]) for index in indices]
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *own])
        return Boxes(
            starts=np.cumsum([0, *map(len, own)]),
            corners=self.corners[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
            areas=self.areas[rows],
            sizes=self.sizes[list(indices)],
        )

    def most(self) -> int:
        """Return how many boxes the image has that has the most; at least 1."""
        return max(1, int(np.diff(self.starts).max(initial=0)))

    def content(self) -> bytes:
        """Return bytes that tell these boxes from others."""
        corners, areas = self.corners.round(3), self.areas.round(3)
        parts = (self.starts, corners, self.labels, self.crowd, areas, self.sizes)
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def checked_boxes(
    images_of: Sequence[int],
    corners: np.ndarray,
    labels: Sequence[int],
    crowd: Sequence[bool],
    areas: Sequence[float] | None,
    sizes: np.ndarray,
    source: str,
    name_of: Callable[[int], str],
) -> tuple[Boxes, tuple[str, ...]]:
    """Return the boxes that can be used, and a line about each kind of fault.

    Args:
        images_of: (M,) number of the image of each box, in any order.
        corners: (M, 4) left, top, right, bottom in pixels.
        labels: (M,) classes; -1: of no known category.
        crowd: (M,) whether it is a crowd.
        areas: (M,) pixels of the objects; None: of the boxes.
        sizes: (N, 2) width and height of every image.
        source: what the user knows the boxes by.
        name_of: number of an image -> its name.

    Raises:
        UserError: a box is not finite.
    """
    images = np.asarray(images_of, dtype=np.int64)
    corners = np.asarray(corners, dtype=np.float64).reshape(-1, 4)
    known = np.asarray(labels, dtype=np.int64).reshape(-1)
    broken = ~np.isfinite(corners).all(axis=1)
    if broken.any():
        first = name_of(int(images[broken][0]))
        raise UserError(
            f"{source}: {broken.sum():,} boxes have numbers that are not finite "
            f"(first: of {first}): mend the file"
        )
    edges = np.concatenate([sizes, sizes], axis=1)[images].astype(np.float64)
    cut = np.clip(corners, 0, edges)
    empty = ((cut[:, 2:] - cut[:, :2]) < SMALLEST).any(axis=1)
    moved = (np.abs(cut - corners) > 0.01).any(axis=1) & ~empty
    unknown = (known < 0) & ~empty
    kept = ~empty & ~unknown
    order = np.flatnonzero(kept)[np.argsort(images[kept], kind="stable")]
    counts = np.bincount(images[order], minlength=len(sizes))
    own = cut[order]
    box_areas = (own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])
    given = box_areas if areas is None else np.asarray(areas, dtype=np.float64)[order]
    boxes = Boxes(
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        corners=own,
        labels=known[order],
        crowd=np.asarray(crowd, dtype=bool).reshape(-1)[order],
        areas=np.where(np.isfinite(given) & (given > 0), given, box_areas),
        sizes=sizes,
    )
    faults = (
        (moved, "leave their image and are cut at its edge"),
        (empty, "have less than a pixel in their image and are left out"),
        (unknown, "are of a category that the file does not name, or training does not know, and "
         "are left out"),
    )  # fmt: skip
    notes = [
        f"{source}: {int(mask.sum()):,} of {len(images):,} boxes {what} (first: of "
        f"{name_of(int(images[mask][0]))})"
        for mask, what in faults
        if mask.any()
    ]
    without = int((np.bincount(images[kept], minlength=len(sizes)) == 0).sum())
    if without:
        notes.append(f"{source}: {without:,} of {len(sizes):,} images have no boxes and are kept")
    if crowds := int(boxes.crowd.sum()):
        notes.append(
            f"{source}: {crowds:,} boxes are crowds or difficult: not trained on, and what is "
            "found there does not count"
        )
    return boxes, tuple(notes)
