"""`data.size_schedule`, `data.repeats`, `data.workers=auto` and the note about a slow loader."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from helpers import refusal

from ghosttrain import ranks
from ghosttrain.config.compose import compose
from ghosttrain.config.schema import AugmentConfig, DataConfig, TeacherConfig
from ghosttrain.data import loader as loading
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import train_loader, worker_count
from ghosttrain.data.order import epoch_order, repeated_order
from ghosttrain.distill.teacher import build_teacher

CPU = torch.device("cpu")


def digits(**more):
    return DataConfig(in_chans=1, mean=(0.3,), std=(0.4,), train_size=16, workers=0, **more)


def test_the_size_of_an_epoch_is_that_of_the_share_it_begins_with():
    data = DataConfig(size_schedule=[[0, 128], [0.4, 160], [0.8, 224]])
    assert [data.train_size_at(e / 10) for e in range(10)] == [128] * 4 + [160] * 4 + [224] * 2
    assert data.train_sizes == (128, 160, 224)
    assert DataConfig().train_sizes == (224,) and DataConfig().train_size_at(0.5) == 224


@pytest.mark.parametrize(
    "points", [[[0.1, 64]], [[0, 64], [0, 96]], [[0, 64.5]], [[0, 4]], [[1, 64]], "64", [[0]]]
)
def test_points_that_are_none_are_refused(points):
    with pytest.raises(ValueError, match="shares rise from 0"):
        DataConfig(size_schedule=points)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["data.size_schedule=[[0,32],[0.5,48]]"], ["ends with 48", "data.train_size=48"]),
        (["data.size_schedule=[[0,8],[0.5,64]]"], ["data.size_schedule=8", "sides of 33 or more"]),
        (["data.size_schedule=[[0,40],[0.5,64]]", "cache.dir=x"], ["cache.dir keeps"]),
        (["data.repeats=2", "data.balance=uniform"], ["data.repeats=1 or data.balance=none"]),
        (["data.repeats=2", "cache.dir=x"], ["cache.dir holds one output"]),
        (["data.workers=many"], ["data.workers=many is not a whole number of 0 or more, nor auto"]),
    ],
)
def test_settings_that_contradict_each_other(words, parts):
    refusal(lambda: compose(["+recipe=compact_kd", "model=ghostnetv3_050", *words]), *parts)


@pytest.mark.parametrize("workers", [0, 1])
def test_another_size_shows_the_same_crops(workers):
    data = digits().model_copy(update={"workers": workers})
    other = data.model_copy(update={"train_size": 24})
    train, _ = build_datasets(data)
    policy, plan = AugmentConfig(), [[3, 4], [900]]
    with train_loader(train, data, policy, CPU, views=[(32, "bicubic")]) as images:
        small = list(images.batches(plan, 2))
        large = list(images.batches(plan, 2, size=24))
    with train_loader(train, other, policy, CPU, views=[(32, "bicubic")]) as images:
        expected = list(images.batches(plan, 2))
    for one, two, three in zip(small, large, expected, strict=True):
        assert one.images.shape[-1] == 16 and two.images.shape[-1] == 24
        assert torch.equal(two.images, three.images)
        for view in one.views:
            assert torch.equal(one.views[view], two.views[view])


def test_a_teacher_sees_its_own_size_while_the_student_sees_less():
    """Not the student's small images, enlarged."""
    plain = DataConfig(train_size=96, mean=(0.3,) * 3, std=(0.3,) * 3)
    rising = plain.model_copy(update={"size_schedule": ((0.0, 40), (0.5, 96))})
    digits_teacher = TeacherConfig(name="digits", weights="digits")
    names = [str(digit) for digit in range(10)]
    views = [build_teacher(digits_teacher, names, data, CPU).views for data in (plain, rising)]
    assert views[0] == () and [side for side, _ in views[1]] == [64]


@pytest.mark.parametrize("n, repeats", [(12, 3), (13, 3), (10, 4), (5, 8), (7, 1)])
def test_repeats_share_a_batch_and_are_drawn_apart(n, repeats):
    order = repeated_order(n, repeats, seed=3, epoch=2)
    assert len(order) == n
    images, times = order % n, order // n
    chosen = epoch_order(n, 3, 2)[: -(-n // repeats)]
    for k, image in enumerate(chosen.tolist()):
        block = slice(k * repeats, (k + 1) * repeats)
        assert set(images[block].tolist()) == {image}
        assert times[block].tolist() == list(range(len(times[block])))
    assert len(set(order.tolist())) == n  # no draw twice


def test_the_draws_of_an_image_differ():
    data = digits()
    train, _ = build_datasets(data)
    order = repeated_order(len(train), 3, 0, 0)[:6].tolist()
    with train_loader(train, data, AugmentConfig(), CPU) as images:
        (batch,) = images.batches([order])
    assert batch.labels[:3].unique().numel() == 1
    assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize(
    "cores, local_ranks, device, expected",
    [(16, 1, "cuda", 15), (64, 8, "cuda", 7), (64, 1, "cuda", 16), (1, 1, "cuda", 0),
     (2, 1, "cpu", 1), (1, 1, "cpu", 0), (16, 1, "cpu", 4), (16, 4, "cpu", 1), (2, 8, "cuda", 0)],
)  # fmt: skip
def test_workers_by_cores_and_ranks(monkeypatch, cores, local_ranks, device, expected):
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(ranks, "local_world_size", lambda: local_ranks)
    assert worker_count("auto", device) == expected
    assert worker_count(3, device) == 3


def waits(monkeypatch, slow_image, slow_model, cores=4, calls=2):
    """The notes of a run whose image and step take so many (made-up) seconds."""
    now = [100.0]
    monkeypatch.setattr(loading.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loading, "cores", lambda: cores)
    data = digits()
    train, _ = build_datasets(data)
    notes = []
    with train_loader(train, data, AugmentConfig(), CPU) as images:
        real = train.open

        def opened(index):
            now[0] += slow_image
            return real(index)

        object.__setattr__(train, "open", opened)
        for _ in range(calls):
            for _ in images.batches([[k] for k in range(20)]):
                now[0] += slow_model
            notes += images.slow_note()
    return notes


def test_a_slow_loader_is_said_once_with_what_to_type(monkeypatch):
    (note,) = waits(monkeypatch, slow_image=3, slow_model=2)
    assert "59 % of the time" in note or "60 % of the time" in note
    assert "data.workers=0" in note and note.endswith("type data.workers=3")


def test_with_all_cores_at_work_it_says_what_else_helps(monkeypatch):
    (note,) = waits(monkeypatch, slow_image=3, slow_model=2, cores=0)
    assert "save the images no larger than needed" in note


def test_a_fast_loader_and_a_short_run_are_not_spoken_of(monkeypatch):
    assert waits(monkeypatch, slow_image=0.5, slow_model=2) == []
    assert waits(monkeypatch, slow_image=0.3, slow_model=0.2, calls=1) == []


def test_time_is_counted_for_real():
    data = digits()
    train, _ = build_datasets(data)
    with train_loader(train, data, AugmentConfig(), CPU) as images:
        for _ in images.batches([[k] for k in range(5)]):
            time.sleep(0.02)
    assert images._used >= 0.08 and 0 < images._waited
    assert np.isfinite(images._waited)
