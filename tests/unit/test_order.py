from __future__ import annotations

from itertools import islice, product

import pytest
import torch

from ghosttrain.data.order import (
    epoch_order,
    eval_batches,
    eval_indices,
    mix,
    steps_per_epoch,
    train_batches,
)
from ghosttrain.errors import UserError


def test_mix_of_one_integer_is_published_splitmix64():
    # First output for seed 1234567 in the reference implementation,
    # https://prng.di.unimi.it/splitmix64.c
    assert mix(1234567 ^ 1) == 6457827717110365317 >> 1


def test_mix_is_63_bits_and_never_collides_here():
    triples = list(product(range(30), range(30), range(30)))
    seeds = {mix(*t) for t in triples}
    assert len(seeds) == len(triples)
    assert all(0 <= s < 1 << 63 for s in seeds)
    assert len({mix(), mix(0), mix(0, 0), mix(0, 1), mix(1, 0)}) == 5


def test_mix_spreads_every_bit():
    flips = [
        bin(mix(n, 5) ^ mix(n ^ (1 << bit), 5)).count("1") for n in range(64) for bit in range(40)
    ]
    assert 30 < sum(flips) / len(flips) < 33  # half of 63
    assert min(flips) > 8


def test_mix_takes_negative_and_large_integers():
    assert mix(-1) == mix((1 << 64) - 1)
    assert mix(1 << 63) != mix(0)


def test_order_is_a_permutation_of_seed_and_epoch():
    orders = {tuple(epoch_order(97, s, e).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(97)) for order in orders)
    assert torch.equal(epoch_order(97, 3, 2), epoch_order(97, 3, 2))


def test_order_stays_what_it_was():
    assert epoch_order(8, 0, 0).tolist() == [0, 1, 4, 2, 3, 5, 6, 7]


def test_order_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    epoch_order(50, 1, 1)
    assert torch.equal(before, torch.get_rng_state())


def steps(n, world, micro, total, **kwargs):
    """[step][rank] -> list of micro-batches."""
    accumulate = total // (micro * world)
    ranks = [list(train_batches(n, 7, 3, total, micro, r, world, **kwargs)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    return [
        [batches[s : s + accumulate] for batches in ranks]
        for s in range(0, len(ranks[0]), accumulate)
    ]


@pytest.mark.parametrize(
    ("world", "micro"), [(1, 24), (1, 4), (2, 12), (2, 4), (3, 8), (3, 2), (4, 3)]
)
def test_images_of_a_step_depend_on_neither_ranks_nor_accumulation(world, micro):
    order = epoch_order(101, 7, 3).tolist()
    split = steps(101, world, micro, 24)
    assert len(split) == steps_per_epoch(101, 24) == 4  # 5 images are dropped
    for s, ranks in enumerate(split):
        images = [i for batches in ranks for batch in batches for i in batch]
        assert sorted(images) == sorted(order[24 * s : 24 * s + 24])
        assert all(len(batch) == micro for batches in ranks for batch in batches)


def test_batch_norm_sees_the_same_micro_batches_however_they_are_spread():
    def micro_batches(world):
        return [
            [batch for k in zip(*ranks, strict=True) for batch in k]
            for ranks in steps(101, world, 4, 24)
        ]

    assert micro_batches(1) == micro_batches(2) == micro_batches(3)


def test_resumes_at_any_step():
    for world, rank in ((1, 0), (2, 1)):
        whole = list(train_batches(50, 0, 1, 8, 2, rank, world))
        per_step = 8 // (2 * world)
        for start in range(steps_per_epoch(50, 8) + 1):
            rest = list(train_batches(50, 0, 1, 8, 2, rank, world, start_step=start))
            assert rest == whole[start * per_step :]


def test_a_batch_larger_than_the_data_says_what_fits():
    with pytest.raises(
        UserError, match=r"global_batch=64 .* 50 training images: type train.global_batch=8$"
    ):
        train_batches(50, 0, 0, 64, 64)
    with pytest.raises(UserError, match="add images"):
        steps_per_epoch(0, 1)


@pytest.mark.parametrize(
    ("n", "world", "micro_batch", "expected"),
    [
        (1970, 1, None, "type train.global_batch=128"),
        (1970, 3, None, "type train.global_batch=192"),
        (1970, 2, 32, "type train.global_batch=128"),
        (1970, 2, 256, "type train.global_batch=128 train.micro_batch=64"),
        (1437, 1, 512, "type train.global_batch=128 train.micro_batch=128"),
        (1000, 1, 128, "type train.global_batch=64 train.micro_batch=64"),
        (100, 1, None, "type train.global_batch=16"),
        (39, 1, None, "type train.global_batch=8"),
        (24, 2, 3, "type train.global_batch=6"),
        (15, 1, None, "type train.global_batch=8"),
        (3, 1, 3, "type train.global_batch=3"),
        (2, 1, 3, "type train.global_batch=2 train.micro_batch=2"),
        (3, 2, 8, "type train.global_batch=2 train.micro_batch=1"),
        (1, 1, None, "type train.global_batch=1"),
        (1, 2, None, "there are too few for 2 processes; add images"),
    ],
)
def test_the_batch_that_is_named_trains(n, world, micro_batch, expected):
    with pytest.raises(UserError) as refusal:
        steps_per_epoch(n, 2048, world, micro_batch)
    assert str(refusal.value).endswith(f"{n:,} training images: {expected}")
    typed = {k: int(v) for k, v in (w.split("=") for w in expected.split() if "=" in w)}
    if typed:
        batch = typed["train.global_batch"]
        micro = typed.get("train.micro_batch", micro_batch or batch // world)
        steps = 10 if n >= 160 else 4 if n >= 32 * world else 1
        assert batch % (micro * world) == 0 and n // batch >= steps


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="no multiple"):
        train_batches(500, 0, 0, 100, 34, 0, 3)


@pytest.mark.parametrize(("n", "world"), [(10, 1), (10, 3), (2, 3), (0, 2), (360, 7)])
def test_evaluation_counts_every_image_once(n, world):
    shares = [eval_indices(n, r, world) for r in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share in shares:
        batches = list(eval_batches(share, 4))
        assert [i for batch in batches for i in batch] == list(share)
        assert all(0 < len(batch) <= 4 for batch in batches)


def test_batches_are_made_as_they_are_asked_for():
    batches = train_batches(1 << 20, 0, 0, 1024, 1024)
    assert [len(b) for b in islice(batches, 2)] == [1024, 1024]


def test_one_process_is_meant_where_none_is_named():
    assert list(eval_indices(4)) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="type train.global_batch=1$"):
        steps_per_epoch(1, 4)
    with pytest.raises(UserError, match="too few for 1 process; add images"):
        steps_per_epoch(0, 4)
    with pytest.raises(UserError, match="too few for 2 processes; add images"):
        steps_per_epoch(1, 4, world=2)
