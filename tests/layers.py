"""Re-parameterized layers of every kind, and one training step of them by a given forward."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.models.ops import is_channels_last
from ghosttrain.models.reparam import RepConv2d, using_forward

FORWARDS = ("stacked", "collapsed")
LAYERS = {  # in, out, kernel, stride, groups
    "pointwise": (6, 6, 1, 1, 1),
    "expansion": (6, 14, 1, 1, 1),
    "projection": (24, 8, 1, 1, 1),
    # Of 8 channels: of others, oneDNN's AVX2 kernel for the gradient of the weight writes past its
    # end (torch 2.14.1: on 8x8 maps MALLOC_CHECK_=3 stops a plain nn.Conv2d(6, 6, 1, 2) as well).
    "pointwise, stride 2": (8, 8, 1, 2, 1),
    "depthwise 3": (12, 12, 3, 1, 12),
    "depthwise 3, stride 2": (12, 12, 3, 2, 12),
    "depthwise 5": (16, 16, 5, 1, 16),
    "depthwise 5, stride 2": (10, 10, 5, 2, 10),
    "stem": (3, 8, 3, 2, 1),
    "grouped": (6, 6, 3, 1, 2),
}


FORMS = [(3, True, True), (2, False, True), (1, True, False), (3, False, False)]


Results = dict[str, Tensor]


def layer(kind: str, form: tuple[int, bool, bool] = FORMS[0], seed: int = 0) -> RepConv2d:
    torch.manual_seed(seed)
    branches, scale, identity = form
    settings = ReparamConfig(branches=branches, scale=scale, identity=identity, forward="branches")
    rep = RepConv2d(*LAYERS[kind], reparam=settings)
    for bn in rep.norms():
        nn.init.uniform_(bn.weight, -0.5, 1.5)
        nn.init.normal_(bn.bias)
        nn.init.normal_(bn.running_mean)
    return rep


def images(*shape: int, mean: float = 1.0, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) + mean * torch.randn(shape[1], 1, 1, generator=g)


def step(rep: nn.Module, x: Tensor, dy: Tensor, forward: str) -> Results:
    """Everything one training step by one forward leaves behind, and the output in evaluation."""
    rep, x = copy.deepcopy(rep), x.detach().clone().requires_grad_()
    with using_forward(rep, forward):
        y = rep(x)
        y.backward(dy)
        grads = {f"d {name}": p.grad for name, p in rep.named_parameters()}
        buffers = {name: b.clone() for name, b in rep.named_buffers()}
        return {"y": y.detach(), "dx": x.grad, **grads, **buffers, "eval": rep.eval()(x).detach()}


def outputs_gradient(rep: RepConv2d, x: Tensor) -> Tensor:
    conv = rep.branches[0].conv
    shape = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, 1, conv.groups).shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.5
    return dy.to(x.dtype).contiguous(
        memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format
    )


def scale_of(key: str, reference: Results) -> float:
    """What an error of `key` is relative to: its size, or for gradients of kernels the largest.

    A kernel before a batch norm has hardly any gradient along itself, a 1x1 depthwise one none at
    all but for eps: its own size would be no measure.
    """
    keys = [k for k in reference if k.startswith("d ")] if key.startswith("d ") else [key]
    return max(reference[k].double().norm().item() for k in keys)


def error(given: Results, reference: Results, key: str) -> float:
    difference = (given[key].double() - reference[key].double()).norm().item()
    return difference / (scale_of(key, reference) + 1e-300)
