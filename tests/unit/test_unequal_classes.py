"""Unequal classes: how often they are drawn, what they weigh in the loss, the focal loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import only_run

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import TrainConfig
from ghosttrain.data.order import balanced_order, train_batches
from ghosttrain.engine.label_loss import class_weights, label_loss
from ghosttrain.engine.rows import read_metrics
from ghosttrain.errors import UserError

LABELS = np.array([0] * 70 + [1] * 20 + [2] * 10)


@pytest.mark.parametrize(
    ("balance", "shares"), [("uniform", [1, 1, 1]), ("sqrt", [70**0.5, 20**0.5, 10**0.5])]
)
def test_classes_are_drawn_in_these_shares_and_their_images_equally_often(balance, shares) -> None:
    expected = 100 * np.array(shares) / sum(shares)
    seen = np.zeros(100, dtype=int)
    for epoch in range(30):
        order = balanced_order(LABELS, balance, 3, epoch)
        assert len(order) == 100 == len(order.unique())  # a number for every draw
        images = (order % 100).numpy()
        counts = np.bincount(LABELS[images], minlength=3)
        assert (abs(counts - expected) < 1).all()
        seen += np.bincount(images, minlength=100)
    for label in range(3):
        own = seen[label == LABELS]
        assert own.max() - own.min() <= 1
    assert torch.equal(order, balanced_order(LABELS, balance, 3, 29))
    assert not torch.equal(order, balanced_order(LABELS, balance, 4, 29))
    batches = list(train_batches(100, 3, 29, 20, 5, start_step=4, order=order))
    assert sum(batches, []) == order[80:].tolist()


def test_an_image_that_is_drawn_twice_is_augmented_in_two_ways(ghosttrain, tmp_path, monkeypatch):
    from ghosttrain.data import loader as loader_module

    drawn, real = [], loader_module.train_transform

    def train_transform(*args):
        transform = real(*args)

        def watched(open_image, draw, index, **how):
            pixels = transform(open_image, draw, index, **how)
            drawn.append((draw, index, pixels[0].sum().item()))
            return pixels

        return watched

    monkeypatch.setattr(loader_module, "train_transform", train_transform)
    from PIL import Image

    for half, counts in (("train", (28, 4)), ("val", (2, 2))):
        for name, count in zip("ab", counts, strict=True):
            (tmp_path / half / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([len(drawn), number]).integers(0, 255, (40, 40, 3))
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(tmp_path / half / name / f"{number}.png")
    done = ghosttrain(
        "+recipe=baseline", "model=mobilenetv2_050", "data=folder", f"data.root={tmp_path}",
        "data.balance=uniform", "data.train_size=32", "data.eval_size=32", "data.workers=0",
        "train.global_batch=8", "train.epochs=2", "train.class_weights=[1,2.5]",
        "train.focal_gamma=2", "launch.device=cpu", f"run.root={tmp_path / 'runs'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "classes are drawn by data.balance=uniform; weights a 1.00, b 2.50; focal" in done.out
    first = [(index, pixels) for draw, index, pixels in drawn if draw == 0]
    rare = [(index, pixels) for index, pixels in first if index % 32 >= 28]
    assert len(first) == 32 and len(rare) == 16
    assert len({pixels for _, pixels in rare}) == 16  # four images, four ways each
    assert read_metrics(only_run(tmp_path / "runs"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_its_formula(smoothing, gamma, weighted) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 3)) * 3, np.array([0, 1, 2, 2, 1, 0])
    weights = np.array([0.5, 1.0, 4.0]) if weighted else np.ones(3)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = (1 - smoothing) * np.eye(3)[labels] + smoothing / 3
    expected = -(weights * targets * (1 - p) ** gamma * np.log(p)).sum(1).mean()
    train = TrainConfig(label_smoothing=smoothing, focal_gamma=gamma)
    x = torch.tensor(logits, requires_grad=True)
    given = torch.tensor(weights) if weighted else None
    loss = label_loss(train, x, torch.from_numpy(np.eye(3)[labels]), given)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_each_class_of_its_own_is_its_formula(weighted) -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(6, 3)) * 3, np.array([0, 1, 2, 2, 1, 0])
    weights = np.array([0.5, 1.0, 4.0]) if weighted else np.ones(3)
    p, t = 1 / (1 + np.exp(-logits)), 0.9 * np.eye(3)[labels] + 0.1 / 3
    expected = -(weights * (t * np.log(p) + (1 - t) * np.log(1 - p))).mean()
    given = torch.tensor(weights) if weighted else None
    train = TrainConfig(label_loss="bce")
    loss = label_loss(train, torch.tensor(logits), torch.from_numpy(np.eye(3)[labels]), given)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_focal_loss_of_a_certain_answer_has_a_gradient() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    label_loss(TrainConfig(focal_gamma=0.5), logits, torch.eye(2)[:1], None).backward()
    assert logits.grad.isfinite().all()


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    found = class_weights(TrainConfig(class_weights="balanced"), LABELS, 3)
    assert found.tolist() == pytest.approx(expected.tolist())
    assert found[LABELS].mean().item() == pytest.approx(1)
    assert class_weights(TrainConfig(), LABELS, 3) is None
    targets = torch.eye(3)[LABELS]
    logits = torch.zeros(100, 3)
    assert label_loss(TrainConfig(label_smoothing=0), logits, targets, found).item() == (
        pytest.approx(F.cross_entropy(logits, targets).item())
    )


def test_bad_weights_are_refused() -> None:
    for value in ("[1,0]", "[]", "heavy", "[1,x]", "true"):
        with pytest.raises(UserError, match="none, balanced, nor a list of numbers above 0"):
            compose([f"train.class_weights={value}"])
    with pytest.raises(UserError, match="has 2 values, the data has 3 classes"):
        class_weights(TrainConfig(class_weights=(1.0, 2.0)), LABELS, 3)
    with pytest.raises(UserError, match="data.balance=sqrt draws images more than once"):
        compose(["+recipe=compact_kd", "data.balance=sqrt", "cache.dir=x"])
