"""1x1 convolutions, stride 1: moments of x decide everything."""

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
    as_map,
    as_rows,
    empty_map,
    rows_as_map,
    summed_kernel,
)
from ghosttrain.models.ops import autocast_dtype, full_precision, is_channels_last, one_node

BLOCK, CUDA_BLOCK = 2**17, 2**22
"""Elements of x that are summed at a time: on a CPU half a MiB, which stays in cache. A GPU waits
for every start of a kernel: a step of ghostnetv3_100 on 128 images of 224 pixels, collapsed, took
268 ms with the small blocks and 176 to 187 ms with the large (measured on an H100)."""


class Moments(NamedTuple):
    """Moments of x, in float64 but for WR."""

    shift: Tensor
    """(Ci,) near the mean of x, in x's dtype; the moments are those of x - shift."""
    first: Tensor
    """(Ci,) mean of x - shift."""
    WR: Tensor
    """(N, Co, Ci) kernels times R, the covariance of x; in x's dtype."""
    variance: Tensor
    """(Ci,) diagonal of R."""


class Pointwise(Form):
    """Collapsed 1x1 convolutions; zc_n = W_n xc with xc = x less its mean."""

    Kept = Moments

    @staticmethod
    def statistics(x: Tensor, layer: Conv) -> tuple[Tensor, Tensor, Moments]:
        """With R = mean of xc outer xc: var z_n = W_n R W_n^T."""
        rows, w, taps = as_rows(x), layer.weight.flatten(2).double(), layer.taps
        shift = rows[::8].mean(0)
        first, second = (total / len(rows) for total in second_moment(rows, shift))
        R, centre = second - first.outer(first), shift + first
        WR = w @ R
        mean, var = w @ centre, (WR * w).sum(-1)
        if len(taps):
            mean = torch.cat([mean, taps * centre])
            var = torch.cat([var, taps**2 * R.diagonal()])
        return mean, var, Moments(shift, first, WR.to(x.dtype), R.diagonal().clone())

    @staticmethod
    def output(
        x: Tensor, layer: Conv, gain: Tensor, bias: Tensor, mean: Tensor, kept: Moments
    ) -> Tensor:
        """One matrix product; in a short dtype of x - shift, as gain * mean may be large."""
        kernel, short = summed_kernel(layer, gain), autocast_dtype(x)
        if short is not None:
            x = (as_map(x) - kept.shift[:, None, None]).to(short)
            bias = bias + kernel.flatten(1).double() @ kept.shift.double()
            kernel = kernel.to(short)
        x, bias = x.to(kernel.dtype), bias.to(kernel.dtype)
        if not is_channels_last(x):
            return F.conv2d(x, kernel, bias)
        y = empty_map(x, len(kernel), layer)
        torch.addmm(bias, as_rows(x), kernel.flatten(1).t(), out=as_rows(y))
        return y

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Conv, kept: Moments) -> Sums:
        """From the moment of dy and xc; `cross` is that moment, (Co, Ci)."""
        g, taps = as_rows(dy), layer.taps
        s0 = g.sum(0).double()
        cross = cross_moment(g, as_rows(x), kept.shift) - s0.outer(kept.first)
        cross = cross.to(x.dtype)
        s1 = (cross * layer.weight.flatten(2)).sum(-1, dtype=torch.double)
        if len(taps):
            s1 = torch.cat([s1, taps.double() * cross.diagonal()])
        return Sums(s0, s1, cross)

    @staticmethod
    def gradients(
        x: Tensor, dy: Tensor, layer: Conv, abc: Coefficients, sums: Sums, kept: Moments
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Dx is two matrix products, of dy with the summed kernel and of x with a (Ci, Ci) one."""
        cross, taps = sums.cross, layer.taps
        assert cross is not None
        w, N, centre = layer.weight.flatten(2), len(layer.weight), kept.shift + kept.first
        centre = centre.to(x.dtype)
        a, b, c, total, P = (t.to(x.dtype) for t in abc)
        K = (a[:N, :, None] * w).sum(0)
        M = (b[:N, :, None] * w).flatten(0, 1).t() @ w.flatten(0, 1)
        constant, dtaps = c[:N].flatten() @ w.flatten(0, 1), taps
        if len(taps):
            K.diagonal().add_((a[N:] * taps).sum(0))
            M.diagonal().add_((b[N:] * taps**2).sum(0))
            constant += (c[N:] * taps).sum(0)
            dtaps = a[N:] * cross.diagonal() + P * b[N:] * taps * kept.variance + total[N:] * centre
        dx = torch.addmm(constant - centre @ M, as_rows(dy), K).addmm_(as_rows(x), M)
        dw = torch.addcmul(total[:N, :, None] * centre, P * b[:N, :, None], kept.WR)
        dw.addcmul_(a[:N, :, None], cross)
        return rows_as_map(dx, x), dw.view_as(layer.weight), dtaps.to(x.dtype)


# --- moments --------------------------------------------------------------------------------------


def _like_second_moment(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    C = x.shape[1]
    return x.new_empty(C, dtype=torch.double), x.new_empty(C, C, dtype=torch.double)


@one_node(_like_second_moment)
def second_moment(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over rows of x - shift, and of its outer product with itself.

    x (P, C), shift (C,) -> (C,) and (C, C), both float64. On a CPU the products are float64 too
    (1.7 times the time, measured here): a kernel may cancel what the channels share, and what is
    left then has the rounding errors of the whole.
    """
    first = x.new_zeros(x.shape[1], dtype=torch.double)
    second = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.double)
    wide = torch.double if x.is_cpu else x.dtype  # many GPUs have hardly any float64
    with full_precision(x):
        for block in x.split(_rows_at_a_time(x)):
            centred = (block - shift).to(wide)
            first += centred.sum(0)
            second += centred.t() @ centred
    return first, second


def _like_cross_moment(g: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    return x.new_empty(g.shape[1], x.shape[1], dtype=torch.double)


@one_node(_like_cross_moment)
def cross_moment(g: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    """Return the sum over rows of g outer (x - shift): (P, D), (P, C), (C,) -> (D, C) float64."""
    total = x.new_zeros(g.shape[1], x.shape[1], dtype=torch.double)
    size = _rows_at_a_time(x)
    with full_precision(x):
        for rows, block in zip(g.split(size), x.split(size), strict=True):
            total += rows.t() @ (block - shift)
    return total


def _rows_at_a_time(x: Tensor) -> int:
    """Return how many rows of x (P, C) are summed at a time."""
    return max(1, (CUDA_BLOCK if x.is_cuda else BLOCK) // x.shape[1])
