"""Whether an exported detector answers as the one it was made of: its raw outputs, and the boxes
that are made of them.

Legend: B batch, A anchors, K classes, N images, D detections.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghosttrain.data.box_augment import to_original
from ghosttrain.data.datasets.boxes import Boxes
from ghosttrain.deploy.formats import Runner
from ghosttrain.deploy.network import Deployed
from ghosttrain.deploy.parity import BOUND, run_in_batches
from ghosttrain.detect.coco_numbers import Found, iou, measure
from ghosttrain.detect.decode import Decoder

SAME_IOU, SAME_EDGE, SAME_SCORE = 0.99, 0.01, 1e-4
"""Two boxes of one class are at one place: intersection over union at least, or pixels that an edge
differs by at most (some boxes have no area). They are the same where their scores differ by at most
`SAME_SCORE`."""
SAME = 99.0
"""Per cent of the boxes that have to be the same, in fp32: where two scores are equal but for
rounding, either may come first, and the first suppresses the other."""


@dataclass(frozen=True)
class DetectorComparison:
    """An exported file and its detector on the same images."""

    images: int
    answer: str
    """The output that differs most: "class logit", "box delta"; of a file with NMS "score", of
    two boxes of one class at one place."""
    largest: float
    """Difference of it."""
    scale: float
    """Largest absolute one of the detector; of scores 1."""
    boxes: int
    """That the detector finds in PyTorch, by torchvision's own choice."""
    same: float
    """Boxes of either that the other has too, in per cent."""
    ap: float
    """Of the detector, in per cent; -1: the images have no object."""
    ap_exported: float
    """Of the file, its outputs decoded by `decode.Decoder`."""

    def passes(self, bound: float) -> bool:
        """Whether the outputs stay within `bound`, a share of the largest, and in fp32 the boxes
        are the same.
        """
        close = self.largest <= bound * self.scale
        return close and (bound > BOUND["fp32"] or self.same >= SAME)

    def allowed(self, bound: float) -> str:
        """Return in words what passes within `bound`."""
        text = (
            f"scores of boxes at one place may differ by {bound:.0e}"
            if self.answer == "score"
            else f"{bound:.0e} of the largest is allowed"
        )
        if bound > BOUND["fp32"]:
            return text
        return f"{text}, and {SAME:g} % of the boxes have to be the same"

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def words(self) -> str:
        """Return it as a sentence."""
        return (
            f"{self.images:,} images: AP {self.ap_exported:.2f} % (PyTorch {self.ap:.2f} %), "
            f"{self.same:.2f} % of {self.boxes:,} boxes the same, largest difference of a "
            f"{self.answer} {self.largest:.1e} (the largest is {self.scale:.3g})"
        )


def compare_detector(
    source: Deployed,
    runner: Runner,
    batches: Iterable[tuple[Tensor, Tensor]],
    boxes: Boxes,
    box_settings: dict[str, Any],
    fixed_batch: int | None,
) -> DetectorComparison:
    """Show the same images to a detector and to what runs its file.

    Args:
        source: the detector.
        runner: of the file.
        batches: inputs of the network, and labels, which are not looked at.
        boxes: the objects of these images, in their order.
        box_settings: of the detector, for the size of these images.
        fixed_batch: images that the file takes at once; None: any number.
    """
    from ghosttrain.detect.detectors import head_outputs

    detector: Any = source.detector
    decoder = Decoder(box_settings, source.classes)
    height, width = box_settings["size"]
    ours: list[Found] = []
    theirs: list[Found] = []
    pairs: dict[str, list[tuple[float, float]]] = {"class logit": [], "box delta": []}
    kept, handle = head_outputs(detector)
    with torch.inference_mode():
        for inputs, _ in batches:
            ours += [
                Found(*(each[key].numpy() for key in ("boxes", "scores", "labels")))
                for each in detector(source.images_of(inputs))
            ]
            if source.nms:
                theirs += [Found(*runner(image[None])) for image in inputs.numpy()]
                continue
            raw = [kept[key].numpy() for key in ("cls_logits", "bbox_regression")]
            found = run_in_batches(runner, inputs.numpy(), fixed_batch)
            for name, mine, other in zip(pairs, raw, found, strict=True):
                pairs[name].append((_apart(mine, other), float(np.abs(mine).max())))
            theirs += [Found(*decoder(*each)) for each in zip(*found, strict=True)]
    handle.remove()
    count = sum(len(each.scores) for each in (*ours, *theirs))
    apart = [d for pair in zip(ours, theirs, strict=True) for d in score_differences(*pair)]
    same = sum(difference <= SAME_SCORE for difference in apart)
    if source.nms:
        answer, largest, scale = "score", max(apart, default=0.0), 1.0
    else:
        worst = {name: tuple(map(max, zip(*rows, strict=True))) for name, rows in pairs.items()}
        answer = max(worst, key=lambda name: worst[name][0] / max(worst[name][1], 1e-12))
        largest, scale = worst[answer]
    ap, ap_exported = (
        _ap(boxes, source.classes, found, (height, width)) for found in (ours, theirs)
    )
    return DetectorComparison(
        images=len(ours),
        answer=answer,
        largest=largest,
        scale=scale,
        boxes=sum(len(each.scores) for each in ours),
        same=200 * same / count if count else 100.0,
        ap=ap,
        ap_exported=ap_exported,
    )


def _apart(mine: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference; infinite where it is no number."""
    apart = np.abs(mine.astype(np.float64) - other)
    return float(np.where(np.isfinite(apart), apart, np.inf).max())


def score_differences(ours: Found, theirs: Found) -> list[float]:
    """Return by how much the scores of each two boxes of one class at one place differ; infinite
    where one is no number. A box is in one pair at most; the nearest scores are paired first.
    """
    edges = np.abs(ours.corners[:, None] - theirs.corners[None]).max(axis=2)
    at_one_place = (iou(ours.corners, theirs.corners) >= SAME_IOU) | (edges <= SAME_EDGE)
    pairs = np.argwhere(at_one_place & (ours.labels[:, None] == theirs.labels[None]))
    apart = np.abs(ours.scores[pairs[:, 0]].astype(np.float64) - theirs.scores[pairs[:, 1]])
    apart[np.isnan(apart)] = np.inf
    free = np.ones(len(ours.scores), bool), np.ones(len(theirs.scores), bool)
    differences = []
    for number in np.argsort(apart, kind="stable"):
        mine, other = pairs[number]
        if free[0][mine] and free[1][other]:
            free[0][mine] = free[1][other] = False
            differences.append(float(apart[number]))
    return differences


def _ap(
    boxes: Boxes, classes: Sequence[str], found: Sequence[Found], size: tuple[int, int]
) -> float:
    """Return the AP of detections in images of `size`."""
    if not (~boxes.crowd).any():
        return -1.0
    in_pixels = {
        number: Found(
            to_original(each.corners.astype(np.float64), size, boxes.sizes[number]),
            each.scores.astype(np.float64),
            each.labels - 1,
        )
        for number, each in enumerate(found)
    }
    return measure(boxes, classes, in_pixels).row["ap"]
