"""Which detections of an image are right, by COCO's rule at one IoU, and how good an image is.

Legend: D detections of an image, M its boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ghosttrain.detect.coco_numbers import Found, intersection, iou

NEAR = 0.5
"""IoU from which a detection is that box."""
RIGHT, WRONG, ON_CROWD = 1, 0, -1
"""What a detection is; on a crowd it counts neither for nor against."""


class Matched(NamedTuple):
    """The detections of one image beside its boxes."""

    found: Found
    """All of the image, by falling score."""
    kind: np.ndarray
    """(D,) `RIGHT`, `WRONG` or `ON_CROWD`."""
    box: np.ndarray
    """(D,) number of the box that a detection is; -1: of none."""
    corners: np.ndarray
    """(M, 4) of the boxes."""
    labels: np.ndarray
    """(M,) classes of the boxes."""
    crowd: np.ndarray
    """(M,) bool"""

    def counts(self, least: float) -> tuple[int, int, int]:
        """Return how many detections with a score of `least` or more are right and how many wrong,
        and how many boxes are missed.
        """
        kept = self.kind[self.found.scores >= least]
        right = int((kept == RIGHT).sum())
        return right, int((kept == WRONG).sum()), int((~self.crowd).sum()) - right

    def f1(self, least: float) -> float:
        """Return 2 right / (2 right + wrong + missed); 1 where there is nothing to find and nothing
        is found.
        """
        right, wrong, missed = self.counts(least)
        return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 1.0


def match(found: Found, corners: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> Matched:
    """Match detections with boxes: by falling score each takes the free box of its class with the
    highest IoU, from `NEAR`; else a crowd that holds half of it.
    """
    order = np.argsort(-found.scores, kind="stable")
    found = Found(*(values[order] for values in found))
    kind = np.full(len(order), WRONG)
    box = np.full(len(order), -1)
    overlap = iou(found.corners, corners)
    areas = (found.corners[:, 2:] - found.corners[:, :2]).prod(axis=1)
    inside = intersection(found.corners, corners) / np.maximum(areas, 1e-9)[:, None]
    same = found.labels[:, None] == labels[None]
    free = ~crowd
    for d in range(len(order)):
        candidates = np.where(free & same[d], overlap[d], 0.0)
        if len(candidates) and candidates.max() >= NEAR:
            best = int(candidates.argmax())
            kind[d], box[d], free[best] = RIGHT, best, False
        elif (inside[d, crowd & same[d]] >= NEAR).any():
            kind[d] = ON_CROWD
    return Matched(found, kind, box, corners, labels, crowd)


def best_threshold(images: Sequence[Matched]) -> float:
    """Return the score from which the F1 of all images together is the highest; 0 without a right
    detection.
    """
    scores = np.concatenate([each.found.scores for each in images] or [np.empty(0)])
    kinds = np.concatenate([each.kind for each in images] or [np.empty(0)])
    scores, kinds = scores[kinds != ON_CROWD], kinds[kinds != ON_CROWD]
    if not (kinds == RIGHT).any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(kinds[order] == RIGHT)
    boxes = sum(int((~each.crowd).sum()) for each in images)
    f1 = 2 * right / (np.arange(1, len(order) + 1) + boxes)
    last_of_score = np.append(np.diff(scores[order]) != 0, True)
    return float(scores[order][np.where(last_of_score, f1, -1.0).argmax()])
