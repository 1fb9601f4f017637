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

`choose` is the cost rule of `reparam.engine=auto`. Submodules are not called: hooks on a branch do
not fire, and its parameters and buffers are used and updated as if they had.

Shapes: B batch, C channels (Ci in, Co out), H W map, k kernel side, N branches with kernels, M
branches of one tap per channel (a depthwise 1x1 convolution, or the identity), P positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.models import moments
from ghosttrain.models.moments import full_precision

if TYPE_CHECKING:
    from ghosttrain.models.reparam import RepConv2d

Kept = tuple[Tensor, ...]


class Geometry(NamedTuple):
    """How a convolution moves over the map."""

    stride: int = 1
    padding: int = 0
    groups: int = 1


# --- what RepConv2d calls -------------------------------------------------------------------------


def choose(rep: RepConv2d, x: Tensor) -> str:
    """Return how `rep` computes its output for x: "branches", "stacked", "collapsed" or "folded".

    Folded is one convolution with running statistics, in evaluation and where every batch norm is
    frozen. In training `rep.engine` says which, and "auto" is this rule, from multiply-accumulates
    and from timings on a CPU (`python -m ghosttrain bench step`):

    - a single branch, or maps that are not channels-last: branches;
    - depthwise, k 3 or 5: collapsed where a compiled kernel takes the map, else branches;
    - 1x1: collapsed costs 4 Ci^2 + 6 Ci Co per position, stacked 6 N Ci Co: the cheaper;
    - any other convolution (a stem): stacked.
    """
    from_batch = [uses_batch_statistics(bn) for bn in rep.norms()]
    if rep.engine == "branches" or (any(from_batch) and not all(from_batch)):
        return "branches"
    if not any(from_batch):
        return "folded"
    conv, N = rep.branches[0].conv, len(rep.branches)
    if len(x) * x.shape[2] * x.shape[3] <= conv.stride[0] ** 2:
        return "branches"  # perhaps a single value: the batch norm refuses it
    if rep.engine != "auto":
        return rep.engine
    if len(from_batch) == 1 or not x.is_contiguous(memory_format=torch.channels_last):
        return "branches"
    form = form_of(conv)
    if form is Depthwise:
        return "collapsed" if moments.compiled(x.device.type) else "branches"
    cheap = rep.identity is not None or conv.in_channels <= 1.5 * (N - 1) * conv.out_channels
    return "collapsed" if form is Pointwise and cheap else "stacked"


def forward_together(rep: RepConv2d, x: Tensor, engine: str) -> Tensor:
    """Return the sum of the branches of `rep` with batch statistics, and update the running ones.

    x (B, Ci, H, W) -> (B, Co, H', W'). `engine` is "stacked" or "collapsed".
    """
    norms, conv = rep.norms(), rep.branches[0].conv
    form = form_of(conv) if engine == "collapsed" else Stacked
    weight, taps = _kernels(rep, form)
    gamma, beta = (torch.stack([getattr(bn, name) for bn in norms]) for name in ("weight", "bias"))
    geometry = Geometry(conv.stride[0], conv.padding[0], conv.groups)
    synced = isinstance(norms[0], SyncBatchNorm2d)
    y, *statistics = _SumOfBranches.apply(
        x, weight, taps, gamma, beta, form, geometry, norms[0].eps, synced
    )
    update_running(norms, *statistics)
    return y


def forward_folded(rep: RepConv2d, x: Tensor) -> Tensor:
    """Return the sum of the branches with their running statistics: one convolution, folded anew.

    x (B, Ci, H, W) -> (B, Co, H', W'). Gradients flow to x and to every parameter.
    """
    norms, conv = rep.norms(), rep.branches[0].conv
    weight, _ = _kernels(rep, Stacked)
    gamma, beta, mean, var = (
        torch.stack([getattr(bn, name) for bn in norms]).double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    gain = gamma * (var + norms[0].eps).rsqrt()
    kernel = (gain[..., None, None, None] * weight).sum(0).to(weight.dtype)
    bias = (beta - gain * mean).sum(0).to(weight.dtype)
    return convolve(x, kernel, bias, Geometry(conv.stride[0], conv.padding[0], conv.groups))


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    """Whether a batch norm would normalise by the batch, rather than by its running statistics."""
    return bn.training or bn.running_mean is None


def update_running(norms: list[Any], mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Update the running statistics as every batch norm would: mean, var (N, C), var biased.

    Once per step: not again when activation checkpointing repeats a forward within the backward.
    """
    repeated = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    tracked = [i for i, bn in enumerate(norms) if bn.training and bn.running_mean is not None]
    if repeated or not tracked:
        return
    with torch.no_grad():
        torch._foreach_add_([norms[i].num_batches_tracked for i in tracked], 1)
        means = mean.to(norms[0].running_mean.dtype).unbind()
        variances = (var * (count / (count - 1))).to(norms[0].running_var.dtype).unbind()
        for i in tracked:
            bn = norms[i]
            share = bn.momentum if bn.momentum is not None else 1 / bn.num_batches_tracked
            bn.running_mean.lerp_(means[i], share)
            bn.running_var.lerp_(variances[i], share)


def _kernels(rep: RepConv2d, form: type[Form]) -> tuple[Tensor, Tensor]:
    """Return kernels (N, Co, Ci / groups, k, k) and taps (M, C), in the order of `rep.norms()`.

    A tap is a branch of the form's kind that needs no kernel; where the form knows none, the 1x1
    branch and the identity become kernels too.
    """
    kernels, taps = [branch.conv.weight for branch in rep.branches], []
    like = kernels[0]
    if rep.scale is not None:
        half = like.shape[-1] // 2
        scale = rep.scale.conv.weight
        if form is Depthwise:
            taps.append(scale.flatten())
        else:
            kernels.append(F.pad(scale, (half, half, half, half)))
    if rep.identity is not None:
        if form is Stacked:
            kernels.append(identity_kernel(rep.branches[0].conv))
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


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution of x; on a CPU, a 1x1 one on an NHWC map as a matrix product.

    That is faster than PyTorch's CPU convolution where maps are small, as these are. CUDA keeps
    cuDNN's convolution: its TF32 setting is not the one of matrix products.
    """
    nhwc = x.is_cpu and x.is_contiguous(memory_format=torch.channels_last)
    if nhwc and weight.shape[2:] == (1, 1) and geometry == Geometry():
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, 1, geometry.groups)


# --- the step that all forms share ----------------------------------------------------------------


class _SumOfBranches(torch.autograd.Function):
    """x, kernels, taps, gamma (N + M, Co), beta -> y, and what the running statistics need.

    Mean, variance and everything per channel is float64; maps keep their dtype.
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
        geometry: Geometry,
        eps: float,
        synced: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with full_precision(x):
            own_mean, var, count, kept = form.statistics(_map(x), weight, taps, geometry)
            mean = own_mean
            if synced:
                mean, var, count = _over_ranks(mean, var, count)
            var = var.clamp(min=0)
            rstd = (var + eps).rsqrt()
            gain = gamma * rstd
            bias = (beta - gain * mean).sum(0)
        y = form.output(x, weight, taps, gain, own_mean, bias, kept, geometry)
        ctx.save_for_backward(x, weight, taps, gain, rstd, own_mean - mean, count, *kept)
        ctx.form, ctx.geometry, ctx.synced = form, geometry, synced
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, taps, gain, rstd, offset, count, *kept = ctx.saved_tensors
        with full_precision(x):
            x_map, dy = _map(x), _map(dy)
            s0, s1, more = ctx.form.sums(x_map, dy, weight, taps, kept, ctx.geometry)
            s1 = s1 + offset * s0
            all0, all1 = s0, s1
            if ctx.synced:
                flat = _all_sum(torch.cat([s0[None], s1]))
                all0, all1 = flat[0], flat[1:]
            c = -gain * rstd * rstd * all1 / count
            e = c * offset - gain * all0 / count
            dx, dweight, dtaps = ctx.form.gradients(
                x_map, dy, weight, taps, gain, c, e, s0, more, kept, ctx.geometry
            )
            dgamma, dbeta = (rstd * s1).to(weight.dtype), s0.expand_as(s1).to(weight.dtype)
        grads = dweight.to(weight.dtype), dtaps.to(weight.dtype)
        return dx.to(x.dtype), *grads, dgamma, dbeta, None, None, None, None


def _map(x: Tensor) -> Tensor:
    """Return x as a channels-last map of float32 or better."""
    x = x if x.dtype == torch.double else x.float()
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last -> (P, C): a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _empty_map(
    x: Tensor, channels: int, geometry: Geometry, dtype: torch.dtype | None = None
) -> Tensor:
    """Return an output map to be filled: no view, so that what follows may work in place."""
    H, W = (-(-side // geometry.stride) for side in x.shape[2:])
    return torch.empty(
        (len(x), channels, H, W),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast, or else x, gives the output of a convolution."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


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


class Form:
    """One way to get what `_SumOfBranches` needs, z never being kept, or kept once.

    zc_n is z_n less its mean over this process's positions; P counts those.
    """

    @staticmethod
    def statistics(
        x: Tensor, weight: Tensor, taps: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor, Tensor, Kept]:
        """Return mean and biased variance of every z_n (N + M, Co), P, and what to keep."""
        raise NotImplementedError

    @staticmethod
    def output(
        x: Tensor,
        weight: Tensor,
        taps: Tensor,
        gain: Tensor,
        mean: Tensor,
        bias: Tensor,
        kept: Kept,
        geometry: Geometry,
    ) -> Tensor:
        """Return sum_n gain_n z_n + bias, in the dtype that autocast gives a convolution."""
        kernel = (gain[: len(weight), :, None, None, None] * weight).sum(0)
        if len(taps):
            middle = kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2]
            tap = (gain[len(weight) :] * taps).sum(0)
            (middle.diagonal() if geometry.groups == 1 else middle[:, 0]).add_(tap)
        x, kernel, bias = (t.to(_output_dtype(x)) for t in (x, kernel, bias))
        if kernel.shape[2:] != (1, 1) or not x.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(x, kernel, bias, geometry.stride, geometry.padding, 1, geometry.groups)
        y = _empty_map(x, len(kernel), geometry)
        torch.addmm(bias, _rows(x), kernel.flatten(1).t(), out=_rows(y))
        return y

    @staticmethod
    def sums(
        x: Tensor, dy: Tensor, weight: Tensor, taps: Tensor, kept: Kept, geometry: Geometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return sum dy (Co,), sum dy zc_n (N + M, Co), and what `gradients` can use again."""
        raise NotImplementedError

    @staticmethod
    def gradients(
        x: Tensor,
        dy: Tensor,
        weight: Tensor,
        taps: Tensor,
        a: Tensor,
        c: Tensor,
        e: Tensor,
        s0: Tensor,
        more: Tensor,
        kept: Kept,
        geometry: Geometry,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, weight and taps from dz_n = a_n dy + c_n zc_n + e_n."""
        raise NotImplementedError


class Pointwise(Form):
    """1x1 convolutions, stride 1: moments of x decide everything (collapsed)."""

    @staticmethod
    def statistics(x, weight, taps, geometry):  # type: ignore[no-untyped-def]
        """With R = mean of xc outer xc: var z_n = W_n R W_n^T."""
        rows, w = _rows(x), weight.flatten(2).double()
        shift = rows.mean(0)
        R = moments.second_moment(rows, shift) / len(rows)
        WR = w @ R
        mean, var = w @ shift.double(), (WR * w).sum(-1)
        if len(taps):
            mean = torch.cat([mean, taps * shift.double()])
            var = torch.cat([var, taps**2 * R.diagonal()])
        return mean, var, _count(rows, len(rows)), (shift, WR.to(x.dtype), R.diagonal().clone())

    @staticmethod
    def sums(x, dy, weight, taps, kept, geometry):  # type: ignore[no-untyped-def]
        """From the moment of dy and xc."""
        g = _rows(dy)
        cross = moments.cross_moment(g, _rows(x), kept[0])
        s1 = (cross * weight.flatten(2)).sum(-1)
        if len(taps):
            s1 = torch.cat([s1, taps * cross.diagonal()])
        return g.sum(0).double(), s1, cross

    @staticmethod
    def gradients(x, dy, weight, taps, a, c, e, s0, more, kept, geometry):  # type: ignore[no-untyped-def]
        """Dx is two matrix products, of dy with the summed kernel and of x with a (Ci, Ci) one."""
        (shift, WR, spread), cross, N = kept, more, len(weight)
        w, dtype, P = weight.flatten(2), x.dtype, x.numel() // x.shape[1]
        K = (a[:N, :, None] * w).sum(0)
        M = (c[:N, :, None].to(dtype) * w).flatten(0, 1).t() @ w.flatten(0, 1)
        constant = (e[:N, :, None] * w).sum((0, 1)) - shift.double() @ M.double()
        total = a * s0 + P * e
        dtaps = taps
        if len(taps):
            K.diagonal().add_((a[N:] * taps).sum(0))
            own = (c[N:] * taps**2).sum(0)
            M.diagonal().add_(own.to(dtype))
            constant += (e[N:] * taps).sum(0) - shift * own
            dtaps = a[N:] * cross.diagonal() + c[N:] * taps * (P * spread) + total[N:] * shift
        dx = torch.addmm(constant.to(dtype), _rows(dy), K.to(dtype)).addmm_(_rows(x), M)
        dw = a[:N, :, None] * cross + P * c[:N, :, None] * WR + total[:N, :, None] * shift
        return _as_map(dx, x), dw.view_as(weight), dtaps


class Depthwise(Form):
    """Depthwise k x k convolutions, any stride: passes over x that keep no z (collapsed)."""

    @staticmethod
    def statistics(x, weight, taps, geometry):  # type: ignore[no-untyped-def]
        """In one pass, on x less a mean of every 8th row; see `moments`."""
        shift, w = x[:, :, ::8].mean((0, 2, 3)), _taps_last(weight)
        sums = moments.depthwise_stats(x, w, shift, geometry.stride)
        H, W = (-(-side // geometry.stride) for side in x.shape[2:])
        count = _count(x, len(x) * H * W)
        mean, square = sums / count
        var = square - mean**2
        means = torch.cat([mean[:-1] + shift * w.double().sum((1, 2)), taps * (mean[-1] + shift)])
        return means, torch.cat([var[:-1], taps**2 * var[-1]]), count, (shift, mean, square[-1])

    @staticmethod
    def sums(x, dy, weight, taps, kept, geometry):  # type: ignore[no-untyped-def]
        """From the correlation of dy with every tap."""
        shift, mean, _ = kept
        k = weight.shape[-1]
        sums = moments.depthwise_reduce(x, dy, shift, k, geometry.stride)
        cross, s0 = sums[:-1], sums[-1]
        s1 = (cross * _taps_last(weight).flatten(1, 2)).sum(1) - mean[:-1] * s0
        return s0, torch.cat([s1, taps * (cross[k * k // 2] - mean[-1] * s0)]), cross

    @staticmethod
    def gradients(x, dy, weight, taps, a, c, e, s0, more, kept, geometry):  # type: ignore[no-untyped-def]
        """In one pass; branches of one tap are summed beforehand."""
        (shift, mean, square), N, k = kept, len(weight), weight.shape[-1]
        P = dy.numel() // dy.shape[1]
        total = a * s0 + P * e
        scale = torch.cat([torch.ones_like(mean[:-1]), taps])  # e for z of the shifted map:
        e = e - c * scale * torch.cat([mean[:-1], mean[-1:].expand(len(taps), -1)])
        coef = torch.stack([t[:N] for t in (a, c, e)]).to(x.dtype)
        one = torch.stack([(t[N:] * taps).sum(0) for t in (a, c * scale, e)]).to(x.dtype)
        dx, dw = moments.depthwise_grads(
            x, dy, _taps_last(weight), shift, coef, one, geometry.stride
        )
        dw = (dw + (total[:N] * shift)[:, None, None]).permute(0, 3, 1, 2)
        dtaps = a[N:] * more[k * k // 2] + P * (c[N:] * taps * square + e[N:] * mean[-1])
        return dx, dw[:, :, None], dtaps + total[N:] * shift


class Stacked(Form):
    """Any convolution: the maps of all branches by one convolution, kept less their means."""

    @staticmethod
    def statistics(x, weight, taps, geometry):  # type: ignore[no-untyped-def]
        """On the maps themselves."""
        z = _branch_axis(
            _rows(_channels_last(convolve(x, _filters(weight, geometry), None, geometry))),
            weight,
            geometry,
        )
        mean = z.mean(0)
        z.sub_(mean)
        return mean.double(), z.square().mean(0).double(), _count(z, len(z)), (z,)

    @staticmethod
    def output(x, weight, taps, gain, mean, bias, kept, geometry):  # type: ignore[no-untyped-def]
        """The maps again, weighted."""
        (z,) = kept
        y = _empty_map(x, gain.shape[1], geometry, z.dtype)
        rows = _rows(y).copy_((bias + (gain * mean).sum(0)).to(z.dtype))
        for n, g in enumerate(gain.to(z.dtype)):
            rows.addcmul_(z[:, n], g)
        return y.to(_output_dtype(x))

    @staticmethod
    def sums(x, dy, weight, taps, kept, geometry):  # type: ignore[no-untyped-def]
        """On the maps."""
        g = _rows(dy)
        s1 = torch.stack([(g * z).sum(0) for z in kept[0].unbind(1)])
        return g.sum(0).double(), s1.double(), g

    @staticmethod
    def gradients(x, dy, weight, taps, a, c, e, s0, more, kept, geometry):  # type: ignore[no-untyped-def]
        """By PyTorch's convolution backward, from all dz at once."""
        (z,), g = kept, _rows(dy)
        dz = torch.empty_like(z)
        for n, (an, cn, en) in enumerate(zip(*(t.to(z.dtype) for t in (a, c, e)), strict=True)):
            dz[:, n] = torch.addcmul(en, z[:, n], cn).addcmul_(g, an)
        filters = _filters(weight, geometry)
        if geometry == Geometry() and weight.shape[-1] == 1:
            flat = dz.flatten(1)
            dx, dw = _as_map(flat @ filters.flatten(1), x), (flat.t() @ _rows(x)).view_as(filters)
        else:
            dx, dw, _ = torch.ops.aten.convolution_backward(
                _as_map(_channel_axis(dz, geometry), dy),
                x,
                filters,
                None,
                [geometry.stride] * 2,
                [geometry.padding] * 2,
                [1, 1],
                False,
                [0, 0],
                geometry.groups,
                [True, True, False],
            )
        if geometry.groups > 1:
            return dx, dw.unflatten(0, (-1, len(weight))).transpose(0, 1), taps
        return dx, dw.view_as(weight), taps


class Normalize(Form):
    """A batch norm alone: one tap of 1 and no kernel."""

    @staticmethod
    def statistics(x, weight, taps, geometry):  # type: ignore[no-untyped-def]
        """Of x itself."""
        rows = _rows(x)
        var, mean = torch.var_mean(rows, 0, correction=0)
        return mean.double()[None], var.double()[None], _count(rows, len(rows)), (mean,)

    @staticmethod
    def output(x, weight, taps, gain, mean, bias, kept, geometry):  # type: ignore[no-untyped-def]
        """Scaled and shifted."""
        y = _map(x) * gain.to(weight.dtype)[0, :, None, None] + bias.to(weight.dtype)[:, None, None]
        return y.to(x.dtype)

    @staticmethod
    def sums(x, dy, weight, taps, kept, geometry):  # type: ignore[no-untyped-def]
        """Of dy and of dy times xc."""
        g = _rows(dy)
        return g.sum(0).double(), (g * (_rows(x) - kept[0])).sum(0).double()[None], g

    @staticmethod
    def gradients(x, dy, weight, taps, a, c, e, s0, more, kept, geometry):  # type: ignore[no-untyped-def]
        """Elementwise."""
        a, c, e = (t[0].to(x.dtype) for t in (a, c, e))
        return _as_map(a * _rows(dy) + c * (_rows(x) - kept[0]) + e, x), weight, taps


def form_of(conv: nn.Conv2d) -> type[Form]:
    """Return the collapsed form of a convolution; Stacked where there is none."""
    square = conv.kernel_size[0] == conv.kernel_size[1]
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
        return Pointwise
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return Depthwise if depthwise and square and conv.kernel_size[0] in (3, 5) else Stacked


def _count(like: Tensor, positions: int) -> Tensor:
    return torch.full((), positions, dtype=torch.double, device=like.device)


def _taps_last(weight: Tensor) -> Tensor:
    """(N, C, 1, k, k) -> (N, k, k, C), contiguous."""
    return weight[:, :, 0].permute(0, 2, 3, 1).contiguous()


def _filters(weight: Tensor, geometry: Geometry) -> Tensor:
    """(N, Co, Ci / groups, k, k) -> (N Co, Ci / groups, k, k), channels of a group together."""
    return (weight if geometry.groups == 1 else weight.transpose(0, 1)).flatten(0, 1)


def _branch_axis(rows: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(P, N Co) -> (P, N, Co): a view."""
    N, Co = weight.shape[:2]
    if geometry.groups == 1:
        return rows.view(-1, N, Co)
    return rows.view(-1, Co, N).transpose(1, 2)


def _channel_axis(z: Tensor, geometry: Geometry) -> Tensor:
    """(P, N, Co) -> (P, N Co), channels of a group together."""
    return (z if geometry.groups == 1 else z.transpose(1, 2)).flatten(1)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# --- statistics over all processes ----------------------------------------------------------------


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on any back end.

    torch.nn.SyncBatchNorm does the same and refuses a CPU. Parameters, buffers and names are those
    of BatchNorm2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W)."""
        if not self.training:
            return super().forward(x)
        weight = self.weight.new_empty(0, len(self.weight), 1, 1, 1)
        taps = self.weight.new_ones(1, len(self.weight))
        y, *statistics = _SumOfBranches.apply(
            x,
            weight,
            taps,
            self.weight[None],
            self.bias[None],
            Normalize,
            Geometry(),
            self.eps,
            True,
        )
        update_running([self], *statistics)
        return y


def synchronize(model: nn.Module) -> nn.Module:
    """Give every batch norm of `model` statistics over all processes; in place, and returned."""
    for bn in model.modules():
        if type(bn) is nn.BatchNorm2d:
            bn.__class__ = SyncBatchNorm2d
    return model
