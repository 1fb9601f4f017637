"""Any convolution: the maps of all branches by one convolution, kept less their means."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ghosttrain.models.collapse.step import (
    Coefficients,
    Conv,
    Form,
    Sums,
    as_rows,
    empty_map,
    rows_as_map,
)
from ghosttrain.models.layers import convolve
from ghosttrain.models.ops import autocast_dtype


class CentredMaps(NamedTuple):
    """The maps themselves."""

    z: Tensor
    """(P, N, Co), less their means."""


class Stacked(Form):
    """All kernels side by side in one convolution; a tap is a kernel too."""

    Kept = CentredMaps

    @staticmethod
    def statistics(x: Tensor, layer: Conv) -> tuple[Tensor, Tensor, CentredMaps]:
        """On the maps themselves."""
        y = convolve(x, _filters(layer), None, layer.stride, layer.padding, layer.groups)
        rows = as_rows(y.contiguous(memory_format=torch.channels_last))
        N, Co = layer.weight.shape[:2]
        z = rows.view(-1, N, Co) if layer.groups == 1 else rows.view(-1, Co, N).transpose(1, 2)
        mean = z.mean(0)
        z.sub_(mean)
        return mean.double(), z.square().mean(0).double(), CentredMaps(z)

    @staticmethod
    def output(
        x: Tensor, layer: Conv, gain: Tensor, bias: Tensor, mean: Tensor, kept: CentredMaps
    ) -> Tensor:
        """Return the maps again, weighted."""
        y = empty_map(x, gain.shape[1], layer, kept.z.dtype)
        rows = as_rows(y).copy_((bias + (gain * mean).sum(0)).to(y.dtype))
        for n, g in enumerate(gain.to(y.dtype)):
            rows.addcmul_(kept.z[:, n], g)
        return y.to(autocast_dtype(x) or x.dtype)

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Conv, kept: CentredMaps) -> Sums:
        """On the maps."""
        g = as_rows(dy)
        s1 = torch.stack([(g * z).sum(0) for z in kept.z.unbind(1)])
        return Sums(g.sum(0).double(), s1.double())

    @staticmethod
    def gradients(
        x: Tensor, dy: Tensor, layer: Conv, abc: Coefficients, sums: Sums, kept: CentredMaps
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By PyTorch's convolution backward, from all dz at once."""
        z, g, filters = kept.z, as_rows(dy), _filters(layer)
        coefficients = [t.to(z.dtype) for t in (abc.a, abc.b, abc.c)]
        dz = torch.empty_like(z)
        for n, (a, b, c) in enumerate(zip(*coefficients, strict=True)):
            dz[:, n] = torch.addcmul(c, z[:, n], b).addcmul_(g, a)
        flat = (dz if layer.groups == 1 else dz.transpose(1, 2)).flatten(1)
        if layer.weight.shape[3:] == (1, 1) and (layer.stride, layer.groups) == (1, 1):
            dx = rows_as_map(flat @ filters.flatten(1), x)
            dw = (flat.t() @ as_rows(x)).view_as(filters)
        else:
            sides = [layer.stride] * 2, [layer.padding] * 2, [1, 1]
            dx, dw, _ = torch.ops.aten.convolution_backward(
                rows_as_map(flat, dy), x, filters, None, *sides, False, [0, 0], layer.groups,
                [True, True, False],
            )  # fmt: skip
        if layer.groups > 1:
            dw = dw.unflatten(0, (-1, len(layer.weight))).transpose(0, 1)
        return dx, dw.reshape(layer.weight.shape), layer.taps


def _filters(layer: Conv) -> Tensor:
    """(N, Co, Ci / groups, k, k) -> (N Co, Ci / groups, k, k), channels of a group together."""
    weight = layer.weight
    return (weight if layer.groups == 1 else weight.transpose(0, 1)).flatten(0, 1)
