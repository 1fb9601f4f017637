"""The three functions in Triton, for CUDA.

On an H100 it was right to 3e-7, gave the same bits again, and took 0.17 to 0.68 of the time of
PyTorch's operators (`python scripts/gpu_check.py triton_kernels`). Without a GPU it is checked
through Triton's interpreter and compiled only (`tests/numerics/test_triton.py`); on first use
`prove` compares it with the definition. Importing it raises ImportError where there is no Triton;
before Triton 3.3 (PyTorch 2.7), which has no lists of tiles, nothing compiles and `prove` raises.

The work is bound by memory, so a pass reads x once. A program takes a block of channels, which lie
side by side in memory, and a share of the output positions. It walks its share in tiles (positions,
channels), and what the taps of a tile see stays in registers for all branches; that the taps of
neighbouring positions overlap is left to the caches. Sums are kept per element of the tile, in
float32; at the end a program adds them over the tile and writes them down as its own part. Parts
are added in float64, in a fixed order and without atomics: the same input gives the same bits.

Shapes are those of the package; what is no map is contiguous: rows of C. P counts output positions,
Q input positions, p and q are one of them, and c is a channel. In a kernel a tile is (positions,
channels), a row (1, channels).
"""
# mypy: allow-untyped-defs, no-check-untyped-defs
# Kernels, the functions without types, are written in Triton's own language.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghosttrain.models.depthwise import reference

TILE = 256
"""Elements of a tile: one per thread of WARPS warps, so that a thread's registers hold the sums of
3 branches with 5x5 taps (253 to 255 of 255 on compute capability 9.0, says ptxas; none spilled)."""

WARPS = 8

CHANNELS = 16
"""Channels of a tile: 64 bytes. More would often idle: compact networks have 12, 20, 36 or 40."""

PROGRAMS = 2048
"""About how many programs a pass has: several for every place on a large GPU, and still few, so
that their parts are small beside the maps."""

LEAST = 4
"""Tiles of a program at least, so that adding over a tile is seldom."""

SCRATCH = 2**26
"""Bytes for gradients of branches at a time; more only where one image needs more."""

TOLERANCE = 1e-5
"""Largest error that `prove` takes for rounding, relative to the largest value of a result.
Float32 sums of some hundred products are right to about 1e-6; one term too many or too few makes
1e-3 or more."""


class Geometry(NamedTuple):
    """Sizes of a pass, and how it is cut. Those behind `share` are constants of the kernel."""

    P: int
    Q: int
    C: int
    H: int
    W: int
    Ho: int
    Wo: int
    share: int
    N: Any
    k: Any
    stride: Any
    positions: Any
    channels: Any


# --- inside a kernel ------------------------------------------------------------------------------


@triton.jit
def _block(g):
    """The channels of this program: a row."""
    return tl.program_id(0) * g.channels + tl.arange(0, g.channels)[None, :]


@triton.jit
def _tile(start, g):
    """The positions of a tile: (positions, 1)."""
    return start + tl.arange(0, g.positions)[:, None]


@triton.jit
def _at(position, c, g):
    """Offset in a map; of 64 bits, for maps of more than 2^31 elements."""
    return position.to(tl.int64) * g.C + c


@triton.jit
def _rows(table, COUNT, c, g):
    """Rows of a table (COUNT, C)."""
    rows = ()
    for r in tl.static_range(COUNT):
        rows = rows + (tl.load(table + r * g.C + c, mask=c < g.C, other=0.0),)
    return rows


@triton.jit
def _taps(x, shift, p, c, g):
    """What every tap sees on the shifted map: k k tiles, 0 where p is beyond the last."""
    b, i, j = p // (g.Ho * g.Wo), p // g.Wo % g.Ho, p % g.Wo
    top, left = i * g.stride - g.k // 2, j * g.stride - g.k // 2
    exists = (p < g.P) & (c < g.C)
    shift, origin = tl.where(exists, shift, 0.0), x + _at((b * g.H + top) * g.W + left, c, g)
    taps = ()
    for s in tl.static_range(g.k):
        row = exists & (top + s >= 0) & (top + s < g.H)
        for t in tl.static_range(g.k):
            inside = row & (left + t >= 0) & (left + t < g.W)
            seen = tl.load(origin + (s * g.W + t) * g.C, mask=inside, other=0.0)
            taps = taps + (seen - shift,)
    return taps


@triton.jit
def _convolve(taps, kernels, n, g):
    """z_n: a tile."""
    z = taps[0] * kernels[n * g.k * g.k]
    for t in tl.static_range(1, g.k * g.k):
        z += taps[t] * kernels[n * g.k * g.k + t]
    return z


@triton.jit
def _zeros(COUNT, g):
    """COUNT tiles of 0."""
    return (tl.zeros((g.positions, g.channels), tl.float32),) * COUNT


@triton.jit
def _plus(sums, terms, COUNT):
    """The tiles of two lists, added one by one."""
    total = ()
    for r in tl.static_range(COUNT):
        total = total + (sums[r] + terms[r],)
    return total


@triton.jit
def _write(parts, sums, COUNT, c, g):
    """Write what tiles sum to over their positions to this program's part (COUNT, C)."""
    for r in tl.static_range(COUNT):
        at = _at(tl.program_id(1) * COUNT + r, c, g)
        tl.store(parts + at, tl.sum(sums[r], 0, keep_dims=True), mask=c < g.C)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _stats_kernel(x, w, shift, parts, g):
    """Parts (2 (N + 1), C): sums of z_n and of the map itself, and of their squares."""
    c = _block(g)
    kernels, shifts = _rows(w, g.N * g.k * g.k, c, g), _rows(shift, 1, c, g)
    sums = _zeros(2 * (g.N + 1), g)
    first = tl.program_id(1) * g.share
    for start in range(first, min(first + g.share, g.P), g.positions):
        taps = _taps(x, shifts[0], _tile(start, g), c, g)
        maps = ()
        for n in tl.static_range(g.N):
            maps = maps + (_convolve(taps, kernels, n, g),)
        maps = maps + (taps[g.k * g.k // 2],)
        squares = ()
        for n in tl.static_range(g.N + 1):
            squares = squares + (maps[n] * maps[n],)
        sums = _plus(sums, maps + squares, 2 * (g.N + 1))
    _write(parts, sums, 2 * (g.N + 1), c, g)


@triton.jit
def _reduce_kernel(x, dy, shift, parts, g):
    """Parts (T, C): sums of dy times what each tap sees, and of dy."""
    c = _block(g)
    shifts = _rows(shift, 1, c, g)
    sums = _zeros(g.k * g.k + 1, g)
    first = tl.program_id(1) * g.share
    for start in range(first, min(first + g.share, g.P), g.positions):
        p = _tile(start, g)
        taps = _taps(x, shifts[0], p, c, g)
        dy_p = tl.load(dy + _at(p, c, g), mask=(p < g.P) & (c < g.C), other=0.0)
        terms = ()
        for t in tl.static_range(g.k * g.k):
            terms = terms + (dy_p * taps[t],)
        sums = _plus(sums, terms + (dy_p,), g.k * g.k + 1)
    _write(parts, sums, g.k * g.k + 1, c, g)


@triton.jit
def _branches_kernel(x, dy, w, shift, abc, dz, parts, g):
    """Gradients dz (N, P, C) of all z_n, and parts (N k k, C): their sums with the taps."""
    c = _block(g)
    kernels, shifts = _rows(w, g.N * g.k * g.k, c, g), _rows(shift, 1, c, g)
    abcs = _rows(abc, 3 * g.N, c, g)
    sums = _zeros(g.N * g.k * g.k, g)
    first = tl.program_id(1) * g.share
    for start in range(first, min(first + g.share, g.P), g.positions):
        p = _tile(start, g)
        taps = _taps(x, shifts[0], p, c, g)
        exists = (p < g.P) & (c < g.C)
        dy_p = tl.load(dy + _at(p, c, g), mask=exists, other=0.0)
        terms = ()
        for n in tl.static_range(g.N):
            z = _convolve(taps, kernels, n, g)
            dz_p = abcs[n] * dy_p + abcs[g.N + n] * z + abcs[2 * g.N + n]
            tl.store(dz + _at(n * g.P + p, c, g), dz_p, mask=exists)
            for t in tl.static_range(g.k * g.k):
                terms = terms + (dz_p * taps[t],)
        sums = _plus(sums, terms, g.N * g.k * g.k)
    _write(parts, sums, g.N * g.k * g.k, c, g)


@triton.jit
def _input_kernel(x, dy, w, shift, tap_abc, dz, dx, g):
    """The gradient dx, from dz (N, P, C) and the branches of one tap."""
    c = _block(g)
    kernels, shifts = _rows(w, g.N * g.k * g.k, c, g), _rows(shift, 1, c, g)
    tap = _rows(tap_abc, 3, c, g)
    first = tl.program_id(1) * g.share
    for start in range(first, min(first + g.share, g.Q), g.positions):
        q = _tile(start, g)
        b, h, v = q // (g.H * g.W), q // g.W % g.H, q % g.W
        exists = (q < g.Q) & (c < g.C)

        centre = exists & (h % g.stride == 0) & (v % g.stride == 0)
        p = (b * g.Ho + h // g.stride) * g.Wo + v // g.stride
        dy_p = tl.load(dy + _at(p, c, g), mask=centre, other=0.0)
        seen = tl.load(x + _at(q, c, g), mask=centre, other=0.0) - shifts[0]
        dx_q = tl.where(centre, tap[0] * dy_p + tap[1] * seen + tap[2], 0.0)
        for s in tl.static_range(g.k):
            for t in tl.static_range(g.k):
                # Tap (s, t) of the output at (i, j) / stride sees q, if there is such an output.
                i, j = h + g.k // 2 - s, v + g.k // 2 - t
                hit = exists & (i >= 0) & (i < g.H) & (i % g.stride == 0)
                hit &= (j >= 0) & (j < g.W) & (j % g.stride == 0)
                p = (b * g.Ho + i // g.stride) * g.Wo + j // g.stride
                for n in tl.static_range(g.N):
                    dz_p = tl.load(dz + _at(n * g.P + p, c, g), mask=hit, other=0.0)
                    dx_q += kernels[(n * g.k + s) * g.k + t] * dz_p
        tl.store(dx + _at(q, c, g), dx_q, mask=exists)


# --- the functions --------------------------------------------------------------------------------


def depthwise_stats(x: Tensor, w: Tensor, shift: Tensor, stride: int) -> Tensor:
    """Return the sums of every branch's output and of its square; see `depthwise.depthwise_stats`.

    Raises ValueError where x is no channels-last float32 map.
    """
    N, k, _, C = w.shape
    _check("x", x, x.shape)
    g = _geometry(x, N, k, stride)
    return _sum(_stats_kernel, 2 * (N + 1), (x, w, shift), g).view(2, N + 1, C)


def depthwise_reduce(x: Tensor, dy: Tensor, shift: Tensor, k: int, stride: int) -> Tensor:
    """Return the sums of dy times what each tap sees; see `depthwise.depthwise_reduce`.

    Raises ValueError where x or dy is no channels-last float32 map or dy has another size.
    """
    g = _geometry(x, 0, k, stride)
    _check("x", x, x.shape)
    _check("dy", dy, (len(x), g.C, g.Ho, g.Wo))
    return _sum(_reduce_kernel, k * k + 1, (x, dy, shift), g)


def depthwise_grads(
    x: Tensor, dy: Tensor, w: Tensor, shift: Tensor, abc: Tensor, tap_abc: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """Return dx and dW from the gradients of the branches; see `depthwise.depthwise_grads`.

    Every dz_n is written to memory and read back by a second kernel: a program cannot see the tiles
    of its neighbours, and z_n anew at the k k outputs around a position would cost k k times as
    much. Images go through in groups, so that this memory is small (`SCRATCH`).

    Raises ValueError as `depthwise_reduce` does.
    """
    N, k, _, C = w.shape
    g = _geometry(x, N, k, stride)
    _check("x", x, x.shape)
    _check("dy", dy, (len(x), C, g.Ho, g.Wo))
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dw = w.new_zeros(N * k * k, C, dtype=torch.double)
    images = max(1, SCRATCH // (4 * max(1, N * C * g.Ho * g.Wo)))
    for some_x, some_dy, some_dx in zip(*(m.split(images) for m in (x, dy, dx)), strict=True):
        g = _geometry(some_x, N, k, stride)
        dz = x.new_empty(N * g.P * C)
        dw += _sum(_branches_kernel, N * k * k, (some_x, some_dy, w, shift, abc, dz), g)
        programs = triton.cdiv(g.Q, g.share)
        _launch(_input_kernel, programs, (some_x, some_dy, w, shift, tap_abc, dz, some_dx), g)
    return dx, dw.view_as(w)


def prove(device: torch.device) -> None:
    """Compare the three functions with the definition in float64, on small random maps.

    Raises RuntimeError where one is off by more than `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for N, k, stride, C in ((3, 3, 1, 20), (1, 5, 2, 32)):
        x, dy = normal(2, 7, 5, C), normal(2, -(-7 // stride), -(-5 // stride), C)
        x, dy = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
        w, shift, abc, tap_abc = normal(N, k, k, C), normal(C), normal(3, N, C), normal(3, C)
        _compare(depthwise_stats, reference.depthwise_stats, x, w, shift, stride)
        _compare(depthwise_reduce, reference.depthwise_reduce, x, dy, shift, k, stride)
        _compare(depthwise_grads, reference.depthwise_grads, x, dy, w, shift, abc, tap_abc, stride)


def _compare(function: Callable[..., Any], definition: Callable[..., Any], *given: Any) -> None:
    results = function(*given)
    truths = definition(*(v.double() if isinstance(v, Tensor) else v for v in given))
    if isinstance(results, Tensor):
        results, truths = (results,), (truths,)
    for result, truth in zip(results, truths, strict=True):
        error = ((result - truth).abs().max() / truth.abs().max()).item()
        if not error <= TOLERANCE:  # NaN too
            raise RuntimeError(
                f"{function.__name__} is off by {error:.1e} of its largest value, {TOLERANCE:.0e} "
                "is rounding"
            )


def _check(name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    last = given.is_contiguous(memory_format=torch.channels_last)
    if given.shape != shape or given.dtype != torch.float32 or not last:
        raise ValueError(
            f"{name} is {given.dtype} {tuple(given.shape)} with strides {given.stride()}; expected "
            f"a channels-last float32 map {tuple(shape)}"
        )


def _geometry(x: Tensor, N: int, k: int, stride: int) -> Geometry:
    B, C, H, W = x.shape
    Ho, Wo = -(-H // stride), -(-W // stride)
    channels = min(CHANNELS, triton.next_power_of_2(C))
    positions = TILE // channels
    tiles = triton.cdiv(B * Ho * Wo, positions)
    programs = max(1, PROGRAMS // triton.cdiv(C, channels))
    share = max(LEAST, triton.cdiv(tiles, programs)) * positions
    constants = (tl.constexpr(value) for value in (N, k, stride, positions, channels))
    return Geometry(B * Ho * Wo, B * H * W, C, H, W, Ho, Wo, share, *constants)


def _sum(kernel: Any, count: int, tensors: tuple[Tensor, ...], g: Geometry) -> Tensor:
    """Return what the parts of a kernel add up to: (count, C) float64."""
    programs = triton.cdiv(g.P, g.share)
    parts = tensors[0].new_empty(programs, count, g.C)
    _launch(kernel, programs, (*tensors, parts), g)
    return parts.sum(0, dtype=torch.double)


def _launch(kernel: Any, programs: int, tensors: tuple[Tensor, ...], g: Geometry) -> None:
    with torch.cuda.device_of(tensors[0]):
        grid = triton.cdiv(g.C, g.channels.value), programs
        kernel[grid](*tensors, g, num_warps=WARPS)
