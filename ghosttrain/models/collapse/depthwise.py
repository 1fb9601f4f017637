"""Depthwise k x k convolutions, any stride: passes over x that keep no z."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ghosttrain.models.collapse.step import (
    Coefficients,
    Conv,
    Form,
    Sums,
    positions,
    summed_kernel,
)
from ghosttrain.models.depthwise import depthwise_grads, depthwise_reduce, depthwise_stats
from ghosttrain.models.ops import autocast_dtype, full_precision


class ShiftedStatistics(NamedTuple):
    """Statistics on the map less `shift`, on which the passes work."""

    shift: Tensor
    """(C,) near the mean of x, in x's dtype."""
    mean: Tensor
    """(N + M, C) of every z_n, float64."""
    tap_mean: Tensor
    """(C,) of what one tap at the centre sees, float64."""
    tap_square: Tensor
    """(C,) mean square of that, float64."""


class Depthwise(Form):
    """Collapsed depthwise convolutions; branches of one tap are summed before the last pass."""

    Kept = ShiftedStatistics

    @staticmethod
    def statistics(x: Tensor, layer: Conv) -> tuple[Tensor, Tensor, ShiftedStatistics]:
        """In one pass over x."""
        w, taps = _taps_last(layer.weight), layer.taps.double()
        shift = x[:, :, ::8].mean((0, 2, 3))
        mean, square = depthwise_stats(x, w, shift, layer.stride) / positions(x, layer)
        var = square - mean * mean
        shifted_mean = torch.cat([mean[:-1], taps * mean[-1]])
        var = torch.cat([var[:-1], taps * taps * var[-1]])
        weight_sums = torch.cat([w.sum((1, 2), dtype=torch.double), taps])
        kept = ShiftedStatistics(shift, shifted_mean, mean[-1].clone(), square[-1].clone())
        return shifted_mean + weight_sums * shift, var, kept

    @staticmethod
    def output(
        x: Tensor,
        layer: Conv,
        gain: Tensor,
        bias: Tensor,
        mean: Tensor,
        kept: ShiftedStatistics,
    ) -> Tensor:
        """One convolution, in full precision: its border is 0, and would not be centred."""
        kernel, short = summed_kernel(layer, gain), autocast_dtype(x)
        with full_precision(x):
            x, bias = x.to(kernel.dtype), bias.to(kernel.dtype)
            y = F.conv2d(x, kernel, bias, layer.stride, layer.padding, 1, layer.groups)
        return y if short is None else y.to(short)

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Conv, kept: ShiftedStatistics) -> Sums:
        """From the correlation of dy with every tap; `cross` is that, (k k, C)."""
        k = layer.weight.shape[-1]
        sums = depthwise_reduce(x, dy, kept.shift, k, layer.stride)
        cross, s0 = sums[:-1], sums[-1]
        s1 = (cross * layer.weight[:, :, 0].flatten(2).transpose(1, 2)).sum(1)
        s1 = torch.cat([s1, layer.taps * cross[k * k // 2]])
        return Sums(s0, s1 - kept.mean * s0, cross)

    @staticmethod
    def gradients(
        x: Tensor,
        dy: Tensor,
        layer: Conv,
        abc: Coefficients,
        sums: Sums,
        kept: ShiftedStatistics,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In one pass over x and dy. Its z_n are not centred: b_n mean_n moves into c_n."""
        taps, N, k = layer.taps, len(layer.weight), layer.weight.shape[-1]
        (a, b, c, total, P), shift, cross = abc, kept.shift, sums.cross
        assert cross is not None
        all_abc = torch.stack([a, b, c - b * kept.mean])
        tap_abc = (all_abc[:, N:] * torch.stack([taps, taps * taps, taps])).sum(1).to(x.dtype)
        branch_abc, w = all_abc[:, :N].to(x.dtype), _taps_last(layer.weight)
        dx, dw = depthwise_grads(x, dy, w, shift, branch_abc, tap_abc, layer.stride)
        dw = (dw + (total[:N] * shift)[:, None, None]).permute(0, 3, 1, 2)[:, :, None]
        tap_c = all_abc[2, N:]
        dtaps = a[N:] * cross[k * k // 2]
        dtaps = dtaps + P * (b[N:] * taps * kept.tap_square + tap_c * kept.tap_mean)
        return dx, dw.to(x.dtype), (dtaps + total[N:] * shift).to(x.dtype)


def _taps_last(weight: Tensor) -> Tensor:
    """(N, C, 1, k, k) -> (N, k, k, C), contiguous."""
    return weight[:, :, 0].permute(0, 2, 3, 1).contiguous()
