"""From the settings to the network that is trained: the student, and a projection beside it where
the distillation loss compares features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ghosttrain.config.losses import compares_features
from ghosttrain.config.schema import Config
from ghosttrain.detect.backbones import create_torchvision_model
from ghosttrain.distill.features import Network, pooled_width
from ghosttrain.engine.freeze import frozen_throughout
from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.models.depth import block_depths
from ghosttrain.models.int8 import round_layers
from ghosttrain.models.sync_bn import synchronize
from ghosttrain.models.timm_limits import validate_timm_sides
from ghosttrain.models.weights.files import (
    other_input_stride,
    other_normalisation,
    read_state,
)
from ghosttrain.models.weights.fit import fit_state
from ghosttrain.models.weights.sources import weights_path


def build_network(
    config: Config,
    classes: Sequence[str],
    teacher_features: int,
    micro_batch: int,
    device: torch.device,
) -> Network:
    """Return the network to train, on `device`.

    Args:
        config: all settings.
        classes: names of the data's classes in the order of its labels.
        teacher_features: pooled features in the teacher's output, onto which the student's are
            projected where a loss compares features.
        micro_batch: images that batch norm sees together.
        device: where it is trained.

    Raises:
        UserError: weights that cannot be had or do not fit; images of a size that a timm model
            cannot take; no pooled features where a loss needs them.
    """
    student = build_student(config, classes)
    if config.model.source == "timm":
        validate_timm_sides(student, config.model.name, len(classes), config.data, micro_batch)
    student = student.to(device)
    if config.train.channels_last:
        student = student.to(memory_format=torch.channels_last)
    if config.train.sync_bn:
        student = synchronize(student)
    projection = None
    if compares_features(config.distill):
        width = pooled_width(student, config.data.in_chans, config.data.train_size)
        if not width:
            raise UserError(
                f"{config.model.name} has no pooled features below one linear layer: type "
                "distill.features_weight=0, or a distill= that compares logits"
            )
        projection = nn.Linear(width, teacher_features)
    return Network(student, projection).to(device)


def build_student(
    config: Config, classes: Sequence[str], new_classifier: bool = True, fused: bool = False
) -> nn.Module:
    """Return the student of `config`, freshly initialised or with `model.weights`.

    Args:
        config: all settings.
        classes: names of the data's classes in the order of its labels.
        new_classifier: whether a classifier of other classes may start anew, or is an error.
        fused: the inference form, of weights that are fused; not of timm's networks.
    """
    model, in_chans = config.model, config.data.in_chans
    student: Any
    if model.source == "torchvision":
        student = create_torchvision_model(model.name)
        if model.weights:
            path = weights_path(model.weights, None, "model.weights")
            fit_state(student, read_state(path), f"torchvision's {model.name}", str(path))
        return student
    if model.source == "timm":
        student = create_timm_model(
            model.name,
            len(classes),
            in_chans,
            model.dropout,
            model.weights,
            new_classifier=new_classifier,
            classes=classes,
            drop_path=model.drop_path,
        )
    else:
        student = create_model(
            model.name,
            len(classes),
            in_chans,
            config.reparam,
            model.dropout,
            model.weights,
            fused=fused or model.weight_bits is not None,
            input_stride=model.input_stride,
            new_classifier=new_classifier,
            classes=classes,
            drop_path=model.drop_path,
        )
    if model.weight_bits is not None:
        round_layers(student, model.weight_bits)
    if model.weights:
        about, notes = student.weights_about, [student.weights_note]
        if model.source == "ghosttrain":  # a timm model has no such setting
            notes.append(other_input_stride(about, model.input_stride))
        notes.append(other_normalisation(about, config.data.mean, config.data.std))
        student.weights_note = "; ".join(filter(None, notes))
    return student


def without_start(config: Config) -> Config:
    """Return the settings without `model.weights`: a saved run does not need the file it started
    from.
    """
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})


def trained_depths(student: nn.Module, config: Config) -> dict[str, int] | None:
    """Leave what is frozen for the whole run without gradients; return how deep each parameter
    lies, by its name in the network that is trained, where `optim.layer_decay` needs it.

    Raises:
        UserError: the network does not say how deep its layers are, or has fewer stages than
            `model.freeze` names.
    """
    frozen = frozen_throughout(student, config.model.freeze)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if config.optim.layer_decay == 1:
        return None
    return {f"student.{name}": depth for name, depth in block_depths(student).items()}


def has_fused_form(config: Config) -> bool:
    """Whether the student of `config` has an inference form of its own."""
    return config.model.source == "ghosttrain"
