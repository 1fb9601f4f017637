"""Sums over all positions of a map that batch norm needs of a depthwise convolution's branches, and
the gradients they give, without a branch's map in memory.

Three implementations of one definition: PyTorch's operators (`reference.py`: any device and dtype),
C++ for float32 channels-last maps on a CPU (`native/depthwise.cpp`), Triton for CUDA (`triton.py`).
Every function is one node for torch.compile.

All work on *shifted* maps: x - shift, where shift is near the channel's mean and zero padding
becomes 0 - shift. Then no variance is the small difference of large numbers. Sums run in float32
within a block (an image, or what a program takes) and in float64 over blocks.

The gradient of the output z_n of branch n, on the shifted map, is in all three

    dz_n = a_n dy + b_n z_n + c_n            abc (3, N, C): rows a, b, c

and the branches of one tap, summed, add a dy + b (x - shift) + c at the kernel's centre to dx:
tap_abc (3, C).

Shapes: B batch, C channels, H W map, H' W' map of the output, k kernel side, N branches,
T = k k + 1.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ghosttrain import native
from ghosttrain.models.depthwise import reference
from ghosttrain.models.ops import is_channels_last, one_node


def _like_depthwise_stats(x: Tensor, w: Tensor, shift: Tensor, stride: int) -> Tensor:
    return w.new_empty(2, w.shape[0] + 1, x.shape[1], dtype=torch.double)


@one_node(_like_depthwise_stats)
def depthwise_stats(x: Tensor, w: Tensor, shift: Tensor, stride: int) -> Tensor:
    """Return the sums over positions of every branch's output and of its square, float64.

    x (B, C, H, W), w (N, k, k, C), shift (C,) -> (2, N + 1, C). The outputs are those on the
    shifted map, the true ones less shift times the sum of the kernel; the last "branch" is the
    shifted map itself under the kernel's centre.
    """
    return kernels_for(x, w.shape[1]).depthwise_stats(x, w, shift, stride)


def _like_depthwise_reduce(x: Tensor, dy: Tensor, shift: Tensor, k: int, stride: int) -> Tensor:
    return x.new_empty(k * k + 1, x.shape[1], dtype=torch.double)


@one_node(_like_depthwise_reduce)
def depthwise_reduce(x: Tensor, dy: Tensor, shift: Tensor, k: int, stride: int) -> Tensor:
    """Return the sums over positions of dy times what each tap sees, and of dy: (T, C) float64.

    x (B, C, H, W), dy (B, C, H', W'), shift (C,); taps in the order of the kernel's rows.
    """
    return kernels_for(x, k).depthwise_reduce(x, dy, shift, k, stride)


def _like_depthwise_grads(
    x: Tensor, dy: Tensor, w: Tensor, shift: Tensor, abc: Tensor, tap_abc: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=memory_format), torch.empty_like(w, dtype=torch.double)


@one_node(_like_depthwise_grads)
def depthwise_grads(
    x: Tensor, dy: Tensor, w: Tensor, shift: Tensor, abc: Tensor, tap_abc: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """Return dx (B, C, H, W) and dW (N, k, k, C) float64 from the gradients of the branches.

    abc (3, N, C) and tap_abc (3, C) are those of the package. dW is against the shifted map.
    """
    return kernels_for(x, w.shape[1]).depthwise_grads(x, dy, w, shift, abc, tap_abc, stride)


# --- which implementation -------------------------------------------------------------------------


def compiled(device_type: str) -> bool:
    """Whether float32 channels-last maps on this kind of device have compiled functions."""
    return _functions(device_type) is not None


# What torch.compiler.assume_constant_result does, which imports the whole compiler for it: 2.8 s of
# every start (`python -X importtime -c "import ghosttrain.models.depthwise"`).
compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels_for(x: Tensor, k: int) -> Any:
    """Return what computes for the map x and kernels of side k: compiled, or the definition."""
    fits = k in (3, 5) and x.dtype == torch.float32 and is_channels_last(x)
    return (_functions(x.device.type) if fits else None) or reference


@functools.cache
def _functions(device_type: str) -> Any:
    """Return C++ for a CPU, Triton for CUDA if it agrees with the definition there, else None.

    The first use of Triton on a device compares, so that a mistake in a kernel or a compiler costs
    speed and never a result.
    """
    if device_type == "cpu":
        return native.load()
    if device_type != "cuda":
        return None
    try:
        from ghosttrain.models.depthwise import triton

        triton.prove(torch.device("cuda"))
    except Exception as error:  # no Triton, no compiler, another driver: anything can be raised
        warnings.warn(
            f"Triton kernels are off: {' '.join(str(error).split())[:200]}; the same results come "
            "from PyTorch's operators, more slowly",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return triton
