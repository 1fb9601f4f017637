"""How good detections are: the 12 numbers of COCO (https://cocodataset.org/#detection-eval),
computed by faster-coco-eval; and what a detector reaches that ignores the picture.

Legend: N images, K classes, D detections of an image, M boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ghosttrain.data.datasets.boxes import Boxes
from ghosttrain.errors import UserError

TITLES = {
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium",
    "ap_large": "AP large", "ar1": "AR1", "ar10": "AR10", "ar100": "AR100", "ar_small": "AR small",
    "ar_medium": "AR medium", "ar_large": "AR large",
}  # fmt: skip
"""Of the 12 numbers, in COCO's order, as every table calls them: average precision over IoU .5 to
.95, at .5 and at .75, of small, medium and large objects; average recall with 1, 10 and 100
detections an image, and by size."""
NAMES = tuple(TITLES)
RECALLS = np.linspace(0, 1, 101)
"""Where COCO reads the curve of precision against recall."""
PRIORS = 300
"""Detections an image of the detector that ignores it: as many as those of torchvision give (COCO
counts 100 of each class)."""
_SAMPLE = 1000  # training boxes of a class that its priors are chosen from
_NEAR = 0.5  # IoU from which a prior finds a box


class Found(NamedTuple):
    """Detections of one image."""

    corners: np.ndarray
    """(D, 4): left, top, right, bottom in pixels of the image."""
    scores: np.ndarray
    """(D,)"""
    labels: np.ndarray
    """(D,) classes, from 0."""


class CocoNumbers(NamedTuple):
    """What was measured of the detections of N images."""

    row: dict[str, float]
    """`NAMES`, in per cent (-1: the images have no object of this size), and "n" images."""
    class_ap: list[float | None]
    """AP of each class in per cent; None: the images have no object of it."""
    precision_RK: np.ndarray
    """Precision at IoU .5 from each of `RECALLS` on, for each class; NaN: no object of it."""


def validate_installed() -> None:
    """Raise UserError where faster-coco-eval is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        raise UserError(
            "detect measures by faster-coco-eval, which is not installed: type pip install "
            "'ghosttrain[detect]'"
        ) from None


def as_coco(boxes: Boxes, classes: Sequence[str]) -> dict[str, Any]:
    """Return boxes as COCO's annotations: image and category ids from 1, in the order of both."""
    widths = boxes.corners[:, 2:] - boxes.corners[:, :2]
    ltwh = np.concatenate([boxes.corners[:, :2], widths], axis=1).tolist()
    images = np.repeat(np.arange(len(boxes.sizes)), np.diff(boxes.starts))
    rows = zip(images.tolist(), boxes.labels.tolist(), ltwh, boxes.crowd, boxes.areas, strict=True)
    return {
        "images": [
            {"id": i + 1, "width": int(w), "height": int(h)} for i, (w, h) in enumerate(boxes.sizes)
        ],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(classes)],
        "annotations": [
            {
                "id": number, "image_id": image + 1, "category_id": label + 1, "bbox": box,
                "area": float(area), "iscrowd": int(crowd),
            }
            for number, (image, label, box, crowd, area) in enumerate(rows, 1)
        ],
    }  # fmt: skip


def as_results(found: Mapping[int, Found]) -> list[dict[str, Any]]:
    """Return detections by number of image in COCO's format of results."""
    results = []
    for image, each in sorted(found.items()):
        widths = each.corners[:, 2:] - each.corners[:, :2]
        ltwh = np.concatenate([each.corners[:, :2], widths], axis=1).tolist()
        for box, score, label in zip(ltwh, each.scores.tolist(), each.labels.tolist(), strict=True):
            results.append(
                {"image_id": image + 1, "category_id": label + 1, "bbox": box, "score": score}
            )
    return results


def measure(boxes: Boxes, classes: Sequence[str], found: Mapping[int, Found]) -> CocoNumbers:
    """Return the numbers of detections on all images of `boxes`.

    Args:
        boxes: of the N images.
        classes: names of the K classes.
        found: number of an image -> its detections; where one is missing there are none.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(as_coco(boxes, classes))
    evaluation = COCOeval_faster(
        truth, truth.loadRes(as_results(found)), "bbox", print_function=lambda *_: None
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    row: dict[str, float] = {
        name: _percent(float(value))
        for name, value in zip(NAMES, evaluation.stats[: len(NAMES)], strict=True)
    }
    precision_TRK = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    per_class = []
    for k in range(len(classes)):
        values = precision_TRK[:, :, k]
        values = values[values > -1]
        per_class.append(100 * float(values.mean()) if len(values) else None)
    at_half_RK = precision_TRK[0]
    return CocoNumbers(
        row | {"n": len(boxes.sizes)}, per_class, np.where(at_half_RK < 0, np.nan, at_half_RK)
    )


def _percent(share: float) -> float:
    return 100 * share if share >= 0 else -1.0


def ignoring_the_picture(train: Boxes, num_classes: int, sizes: np.ndarray) -> dict[int, Found]:
    """Return the detections of a detector that knows the training boxes and ignores the picture:
    on every image the same boxes, those that find the most training boxes.

    Of each class one box after another is chosen that finds (at IoU `_NEAR`) the most training
    boxes of it that none before finds; its score is the share of training images with one of them.
    Boxes are shares of width and height. The best `PRIORS` of all classes are kept.

    Args:
        train: the training boxes.
        num_classes: K.
        sizes: (N, 2) width and height of the images to detect on.
    """
    owners = np.repeat(np.arange(len(train.sizes)), np.diff(train.starts))
    scale = np.tile(train.sizes[owners], 2)
    every = train.corners / scale
    chosen: list[tuple[float, int, np.ndarray]] = []
    for label in range(num_classes):
        own = every[(train.labels == label) & ~train.crowd][:_SAMPLE]
        total = max(int((train.labels == label).sum()), 1)
        finds = iou(own, own) >= _NEAR
        left = np.ones(len(own), dtype=bool)
        while left.any() and len(own):
            best = int((finds & left).sum(axis=1).argmax())
            hits = int((finds[best] & left).sum())
            score = hits / len(own) * total / len(train.sizes)
            chosen.append((min(score, 1.0), label, own[best]))
            left &= ~finds[best]
    chosen.sort(key=lambda each: -each[0])
    kept = chosen[:PRIORS]
    corners = np.array([box for _, _, box in kept]).reshape(-1, 4)
    scores = np.array([score for score, _, _ in kept])
    labels = np.array([label for _, label, _ in kept], dtype=np.int64)
    return {i: Found(corners * np.tile(size, 2), scores, labels) for i, size in enumerate(sizes)}


def intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the pixels that boxes (A, 4) and (B, 4) share: (A, B)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union of boxes (A, 4) and (B, 4): (A, B); 0 of two without area."""
    inner = intersection(a, b)
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None] - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)
