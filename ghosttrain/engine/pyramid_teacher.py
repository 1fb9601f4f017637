"""The teacher of a detector: a RetinaNet that was trained here, of which the feature pyramid
teaches.

Shapes: B batch, C channels, S side of the square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghosttrain.config.schema import Config, DataConfig, DetectorConfig, ModelConfig, ReparamConfig
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import eval_loader
from ghosttrain.data.order import epoch_order, eval_batches
from ghosttrain.detect.coco_numbers import Found, ignoring_the_picture, measure
from ghosttrain.engine.detection import boxes_of, build_detector, in_pixels
from ghosttrain.engine.state import fit_saved
from ghosttrain.engine.teacher_source import TeacherSource
from ghosttrain.engine.weights_file import read_weights
from ghosttrain.errors import UserError
from ghosttrain.files import expanded
from ghosttrain.models.reparam import fuse
from ghosttrain.text import listed

_BATCH = 16  # images at once while it is checked


class PyramidTeacher(nn.Module):
    """A detector in eval mode, without gradients, that is shown the student's images."""

    scale: Tensor
    shift: Tensor

    def __init__(self, detector: Any, about: dict[str, Any], student: DataConfig) -> None:
        super().__init__()
        self.detector = detector.requires_grad_(False).eval()
        own, seen = about["input"], (torch.tensor(student.mean), torch.tensor(student.std))
        mean, std = torch.tensor(own["mean"]), torch.tensor(own["std"])
        self.register_buffer("scale", (seen[1] / std).view(-1, 1, 1))
        self.register_buffer("shift", ((seen[0] - mean) / std).view(-1, 1, 1))

    def train(self, mode: bool = True) -> PyramidTeacher:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the pyramid's maps of images (B, C, S, S), normalised as the student takes them;
        the largest first.
        """
        return [*self.detector.backbone(images * self.scale + self.shift).values()]

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Return the detections of such images, for each a dictionary as torchvision's."""
        return self.detector(images * self.scale + self.shift)


@dataclass(frozen=True)
class PyramidSource(TeacherSource):
    """Where the maps of a batch that the student's are compared with come from."""

    pyramid: PyramidTeacher | None = None


def build_pyramid_source(config: Config, train_set: Dataset, device: torch.device) -> TeacherSource:
    """Return the teacher of a detector, checked on unaugmented training images; none with
    `distill=none`.

    Raises:
        UserError: its weights cannot be had, or are not of a RetinaNet with as many channels; it
            does not know the classes, or finds no more than chance does.
    """
    if config.distill.name == "none":
        return TeacherSource()
    path = expanded(str(config.teacher.weights))
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; distill=pkd needs a detector that was trained here: type "
            "teacher=run teacher.run=RUN, the folder of a finished run of +recipe=detect_retinanet"
        )
    state, about = read_weights(path)
    _validate_fits(config, about, path)
    of_teacher = {
        "model": ModelConfig(**about["model"]),
        "reparam": ReparamConfig(**(about["reparam"] or {})),
        "detector": DetectorConfig(**about["detector"]),
    }
    detector = build_detector(config.model_copy(update=of_teacher), about["classes"])
    if about["kind"] == "fused":
        detector = fuse(detector)
    fit_saved(detector, state, path)
    teacher = PyramidTeacher(detector, about, config.data).to(device)
    worth = ", not checked"
    if config.teacher.check_samples and not config.teacher.trust:
        worth = _checked(config, teacher, train_set, about["classes"], device)
    name = about["model"]["name"]
    return PyramidSource(f"retinanet on {name} ({path}){worth}", pyramid=teacher)


def _validate_fits(config: Config, about: dict[str, Any], path: Path) -> None:
    kind = about.get("detector", {}).get("name", "none")
    if kind != "retinanet":
        raise UserError(
            f"{path} holds the weights of a {'classifier' if kind == 'none' else kind}, and "
            "distill=pkd compares the feature pyramids of RetinaNets: give the folder of a "
            "finished run of +recipe=detect_retinanet"
        )
    for key, given, own in (
        ("detector.channels", about["detector"]["channels"], config.detector.channels),
        ("data.in_chans", about["input"]["in_chans"], config.data.in_chans),
    ):
        if given != own:
            raise UserError(
                f"the teacher {path} has {key}={given}, the student {own}: type {key}={given}"
            )


def _checked(
    config: Config,
    teacher: PyramidTeacher,
    train_set: Dataset,
    known: Sequence[str],
    device: torch.device,
) -> str:
    """Return what the teacher finds on a sample of training images, in words.

    It must find more (AP50) than the same boxes on every image do, and than its own detections do
    on the image after theirs.

    Raises:
        UserError: it does not know the classes, or finds no more.
    """
    classes = train_set.classes
    if missing := [name for name in classes if name not in known]:
        raise UserError(
            f"the teacher does not know {listed(missing, 3)}, so that what it finds cannot be "
            "checked: give another teacher, or type teacher.trust=true to take it all the same"
        )
    sample = epoch_order(len(train_set), 0, 0)[: config.teacher.check_samples].tolist()
    boxes = boxes_of(train_set).at(sample)
    column = np.array([classes.index(name) if name in classes else -1 for name in known])
    found: list[Found] = []
    with eval_loader(train_set, config.data, device) as images:
        for batch in images.batches(eval_batches(sample, _BATCH)):
            for each in teacher(batch.images):
                one = in_pixels(each, batch.images.shape[-1], boxes.sizes[len(found)])
                labels = column[one.labels]
                ours = labels >= 0
                found.append(Found(one.corners[ours], one.scores[ours], labels[ours]))
    shifted = [*found[1:], *found[:1]] if len(found) > 1 else [Found(*(x[:0] for x in found[0]))]
    same = ignoring_the_picture(boxes_of(train_set), len(classes), boxes.sizes)
    own, blind, moved = (
        measure(boxes, classes, dict(each)).row["ap50"]
        for each in (enumerate(found), same.items(), enumerate(shifted))
    )
    if own <= max(blind, moved):
        raise UserError(
            f"the teacher finds no more than chance: AP50 {own:.2f} % on {len(sample)} training "
            f"images; the same boxes on every image {blind:.2f} %, its own of another image "
            f"{moved:.2f} %; give another teacher, or type teacher.trust=true to take it all the "
            "same"
        )
    return (
        f", AP50 {own:.1f} % on {len(sample)} unaugmented training images (the same boxes on every "
        f"image {blind:.1f} %)"
    )
