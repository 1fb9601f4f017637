"""What a teacher says about a batch, whether it is asked now or was asked once and stored.

Shapes: B batch, K classes, F pooled features of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Answer(NamedTuple):
    """A teacher's answer to a batch of images, in float32 and without gradient."""

    logits: Tensor
    """(B, K), in the order of the data's classes."""
    features: Tensor | None = None
    """(B, F): what the teacher's classifier sees; None where it has no such layer."""


def concatenated(parts: Sequence[Answer]) -> Answer:
    """Return the answers to several batches, of the same teacher, as the answer to one."""
    features = [part.features for part in parts if part.features is not None]
    logits = torch.cat([part.logits for part in parts])
    return Answer(logits, torch.cat(features) if features else None)
