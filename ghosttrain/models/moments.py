"""Sums over all positions of a map that batch norm needs of a convolution's branches, and the
gradients they give, without a branch's map in memory.

Two families of functions. For 1x1 convolutions, matrix products of x with itself (`second_moment`)
and with the gradient (`cross_moment`). For depthwise ones `depthwise_stats`, `depthwise_reduce` and
`depthwise_grads`, each in three forms of one definition: PyTorch operators (any device and dtype,
the definition), C++ for float32 channels-last maps on a CPU (`native/depthwise.cpp`), Triton for
CUDA (`triton_depthwise.py`). Every function is one node for torch.compile.

All work on *shifted* maps: x - shift, where shift is near the channel's mean and zero padding
becomes 0 - shift. Then no variance is the small difference of large numbers. Sums run in float32
within a block (an image, or rows of `BLOCK` elements) and in float64 over blocks; autocast and
TF32 are off.

Shapes: B batch, C channels, H W map, H' W' map of the output, k kernel side, N branches, P
positions, T = k k + 1.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad

from ghosttrain import native

BLOCK, CUDA_BLOCK = 2**17, 2**22
"""Elements of x that are summed at a time: on a CPU half a MiB, which stays in cache. A GPU waits
for every start of a kernel: a step of ghostnetv3_100 on 128 images of 224 pixels, collapsed, took
268 ms with the small blocks and 176 to 187 ms with the large (measured on an H100)."""

Given = ParamSpec("Given")
Result = TypeVar("Result")


def one_node(
    fake: Callable[..., Any],
) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Make a function one node for torch.compile; `fake` returns empty results of its shapes.

    Called directly it stays a plain function: going through the dispatcher takes 0.1 ms, a
    tenth of what a small layer takes (measured here).
    """

    def decorate(function: Callable[Given, Result]) -> Callable[Given, Result]:
        name = f"ghosttrain::one_node_{function.__name__}"
        node = torch.library.custom_op(name, function, mutates_args=())
        node.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            return (node if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return call

    return decorate


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a convolution of x; None where autocast is off."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Switch autocast and TF32 off: matrix products have all digits of float32."""
    tf32 = x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    on = tf32 or autocast_dtype(x) is not None
    return _full_precision(x.device.type, tf32) if on else nullcontext()  # 50 us less


@contextmanager
def _full_precision(device_type: str, tf32: bool) -> Iterator[None]:
    try:
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = False
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = True


# --- 1x1 convolutions -----------------------------------------------------------------------------


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
        for block in x.split(_rows(x)):
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
    with full_precision(x):
        for rows, block in zip(g.split(_rows(x)), x.split(_rows(x)), strict=True):
            total += rows.t() @ (block - shift)
    return total


def _rows(x: Tensor) -> int:
    """Return how many rows of x (P, C) are summed at a time."""
    return max(1, (CUDA_BLOCK if x.is_cuda else BLOCK) // x.shape[1])


# --- depthwise convolutions -----------------------------------------------------------------------


def _like_depthwise_stats(x: Tensor, w: Tensor, shift: Tensor, stride: int) -> Tensor:
    return w.new_empty(2, w.shape[0] + 1, x.shape[1], dtype=torch.double)


@one_node(_like_depthwise_stats)
def depthwise_stats(x: Tensor, w: Tensor, shift: Tensor, stride: int) -> Tensor:
    """Return the sums over positions of every branch's output and of its square, float64.

    x (B, C, H, W), w (N, k, k, C), shift (C,) -> (2, N + 1, C). The outputs are those on the
    shifted map, the true ones less shift times the sum of the kernel; the last "branch" is the
    shifted map itself under the kernel's centre.
    """
    if (kernels := kernels_for(x, w.shape[1])) is not None:
        return kernels.depthwise_stats(x, w, shift, stride)
    padded = _padded(x, shift, w.shape[1])
    maps = (
        *(_convolve(padded, kernel, stride) for kernel in w),
        _centre(padded, w.shape[1], stride),
    )
    sums = [torch.stack([z.sum((0, 2, 3), dtype=torch.double) for z in (m, m * m)]) for m in maps]
    return torch.stack(sums, 1)


def _like_depthwise_reduce(x: Tensor, dy: Tensor, shift: Tensor, k: int, stride: int) -> Tensor:
    return x.new_empty(k * k + 1, x.shape[1], dtype=torch.double)


@one_node(_like_depthwise_reduce)
def depthwise_reduce(x: Tensor, dy: Tensor, shift: Tensor, k: int, stride: int) -> Tensor:
    """Return the sums over positions of dy times what each tap sees, and of dy: (T, C) float64.

    x (B, C, H, W), dy (B, C, H', W'), shift (C,); taps in the order of the kernel's rows.
    """
    if (kernels := kernels_for(x, k)) is not None:
        return kernels.depthwise_reduce(x, dy, shift, k, stride)
    taps = _tap_sums(_padded(x, shift, k), dy, k, stride).flatten(0, 1)
    return torch.cat([taps, dy.sum((0, 2, 3), dtype=torch.double)[None]])


def _like_depthwise_grads(
    x: Tensor, dy: Tensor, w: Tensor, shift: Tensor, coef: Tensor, one: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=_format(x)), torch.empty_like(w, dtype=torch.double)


@one_node(_like_depthwise_grads)
def depthwise_grads(
    x: Tensor, dy: Tensor, w: Tensor, shift: Tensor, coef: Tensor, one: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """Return dx (B, C, H, W) and dW (N, k, k, C) float64 from the gradients of the branches.

    The gradient of branch n's output z_n is coef[0, n] dy + coef[1, n] z_n + coef[2, n], with z_n
    on the shifted map; coef (3, N, C). Branches of one tap come summed: dx gets one[0] dy +
    one[1] (x - shift) + one[2] at the kernel's centre; one (3, C). dW is against the shifted map.
    """
    k = w.shape[1]
    if (kernels := kernels_for(x, k)) is not None:
        return kernels.depthwise_grads(x, dy, w, shift, coef, one, stride)
    coef, one = coef[..., None, None], one[..., None, None]
    padded = _padded(x, shift, k)
    dx, dw = torch.zeros_like(padded), []
    _centre(dx, k, stride).copy_(one[0] * dy + one[1] * _centre(padded, k, stride) + one[2])
    for n, kernel in enumerate(w):
        dz = coef[0, n] * dy + coef[1, n] * _convolve(padded, kernel, stride) + coef[2, n]
        filters = kernel.permute(2, 0, 1)[:, None]
        dx += grad.conv2d_input(padded.shape, filters, dz, stride, groups=len(filters))
        dw.append(_tap_sums(padded, dz, k, stride))
    edge = k // 2
    return dx[:, :, edge:-edge, edge:-edge].clone(memory_format=_format(x)), torch.stack(dw)


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


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


# --- which form -----------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def compiled(device_type: str) -> bool:
    """Whether float32 channels-last maps on this kind of device have compiled functions."""
    return _functions(device_type) is not None


def kernels_for(x: Tensor, k: int) -> Any:
    """Return the compiled functions that take the map x with kernels of side k, or None."""
    fits = k in (3, 5) and x.dtype == torch.float32 and _format(x) == torch.channels_last
    return _functions(x.device.type) if fits else None


@functools.cache
def _functions(device_type: str) -> Any:
    """Return C++ for a CPU, Triton for CUDA if it agrees with the definition there, else None.

    The Triton functions were written without such a device at hand: their first use compares, so
    that a mistake in them costs speed and never a result.
    """
    if device_type == "cpu":
        return native.load()
    if device_type != "cuda":
        return None
    try:
        from ghosttrain.models import triton_depthwise

        triton_depthwise.prove(torch.device("cuda"))
    except Exception as error:  # no Triton, no compiler, another driver: anything can be raised
        warnings.warn(
            f"Triton kernels are off: {' '.join(str(error).split())[:200]}; the same results come "
            "from PyTorch's operators, more slowly",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return triton_depthwise
