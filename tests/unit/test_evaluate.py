"""Top-1, top-5 and n against counts made by hand; what two ranks count: test_two_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.engine.evaluate import classes_before, evaluate
from ghosttrain.models.reparam import RepConv2d, fuse

CPU = torch.device("cpu")


class Table(nn.Module):
    """TeacherSource image i with row i of a table; an image is its number."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[x.long()]


def batches(labels: list[int], *sizes: int) -> Iterator[tuple[Tensor, Tensor]]:
    numbers, all_labels = torch.arange(len(labels)), torch.tensor(labels)
    yield from zip(numbers.split(sizes), all_labels.split(sizes), strict=True)


def counted(table: dict) -> dict:
    return {name: {k: row[k] for k in ("top1", "top5", "n")} for name, row in table.items()}


def test_seven_classes_by_hand() -> None:
    rows = [
        [9, 0, 0, 0, 0, 0, 0],  # label 0: first
        [1, 2, 3, 4, 5, 6, 7],  # label 6: first
        [1, 2, 3, 4, 5, 6, 7],  # label 5: second
        [1, 2, 3, 4, 5, 6, 7],  # label 2: fifth
        [1, 2, 3, 4, 5, 6, 7],  # label 1: sixth
        [7, 6, 5, 4, 3, 2, 1],  # label 6: seventh
        [-1, -9, -9, -2, -9, -9, -9],  # label 3: second
        [-1, -9, -9, -2, -8, -9, -9],  # label 0: first
    ]
    labels = [0, 6, 5, 2, 1, 6, 3, 0]
    table, difference, _ = evaluate({"it": Table(rows)}, batches(labels, 3, 3, 2), CPU, 7)
    assert counted(table) == {"it": {"top1": 100 * 3 / 8, "top5": 100 * 6 / 8, "n": 8}}
    assert difference == 0


def test_counts_are_kept_where_the_models_are_whatever_the_default_device() -> None:
    model, given = Table([[0.0, 1.0], [1.0, 0.0]]), list(batches([1, 1], 2))
    with torch.device("meta"):
        table, difference, _ = evaluate({"ema": model, "fused": model}, given, CPU, 2)
    assert counted(table)["ema"] == {"top1": 50, "top5": 100, "n": 2} and difference == 0


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_up_to_five_classes_all_are_among_the_five_best(classes: int) -> None:
    rows = [[float(k == (i + 1) % classes) for k in range(classes)] for i in range(4)]
    labels = [0, 1 % classes, 0, 1 % classes]
    table = evaluate({"it": Table(rows)}, batches(labels, 4), CPU, classes).table
    hits = sum((i + 1) % classes == label for i, label in enumerate(labels))
    assert counted(table)["it"] == {"top1": 25 * hits, "top5": 100, "n": 4}


def test_of_equal_logits_the_class_of_the_lower_number_is_first() -> None:
    same = [[0.0] * 7] * 7
    table = evaluate({"same": Table(same)}, batches(list(range(7)), 7), CPU, 7).table
    assert counted(table)["same"] == {
        "top1": 100 / 7,
        "top5": 500 / 7,
        "n": 7,
    }  # labels 0 and 0 to 4
    pair = [[0.0, 5.0, 5.0, 1.0]]
    for label, place in enumerate([3, 0, 1, 2]):
        assert classes_before(torch.tensor(pair), torch.tensor([label])).tolist() == [place]


def test_a_logit_that_is_no_number_is_no_hit() -> None:
    nan = float("nan")
    logits = torch.tensor([[nan] * 7, [1.0, nan, 0, 0, 0, 0, 0], [1.0, nan, 0, 0, 0, 0, 0]])
    assert classes_before(logits, torch.tensor([0, 0, 1])).tolist() == [7, 1, 7]


def test_places_are_those_of_sorting() -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 6, (200, 9))  # with many ties
    labels = rng.integers(0, 9, 200)
    order = np.argsort(-logits, axis=1, kind="stable")
    places = np.argmax(order == labels[:, None], axis=1)
    found = classes_before(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    assert found.tolist() == places.tolist()


def test_each_model_has_its_own_row_and_no_image_no_hit() -> None:
    right, wrong = Table([[0.0, 1.0]]), Table([[1.0, 0.0]])
    table = evaluate({"right": right, "wrong": wrong}, batches([1], 1), CPU, 2).table
    assert (table["right"]["top1"], table["wrong"]["top1"]) == (100, 0)
    table = evaluate({"it": right}, [], CPU, 2).table
    assert counted(table) == {"it": {"top1": 0, "top5": 0, "n": 0}}


def test_modes_are_evaluated_in_eval_mode_and_given_back() -> None:
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 3))

    training, averaged = network().train(), network().eval()
    x = torch.randn(30, 4)
    statistics = training[1].running_mean.clone()
    labels = averaged(x).argmax(dim=1)
    training[1].eval()  # a frozen part
    table = evaluate({"raw": training, "ema": averaged}, [(x, labels)], CPU, 3).table
    assert table["ema"]["top1"] == 100
    assert training.training and not averaged.training
    assert not training[1].training and training[2].training
    assert torch.equal(training[1].running_mean, statistics)
    assert all(p.grad is None for p in training.parameters())


def test_the_difference_is_the_largest_of_all_batches_branch_by_branch() -> None:
    torch.manual_seed(0)
    convolution = RepConv2d(3, 8, 3, reparam=ReparamConfig())
    modes: list[str] = []

    class Student(nn.Module):
        def __init__(self, convolution: nn.Module, error: float) -> None:
            super().__init__()
            self.convolution, self.error = convolution, error

        def forward(self, x: Tensor) -> Tensor:
            modes.append(getattr(self.convolution, "forward_mode", "fused"))
            y = self.convolution(x).mean((2, 3))
            y[x[:, 0, 0, 0] > 50, 2] += self.error  # one logit of one image
            return y

    convolution.eval()
    models = {"ema": Student(convolution, 0.0), "fused": Student(fuse(convolution), -3.0)}
    x = torch.randn(6, 3, 5, 5)
    x[1, 0, 0, 0] = 99
    parts = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split([4, 2])]
    difference = evaluate(models, parts, CPU, 8).difference
    assert difference == pytest.approx(3, rel=1e-4)
    assert modes == ["branches", "fused"] * 2 and convolution.forward_mode == "auto"
    difference = evaluate({"ema": models["ema"]}, parts, CPU, 8).difference
    assert difference == 0
