"""Classification: the data, the terms of the loss and the metric of a run (`train.Task`).

Legend: B images of one micro-batch, C channels, H W pixels, K classes, F pooled features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ghosttrain.config import losses
from ghosttrain.config.schema import AugmentConfig, Config
from ghosttrain.data.augment import View, mix_batch
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import Batch
from ghosttrain.distill.losses import LossInputs, agreement, at, evaluate_loss
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.engine.evaluate import evaluate
from ghosttrain.engine.label_loss import label_loss
from ghosttrain.engine.student import build_network
from ghosttrain.engine.teacher_source import TeacherSource, build_teacher_source
from ghosttrain.engine.train import Task


def loss_terms(
    config: Config,
    network: nn.Module,
    teacher: TeacherSource,
    batch: Batch,
    *,
    classes: Sequence[str],
    epoch: int,
    progress: float,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the terms of one micro-batch: mix it, ask the teacher, compare (`objective`).

    Args:
        config: all settings.
        network: images -> `StudentOutput`.
        teacher: its outputs for these images.
        batch: as the loader gives it.
        classes: names of the K classes.
        epoch: from 0; Mixup and CutMix draw anew in each.
        progress: share of the run that is done, in [0, 1].
        class_weights: (K,), of the labels' term; None: all are 1.
    """
    images, views, targets = mixed(batch, len(classes), config.augment, epoch)
    teacher_output = teacher(images, views, batch.cached)
    return objective(config, progress, network, teacher_output, images, targets, class_weights)


def objective(
    config: Config,
    progress: float,
    network: nn.Module,
    teacher_output: TeacherOutput | None,
    images: Tensor,
    targets: Tensor,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return every term of the loss by name, weighted, and their sum as "loss".

    With a teacher there is "agreement" too: the share of images on which the student's best class
    is the teacher's.

    Args:
        config: which terms, their weights and temperature.
        progress: share of the run that is done, in [0, 1]: weights and temperature may follow it.
        network: returns `StudentOutput`: logits (B, K), projected features (B, F) or None.
        teacher_output: for these images, or None.
        images: (B, C, H, W) as the student sees them.
        targets: (B, K) class probabilities of the labels.
        class_weights: (K,), of the labels' term; None: all are 1.
    """
    distill = config.distill
    logits, student_BF = network(images)
    # At least float32, whatever autocast says; a network in float64 keeps its precision.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.dtype)
    label = label_loss(config.train, logits, targets, class_weights)
    terms = {"label": at(distill.label_weight, progress) * label}
    if teacher_output is None:
        return terms | {"loss": terms["label"]}
    inputs = LossInputs(
        student_BK=logits,
        teacher_BK=teacher_output.logits,
        labels_B=targets.argmax(dim=1),
        temperature=at(distill.temperature, progress),
        student_BF=student_BF,
        teacher_BF=teacher_output.features,
    )
    for name, weight in losses.terms(distill):
        term = evaluate_loss(name, inputs, losses.settings_of(distill, name))
        terms[name] = at(weight, progress) * term
    total = torch.stack(list(terms.values())).sum()
    return terms | {"loss": total, "agreement": agreement(logits, teacher_output.logits)}


def mixed(
    batch: Batch, num_classes: int, augment: AugmentConfig, epoch: int
) -> tuple[Tensor, dict[View, Tensor], Tensor]:
    """Return images, the teacher's views and targets (B, K), after Mixup or CutMix where it is on.

    Views are mixed by the same draw as the images; the targets are those of the images.
    """
    indices = batch.indices.tolist()

    def mix_one(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return mix_batch(pixels, batch.labels, num_classes, augment, epoch, indices)

    images, targets = mix_one(batch.images)
    if not (augment.mixup_alpha or augment.cutmix_alpha):
        return images, batch.views, targets
    return images, {k: mix_one(view.float() / 255)[0] for k, view in batch.views.items()}, targets


CLASSIFICATION = Task(build_datasets, build_teacher_source, build_network, loss_terms, evaluate)
