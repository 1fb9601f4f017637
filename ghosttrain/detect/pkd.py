"""PKD: distillation of a detector's feature pyramid by Pearson correlation
(https://arxiv.org/abs/2207.02039).

Shapes: B batch, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 4
"""Maps that are compared, from the largest on: mmrazor's configurations leave the fifth out."""
_EPS = 1e-6


def pearson_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the sum over `LEVELS` maps of half the mean squared distance of student and teacher,
    each channel of both brought to mean 0 and variance 1 over batch and map: 1 - r, the mean
    Pearson correlation of a channel, whatever the scale of its values.

    Args:
        student: maps (B, C, H, W), the largest first.
        teacher: maps of the same shapes.
    """
    terms = [
        (_standardized(s) - _standardized(t)).square().mean() / 2
        for s, t in zip(student[:LEVELS], teacher[:LEVELS], strict=True)
        if s[:, 0].numel() > 1  # a single value is correlated with nothing
    ]
    return torch.stack(terms).sum()


def _standardized(maps_BCHW: Tensor) -> Tensor:
    x = maps_BCHW.float()
    deviation, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
    return (x - mean) / (deviation + _EPS)
