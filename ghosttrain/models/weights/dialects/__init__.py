"""Whose names a state dict has: this project's (training form or fused), timm's, torchvision's or
the official code's.

This project's own names need no table: every family of `config/students.py` says by which layer its
weights are recognised. A file of this folder names a family as others do.
"""

from __future__ import annotations

from collections.abc import Iterable

from ghosttrain.config.students import FAMILIES
from ghosttrain.models.weights.dialects import ghostnet, mobilenetv2, shufflenetv2
from ghosttrain.models.weights.dialects.layout import Dialect, Layout

__all__ = ["Dialect", "Layout", "detect", "foreign_layouts", "layouts", "telltales"]


def foreign_layouts() -> list[Layout]:
    """Return the layouts of other code bases."""
    return [*ghostnet.DIALECTS, *mobilenetv2.DIALECTS, *shufflenetv2.DIALECTS]


def layouts() -> list[Layout]:
    """Return all layouts: of a telltale that two have, the first counts."""
    rows = FAMILIES.items()
    return [
        *(Layout("ghosttrain", key, f"{row.layer}.branches.0.conv.weight") for key, row in rows),
        *(Layout("fused", key, f"{row.layer}.weight") for key, row in rows),
        *foreign_layouts(),
    ]


def telltales() -> frozenset[str]:
    """Return the entries by which layouts are recognised."""
    return frozenset(layout.telltale for layout in layouts())


def detect(entries: Iterable[str]) -> Layout:
    """Return the layout of a state dict, given it or its keys; dialect "unknown" if it is none."""
    keys = set(entries)
    return next((layout for layout in layouts() if layout.telltale in keys), Layout("unknown", ""))
