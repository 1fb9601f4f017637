"""The students: families and their members, one row each; and how small their images may be.

Plain data, without torch: the composer refuses a name or a size that cannot work before anything
heavy is loaded, and the networks check their input by the same rows. A new family is a module with
one class, which takes (name, <arguments of its rows>, num_classes, in_chans, reparam, dropout,
input_stride), a row in `FAMILIES` and its members in `STUDENTS`; a new member is a row there and a
YAML in `conf/model/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ghosttrain.config.schema import DataConfig, ModelConfig
from ghosttrain.errors import UserError


class Sides(NamedTuple):
    """Sides of an image in pixels that a family of students sets apart."""

    least: int
    """Smallest that every layer can take."""
    one_value: int
    """Largest at which some batch norm sees one value per image: no training on a batch of 1."""


class Family(NamedTuple):
    """Networks that one class builds."""

    module: str
    """Where the class is."""
    cls: str
    """Its name."""
    layer: str
    """Module path of a re-parameterized convolution of the first block: no other family has it, so
    that its entry in a state dict tells the family."""
    sides: Mapping[str, Sides]
    """`model.input_stride` -> sides."""
    has_shortcuts: bool = False
    """Whether its blocks can be skipped (`model.drop_path`)."""


class StudentRow(NamedTuple):
    """One member of a family."""

    family: str
    arguments: dict[str, Any]
    """What makes it this one."""


# The last attention of GhostNet pools the map of 1/32 (rounded up) by 2 (rounded down): the
# smallest image has a map of 2x2 there, and up to 3x3 a single position is left. The other families
# shrink to 1x1 and go on. A stem that keeps the map makes it 1/16.
_CONVOLUTIONS_ONLY = {"standard": Sides(1, 32), "small": Sides(1, 16)}
FAMILIES: dict[str, Family] = {
    "ghostnet": Family(
        "ghosttrain.models.ghostnet",
        "GhostNet",
        "stages.0.0.ghost1.primary",
        {"standard": Sides(33, 96), "small": Sides(17, 48)},
        has_shortcuts=True,
    ),
    "mobilenetv2": Family(
        "ghosttrain.models.mobilenetv2",
        "MobileNetV2",
        "stages.0.0.project",
        _CONVOLUTIONS_ONLY,
        has_shortcuts=True,
    ),
    "shufflenetv2": Family(
        "ghosttrain.models.shufflenetv2",
        "ShuffleNetV2",
        "stages.0.0.right.expand",
        _CONVOLUTIONS_ONLY,
    ),
}
# ghostnetv2_* and ghostnetv3_* name one network: plain with reparam=none, branches with full.
STUDENTS: dict[str, StudentRow] = {
    "ghostnetv2_100": StudentRow("ghostnet", {"width": 1.0}),
    "ghostnetv2_130": StudentRow("ghostnet", {"width": 1.3}),
    "ghostnetv2_160": StudentRow("ghostnet", {"width": 1.6}),
    "ghostnetv3_050": StudentRow("ghostnet", {"width": 0.5}),
    "ghostnetv3_100": StudentRow("ghostnet", {"width": 1.0}),
    "ghostnetv3_130": StudentRow("ghostnet", {"width": 1.3}),
    "ghostnetv3_160": StudentRow("ghostnet", {"width": 1.6}),
    "mobilenetv2_050": StudentRow("mobilenetv2", {"width": 0.5}),
    "mobilenetv2_100": StudentRow("mobilenetv2", {"width": 1.0}),
    "mobilenetv2_140": StudentRow("mobilenetv2", {"width": 1.4}),
    "shufflenetv2_050": StudentRow("shufflenetv2", {"channels": (48, 96, 192, 1024)}),
    "shufflenetv2_100": StudentRow("shufflenetv2", {"channels": (116, 232, 464, 1024)}),
    "shufflenetv2_150": StudentRow("shufflenetv2", {"channels": (176, 352, 704, 1024)}),
    "shufflenetv2_200": StudentRow("shufflenetv2", {"channels": (244, 488, 976, 2048)}),
}


def sides_of(name: str, input_stride: str) -> Sides:
    """Return the sides of a student; of a name that is none, those of a network that takes all."""
    student = STUDENTS.get(name)
    return FAMILIES[student.family].sides[input_stride] if student else Sides(1, 1)


def validate_sides(model: ModelConfig, data: DataConfig, micro_batch: int) -> None:
    """Refuse images too small for the student `model.name`, and for batches of one image.

    Raises:
        UserError: `data.train_size` or `data.eval_size` is below the least side, or `micro_batch`
            (images that batch norm sees together) is 1 and a batch norm would see a single value.
    """
    least, one_value = sides_of(model.name, model.input_stride)
    small = sides_of(model.name, "small").least

    trained = "size_schedule" if data.size_schedule else "train_size"
    sides = [(trained, side) for side in data.train_sizes] + [("eval_size", data.eval_size)]
    for key, size in sides:
        if size < least:
            other_stride = f", or model.input_stride=small (from {small})" if small <= size else ""
            typed = "sides of " if key == "size_schedule" else f"data.{key}="
            raise UserError(
                f"data.{key}={size} is too small for {model.name}, which takes images of at least "
                f"{least}x{least} pixels: type {typed}{least} or more{other_stride}"
            )
    side = min(data.train_sizes)
    if micro_batch == 1 and side <= one_value:
        raise UserError(
            f"{model.name} cannot train on batches of 1 at data.train_size={side}: "
            "a batch norm would see a single value; type train.micro_batch=2 or more, or "
            f"data.train_size={one_value + 1} or more"
        )


def validate_drop_path(name: str, drop_path: float) -> None:
    """Refuse to skip blocks of a student that has no shortcuts around them.

    Raises:
        UserError: saying so.
    """
    if drop_path and not FAMILIES[STUDENTS[name].family].has_shortcuts:
        raise UserError(
            f"model.drop_path={drop_path:g}: {name} has no shortcuts, so no block can be skipped; "
            "type model.drop_path=0"
        )
