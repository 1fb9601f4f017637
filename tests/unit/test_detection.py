"""The numbers of a run of detection, by a detector whose answers are known; terms of the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from boxes import make_coco
from torch import Tensor, nn

from ghosttrain.config.compose import compose
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import train_loader
from ghosttrain.engine import detection
from ghosttrain.engine.detection import build_network, evaluate, loss_terms
from ghosttrain.engine.evaluate import HeldOutImages

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path):
    make_coco(tmp_path)
    return compose(
        ["+recipe=detect_ssdlite", "model=ghostnetv3_050", "data=coco", f"data.root={tmp_path}",
         "data.train_size=96", "data.eval_size=96", "data.workers=0", "augment.iou_crop=false",
         "data.flip=false"]
    ).config  # fmt: skip


class SeesColours(nn.Module):
    """Finds the red rectangle (class 0) and the blue one (class 1) by their pixels."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], swapped: bool) -> None:
        super().__init__()
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))
        self.swapped = swapped

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        found = []
        for pixels in images * self.std + self.mean:
            boxes, labels = [], []
            for label, colour in enumerate((0, 2)):
                mask = pixels[colour] - pixels[2 - colour] > 0.4
                if mask.any():
                    rows, columns = mask.nonzero(as_tuple=True)
                    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                    boxes.append([float(edge) for edge in edges])
                    labels.append(2 - label if self.swapped else label + 1)
            found.append(
                {
                    "boxes": torch.tensor(boxes).reshape(-1, 4),
                    "scores": torch.ones(len(boxes)),
                    "labels": torch.tensor(labels, dtype=torch.int64),
                }
            )
        return found


def detector(config, swapped: bool = False) -> SeesColours:
    return SeesColours(config.data.mean, config.data.std, swapped)


def test_a_detector_that_is_right_reaches_nearly_100_and_one_that_swaps_classes_nothing(config):
    """Pixels of the square become those of the image, labels those of the data."""
    _, held_out = build_datasets(config.data)
    models = {"raw": detector(config), "ema": detector(config, swapped=True)}
    with HeldOutImages(held_out, config, CPU, 3) as images:
        found = evaluate(models, images, CPU, 2)
    assert found.table["raw"]["ap50"] == 100 and found.table["raw"]["ap"] > 80
    assert found.table["raw"]["n"] == len(held_out) == 8
    assert found.table["ema"]["ap50"] == 0
    record = found.counts["raw"].record(held_out.classes)
    assert record["names"] == ["disc", "bar"] and min(record["ap"]) > 80
    assert sum(record["boxes"]) == len(held_out.boxes.labels)


def test_shares_of_two_ranks_measure_what_one_does(config, monkeypatch):
    _, held_out = build_datasets(config.data)
    models = {"raw": detector(config)}

    def measured(indices, others):
        kept = []

        def gathered(value):
            kept.append(value)
            return [value, *others]

        with monkeypatch.context() as patch, HeldOutImages(held_out, config, CPU, 3) as images:
            patch.setattr(detection.distributed, "gathered", gathered)
            images.indices = indices
            return evaluate(models, images, CPU, 2).table, kept

    whole, _ = measured(range(8), [])
    half, others = measured(range(1, 8, 2), [])
    both, _ = measured(range(0, 8, 2), others)
    assert both == whole and half != whole


def test_what_is_said_to_be_background_is_no_detection():
    each = {"boxes": torch.ones(2, 4), "scores": torch.tensor([0.9, 0.8])}
    found = detection.in_pixels(each | {"labels": torch.tensor([0, 2])}, 64, np.array([64, 64]))
    assert found.labels.tolist() == [1] and found.scores.tolist() == pytest.approx([0.8])


def test_batch_norm_of_the_whole_detector_is_synchronized(config):
    train = config.train.model_copy(update={"sync_bn": True})
    asked = config.model_copy(update={"train": train})
    network = build_network(asked, ["disc", "bar"], 0, 4, CPU)
    kinds = {type(m).__name__ for m in network.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {"SyncBatchNorm2d"}


def test_the_terms_of_the_loss_are_torchvisions_and_fall(config):
    """Twelve steps on one batch, the branches collapsed; an image without boxes is in it."""
    train, _ = build_datasets(config.data)
    torch.manual_seed(0)
    network = build_network(config, train.classes, 0, 4, CPU)
    assert not [p for p in network.parameters() if not p.requires_grad]
    with train_loader(train, config.data, config.augment, CPU, channels_last=True) as images:
        (batch,) = images.batches([[0, 1, 2, len(train) - 1]])
    optimizer, losses = torch.optim.AdamW(network.parameters(), 2e-3), []
    for _ in range(12):
        terms = loss_terms(config, network.train(), None, batch)
        assert set(terms) == {"class", "box", "loss"}
        torch.testing.assert_close(terms["loss"], terms["class"] + terms["box"])
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert losses[-1] < 0.6 * losses[0]
