"""Triton functions against the definition in float64, where there is no GPU.

Triton's interpreter runs them on a CPU. It must be chosen before Triton is imported, so a process
of its own does the work; another one has the kernels compiled for a GPU, which is not run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ghosttrain.models.depthwise import reference

try:
    VERSION = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
except importlib.metadata.PackageNotFoundError:
    pytest.skip("no Triton here", allow_module_level=True)

NAMES = ("depthwise_stats", "depthwise_reduce", "depthwise_grads")
ROUNDING = 3e-6

Call = Callable[..., Any]


@contextmanager
def another_process(**environment: str) -> Iterator[Call]:
    """Give what calls functions of this file in a process with that environment."""
    environment |= {"GHOSTTRAIN_NATIVE": "0"}  # no compiling of C++
    spawn = multiprocessing.get_context("spawn")
    with (
        patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as pool,
    ):
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    """Call a function where Triton is interpreted."""
    if VERSION < (3, 7):
        pytest.skip("the interpreter of this Triton knows no lists of tiles")
    with another_process(TRITON_INTERPRET="1") as call:
        yield call


def arguments(k: int, stride: int, N: int, C: int, B: int, H: int, W: int) -> dict[str, tuple]:
    """Return random arguments of every function: float32, channels-last maps, x far from 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    x, shift = last(normal(B, C, H, W) + 3), normal(C) + 3
    dy = last(normal(B, C, -(-H // stride), -(-W // stride)))
    w, abc = normal(N, k, k, C), normal(3, N, C)
    tap_abc = torch.zeros(3, C) if N == 1 else normal(3, C)  # also without such branches
    given = (
        (x, w, shift, stride),
        (x, dy, shift, k, stride),
        (x, dy, w, shift, abc, tap_abc, stride),
    )
    return dict(zip(NAMES, given, strict=True))


def definition(name: str, *given: Any) -> tuple[Tensor, ...]:
    """Return the results in float64; that of the gradients wants a branch, and gets one of 0."""
    given = tuple(v.double() if isinstance(v, Tensor) else v for v in given)
    if name != "depthwise_grads":
        return (getattr(reference, name)(*given),)
    x, dy, w, shift, abc, tap_abc, stride = given
    w, abc = torch.cat([w, w.new_zeros(1, *w.shape[1:])]), torch.cat([abc, 0 * tap_abc[:, None]], 1)
    dx, dw = reference.depthwise_grads(x, dy, w, shift, abc, tap_abc, stride)
    return dx, dw[:-1]


def largest_error(*case: int, **cut: int) -> float:
    """Return the largest error of all results, each relative to the largest value in it.

    `cut` replaces numbers that say how work is cut into programs.
    """
    from ghosttrain.models.depthwise import triton as kernels

    worst = 0.0
    for name, given in arguments(*case).items():
        with patch.multiple(kernels, **cut):
            results = getattr(kernels, name)(*given)
        results = results if isinstance(results, tuple) else (results,)
        assert results[-1].dtype == torch.double
        for result, truth in zip(results, definition(name, *given), strict=True):
            assert result.shape == truth.shape
            if truth.numel():
                worst = max(worst, float((result - truth).abs().max() / truth.abs().max()))
    return worst


@pytest.mark.parametrize(
    "case",
    [
        # k, stride, N, C, B, H, W
        (3, 1, 3, 20, 2, 7, 5),
        (3, 2, 2, 8, 2, 7, 5),
        (3, 2, 1, 3, 1, 6, 9),
        (3, 1, 0, 20, 1, 5, 6),
        (3, 1, 1, 8, 1, 1, 1),
        (5, 1, 2, 3, 2, 5, 7),
        (5, 2, 3, 8, 1, 7, 5),
        (5, 2, 0, 8, 1, 4, 3),
        (5, 1, 1, 20, 1, 2, 3),
    ],
)
def test_as_defined(interpreted: Call, case: tuple[int, ...]) -> None:
    assert interpreted(largest_error, *case, TILE=1024) < ROUNDING


@pytest.mark.parametrize(
    "cut",
    [
        {"TILE": 64, "LEAST": 1},  # programs of one tile
        {"TILE": 64, "LEAST": 1, "PROGRAMS": 2},  # two tiles in the first, one in the last
        {"SCRATCH": 2 * 4 * 3 * 16},  # images two by two, the last alone
    ],
)
def test_however_it_is_cut(interpreted: Call, cut: dict[str, int]) -> None:
    assert interpreted(largest_error, 3, 2, 1, 3, 3, 7, 7, **cut) < ROUNDING


def prove() -> None:
    from ghosttrain.models.depthwise import triton as kernels

    kernels.prove(torch.device("cpu"))


def prove_with_error(wrong: str) -> None:
    """Run `prove` on the definition in place of the kernels, one function being a little off."""
    from ghosttrain.models.depthwise import triton as kernels

    def replacement(name: str) -> Call:
        @functools.wraps(getattr(kernels, name))
        def function(*given: Any) -> Any:
            result = getattr(reference, name)(*given)
            last = result[-1] if isinstance(result, tuple) else result
            last *= 1 + 1e-4 * (name == wrong)
            return result

        return function

    with patch.multiple(kernels, **{name: replacement(name) for name in NAMES}):
        kernels.prove(torch.device("cpu"))


def test_proves_itself(interpreted: Call) -> None:
    interpreted(prove)


@pytest.mark.parametrize("name", NAMES)
def test_proof_finds_an_error(interpreted: Call, name: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name} is off by 1.0e-04"):
        interpreted(prove_with_error, name)
    interpreted(prove_with_error, "none")


def refuse(name: str, index: int, change: Callable[[Tensor], Tensor]) -> None:
    from ghosttrain.models.depthwise import triton as kernels

    given = list(arguments(3, 2, 1, 8, 2, 5, 7)[name])
    given[index] = change(given[index])
    getattr(kernels, name)(*given)


def cropped(x: Tensor) -> Tensor:
    return x[:, :, 1:].clone(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "name, index, change",
    [
        ("depthwise_stats", 0, Tensor.double),
        ("depthwise_reduce", 0, Tensor.contiguous),
        ("depthwise_reduce", 1, Tensor.contiguous),
        ("depthwise_grads", 0, Tensor.double),
        ("depthwise_grads", 1, Tensor.contiguous),
        ("depthwise_grads", 1, cropped),
    ],
)
def test_refuses_other_maps(
    interpreted: Call, name: str, index: int, change: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(ValueError, match="expected a channels-last float32 map"):
        interpreted(refuse, name, index, change)


def compiled(capability: int, case: tuple[int, ...]) -> list[str]:
    """Return the names of the kernels that were compiled for an NVIDIA GPU that is not here."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ghosttrain.models.depthwise import triton as kernels

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    names = []

    def launch(kernel: Any, programs: int, tensors: tuple[Tensor, ...], g: Any) -> None:
        binary = kernel.warmup(*tensors, g, num_warps=kernels.WARPS, grid=(1,))
        assert binary.asm["cubin"]
        names.append(kernel.__name__)

    triton.runtime.driver.set_active(Driver())
    with patch.object(kernels, "_launch", launch):
        for name, given in arguments(*case).items():
            getattr(kernels, name)(*given)
    return names


def test_compiles_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes what no compiler takes."""
    with another_process(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) as call:
        names = call(compiled, 80, (3, 2, 1, 20, 2, 9, 7))
    assert names == ["_stats_kernel", "_reduce_kernel", "_branches_kernel", "_input_kernel"]
