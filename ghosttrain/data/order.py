"""Which samples, in which order, on which rank: pure functions of (seed, epoch, rank, world).

Owns the seeds of everything that is drawn (`mix`) and the order of the samples. Knows nothing of
images. Because nothing here has a state, a run resumes in the middle of an epoch by asking for the
batches from a later step on.

    order of an epoch   |---------- step 0 ----------|---------- step 1 ----------| rest: dropped
    one step            | k0 r0 | k0 r1 | k1 r0 | k1 r1 |

Micro-batch k of rank r is slice k * world + r of its step. The images of a step depend on the
global batch alone, and the micro-batches (what batch norm sees) on the micro-batch alone: 2 ranks
without accumulation see the same micro-batches as 1 rank that accumulates twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ghosttrain.errors import UserError

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of splitmix64
_ORDER = 1  # keeps these seeds apart from what others mix from the same (seed, epoch)
_BALANCE = 7  # the streams of augment.py lie between


def mix(*ints: int) -> int:
    """Hash integers, in their order, into one seed in [0, 2^63).

    Each integer (its low 64 bits) is folded into the state, and the state goes through the output
    function of splitmix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195).
    """
    state = len(ints)
    for value in ints:
        state = ((state ^ value) + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 1


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Return this epoch's permutation (n,); the global random state is neither read nor moved."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(_ORDER, seed, epoch)))


def balanced_order(labels: np.ndarray, balance: str, seed: int, epoch: int) -> Tensor:
    """Return this epoch's samples (N,) where classes are drawn by `data.balance`.

    Number s stands for image s mod N, drawn for the (s div N)-th time: a rare image that is drawn
    twice in an epoch is augmented in two ways. A class of q draws an epoch goes through its images
    in one permutation after the other, so that all of them are seen equally often.

    Args:
        labels: (N,) class of every image.
        balance: `uniform`, or `sqrt`: in proportion to the root of a class's number of images.
        seed: the run's `seed`.
        epoch: from 0.
    """
    classes, counts = np.unique(labels, return_counts=True)
    n = len(labels)
    weights = np.ones(len(counts)) if balance == "uniform" else np.sqrt(counts)
    shares = n * weights / weights.sum()
    draws = np.floor(shares).astype(int)
    draws[np.argsort(draws - shares, kind="stable")[: n - draws.sum()]] += 1
    samples = []
    for label, count, quota in zip(classes.tolist(), counts.tolist(), draws.tolist(), strict=True):
        images = torch.from_numpy(np.flatnonzero(labels == label))
        first, last = divmod(epoch * quota, count)[0], -(-((epoch + 1) * quota) // count)
        rounds = [
            images[epoch_order(count, mix(_BALANCE, seed, label), turn)] + n * (turn - first)
            for turn in range(first, last)
        ]
        begin = epoch * quota - first * count
        samples.append(torch.cat(rounds)[begin : begin + quota] if rounds else images[:0])
    return torch.cat(samples)[epoch_order(n, seed, epoch)]


def repeated_order(n: int, repeats: int, seed: int, epoch: int) -> Tensor:
    """Return this epoch's samples (n,) under repeated augmentation: the first of a permutation,
    each `repeats` times in a row; the k-th time as number image + k n, which is augmented in
    another way.
    """
    images = epoch_order(n, seed, epoch)[: -(-n // repeats)]
    return (images[:, None] + n * torch.arange(repeats)).flatten()[:n]


def steps_per_epoch(
    n: int, global_batch: int, world: int = 1, micro_batch: int | None = None
) -> int:
    """Return how many whole global batches `n` images hold; an incomplete last one is dropped.

    Raises:
        UserError: not even one; names a batch that fits `world` processes and `micro_batch`.
    """
    if n < global_batch:
        raise UserError(
            f"train.global_batch={global_batch} is more than the {n:,} training images: "
            f"{_batch_that_trains(n, world, micro_batch)}"
        )
    return n // global_batch


def _batch_that_trains(n: int, world: int, micro_batch: int | None) -> str:
    """Say what to type: the largest batch (micro-batch x world x a power of two) that `n` images
    hold ten times, of few images four times; never less than 8 where they hold it. A micro-batch
    that is too large is halved.
    """
    if n < world:
        return f"there are too few for {world} process{'es' * (world > 1)}; add images"
    most = min(n, max(n // 10, min(n // 4, 16), 8, 2 * world))
    micro = micro_batch or 2  # batch norm needs two images
    while micro * world > most:
        micro = max(micro // 2, 2) if micro > 2 else 1
    batch = micro * world
    while 2 * batch <= most:
        batch *= 2
    smaller = micro_batch not in (None, micro)
    return f"type train.global_batch={batch}" + f" train.micro_batch={micro}" * smaller


def train_batches(
    n: int,
    seed: int,
    epoch: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    order: Tensor | None = None,
) -> Iterator[list[int]]:
    """Return this rank's micro-batches of one epoch, from global step `start_step` on.

    Args:
        n: training images.
        seed: the run's `seed`.
        epoch: from 0.
        global_batch: images per optimizer step, over all ranks and accumulation steps.
        micro_batch: images per forward pass and rank.
        rank: this process, in [0, world).
        world: processes.
        start_step: global steps of this epoch already done.
        order: the samples of this epoch (n,); None: `epoch_order`.

    Raises:
        UserError: `global_batch` exceeds `n`.
        ValueError: `global_batch` is no multiple of `micro_batch` x `world`.
    """
    chunk = micro_batch * world
    if global_batch % chunk:
        raise ValueError(f"{global_batch=} is no multiple of {micro_batch=} x {world=}")
    stop = steps_per_epoch(n, global_batch) * global_batch
    order = epoch_order(n, seed, epoch) if order is None else order
    starts = range(start_step * global_batch + rank * micro_batch, stop, chunk)
    return (order[start : start + micro_batch].tolist() for start in starts)


def eval_indices(n: int, rank: int = 0, world: int = 1) -> range:
    """Return this rank's share of `n` images: each image is on exactly one rank, nothing padded."""
    return range(rank, n, world)


def eval_batches(indices: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Cut indices into batches; the last one may be smaller."""
    return (list(indices[start : start + batch]) for start in range(0, len(indices), batch))
