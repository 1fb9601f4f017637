"""The training forward of a re-parameterized convolution, without one pass per branch.

A block computes y = sum_n BN_n(conv_n(x)). With batch statistics of every z_n = conv_n(x) at hand
it is ONE convolution, and the gradients of its backward follow from sums over positions
(`step.py`). So everything is exact, gradients through the statistics included; only rounding
differs from evaluating the branches. docs/collapsed_training.md derives it. A *form* knows how to
get statistics, sums and gradients for one kind of convolution, and is one file: `pointwise.py`,
`depthwise.py`, `stacked.py`; `normalize.py` is a batch norm alone.

`choose_forward` is the cost rule of `reparam.forward=auto`. Submodules are not called: hooks on a
branch do not fire, and its parameters and buffers are used and updated as if they had.

Shapes are those of `step.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.models.collapse.depthwise import Depthwise
from ghosttrain.models.collapse.pointwise import Pointwise
from ghosttrain.models.collapse.stacked import Stacked
from ghosttrain.models.collapse.step import Form, SumOfBranches, Way, update_running
from ghosttrain.models.depthwise import compiled
from ghosttrain.models.layers import BatchNorm, ConvBN, convolve
from ghosttrain.models.ops import is_channels_last


class Block(Protocol):
    """What is read of a `RepConv2d`."""

    num_branches: int
    """Branches with kernels of the full size."""
    forward_mode: str
    """`reparam.forward`."""
    scale: ConvBN | None
    identity: BatchNorm | None

    def convs(self) -> list[ConvBN]:
        """Return the branches that convolve, the scale last."""

    def norms(self) -> list[BatchNorm]:
        """Return the batch norm of every branch, the identity's last."""


def choose_forward(rep: Block, x: Tensor) -> str:
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
    usual = type(first) is BatchNorm or getattr(first, "synced", False)
    usual = usual and first.weight is not None
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
    if len(norms) == 1 or x.is_cuda or not is_channels_last(x):
        return slow
    form = form_of(conv)
    if form is Depthwise:
        return "collapsed" if compiled(x.device.type) else slow
    cheap = rep.identity is not None or conv.in_channels <= 2 * (N - 1) * conv.out_channels
    return "collapsed" if form is Pointwise and cheap else "stacked"


def forward_together(rep: Block, x: Tensor, mode: str) -> Tensor:
    """Return the sum of the branches of `rep` with batch statistics, and update the running ones.

    x (B, Ci, H, W) -> (B, Co, H', W'). `mode` is "stacked" or "collapsed".
    """
    norms, conv = rep.norms(), rep.convs()[0].conv
    form = form_of(conv) if mode == "collapsed" else Stacked
    weight, taps = _kernels(rep, form)
    gamma, beta = (torch.stack([getattr(bn, name) for bn in norms]) for name in ("weight", "bias"))
    stride, padding, eps = conv.stride[0], int(conv.padding[0]), norms[0].eps
    way = Way(form, stride, padding, conv.groups, eps, norms[0].synced)
    y, *statistics = SumOfBranches.apply(x, weight, taps, gamma, beta, way)
    update_running(norms, *statistics)
    return y


def forward_folded(rep: Block, x: Tensor) -> Tensor:
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


def form_of(conv: nn.Conv2d) -> type[Form]:
    """Return the collapsed form of a convolution; Stacked where there is none."""
    square = conv.kernel_size[0] == conv.kernel_size[1]
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
        return Pointwise
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return Depthwise if depthwise and square and conv.kernel_size[0] in (3, 5) else Stacked


def _kernels(rep: Block, form: type[Form]) -> tuple[Tensor, Tensor]:
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
    # Not by an index: a GPU would wait for its numbers to come from the processor.
    kernel[:, :, row, column].scatter_(1, (outputs % kernel.shape[1])[:, None], 1)
    return kernel
