"""Metrics of the classes against scikit-learn, and against a calibration error written down again.

What several ranks count: test_two_ranks.py; what a run reports of it: test_run_by_hand.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import nn

from ghosttrain.engine.evaluate import evaluate
from ghosttrain.engine.metrics import (
    MOST_CONFUSED,
    Counts,
    class_lines,
    class_record,
    row_of,
    table_lines,
    verdict,
)

CPU = torch.device("cpu")
NAMES = ["cat", "dog", "owl", "newt"]


def measured(logits: np.ndarray, labels: np.ndarray, parts: int = 3) -> tuple[dict, Counts]:
    class Table(nn.Module):
        def forward(self, x):
            return torch.from_numpy(logits).float()[x]

    numbers = torch.arange(len(labels))
    batches = zip(numbers.chunk(parts), torch.from_numpy(labels).chunk(parts), strict=True)
    found = evaluate({"ema": Table()}, batches, CPU, logits.shape[1])
    return found.table["ema"], found.counts["ema"]


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    """Logits of 400 images and their labels: unequal classes, the last is never there, the third is
    never predicted.
    """
    rng = np.random.default_rng(1)
    labels = rng.choice(3, 400, p=[0.7, 0.25, 0.05])
    logits = rng.normal(size=(400, 4)) + 1.5 * np.eye(4)[labels]
    logits[:, 2] = -9
    return logits, labels


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """In 15 bins, bin by bin (https://arxiv.org/abs/1706.04599, equation 3)."""
    confidence, guess = probabilities.max(1), probabilities.argmax(1)
    edges, error = np.linspace(0, 1, 16), 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence >= low) & (confidence < high if high < 1 else confidence <= high)
        if inside.any():
            gap = abs((guess[inside] == labels[inside]).mean() - confidence[inside].mean())
            error += inside.mean() * gap
    return 100 * error


@pytest.mark.parametrize("parts", [1, 7])
def test_metrics_are_scikit_learns(answers, parts) -> None:
    logits, labels = answers
    row, counts = measured(logits, labels, parts)
    guess = logits.argmax(1)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert row["top1"] == pytest.approx(100 * sklearn_metrics.accuracy_score(labels, guess))
    balanced = np.mean([(guess[labels == k] == k).mean() for k in (0, 1, 2)])
    assert row["balanced"] == pytest.approx(100 * balanced)
    f1 = sklearn_metrics.f1_score(labels, guess, average="macro", zero_division=0)
    assert row["macro_f1"] == pytest.approx(100 * f1)
    loss = sklearn_metrics.log_loss(labels, probabilities, labels=range(4))
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    ece = expected_calibration_error(probabilities, labels)
    assert row["ece"] == pytest.approx(ece, abs=1e-3)
    confusion = sklearn_metrics.confusion_matrix(labels, guess, labels=range(4))
    record = class_record(counts, NAMES)
    assert record["confusion"] == confusion.tolist()
    kwargs = {"average": None, "labels": range(4), "zero_division": 0}
    recall = 100 * sklearn_metrics.recall_score(labels, guess, **kwargs)
    assert record["recall"][:3] == pytest.approx(recall[:3]) and record["recall"][3] is None
    precision = 100 * sklearn_metrics.precision_score(labels, guess, **kwargs)
    assert record["precision"][2] is None  # never predicted
    assert record["precision"][0] == pytest.approx(precision[0])
    assert record["precision"][3] == 0


def test_numbers_do_not_depend_on_the_batches(answers) -> None:
    assert measured(*answers, 1)[0] == measured(*answers, 13)[0]


def test_no_image_and_a_logit_that_is_no_number_have_numbers_all_the_same() -> None:
    row, _ = measured(np.full((3, 2), np.nan), np.array([0, 1, 1]))
    zero = dict.fromkeys(("top1", "balanced", "macro_f1", "ece", "loss"), 0)
    assert row == {**zero, "top5": 100, "n": 3}  # of two classes, both are among the five best
    empty = evaluate({"ema": nn.Identity()}, [], CPU, 3)
    assert set(empty.table["ema"].values()) == {0}


def test_the_matrix_of_many_classes_is_not_kept() -> None:
    K = MOST_CONFUSED + 1
    _, counts = measured(np.eye(K), np.arange(K))
    assert counts.confusion_TP is None and counts.hits_K.tolist() == [1] * K
    names = [f"class{k}" for k in range(K)]
    assert len(class_lines(class_record(counts, names))) == 1


def test_lines_of_a_result(answers) -> None:
    row, counts = measured(*answers)
    record = class_record(counts, NAMES)
    head, line = table_lines({"ema": row}, 4, {"ema": "   <- the result"})
    assert "top-5" not in head and "balanced %" in head and line.endswith("<- the result")
    assert "top-5" in table_lines({"ema": row}, 6, {})[0]
    lines = class_lines(record)
    assert lines[0].split() == ["class", "images", "recall", "%", "precision", "%"]
    assert lines[3].split()[0] == "owl" and lines[3].split()[-1] == "-"
    share = 100 * (answers[1] == 0).mean()
    assert verdict(share + 1, record) == f"always 'cat' would reach {share:.2f} % top-1"
    assert verdict(share, record).endswith("is not better than that")
    assert row_of(counts) == row
