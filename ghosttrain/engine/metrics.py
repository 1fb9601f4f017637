"""What is reported of a classifier, from counts: accuracy of every class, averages over classes,
calibration.

Owns the arithmetic. Counts are integers, so that numbers do not depend on how images are spread
over batches and ranks; `evaluate.py` counts. Imports no torch.

Legend: K classes, N images; T true class, P predicted class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ghosttrain.config.schema import Config
from ghosttrain.text import listed

MOST_CONFUSED = 128
"""Classes up to which the confusion matrix is kept: above, no one reads it."""
LISTED_CLASSES = 20
"""Classes up to which a table has a line for each."""
BINS = 15
"""Of the calibration error, as in https://arxiv.org/abs/1706.04599."""
UNIT = 2**24
"""Confidences and losses are counted in steps of 1 / UNIT."""
WORDS = {"top1": "top-1", "balanced": "balanced accuracy", "ap": "AP"}
"""Choice of `train.best_by` -> what it is called in a sentence."""
TOPS = 5
"""More classes than this make a top-5 that says something."""


@dataclass(frozen=True)
class Counts:
    """What was counted of one model over the held-out images."""

    images_K: np.ndarray
    """Images of each class."""
    predicted_K: np.ndarray
    """Images that were taken for each class."""
    hits_K: np.ndarray
    """Images of each class that were taken for it."""
    top5: int
    """Images whose class is among the five best."""
    loss: int
    """Sum of the cross-entropy to the labels (nats), in steps of 1 / UNIT."""
    bins_3B: np.ndarray
    """Calibration: images, hits and sum of confidences (in steps of 1 / UNIT) of each bin."""
    confusion_TP: np.ndarray | None = None
    """Images of class T taken for P; None where there are more than `MOST_CONFUSED` classes."""

    def record(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return what `result.json` holds of the classes (`class_record`)."""
        return class_record(self, classes)


def headline(row: Mapping[str, float]) -> str:
    """Return the name of the number that a row is judged by: `ap` of a detector, else `top1`."""
    return "ap" if "ap" in row else "top1"


def judged_by(config: Config) -> str:
    """Return the name of the number that a run of these settings is judged by (`headline`)."""
    return "ap" if config.detects else "top1"


def score(result: Mapping[str, Any]) -> float:
    """Return the number that a finished run is judged by, in per cent."""
    row = result["weights"][result["headline"]]
    return float(row[headline(row)])


def row_of(counts: Counts) -> dict[str, float]:
    """Return the row of a table: accuracies and the calibration error in per cent, the mean loss.

    `balanced` is the mean recall of the classes that have images, `macro_f1` the mean F1 of the
    classes that have images or were predicted (both as scikit-learn has them), `ece` the expected
    calibration error in `BINS` bins of equal width.
    """
    images, predicted, hits = counts.images_K, counts.predicted_K, counts.hits_K
    n = int(images.sum())
    one = max(n, 1)
    there, seen = images > 0, images + predicted > 0
    _, hits_B, confidence_B = counts.bins_3B
    gaps = np.abs(hits_B - confidence_B / UNIT)
    return {
        "top1": 100 * int(hits.sum()) / one,
        "top5": 100 * counts.top5 / one,
        "n": n,
        "balanced": _mean(100 * hits[there] / images[there]),
        "macro_f1": _mean(200 * hits[seen] / (images + predicted)[seen]),
        "ece": 100 * float(gaps.sum()) / one,
        "loss": counts.loss / UNIT / one,
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def class_record(counts: Counts, classes: Sequence[str]) -> dict[str, Any]:
    """Return what `result.json` holds of the classes: JSON values, accuracies in per cent; null
    where a class has no image or was never predicted.
    """
    images, predicted, hits = counts.images_K, counts.predicted_K, counts.hits_K

    def shares(whole: np.ndarray) -> list[float | None]:
        return [100 * int(h) / int(w) if w else None for h, w in zip(hits, whole, strict=True)]

    return {
        "names": list(classes),
        "images": images.tolist(),
        "recall": shares(images),
        "precision": shares(predicted),
        "confusion": None if counts.confusion_TP is None else counts.confusion_TP.tolist(),
    }


def largest(images_K: Sequence[int]) -> tuple[int, float]:
    """Return the class with the most images, and their share in per cent: what always saying its
    name would reach.
    """
    most = int(np.argmax(images_K))
    return most, 100 * images_K[most] / max(sum(images_K), 1)


# --- words ----------------------------------------------------------------------------------------


def table_lines(
    weights: dict[str, dict[str, float]], classes: int, notes: dict[str, str]
) -> list[str]:
    """Return a table of accuracies: a row for each kind of weights, with a note behind it."""
    columns = {"top1": "top-1 %", "balanced": "balanced %", "macro_f1": "macro F1 %",
               "ece": "ECE %", "top5": "top-5 %"}  # fmt: skip
    rows = list(weights.values())
    shown = [key for key in columns if all(key in row for row in rows)]
    if classes <= TOPS:
        shown = [key for key in shown if key != "top5"]
    widths = {key: len(columns[key]) + 2 for key in shown}
    lines = [f"{'weights':<8}" + "".join(f"{columns[key]:>{widths[key]}}" for key in shown)]
    for name, row in weights.items():
        cells = "".join(f"{row[key]:>{widths[key]}.2f}" for key in shown)
        lines.append(f"{name:<8}{cells}{notes.get(name, '')}")
    return lines


def class_lines(record: dict[str, Any]) -> list[str]:
    """Return recall and precision of every class, a line each; of many classes the worst."""
    names, images = record["names"], record["images"]
    recall, precision = record["recall"], record["precision"]
    if len(names) > LISTED_CLASSES:
        there = [k for k in range(len(names)) if images[k]]
        worst = sorted(there, key=lambda k: (recall[k], names[k]))
        shown = (f"{names[k]} {recall[k]:.0f} % of {images[k]}" for k in worst)
        return [f"lowest recall: {listed(shown, most=5)}"]
    width = max(len("class"), *(len(name) for name in names)) + 2
    lines = [f"{'class':<{width}}{'images':>8}{'recall %':>10}{'precision %':>13}"]
    for row in zip(names, images, recall, precision, strict=True):
        name, count, *shares = row
        r, p = ("-" if share is None else f"{share:.2f}" for share in shares)
        lines.append(f"{name:<{width}}{count:>8,}{r:>10}{p:>13}")
    return lines


def verdict(top1: float, record: dict[str, Any]) -> str:
    """Return a line that compares a result with always naming the largest class."""
    most, share = largest(record["images"])
    base = f"always {record['names'][most]!r} would reach {share:.2f} % top-1"
    if top1 <= share:
        return f"note: {base}: this network ({top1:.2f} %) is not better than that"
    return base
