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
from ghosttrain.detect.coco_numbers import CocoNumbers, Found, measure, validate_installed
from ghosttrain.detect.detectors import create_detector, head_outputs, targets_of
from ghosttrain.detect.pkd import pearson_loss
from ghosttrain.distill.features import Network
from ghosttrain.distill.losses import at
from ghosttrain.engine import distributed
from ghosttrain.engine.detector_start import load_the_rest, same_kind
from ghosttrain.engine.evaluate import Evaluation, HeldOutImages, evaluating
from ghosttrain.engine.student import build_student, without_start
from ghosttrain.errors import UserError
from ghosttrain.models.reparam import using_forward
from ghosttrain.models.sync_bn import synchronize
from ghosttrain.models.weights.sources import about_weights

TERMS = {"classification": "class", "bbox_regression": "box", "pkd": "pkd"}
"""torchvision's name of a loss -> that of a run's term."""


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

    def forward(  # type: ignore[override]
        self, images: Tensor, targets: Any, teacher_maps: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the losses of images (B, C, S, S) by torchvision's names, and "pkd", by which the
        pyramid's maps differ from `teacher_maps`.
        """
        detector: Any = self.student
        if teacher_maps is None:
            return detector(images, targets)
        maps: list[Tensor] = []
        # At the head: the backbone may be compiled, and would be anew for every hook.
        kept = detector.head.register_forward_pre_hook(lambda _, inputs: maps.extend(inputs[0]))
        losses = detector(images, targets)
        kept.remove()
        return losses | {"pkd": pearson_loss(maps, teacher_maps)}


def build_detector(config: Config, classes: Sequence[str]) -> nn.Module:
    """Return the detector of `config`, freshly initialised but for `model.weights`: those of its
    backbone, or all of it where they are of a detector of the same kind.

    Args:
        config: all settings.
        classes: names of the data's classes in the order of its labels.

    Raises:
        UserError: weights that cannot be had or are of another network; a backbone that does not
            give the maps.
    """
    whole = same_kind(config)
    # Of other networks than students a detector holds what the maps need, which is no network.
    begun = whole is not None and config.model.source != "ghosttrain"
    student: Any = build_student(without_start(config) if begun else config, classes)
    detector: Any = create_detector(
        config.detector.name,
        student,
        config.model.name,
        len(classes),
        config.data.train_size,
        config.detector.channels,
    )
    if config.model.weights:  # what the head of the log says
        detector.weights_dialect = getattr(student, "weights_dialect", None) or config.model.source
        detector.weights_note = "the backbone"
        if whole is not None:
            path = detector.backbone_path
            detector.weights_note = load_the_rest(detector, config, whole, classes, path)
        elif (other := about_weights(config.model.weights).detector) is not None:
            kind = " ".join(f"{key}={value}" for key, value in other.items())
            detector.weights_note += (
                f" alone: the rest is of another detector, {kind}, and left out"
            )
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
    config: Config, network: nn.Module, teacher: Any, batch: Batch, progress: float = 0.0, **_: Any
) -> dict[str, Tensor]:
    """Return the terms of one micro-batch: what torchvision's detector says of its classes and of
    its boxes, with a teacher how their pyramids differ, and the sum.

    Args:
        config: all settings.
        network: images, targets and the teacher's maps -> losses by name.
        teacher: whose pyramid teaches.
        batch: as the loader gives it.
        progress: share of the run that is done.
    """
    assert batch.boxes is not None
    distill, targets = config.distill, targets_of(batch.boxes)
    if distill.name == "none":
        losses = network(batch.images, targets)
        weights = {"classification": 1.0, "bbox_regression": 1.0}
    else:
        losses = network(batch.images, targets, teacher.pyramid.maps(batch.images))
        label = at(distill.label_weight, progress)
        weights = {
            "classification": label, "bbox_regression": label, "pkd": at(distill.weight, progress),
        }  # fmt: skip
    terms = {TERMS[name]: weight * losses[name].float() for name, weight in weights.items()}
    return terms | {"loss": torch.stack([*terms.values()]).sum()}


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
                    found[name][index] = in_pixels(each, size, boxes.sizes[index])
            for key, value in heads.get("ema", {}).items():
                apart = (value - heads["fused"][key]).abs().max()
                largest = torch.maximum(largest, apart)
    return found, largest


def in_pixels(each: Mapping[str, Tensor], size: int, image: np.ndarray) -> Found:
    """Return the detections of one image in its own pixels, with classes from 0.

    Args:
        each: what a detector says of it.
        size: S, side of the square that the detector saw.
        image: (2,) its width and height.
    """
    labels = each["labels"].cpu().numpy() - 1
    objects = labels >= 0  # RetinaNet may say background, as torchvision's does
    corners = each["boxes"].float().cpu().double().numpy()[objects]
    return Found(
        to_original(corners, size, image),
        each["scores"].float().cpu().double().numpy()[objects],
        labels[objects],
    )
