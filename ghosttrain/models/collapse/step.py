"""The step that all forms share: statistics, one convolution, and the gradients of its backward.

With batch statistics m_n, v_n of z_n = conv_n(x), the sum of branches y = sum_n BN_n(z_n) is

    y = sum_n (gain_n z_n) + bias,    gain_n = gamma_n / sqrt(v_n + eps),
                                      bias = sum_n (beta_n - gain_n m_n)

and the gradient of every z_n is, with s0 = sum dy and s1_n = sum dy (z_n - m_n) over P positions,

    dz_n = a_n dy + b_n (z_n - m_n) + c_n
    a_n = gain_n,   b_n = -gain_n s1_n / ((v_n + eps) P),   c_n = -gain_n s0 / P

These are the letters of all forms, of `models/depthwise` in its three languages, and of
docs/collapsed_training.md, which derives them.

Shapes: B batch, C channels (Ci in, Co out), H W map, k kernel side, N branches with kernels, M
branches of one tap per channel (a depthwise 1x1 convolution, or the identity), P positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghosttrain.models.layers import repeats_a_forward
from ghosttrain.models.ops import full_precision


class Conv(NamedTuple):
    """Kernels and one-tap branches of a layer, and how they move over the map."""

    weight: Tensor
    """(N, Co, Ci / groups, k, k)"""
    taps: Tensor
    """(M, Co)"""
    stride: int
    padding: int
    groups: int


class Way(NamedTuple):
    """What is no tensor of a step."""

    form: type[Form]
    stride: int
    padding: int
    groups: int
    eps: float
    """Of every batch norm."""
    synced: bool
    """Whether statistics are those of all processes."""

    def layer(self, weight: Tensor, taps: Tensor) -> Conv:
        """Return these kernels and taps as they move over the map."""
        return Conv(weight, taps, self.stride, self.padding, self.groups)


class Sums(NamedTuple):
    """What the backward of batch norm sums over this process's positions."""

    dy: Tensor
    """s0 = sum dy: (Co,) float64."""
    dy_z: Tensor
    """s1 = sum dy zc_n: (N + M, Co) float64; zc_n is z_n less its mean over these positions."""
    cross: Tensor | None = None
    """Sums of dy with what each kernel element sees, laid out as the form's `gradients` uses it."""


class Coefficients(NamedTuple):
    """dz_n = a_n dy + b_n zc_n + c_n, (N + M, Co) each, float64."""

    a: Tensor
    b: Tensor
    c: Tensor
    total: Tensor
    """Sum of dz_n over the positions; 0 but for statistics of several processes."""
    P: Tensor
    """Positions of this process."""


class Form:
    """One way to get what `SumOfBranches` needs; x and dy are channels-last maps."""

    Kept: Any
    """Named tuple of the tensors that `statistics` keeps for the other three."""

    @staticmethod
    def statistics(x: Tensor, layer: Conv) -> tuple[Tensor, Tensor, Any]:
        """Return mean and biased variance of every z_n, (N + M, Co) float64, and what to keep."""
        raise NotImplementedError

    @staticmethod
    def output(
        x: Tensor, layer: Conv, gain: Tensor, bias: Tensor, mean: Tensor, kept: Any
    ) -> Tensor:
        """Return sum_n gain_n z_n + bias, in the dtype that autocast gives a convolution."""
        raise NotImplementedError

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Conv, kept: Any) -> Sums:
        """Return the sums of the backward."""
        raise NotImplementedError

    @staticmethod
    def gradients(
        x: Tensor, dy: Tensor, layer: Conv, abc: Coefficients, sums: Sums, kept: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, weight and taps; an empty one of these is its own gradient."""
        raise NotImplementedError


class SumOfBranches(torch.autograd.Function):
    """x, kernels, taps, gamma (N + M, Co), beta -> y, and mean, biased variance and P of all ranks.

    Everything per branch and channel is float64; maps and kernels keep their dtype.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        taps: Tensor,
        gamma: Tensor,
        beta: Tensor,
        way: Way,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layer, form = way.layer(weight, taps), way.form
        with full_precision(x):
            own_mean, var, kept = form.statistics(as_map(x), layer)
            own_count = count = positions(x, layer)
            mean = own_mean
            if way.synced:
                mean, var, count = _over_ranks(mean, var, count)
                if len(as_rows(x)) <= 1 and count <= 1:
                    raise ValueError("Expected more than 1 value per channel over all processes")
            rstd = (var.clamp_(min=0) + way.eps).rsqrt_()
            gain = gamma * rstd
            bias = (beta - gain * mean).sum(0)
        y = form.output(x, layer, gain, bias, own_mean, kept)  # under autocast, if that is on
        ctx.save_for_backward(x, weight, taps, gain, rstd, own_mean - mean, count, own_count, *kept)
        ctx.way = way
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102
        ctx: Any, dy: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, taps, gain, rstd, offset, count, own_count, *saved = ctx.saved_tensors
        form, layer = ctx.way.form, ctx.way.layer(weight, taps)
        kept = form.Kept(*saved)
        with full_precision(x):
            x_map, dy = as_map(x), as_map(dy)
            sums = form.sums(x_map, dy, layer, kept)
            s0, s1 = sums.dy, sums.dy_z
            all0, all1 = s0, s1
            if ctx.way.synced:
                s1 = s1 + offset * s0
                flat = _all_sum(torch.cat([s0[None], s1]))
                all0, all1 = flat[0], flat[1:]
            b = all1 * rstd * rstd * gain / -count
            c = gain * (all0 / -count)
            total = torch.zeros_like(c)
            if ctx.way.synced:
                c = c + b * offset
                total = gain * s0 + own_count * c
            abc = Coefficients(gain, b, c, total, own_count)
            dx, dweight, dtaps = form.gradients(x_map, dy, layer, abc, sums, kept)
            dgamma, dbeta = (rstd * s1).to(weight.dtype), s0.to(weight.dtype).repeat(len(s1), 1)
        return dx.to(x.dtype), dweight, dtaps, dgamma, dbeta, None


def update_running(norms: list[Any], mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Update the running statistics as every batch norm would: mean, var (N, C), var biased.

    Once per step: not again when activation checkpointing repeats a forward.
    """
    tracked = [i for i, bn in enumerate(norms) if bn.training and bn.running_mean is not None]
    if repeats_a_forward() or not tracked:
        return
    tracking = [norms[i] for i in tracked]
    with torch.no_grad():
        torch._foreach_add_([bn.num_batches_tracked for bn in tracking], 1)
        new = torch.stack([mean, var * (count / (count - 1))], 1).to(tracking[0].running_mean.dtype)
        running = [b for bn in tracking for b in (bn.running_mean, bn.running_var)]
        values = [v for i in tracked for v in new[i].unbind()]
        momenta = {bn.momentum for bn in tracking}
        if len(momenta) == 1 and None not in momenta:
            torch._foreach_lerp_(running, values, momenta.pop())
            return
        for k, bn in enumerate(tracking):  # None: the mean over all batches so far
            share = 1 / bn.num_batches_tracked.double() if bn.momentum is None else bn.momentum
            for buffer, value in zip(running[2 * k :][:2], values[2 * k :][:2], strict=True):
                buffer.add_((value - buffer) * share)


# --- maps and rows --------------------------------------------------------------------------------


def as_map(x: Tensor) -> Tensor:
    """Return x as a channels-last map of float32 or better."""
    x = x if x.dtype == torch.double else x.float()
    return x.contiguous(memory_format=torch.channels_last)


def as_rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last -> (P, C): a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def rows_as_map(rows: Tensor, like: Tensor) -> Tensor:
    """(P, C) -> (B, C, H, W), channels-last, B, H, W those of `like`: a view."""
    B, _, H, W = like.shape
    return rows.view(B, H, W, -1).permute(0, 3, 1, 2)


def positions(x: Tensor, layer: Conv) -> Tensor:
    """P, positions of the output, as a float64 tensor."""
    H, W = _sides(x, layer)
    return torch.full((), len(x) * H * W, dtype=torch.double, device=x.device)


def empty_map(x: Tensor, channels: int, layer: Conv, dtype: torch.dtype | None = None) -> Tensor:
    """Return an output map to be filled: no view, so that what follows may work in place."""
    return torch.empty(
        (len(x), channels, *_sides(x, layer)),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def summed_kernel(layer: Conv, gain: Tensor) -> Tensor:
    """Return sum_n gain_n W_n, taps at the centre: (Co, Ci / groups, k, k)."""
    weight, taps = layer.weight, layer.taps
    gain = gain.to(weight.dtype)
    kernel = (gain[: len(weight), :, None, None, None] * weight).sum(0)
    if len(taps):
        middle = kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2]
        tap = (gain[len(weight) :] * taps).sum(0)
        (middle.diagonal() if layer.groups == 1 else middle[:, 0]).add_(tap)
    return kernel


def _sides(x: Tensor, layer: Conv) -> tuple[int, int]:
    """Height and width of the output."""
    return -(-x.shape[2] // layer.stride), -(-x.shape[3] // layer.stride)


# --- several processes ----------------------------------------------------------------------------


def _over_ranks(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistics of all ranks' positions together; ranks may differ in number."""
    flat = _all_sum(
        torch.cat([count.view(1), (count * mean).flatten(), (count * (var + mean**2)).flatten()])
    )
    total = flat[0]
    mean, square = (flat[1:] / total).view(2, *mean.shape)
    return mean, square - mean**2, total


def _all_sum(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x
