"""What is refused of channel means and standard deviations: those of pixels in [0, 255].

Imports no torch. How many channels there are is for the composer and the teacher to compare.
"""

from __future__ import annotations

from collections.abc import Sequence

from ghosttrain.config.schema import DataConfig, TeacherConfig
from ghosttrain.errors import UserError


def validate_normalization(data: DataConfig, teacher: TeacherConfig) -> None:
    """Refuse means outside [0, 1] and standard deviations outside (0, 1] of data, teacher, members.

    Pixels lie in [0, 1], so their mean does, and their standard deviation is at most 0.5; 1 stands
    for no scaling.

    Raises:
        UserError: naming the setting; where 0..255 was meant, the divided values are what to type.
    """
    networks = {"data": data, "teacher": teacher}
    networks |= {f"teacher.members.{name}": network for name, network in teacher.members.items()}
    for section, network in networks.items():
        for name in ("mean", "std"):
            if (values := getattr(network, name)) is not None:
                _check(f"{section}.{name}", values)


def _check(key: str, values: Sequence[float]) -> None:
    given, is_std = f"{key}={_shown(values)}", key.endswith("std")
    if not values:
        raise UserError(f"{given} is empty: type a number for each channel")
    if max(values) > 1:
        divided = [float(f"{value / 255:.4g}") for value in values]
        raise UserError(
            f"{given} is above 1, but pixels are in [0, 1] here, not in 0..255: type "
            f"{key}={_shown(divided)}"
        )
    if is_std and min(values) <= 0:
        raise UserError(f"{given} must be above 0: pixels are divided by it")
    if min(values) < 0:
        raise UserError(f"{given} must be 0 or more: it is a mean of pixels in [0, 1]")


def _shown(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:g}' for value in values)}]"
