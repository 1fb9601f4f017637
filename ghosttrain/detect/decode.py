"""From the outputs of an exported detector to boxes, with numpy and the `preprocess.json` that lies
beside the file. It imports nothing else, so that it can be taken along, or written anew in another
language; the boxes are those of torchvision's detectors.

    decoder = Decoder.read("RUN/export/onnx/preprocess.json")
    boxes, scores, labels = decoder(logits, deltas)  # of one image
    names = [["background", *decoder.classes][label] for label in labels]

Legend: A anchors, K classes, N candidates, D detections. Boxes are left, top, right, bottom in
pixels of the image that the network sees.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Decoder:
    """Logits and deltas of one image -> boxes (D, 4), scores (D,), labels (D,), the best first.
    Label 0 is the background, label k the k-th class.
    """

    def __init__(self, settings: dict[str, Any], classes: Sequence[str]) -> None:
        """`settings`: `detector` of preprocess.json."""
        self.settings, self.classes = settings, list(classes)
        self.anchors = np.array(settings["anchors"], np.float32)

    @classmethod
    def read(cls, path: str | Path) -> Decoder:
        """Return the decoder that a `preprocess.json` describes."""
        about = json.loads(Path(path).read_text("utf-8"))
        return cls(about["detector"], about["classes"])

    def __call__(
        self, logits: np.ndarray, deltas: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return boxes, scores and labels.

        Args:
            logits: (A, K + 1), the background's first.
            deltas: (A, 4).
        """
        settings = self.settings
        boxes = self.boxes(deltas)
        if settings["scores"] == "softmax":
            scores, anchors, labels = self.best_of_each_class(softmax(logits))
        else:
            scores, anchors, labels = self.best_of_each_map(sigmoid(logits))
        boxes = boxes[anchors]
        kept = np.zeros(len(scores), bool)
        for label in np.unique(labels):
            own = np.flatnonzero(labels == label)
            kept[own[nms(boxes[own], scores[own], settings["nms_threshold"])]] = True
        best = np.flatnonzero(kept)
        best = best[np.argsort(-scores[best], kind="stable")][: settings["detections_per_image"]]
        return boxes[best], scores[best], labels[best]

    def boxes(self, deltas: np.ndarray) -> np.ndarray:
        """Return the box (A, 4) that each anchor is moved to, cut at the edges of the image."""
        height, width = self.settings["size"]
        low, high = self.anchors[:, :2], self.anchors[:, 2:]
        sides = high - low
        moves = deltas / np.array(self.settings["box_weights"], np.float32)
        stretch = np.minimum(moves[:, 2:], np.float32(self.settings["largest_log_ratio"]))
        centres = low + sides / 2 + moves[:, :2] * sides
        halves = np.exp(stretch) * sides / 2
        corners = np.concatenate([centres - halves, centres + halves], axis=1)
        return np.clip(corners, 0, np.array([width, height, width, height], np.float32))

    def best_of_each_class(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scores, anchors and labels (N,) of SSD's candidates: of each class but the
        background the best `topk_candidates` anchors.
        """
        found = []
        for label in range(1, scores.shape[1]):
            anchors = self.best(scores[:, label])
            found.append((scores[anchors, label], anchors, np.full(len(anchors), label)))
        return _joined(found)

    def best_of_each_map(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scores, anchors and labels (N,) of RetinaNet's candidates: of each map of the
        pyramid the best `topk_candidates` pairs of anchor and label.
        """
        found, first = [], 0
        for count in self.settings["anchors_per_map"]:
            flat = scores[first : first + count].ravel()
            places = self.best(flat)
            anchors, labels = np.divmod(places, scores.shape[1])
            found.append((flat[places], first + anchors, labels))
            first += count
        return _joined(found)

    def best(self, scores: np.ndarray) -> np.ndarray:
        """Return where the largest scores above the threshold are, the best first."""
        likely = np.flatnonzero(scores > self.settings["score_threshold"])
        order = np.argsort(-scores[likely], kind="stable")
        return likely[order[: self.settings["topk_candidates"]]]


def nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Return the boxes that stay, the best first: none of those before overlaps one by more than
    `threshold` (intersection over union).
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    left = np.argsort(-scores, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[left, :2])
        high = np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.maximum(high - low, 0).prod(axis=1)
        left = left[shared <= threshold * (areas[best] + areas[left] - shared)]
    return kept


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each logit."""
    return np.exp(-np.logaddexp(0, -logits))


def _joined(
    found: Sequence[tuple[np.ndarray, ...]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, anchors, labels = (np.concatenate(each) for each in zip(*found, strict=True))
    return scores, anchors, labels
