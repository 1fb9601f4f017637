"""What operators of this project share: one node for torch.compile, and full float32 precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

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


AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Devices that have it. (PyTorch 2.7 cannot compile the question which do.)"""


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a convolution of x; None where autocast is off."""
    device = x.device.type
    on = device in AUTOCAST and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def computes_in_bf16(setting: str, cuda: bool) -> bool:
    """Whether a setting of auto, fp32 or bf16 means bf16: `auto` does on CUDA alone."""
    return setting == "bf16" or (setting == "auto" and cuda)


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


def is_channels_last(x: Tensor) -> bool:
    """Whether x (B, C, H, W) lies in memory with its channels side by side."""
    return x.is_contiguous(memory_format=torch.channels_last)
