"""The training forward of a re-parameterized convolution, without one pass per branch.

A block computes y = sum_n BN_n(conv_n(x)). With batch statistics m_n and v_n of z_n = conv_n(x) at
hand, it is ONE convolution:

    y = conv(x; sum_n a_n W_n) + sum_n (beta_n - a_n m_n),   a_n = gamma_n / sqrt(v_n + eps)

and the gradient of every z_n is known from sums over positions (s0 = sum dy, s1_n = sum dy (z_n -
m_n)), as in the backward of batch norm:

    dz_n = a_n dy + c_n (z_n - m_n) + d_n,   c_n = -a_n s1_n / ((v_n + eps) P),   d_n = -a_n s0 / P

So everything is exact, gradients through the statistics included; only rounding differs from
evaluating the branches. A *form* knows how to get statistics, sums and gradients for one kind of
convolution (`Pointwise`, `Depthwise`, `Stacked`; `Normalize` is a batch norm alone); what is
between them, `_SumOfBranches`, is the same for all, and is where processes add up their statistics.

`choose_forward` is the cost rule of `reparam.forward=auto`. Submodules are not called: hooks on a
branch do not fire, and its parameters and buffers are used and updated as if they had.

Shapes: B batch, C channels (Ci in, Co out), H W map, k kernel side, N branches with kernels, M
branches of one tap per channel (a depthwise 1x1 convolution, or the identity), P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ghosttrain.models import moments
from ghosttrain.models.layers import BatchNorm, convolve, repeats_a_forward
from ghosttrain.models.moments import full_precision

if TYPE_CHECKING:
    from ghosttrain.models.reparam import RepConv2d

Kept = Sequence[Tensor]


# --- what RepConv2d calls -------------------------------------------------------------------------


def choose_forward(rep: RepConv2d, x: Tensor) -> str:
    """Return how `rep` computes its output for x: "branches", "stacked", "collapsed" or "folded".

    Branches wherever the batch norms are not what the fast forms take: replaced, without weights,
    of several kinds, some frozen and others not, or in a reduced precision throughout. Folded is
    one convolution with running statistics, in evaluation and where every batch norm is frozen. In
    training `rep.forward_mode` says which, and "auto" is this rule, from multiplications and from
    timings on a CPU (`python -m ghosttrain bench step`):

    - a single branch, or maps that are not channels-last: branches;
    - on CUDA: branches. The fast forms start so many kernels that the GPU waits: a step of
      ghostnetv3_100 on 128 images of 224 pixels in float32 took 114 ms by branches, 176 to 187 ms
      collapsed, of which 75 ms of work (measured on an H100, `scripts/gpu_check.py`). Where memory
      is short, forward=collapsed has 6.1 GiB in place of 11.2;
    - depthwise, k 3 or 5: collapsed where a compiled kernel takes the map, else branches;
    - 1x1: collapsed costs 4 Ci^2 + 6 Ci Co multiplications per position, stacked 6 N Ci Co and N
      maps in memory: collapsed up to Ci = 2 (N - 1) Co, where the two took equal time, and with an
      identity (Ci = Co), which stacked would make a kernel;
    - any other convolution (a stem): stacked.

    With synchronized statistics "auto" says stacked for branches: ranks may choose differently, and
    must exchange the same sums.
    """
    norms, first = rep.norms(), rep.norms()[0]
    usual = type(first) in (BatchNorm, SyncBatchNorm2d) and first.weight is not None
    usual = usual and first.weight.dtype in (torch.float32, torch.double)
    usual = usual and all(type(bn) is type(first) and bn.eps == first.eps for bn in norms)
    if rep.forward_mode == "branches" or not usual:
        return "branches"
    from_batch = [bn.training or bn.running_mean is None for bn in norms]
    if any(from_batch) and not all(from_batch):
        return "branches"
    if not any(from_batch):
        return "folded"
    conv, N = rep.convs()[0].conv, rep.num_branches
    if not first.synced and len(x) * x.shape[2] * x.shape[3] <= conv.stride[0] ** 2:
        return "branches"  # perhaps a single value: the batch norm refuses it
    if rep.forward_mode != "auto":
        return rep.forward_mode
    slow = "stacked" if first.synced and len(norms) > 1 else "branches"
    if len(norms) == 1 or x.is_cuda or not x.is_contiguous(memory_format=torch.channels_last):
        return slow
    form = form_of(conv)
    if form is Depthwise:
        return "collapsed" if moments.compiled(x.device.type) else slow
    cheap = rep.identity is not None or conv.in_channels <= 2 * (N - 1) * conv.out_channels
    return "collapsed" if form is Pointwise and cheap else "stacked"


def forward_together(rep: RepConv2d, x: Tensor, mode: str) -> Tensor:
    """Return the sum of the branches of `rep` with batch statistics, and update the running ones.

    x (B, Ci, H, W) -> (B, Co, H', W'). `mode` is "stacked" or "collapsed".
    """
    norms, conv = rep.norms(), rep.convs()[0].conv
    form = form_of(conv) if mode == "collapsed" else Stacked
    weight, taps = _kernels(rep, form)
    gamma, beta = (torch.stack([getattr(bn, name) for bn in norms]) for name in ("weight", "bias"))
    geometry = conv.stride[0], int(conv.padding[0]), conv.groups
    y, *statistics = _SumOfBranches.apply(
        x, weight, taps, gamma, beta, form, geometry, norms[0].eps, norms[0].synced
    )
    update_running(norms, *statistics)
    return y


def forward_folded(rep: RepConv2d, x: Tensor) -> Tensor:
    """Return the sum of the branches with their running statistics: one convolution, folded anew.

    x (B, Ci, H, W) -> (B, Co, H', W'). Gradients flow to x and to every parameter.
    """
    norms, conv = rep.norms(), rep.convs()[0].conv
    weight, _ = _kernels(rep, Stacked)
    gamma, beta, mean, var = (
        torch.stack([getattr(bn, name) for bn in norms]).double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    gain = gamma * (var + norms[0].eps).rsqrt()
    kernel = (gain[..., None, None, None] * weight).sum(0).to(weight.dtype)
    bias = (beta - gain * mean).sum(0).to(weight.dtype)
    return convolve(x, kernel, bias, conv.stride[0], int(conv.padding[0]), conv.groups)


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


def _kernels(rep: RepConv2d, form: type[Form]) -> tuple[Tensor, Tensor]:
    """Return kernels (N, Co, Ci / groups, k, k) and taps (M, C), in the order of `rep.norms()`.

    A tap is a branch of the form's kind that needs no kernel; where the form knows none, the 1x1
    branch and the identity become kernels too.
    """
    kernels = [branch.conv.weight for branch in rep.convs()]
    like, taps = kernels[0], []
    if rep.scale is not None:
        half, scale = like.shape[-1] // 2, kernels.pop()
        if form is Depthwise:
            taps.append(scale.flatten())
        else:
            kernels.append(F.pad(scale, (half, half, half, half)))
    if rep.identity is not None:
        if form is Stacked:
            kernels.append(identity_kernel(rep.convs()[0].conv))
        else:
            taps.append(like.new_ones(len(like)))
    return torch.stack(kernels), torch.stack(taps) if taps else like.new_empty(0, len(like))


def identity_kernel(conv: nn.Conv2d) -> Tensor:
    """Kernel of the shape of `conv` that copies its input: one tap of 1 per output channel."""
    kernel = torch.zeros_like(conv.weight)
    outputs = torch.arange(conv.out_channels, device=kernel.device)
    row, column = (k // 2 for k in conv.kernel_size)
    kernel[outputs, outputs % kernel.shape[1], row, column] = 1
    return kernel


# --- the step that all forms share ----------------------------------------------------------------


class _SumOfBranches(torch.autograd.Function):
    """x, kernels, taps, gamma (N + M, Co), beta -> y, and mean, biased variance and P of all ranks.

    Everything per branch and channel is float64; maps and kernels keep their dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        taps: Tensor,
        gamma: Tensor,
        beta: Tensor,
        form: type[Form],
        geometry: tuple[int, int, int],
        eps: float,
        synced: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layer = Layer(weight, taps, *geometry)
        with full_precision(x):
            own_mean, var, kept = form.statistics(_map(x), layer)
            own_count = count = _positions(x, layer)
            mean = own_mean
            if synced:
                mean, var, count = _over_ranks(mean, var, count)
                if len(_rows(x)) <= 1 and count <= 1:
                    raise ValueError("Expected more than 1 value per channel over all processes")
            rstd = (var.clamp_(min=0) + eps).rsqrt_()
            gain = gamma * rstd
            bias = (beta - gain * mean).sum(0)
        y = form.output(x, layer, gain, bias, own_mean, kept)  # under autocast, if that is on
        ctx.save_for_backward(x, weight, taps, gain, rstd, own_mean - mean, count, own_count, *kept)
        ctx.form, ctx.geometry, ctx.synced = form, geometry, synced
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, taps, gain, rstd, offset, count, own_count, *kept = ctx.saved_tensors
        layer = Layer(weight, taps, *ctx.geometry)
        with full_precision(x):
            x_map, dy = _map(x), _map(dy)
            s0, s1, more = ctx.form.sums(x_map, dy, layer, kept)
            all0, all1 = s0, s1
            if ctx.synced:
                s1 = s1 + offset * s0
                flat = _all_sum(torch.cat([s0[None], s1]))
                all0, all1 = flat[0], flat[1:]
            c = all1 * rstd * rstd * gain / -count
            e = gain * (all0 / -count)
            total = torch.zeros_like(e)
            if ctx.synced:
                e = e + c * offset
                total = gain * s0 + own_count * e
            dx, dweight, dtaps = ctx.form.gradients(
                x_map, dy, layer, Coefficients(gain, c, e, total, own_count), more, kept
            )
            dgamma, dbeta = (rstd * s1).to(weight.dtype), s0.to(weight.dtype).repeat(len(s1), 1)
        return dx.to(x.dtype), dweight, dtaps, dgamma, dbeta, None, None, None, None


def _map(x: Tensor) -> Tensor:
    """Return x as a channels-last map of float32 or better."""
    x = x if x.dtype == torch.double else x.float()
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last -> (P, C): a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _sides(x: Tensor, layer: Layer) -> tuple[int, int]:
    """Height and width of the output."""
    return -(-x.shape[2] // layer.stride), -(-x.shape[3] // layer.stride)


def _positions(x: Tensor, layer: Layer) -> Tensor:
    """P as a float64 tensor."""
    H, W = _sides(x, layer)
    return torch.full((), len(x) * H * W, dtype=torch.double, device=x.device)


def _empty_map(x: Tensor, channels: int, layer: Layer, dtype: torch.dtype | None = None) -> Tensor:
    """Return an output map to be filled: no view, so that what follows may work in place."""
    return torch.empty(
        (len(x), channels, *_sides(x, layer)),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """(P, C) -> (B, C, H, W), channels-last, B, H, W those of `like`: a view."""
    B, _, H, W = like.shape
    return rows.view(B, H, W, -1).permute(0, 3, 1, 2)


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


# --- forms ----------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """Kernels (N, Co, Ci / groups, k, k), taps (M, Co), and how they move over the map."""

    weight: Tensor
    taps: Tensor
    stride: int
    padding: int
    groups: int


class Coefficients(NamedTuple):
    """dz_n = a_n dy + c_n zc_n + e_n, (N + M, Co) each; `total` is the sum of dz_n, over P."""

    a: Tensor
    c: Tensor
    e: Tensor
    total: Tensor
    P: Tensor


class Form:
    """One way to get what `_SumOfBranches` needs; x and dy are channels-last maps.

    zc_n is z_n less its mean over this process's positions.
    """

    @staticmethod
    def statistics(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Kept]:
        """Return mean and biased variance of every z_n, (N + M, Co), and what to keep."""
        raise NotImplementedError

    @staticmethod
    def output(
        x: Tensor, layer: Layer, gain: Tensor, bias: Tensor, mean: Tensor, kept: Kept
    ) -> Tensor:
        """Return sum_n gain_n z_n + bias: one convolution, in the dtype that autocast gives one.

        Where that is a short one, not of the maps as they are: gain * mean may be a large number.
        """
        weight, taps = layer.weight, layer.taps
        gain = gain.to(weight.dtype)
        kernel = (gain[: len(weight), :, None, None, None] * weight).sum(0)
        if len(taps):
            middle = kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2]
            tap = (gain[len(weight) :] * taps).sum(0)
            (middle.diagonal() if layer.groups == 1 else middle[:, 0]).add_(tap)
        short = moments.autocast_dtype(x)
        if kernel.shape[2:] != (1, 1):  # depthwise: its border is 0, and would not be centred
            with full_precision(x):
                x, bias = x.to(weight.dtype), bias.to(weight.dtype)
                y = F.conv2d(x, kernel, bias, layer.stride, layer.padding, 1, layer.groups)
            return y if short is None else y.to(short)
        if short is not None:
            centre = kept[0]
            x = (_map(x) - centre[:, None, None]).to(short)
            bias, kernel = bias + kernel.flatten(1).double() @ centre.double(), kernel.to(short)
        x, bias = x.to(kernel.dtype), bias.to(kernel.dtype)
        if not x.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(x, kernel, bias)
        y = _empty_map(x, len(kernel), layer)
        torch.addmm(bias, _rows(x), kernel.flatten(1).t(), out=_rows(y))
        return y

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Layer, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """Return sum dy (Co,), sum dy zc_n (N + M, Co), and what `gradients` can use again."""
        raise NotImplementedError

    @staticmethod
    def gradients(
        x: Tensor, dy: Tensor, layer: Layer, coef: Coefficients, more: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, weight and taps; an empty one of these is its own gradient."""
        raise NotImplementedError


class Pointwise(Form):
    """1x1 convolutions, stride 1: moments of x decide everything (collapsed)."""

    @staticmethod
    def statistics(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Kept]:
        """With R = mean of xc outer xc: var z_n = W_n R W_n^T."""
        rows, w, taps = _rows(x), layer.weight.flatten(2).double(), layer.taps
        shift = rows[::8].mean(0)
        first, second = (total / len(rows) for total in moments.second_moment(rows, shift))
        R, centre = second - first.outer(first), shift + first
        WR = w @ R
        mean, var = w @ centre, (WR * w).sum(-1)
        if len(taps):
            mean = torch.cat([mean, taps * centre])
            var = torch.cat([var, taps**2 * R.diagonal()])
        return mean, var, (shift, first, WR.to(x.dtype), R.diagonal().clone())

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Layer, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """From the moment of dy and xc."""
        (shift, rest, *_), g, taps = kept, _rows(dy), layer.taps
        s0 = g.sum(0).double()
        cross = moments.cross_moment(g, _rows(x), shift) - s0.outer(rest)
        cross = cross.to(x.dtype)
        s1 = (cross * layer.weight.flatten(2)).sum(-1, dtype=torch.double)
        if len(taps):
            s1 = torch.cat([s1, taps.double() * cross.diagonal()])
        return s0, s1, cross

    @staticmethod
    def gradients(
        x: Tensor, dy: Tensor, layer: Layer, coef: Coefficients, more: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Dx is two matrix products, of dy with the summed kernel and of x with a (Ci, Ci) one."""
        (shift, rest, WR, spread), cross, taps = kept, more, layer.taps
        w, N, centre = layer.weight.flatten(2), len(layer.weight), (shift + rest).to(x.dtype)
        a, c, e, total, P = (t.to(x.dtype) for t in coef)
        K = (a[:N, :, None] * w).sum(0)
        M = (c[:N, :, None] * w).flatten(0, 1).t() @ w.flatten(0, 1)
        constant, dtaps = e[:N].flatten() @ w.flatten(0, 1), taps
        if len(taps):
            K.diagonal().add_((a[N:] * taps).sum(0))
            M.diagonal().add_((c[N:] * taps**2).sum(0))
            constant += (e[N:] * taps).sum(0)
            dtaps = a[N:] * cross.diagonal() + P * c[N:] * taps * spread + total[N:] * centre
        dx = torch.addmm(constant - centre @ M, _rows(dy), K).addmm_(_rows(x), M)
        dw = torch.addcmul(total[:N, :, None] * centre, P * c[:N, :, None], WR)
        dw.addcmul_(a[:N, :, None], cross)
        return _as_map(dx, x), dw.view_as(layer.weight), dtaps.to(x.dtype)


class Depthwise(Form):
    """Depthwise k x k convolutions, any stride: passes over x that keep no z (collapsed).

    They see x less `shift`; `local` holds the means of the z_n of that map.
    """

    @staticmethod
    def statistics(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Kept]:
        """In one pass over x."""
        w, taps = _taps_last(layer.weight), layer.taps.double()
        shift = x[:, :, ::8].mean((0, 2, 3))
        mean, square = moments.depthwise_stats(x, w, shift, layer.stride) / _positions(x, layer)
        var = square - mean * mean
        local = torch.cat([mean[:-1], taps * mean[-1]])
        var = torch.cat([var[:-1], taps * taps * var[-1]])
        weight_sums = torch.cat([w.sum((1, 2), dtype=torch.double), taps])
        own = torch.stack([mean[-1], square[-1]])
        return local + weight_sums * shift, var, (shift, local, own)

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Layer, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """From the correlation of dy with every tap."""
        (shift, local, _), k = kept, layer.weight.shape[-1]
        sums = moments.depthwise_reduce(x, dy, shift, k, layer.stride)
        cross, s0 = sums[:-1], sums[-1]
        s1 = (cross * layer.weight[:, :, 0].flatten(2).transpose(1, 2)).sum(1)
        s1 = torch.cat([s1, layer.taps * cross[k * k // 2]])
        return s0, s1 - local * s0, cross

    @staticmethod
    def gradients(
        x: Tensor, dy: Tensor, layer: Layer, coef: Coefficients, more: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In one pass over x and dy; branches of one tap are summed beforehand."""
        (shift, local, own), (a, c, e, total, P) = kept, coef
        taps, N, k = layer.taps, len(layer.weight), layer.weight.shape[-1]
        three = torch.stack([a, c, e - c * local])
        one = (three[:, N:] * torch.stack([taps, taps * taps, taps])).sum(1).to(x.dtype)
        branches = three[:, :N].to(x.dtype)
        w = _taps_last(layer.weight)
        dx, dw = moments.depthwise_grads(x, dy, w, shift, branches, one, layer.stride)
        dw = (dw + (total[:N] * shift)[:, None, None]).permute(0, 3, 1, 2)[:, :, None]
        dtaps = a[N:] * more[k * k // 2] + P * (c[N:] * taps * own[1] + three[2, N:] * own[0])
        return dx, dw.to(x.dtype), (dtaps + total[N:] * shift).to(x.dtype)


class Stacked(Form):
    """Any convolution: the maps of all branches by one convolution, kept less their means."""

    @staticmethod
    def statistics(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Kept]:
        """On the maps themselves."""
        y = convolve(x, _filters(layer), None, layer.stride, layer.padding, layer.groups)
        rows = _rows(y.contiguous(memory_format=torch.channels_last))
        N, Co = layer.weight.shape[:2]
        z = rows.view(-1, N, Co) if layer.groups == 1 else rows.view(-1, Co, N).transpose(1, 2)
        mean = z.mean(0)
        z.sub_(mean)
        return mean.double(), z.square().mean(0).double(), (z,)

    @staticmethod
    def output(
        x: Tensor, layer: Layer, gain: Tensor, bias: Tensor, mean: Tensor, kept: Kept
    ) -> Tensor:
        """Return the maps again, weighted."""
        (z,) = kept
        y = _empty_map(x, gain.shape[1], layer, z.dtype)
        rows = _rows(y).copy_((bias + (gain * mean).sum(0)).to(z.dtype))
        for n, g in enumerate(gain.to(z.dtype)):
            rows.addcmul_(z[:, n], g)
        return y.to(moments.autocast_dtype(x) or x.dtype)

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Layer, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """On the maps."""
        g = _rows(dy)
        s1 = torch.stack([(g * z).sum(0) for z in kept[0].unbind(1)])
        return g.sum(0).double(), s1.double(), g

    @staticmethod
    def gradients(
        x: Tensor, dy: Tensor, layer: Layer, coef: Coefficients, more: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By PyTorch's convolution backward, from all dz at once."""
        (z,), g, filters = kept, more, _filters(layer)
        dz = torch.empty_like(z)
        for n, (a, c, e) in enumerate(zip(*(t.to(z.dtype) for t in coef[:3]), strict=True)):
            dz[:, n] = torch.addcmul(e, z[:, n], c).addcmul_(g, a)
        flat = (dz if layer.groups == 1 else dz.transpose(1, 2)).flatten(1)
        if layer.weight.shape[3:] == (1, 1) and (layer.stride, layer.groups) == (1, 1):
            dx = _as_map(flat @ filters.flatten(1), x)
            dw = (flat.t() @ _rows(x)).view_as(filters)
        else:
            sides = [layer.stride] * 2, [layer.padding] * 2, [1, 1]
            dx, dw, _ = torch.ops.aten.convolution_backward(
                _as_map(flat, dy), x, filters, None, *sides, False, [0, 0], layer.groups,
                [True, True, False],
            )  # fmt: skip
        if layer.groups > 1:
            dw = dw.unflatten(0, (-1, len(layer.weight))).transpose(0, 1)
        return dx, dw.reshape(layer.weight.shape), layer.taps


class Normalize(Form):
    """A batch norm alone: one tap of 1 and no kernel."""

    @staticmethod
    def statistics(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Kept]:
        """Of x itself."""
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean.double()[None], var.double()[None], (mean,)

    @staticmethod
    def output(
        x: Tensor, layer: Layer, gain: Tensor, bias: Tensor, mean: Tensor, kept: Kept
    ) -> Tensor:
        """Scale and shift."""
        gain, bias = (t.to(layer.taps.dtype).view(-1, 1, 1) for t in (gain, bias))
        return (_map(x) * gain + bias).to(x.dtype)

    @staticmethod
    def sums(x: Tensor, dy: Tensor, layer: Layer, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """Of dy and of dy times xc."""
        g = _rows(dy)
        return g.sum(0).double(), (g * (_rows(x) - kept[0])).sum(0).double()[None], g

    @staticmethod
    def gradients(
        x: Tensor, dy: Tensor, layer: Layer, coef: Coefficients, more: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Elementwise."""
        a, c, e = (t[0].to(x.dtype) for t in coef[:3])
        dx = torch.addcmul(e, _rows(x) - kept[0], c).addcmul_(more, a)
        return _as_map(dx, x), layer.weight, layer.taps


def form_of(conv: nn.Conv2d) -> type[Form]:
    """Return the collapsed form of a convolution; Stacked where there is none."""
    square = conv.kernel_size[0] == conv.kernel_size[1]
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
        return Pointwise
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return Depthwise if depthwise and square and conv.kernel_size[0] in (3, 5) else Stacked


def _taps_last(weight: Tensor) -> Tensor:
    """(N, C, 1, k, k) -> (N, k, k, C), contiguous."""
    return weight[:, :, 0].permute(0, 2, 3, 1).contiguous()


def _filters(layer: Layer) -> Tensor:
    """(N, Co, Ci / groups, k, k) -> (N Co, Ci / groups, k, k), channels of a group together."""
    weight = layer.weight
    return (weight if layer.groups == 1 else weight.transpose(0, 1)).flatten(0, 1)


# --- statistics over all processes ----------------------------------------------------------------


class SyncBatchNorm2d(BatchNorm):
    """Batch norm over the images of all processes, on any back end.

    torch.nn.SyncBatchNorm does the same and refuses a CPU. Parameters, buffers and names are those
    of BatchNorm2d. Raises ValueError in training where all processes together have one value.
    """

    synced = True

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W)."""
        if not self.training:
            return super().forward(x)
        weight = self.weight.new_empty(0, len(self.weight), 1, 1, 1)
        taps = self.weight.new_ones(1, len(self.weight))
        gamma, beta = self.weight[None], self.bias[None]
        y, *statistics = _SumOfBranches.apply(
            x, weight, taps, gamma, beta, Normalize, (1, 0, 1), self.eps, True
        )
        update_running([self], *statistics)
        return y


def synchronize(model: nn.Module) -> nn.Module:
    """Give every batch norm of a student statistics over all processes; in place, and returned.

    Raises TypeError for batch norms of another kind, such as timm's with an activation.
    """
    for bn in model.modules():
        if type(bn) in (nn.BatchNorm2d, BatchNorm):
            bn.__class__ = SyncBatchNorm2d  # the same parameters and buffers, under the same names
        elif isinstance(bn, nn.modules.batchnorm._BatchNorm) and type(bn) is not SyncBatchNorm2d:
            raise TypeError(f"cannot synchronize a {type(bn).__name__}")
    return model
