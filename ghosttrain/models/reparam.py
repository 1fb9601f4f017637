"""Structural re-parameterization: convolutions that train as several branches and infer as one.

Owns `RepConv2d`, and `fuse(model)` with its batch-norm folding: with running statistics a conv-BN
branch is linear, so a sum of branches is one convolution with a bias (RepVGG,
https://arxiv.org/abs/2101.03697; GhostNetV3, https://arxiv.org/abs/2404.11202). What folds batch
statistics in training is collapse/.

Shapes: B batch, C channels, H W map, k kernel side.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config.schema import PLAIN, ReparamConfig
from ghosttrain.errors import UserError
from ghosttrain.models.collapse import (
    choose_forward,
    forward_folded,
    forward_together,
    identity_kernel,
)
from ghosttrain.models.int8 import in_float
from ghosttrain.models.layers import BatchNorm, ConvBN


class RepConv2d(nn.Module):
    """Sum of conv-BN branches over one input: (B, C_in, H, W) -> (B, C_out, H', W').

    `reparam.branches` k x k branches; with `reparam.scale` a 1x1 branch where k > 1; with
    `reparam.identity` a batch norm of the input where input and output have equal shapes. With 1,
    false, false, or where `reparam.pointwise` or `.depthwise` leaves it out, it is an ordinary
    conv-BN. Strides and padding are those of `ConvBN`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        reparam: ReparamConfig,
    ) -> None:
        super().__init__()
        depthwise = groups == in_channels > 1
        if (depthwise and not reparam.depthwise) or (kernel_size == 1 and not reparam.pointwise):
            reparam = PLAIN.model_copy(update={"forward": reparam.forward})

        def branch(kernel_size: int) -> ConvBN:
            return ConvBN(in_channels, out_channels, kernel_size, stride, groups)

        has_scale = reparam.scale and kernel_size > 1
        has_identity = reparam.identity and in_channels == out_channels and stride == 1
        self.num_branches, self.forward_mode = reparam.branches, str(reparam.forward)
        self.branches = nn.ModuleList(branch(kernel_size) for _ in range(reparam.branches))
        self.scale = branch(1) if has_scale else None
        self.identity = BatchNorm(in_channels) if has_identity else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H', W'), without activation."""
        mode = choose_forward(self, x)
        if mode == "branches":
            return self.forward_branches(x)
        if mode == "folded":
            return forward_folded(self, x)
        return forward_together(self, x, mode)

    def convs(self) -> list[ConvBN]:
        """Return the branches that convolve: the k x k ones, then the scale."""
        branches = cast("list[ConvBN]", list(self.branches))
        return branches if self.scale is None else [*branches, self.scale]

    def norms(self) -> list[BatchNorm]:
        """Return the batch norm of every branch: k x k, scale, identity."""
        norms = [conv.bn for conv in self.convs()]
        return norms if self.identity is None else [*norms, self.identity]

    def forward_branches(self, x: Tensor) -> Tensor:
        """Evaluate one branch after another: the definition that any faster forward must equal."""
        y = self.branches[0](x)
        # In place: backward of a batch norm needs its input, not its output.
        for branch in self.branches[1:]:
            y += branch(x)
        if self.scale is not None:
            y += self.scale(x)
        if self.identity is not None:
            y += self.identity(x)
        return y


def make_stem(
    in_chans: int, channels: int, input_stride: str, reparam: ReparamConfig
) -> ConvBN | RepConv2d:
    """Return the first 3x3 convolution of a student: (B, in_chans, H, W) -> (B, channels, H', W').

    `input_stride` "standard" halves the map, "small" keeps it. It has branches with `reparam.stem`.
    """
    stride = stem_stride(input_stride)
    if reparam.stem:
        return RepConv2d(in_chans, channels, 3, stride, reparam=reparam)
    return ConvBN(in_chans, channels, 3, stride)


def stem_stride(input_stride: str) -> int:
    """Return the stride of the first convolution under `model.input_stride`."""
    return 1 if input_stride == "small" else 2


def share_gain(model: nn.Module) -> None:
    """Start every `RepConv2d` of n branches with gains of 1 / sqrt(n), in place of 1.

    The sum of the branches then varies as the plain layer's output does. With gains of 1 it varies
    n times as much; where maps are passed on by shortcuts this adds up, and before any statistics
    were taken a network of such layers evaluates to logits in the tens (measured here,
    ShuffleNetV2 2.0x: standard deviation 46 to 65 with 2 to 1000 classes).
    """
    for module in model.modules():
        if isinstance(module, RepConv2d):
            norms = module.norms()
            for norm in norms:
                nn.init.constant_(norm.weight, len(norms) ** -0.5)


@contextmanager
def using_forward(model: nn.Module, name: str) -> Iterator[None]:
    """Compute every `RepConv2d` of `model` this way within the block."""
    reps = [m for m in model.modules() if isinstance(m, RepConv2d)]
    before = [rep.forward_mode for rep in reps]
    try:
        for rep in reps:
            rep.forward_mode = name
        yield
    finally:
        for rep, old in zip(reps, before, strict=True):
            rep.forward_mode = old


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode, each `RepConv2d` and `ConvBN` one convolution.

    The copy computes the same function up to rounding (float64: relative error of the logits below
    1e-12 on randomised statistics, `tests/numerics/test_fuse.py`) and can be trained: the new
    parameters require gradients. Folding is done in float64 whatever the dtype of the model, and
    draws no random numbers. Layers that round as INT8 files do become ordinary ones. What is folded
    already, or is none of these layers, is copied as it is.

    Raises UserError in training mode, where the outputs of `model` depend on the batch.
    """
    if any(module.training for module in model.modules()):
        raise UserError(
            "fuse() folds the running statistics of batch norms: call model.eval() first."
        )
    with torch.no_grad():
        return _folded(copy.deepcopy(model)).eval()


def _folded(module: nn.Module) -> nn.Module:
    """Return the folded form of `module`; its children are replaced in place."""
    if isinstance(module, RepConv2d):
        return _fold_branches(module)
    if isinstance(module, ConvBN):
        return _conv_like(module.conv, *_fold(module.conv.weight, module.bn))
    in_float(module)
    for name, child in module.named_children():
        setattr(module, name, _folded(child))
    return module


def _fold_branches(rep: RepConv2d) -> nn.Conv2d:
    branches = cast("list[ConvBN]", list(rep.branches))
    conv = branches[0].conv
    half = conv.kernel_size[0] // 2
    folded = [_fold(branch.conv.weight, branch.bn) for branch in branches]
    if rep.scale is not None:
        centred = F.pad(rep.scale.conv.weight, (half, half, half, half))
        folded.append(_fold(centred, rep.scale.bn))
    if rep.identity is not None:
        folded.append(_fold(identity_kernel(conv), rep.identity))
    kernels, biases = zip(*folded, strict=True)
    return _conv_like(conv, torch.stack(kernels).sum(0), torch.stack(biases).sum(0))


def _fold(kernel: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel (C_out, C_in / groups, k, k) and bias (C_out,) of `bn` after a kernel, float64."""
    assert bn.running_mean is not None and bn.running_var is not None
    return fold_norm(kernel, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)


def fold_norm(
    kernel: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return kernel and bias, in float64, of a convolution and the batch norm after it.

    `kernel` is (C_out, C_in / groups, k, k); weight, bias, running mean and variance are (C_out,).
    """
    scale = weight.double() / (var.double() + eps).sqrt()
    folded_bias = bias.double() - mean.double() * scale
    return kernel.double() * scale[:, None, None, None], folded_bias


def _conv_like(conv: nn.Conv2d, kernel: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution that moves over the map as `conv` does, with this kernel and bias."""
    geometry: dict[str, Any] = {
        name: getattr(conv, name)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
    }
    # On "meta" nothing is initialised, which would advance the global RNG.
    folded = nn.Conv2d(**geometry, device="meta")
    folded.weight = nn.Parameter(kernel.to(conv.weight.dtype).contiguous())
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return folded
