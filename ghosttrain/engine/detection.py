"""Detection: the data, the network, the terms of the loss and the numbers of a run (`train.Task`).

Legend: B images of one micro-batch, C channels, S side of the square, M boxes, D detections,
K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.data.box_augment import to_original
from ghosttrain.data.datasets import Dataset, build_datasets
from ghosttrain.data.datasets.boxes import Boxes
from ghosttrain.data.loader import Batch
from ghosttrain.detect.backbones import build_backbone
from ghosttrain.detect.coco_numbers import CocoNumbers, Found, measure, validate_installed
from ghosttrain.detect.detectors import (
    PYRAMID,
    SSDLITE_REDUCTIONS,
    head_outputs,
    retinanet,
    ssdlite,
    targets_of,
)
from ghosttrain.distill.features import Network
from ghosttrain.engine import distributed
from ghosttrain.engine.evaluate import Evaluation, HeldOutImages, evaluating
from ghosttrain.engine.student import build_student
from ghosttrain.engine.train import Task
from ghosttrain.errors import UserError
from ghosttrain.models.reparam import using_forward
from ghosttrain.models.sync_bn import synchronize


def build_data(data: DataConfig) -> tuple[Dataset, Dataset]:
    """Return the training set and the held-out set, both with boxes.

    Raises:
        UserError: they are not there or not whole, or a half has no box; what measures detections
            is not installed.
    """
    validate_installed()
    halves = build_datasets(data)
    for half in halves:
        if not (~boxes_of(half).crowd).any():
            raise UserError(
                f"{half.source} has no box of a known category: there is nothing to learn from or "
                "to measure; give annotations that have some"
            )
    return halves


def boxes_of(dataset: Dataset) -> Boxes:
    """Return the boxes of a data set that has some."""
    assert dataset.boxes is not None
    return dataset.boxes


class DetectorNetwork(Network):
    """What is trained: a detector, and nothing beside it."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what makes the maps: the backbone, and what is made of its maps. What torchvision
        does with them has shapes that depend on the boxes.
        """
        detector: Any = self.student
        detector.backbone.compile(*args, **kwargs)

    def forward(self, images: Tensor, targets: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the losses of images (B, C, S, S) by torchvision's names."""
        return self.student(images, targets)


def build_detector(config: Config, classes: Sequence[str]) -> nn.Module:
    """Return the detector of `config`, freshly initialised but for the weights of its backbone.

    Args:
        config: all settings.
        classes: names of the data's classes in the order of its labels.

    Raises:
        UserError: weights that cannot be had or are of another network; a backbone that does not
            give the maps.
    """
    student: Any = build_student(config, classes)
    name, count = config.model.name, len(classes)
    detector: Any
    if config.detector.name == "ssdlite":
        backbone = build_backbone(student, SSDLITE_REDUCTIONS, name)
        detector = ssdlite(backbone, count, config.data.train_size)
    else:
        backbone = build_backbone(student, PYRAMID, name)
        detector = retinanet(backbone, count, config.detector.channels)
    if config.model.weights:  # what the head of the log says
        detector.weights_dialect = getattr(student, "weights_dialect", None) or config.model.source
        detector.weights_note = "the backbone"
    return detector


def build_network(
    config: Config,
    classes: Sequence[str],
    teacher_features: int,
    micro_batch: int,
    device: torch.device,
) -> Network:
    """Return the network to train, on `device`; the arguments are those of `student.build_network`.

    Raises:
        UserError: as `build_detector`, and batch norms of SSDLite that see one image: its smallest
            map is one value.
    """
    together = micro_batch * (distributed.world_size() if config.train.sync_bn else 1)
    if together < 2 and config.detector.name == "ssdlite":
        raise UserError(
            "detector=ssdlite cannot train on a batch of 1: a batch norm would see a single value; "
            "type train.micro_batch=2 or more"
        )
    detector = build_detector(config, classes).to(device)
    if config.train.channels_last:
        detector = detector.to(memory_format=torch.channels_last)
    if config.train.sync_bn:
        detector = synchronize(detector)
    return DetectorNetwork(detector)


def loss_terms(
    config: Config, network: nn.Module, teacher: Any, batch: Batch, **_: Any
) -> dict[str, Tensor]:
    """Return the terms of one micro-batch: what torchvision's detector says of its classes and of
    its boxes, and their sum.

    Args:
        config: all settings.
        network: images and targets -> losses by name.
        teacher: none teaches a detector.
        batch: as the loader gives it.
    """
    assert batch.boxes is not None
    losses = network(batch.images, targets_of(batch.boxes))
    terms = {"class": losses["classification"].float(), "box": losses["bbox_regression"].float()}
    return terms | {"loss": terms["class"] + terms["box"]}


@dataclass(frozen=True)
class Measured:
    """What was measured of one model over the held-out images."""

    numbers: CocoNumbers
    boxes: Boxes

    def record(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return what `result.json` holds of the classes."""
        counts = np.bincount(self.boxes.labels, minlength=len(classes))
        return {
            "names": list(classes),
            "boxes": counts.tolist(),
            "ap": self.numbers.class_ap,
            "confusion": None,
        }


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module],
    batches: HeldOutImages,
    device: torch.device,
    num_classes: int,
) -> Evaluation:
    """Evaluate all models on the same batches, in float32 and eval mode; exact on any number of
    ranks: rank 0 measures the detections of all images.

    Args:
        models: name -> detector; what the head of "fused" says is compared with that of "ema".
        batches: the held-out images of this rank.
        device: where the models are.
        num_classes: K.
    """
    dataset = batches.dataset
    boxes = boxes_of(dataset)
    found, largest = find(models, batches, device)
    distributed.all_max(largest)
    measured = None
    every = distributed.gathered(found)
    if distributed.rank() == 0:
        measured = {
            name: measure(
                boxes, dataset.classes, {k: v for part in every for k, v in part[name].items()}
            )
            for name in models
        }
    numbers = distributed.broadcast(measured)
    assert numbers is not None
    table = {name: each.row for name, each in numbers.items()}
    counts = {name: Measured(each, boxes) for name, each in numbers.items()}
    return Evaluation(table, largest.item(), counts)


@torch.inference_mode()
def find(
    models: Mapping[str, nn.Module], batches: HeldOutImages, device: torch.device
) -> tuple[dict[str, dict[int, Found]], Tensor]:
    """Return what each model detects on the images of this rank, by their numbers, and the largest
    difference of an output of the heads of "ema" and "fused".
    """
    boxes = boxes_of(batches.dataset)
    found: dict[str, dict[int, Found]] = {name: {} for name in models}
    largest = torch.zeros((), device=device)
    with ExitStack() as stack:
        stack.enter_context(evaluating(*models.values()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled is for training
        heads: dict[str, dict[str, Tensor]] = {}
        if "fused" in models:
            # Branch by branch beside the fused weights: one fold against another proves nothing.
            stack.enter_context(using_forward(nn.ModuleList(models.values()), "branches"))
            for name in ("ema", "fused"):
                heads[name], handle = head_outputs(models[name])
                stack.callback(handle.remove)
        for batch in batches:
            size = batch.images.shape[-1]
            indices = batch.indices.tolist()
            for name, model in models.items():
                for index, each in zip(indices, model(batch.images), strict=True):
                    found[name][index] = _in_pixels(each, size, boxes.sizes[index])
            for key, value in heads.get("ema", {}).items():
                apart = (value - heads["fused"][key]).abs().max()
                largest = torch.maximum(largest, apart)
    return found, largest


def _in_pixels(each: Mapping[str, Tensor], size: int, image: np.ndarray) -> Found:
    """Return the detections of one image in its own pixels."""
    corners = each["boxes"].float().cpu().double().numpy()
    return Found(
        to_original(corners, size, image),
        each["scores"].float().cpu().double().numpy(),
        each["labels"].cpu().numpy() - 1,
    )


DETECTION = Task(build_data, build_network, loss_terms, evaluate)
