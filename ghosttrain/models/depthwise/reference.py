"""The definition, in PyTorch's operators: any device, dtype and memory format.

Shapes are those of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad

from ghosttrain.models.ops import is_channels_last


def depthwise_stats(x: Tensor, w: Tensor, shift: Tensor, stride: int) -> Tensor:
    """Define `depthwise.depthwise_stats`."""
    k = w.shape[1]
    padded = _padded(x, shift, k)
    maps = *(_convolve(padded, kernel, stride) for kernel in w), _centre(padded, k, stride)
    sums = [torch.stack([z.sum((0, 2, 3), dtype=torch.double) for z in (m, m * m)]) for m in maps]
    return torch.stack(sums, 1)


def depthwise_reduce(x: Tensor, dy: Tensor, shift: Tensor, k: int, stride: int) -> Tensor:
    """Define `depthwise.depthwise_reduce`."""
    taps = _tap_sums(_padded(x, shift, k), dy, k, stride).flatten(0, 1)
    return torch.cat([taps, dy.sum((0, 2, 3), dtype=torch.double)[None]])


def depthwise_grads(
    x: Tensor, dy: Tensor, w: Tensor, shift: Tensor, abc: Tensor, tap_abc: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """Define `depthwise.depthwise_grads`."""
    k = w.shape[1]
    abc, tap_abc = abc[..., None, None], tap_abc[..., None, None]
    padded = _padded(x, shift, k)
    dx, dw = torch.zeros_like(padded), []
    seen = _centre(padded, k, stride)
    _centre(dx, k, stride).copy_(tap_abc[0] * dy + tap_abc[1] * seen + tap_abc[2])
    for n, kernel in enumerate(w):
        dz = abc[0, n] * dy + abc[1, n] * _convolve(padded, kernel, stride) + abc[2, n]
        filters = kernel.permute(2, 0, 1)[:, None]
        dx += grad.conv2d_input(padded.shape, filters, dz, stride, groups=len(filters))
        dw.append(_tap_sums(padded, dz, k, stride))
    edge = k // 2
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return dx[:, :, edge:-edge, edge:-edge].clone(memory_format=memory_format), torch.stack(dw)


def _padded(x: Tensor, shift: Tensor, k: int) -> Tensor:
    return F.pad(x, (k // 2,) * 4) - shift[:, None, None]


def _centre(padded: Tensor, k: int, stride: int) -> Tensor:
    """Return what the middle of the kernel sees: a view."""
    edge = k // 2
    return padded[:, :, edge:-edge:stride, edge:-edge:stride]


def _convolve(padded: Tensor, kernel: Tensor, stride: int) -> Tensor:
    filters = kernel.permute(2, 0, 1)[:, None]
    return F.conv2d(padded, filters, stride=stride, groups=len(filters))


def _tap_sums(padded: Tensor, dz: Tensor, k: int, stride: int) -> Tensor:
    """Return the sums over positions of dz times what each tap sees: (k, k, C) float64."""
    shape = (dz.shape[1], 1, k, k)
    sums = grad.conv2d_weight(padded, shape, dz, stride, groups=shape[0])
    return sums[:, 0].permute(1, 2, 0).double()
