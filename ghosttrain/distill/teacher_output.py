"""What a teacher says about a batch, whether it is asked now or was asked once and stored.

Shapes: B batch, K classes, F pooled features of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TeacherOutput(NamedTuple):
    """A teacher's output for a batch of images, in float32 and without gradient."""

    logits: Tensor
    """(B, K), in the order of the data's classes."""
    features: Tensor | None = None
    """(B, F): what the teacher's classifier sees; None where it has no such layer."""


def concatenated(parts: Sequence[TeacherOutput]) -> TeacherOutput:
    """Return the outputs of one teacher for several batches as the output for one."""
    features = [part.features for part in parts if part.features is not None]
    logits = torch.cat([part.logits for part in parts])
    return TeacherOutput(logits, torch.cat(features) if features else None)
