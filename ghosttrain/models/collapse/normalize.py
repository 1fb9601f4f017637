"""A batch norm alone: one tap of 1 and no kernel. For statistics over several processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ghosttrain.models.collapse.step import (
    Coefficients,
    Conv,
    Form,
    Sums,
    as_map,
    as_rows,
    rows_as_map,
)


class OwnMean(NamedTuple):
    """Statistics of x."""

    mean: Tensor
    """(C,) in x's dtype."""


class Normalize(Form):
    """The batch norm of x itself."""

    Kept = OwnMean

    @staticmethod
    def statistics(x: Tensor, layer: Conv) -> tuple[Tensor, Tensor, OwnMean]:
        """Of x itself."""
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean.double()[None], var.double()[None], OwnMean(mean)

    @staticmethod
    def output(
        x: Tensor, layer: Conv, gain: Tensor, bias: Tensor, mean: Tensor, kept: OwnMean
    ) -> Tensor:
        """Scale and shift."""
        gain, bias = (t.to(layer.taps.dtype).view(-1, 1, 1) for t in (gain, bias))
        return (as_map(x) * gain + bias).to(x.dtype)

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Conv, kept: OwnMean) -> Sums:
        """Of dy and of dy times xc."""
        g = as_rows(dy)
        return Sums(g.sum(0).double(), (g * (as_rows(x) - kept.mean)).sum(0).double()[None])

    @staticmethod
    def gradients(
        x: Tensor, dy: Tensor, layer: Conv, abc: Coefficients, sums: Sums, kept: OwnMean
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Elementwise."""
        a, b, c = (t[0].to(x.dtype) for t in (abc.a, abc.b, abc.c))
        dx = torch.addcmul(c, as_rows(x) - kept.mean, b).addcmul_(as_rows(dy), a)
        return rows_as_map(dx, x), layer.weight, layer.taps
