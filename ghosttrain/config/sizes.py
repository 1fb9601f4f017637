"""How small an image may be: one table, read when a run is composed and by the networks themselves.

Imports no torch, so that a size that cannot work is refused before anything heavy is loaded.
"""

from __future__ import annotations

from typing import NamedTuple

from ghosttrain.config.errors import UserError
from ghosttrain.config.schema import DataConfig, ModelConfig


class Sides(NamedTuple):
    """Sides of an image in pixels that a family of students sets apart."""

    least: int
    """Smallest that every layer can take."""
    one_value: int
    """Largest at which some batch norm sees one value per image: no training on a batch of 1."""


# Family -> model.input_stride -> sides. The last attention of GhostNet pools the map of 1/32
# (rounded up) by 2 (rounded down): the smallest image has a map of 2x2 there, and up to 3x3 a
# single position is left. The other families shrink to 1x1 and go on. A stem that keeps the map
# makes it 1/16.
_GHOSTNET = {"standard": Sides(33, 96), "small": Sides(17, 48)}
_CONVOLUTIONS_ONLY = {"standard": Sides(1, 32), "small": Sides(1, 16)}
SIDES = {
    "ghostnetv2": _GHOSTNET,
    "ghostnetv3": _GHOSTNET,
    "mobilenetv2": _CONVOLUTIONS_ONLY,
    "shufflenetv2": _CONVOLUTIONS_ONLY,
}


def family(name: str) -> str:
    """Return the name of a student without its width: `ghostnetv3` of `ghostnetv3_100`."""
    return name.rpartition("_")[0]


def check_sides(model: ModelConfig, data: DataConfig, micro_batch: int) -> None:
    """Refuse images too small for the student `model.name`, and for batches of one image.

    Raises:
        UserError: `data.train_size` or `data.eval_size` is below the least side, or `micro_batch`
            (images that batch norm sees together) is 1 and a batch norm would see a single value.
    """
    strides = SIDES[family(model.name)]
    least, one_value = strides[model.input_stride]
    small = strides["small"].least

    for key in ("train_size", "eval_size"):
        size = getattr(data, key)
        if size < least:
            also = f", or model.input_stride=small (from {small})" if small <= size else ""
            raise UserError(
                f"data.{key}={size} is too small for {model.name}, which takes images of at least "
                f"{least}x{least} pixels: type data.{key}={least} or more{also}"
            )
    if micro_batch == 1 and data.train_size <= one_value:
        raise UserError(
            f"{model.name} cannot train on batches of 1 at data.train_size={data.train_size}: a "
            "batch norm would see a single value; type train.micro_batch=2 or more, or "
            f"data.train_size={one_value + 1} or more"
        )
