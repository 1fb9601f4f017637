"""Whether a timm model can be trained on images of these sides: found out by asking it.

This project knows the sides of its own students (config/students.py). Of timm's, some take one side
only (a ViT's position embedding belongs to it: `img_size` would make another network, which the
published weights do not fit), some fail on small maps, some are no classifiers.

Legend: K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from ghosttrain.config.schema import DataConfig
from ghosttrain.errors import UserError


def validate_timm_sides(
    model: nn.Module, name: str, num_classes: int, data: DataConfig, batch: int
) -> None:
    """Ask `model` about an empty image of every side.

    Args:
        model: on the CPU; neither its weights nor the random state are touched.
        name: timm's name of it.
        num_classes: K.
        data: sides and channels of its images.
        batch: images that a batch norm sees together in training.

    Raises:
        UserError: it fails, or what it returns are no logits (1, K).
    """
    sides = {"data.train_size": data.train_size, "data.eval_size": data.eval_size}
    training = model.training
    model.eval()
    for key, side in (*(("data.train_size", side) for side in data.train_sizes), *sides.items()):
        try:
            with torch.no_grad():
                logits = model(torch.zeros(1, data.in_chans, side, side))
        except Exception as error:  # whatever a model of timm raises on what it cannot take
            raise UserError(
                f"timm's {name} cannot take images of {key}={side}"
                f" ({' '.join(str(error).split())[:120]}){_remedy(model, sides)}"
            ) from None
        shape = tuple(getattr(logits, "shape", ()))
        if shape != (1, num_classes):
            raise UserError(
                f"timm's {name} is no classifier: it answers an image with "
                f"{shape or type(logits).__name__}, not with {num_classes} logits; choose another "
                "model.name"
            )
    model.train(training)
    if batch == 1 and _sees_one_value(model, data):
        raise UserError(
            f"timm's {name} cannot train on batches of 1 at "
            f"data.train_size={data.train_size}: a batch norm would see a single value; "
            "type train.micro_batch=2 or more"
        )


def _remedy(model: nn.Module, sides: Mapping[str, int]) -> str:
    """Name the side that timm's configuration of this model gives, where that is another one."""
    config = getattr(model, "pretrained_cfg", None) or {}
    made_for = (config.get("input_size") or (0, 0))[1]
    if not made_for or all(side == made_for for side in sides.values()):
        return "; choose another model.name"
    return f": it is made for {made_for}x{made_for} pixels, type " + " ".join(
        f"{k}={made_for}" for k in sides
    )


def _sees_one_value(model: nn.Module, data: DataConfig) -> bool:
    """Whether a batch norm in training mode has a single value per channel of one image."""
    try:
        without_values = copy.deepcopy(model).to("meta").train()
        side = min(data.train_sizes)
        shape = (1, data.in_chans, side, side)
        without_values(torch.zeros(shape, device="meta"))
    except ValueError as error:
        return "more than 1 value per channel" in str(error)
    except Exception:  # not every operation works without values: then training itself will tell
        return False
    return False
