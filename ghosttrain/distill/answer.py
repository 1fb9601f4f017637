"""What a teacher says about a batch, whether it is asked now or was asked once and stored.

Shapes: B batch, K classes, F pooled features of the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Answer(NamedTuple):
    """A teacher's answer to a batch of images, in float32 and without gradient."""

    logits: Tensor
    """(B, K), in the order of the data's classes."""
    features: Tensor | None = None
    """(B, F): what the teacher's classifier sees; None where it has no such layer."""
