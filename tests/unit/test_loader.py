from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import count_calls
from PIL import Image

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.augment import eval_transform, normalise, train_transform
from ghosttrain.data.datasets import ArrayDataset, build_datasets
from ghosttrain.data.loader import Loader, eval_loader, train_loader
from ghosttrain.data.order import eval_batches, eval_indices, steps_per_epoch, train_batches
from ghosttrain.errors import UserError

CPU = torch.device("cpu")
N = 24


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for n in range(N // 2):
                small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
                image = small.resize((70, 50 + n), Image.Resampling.BICUBIC)
                image.save(tmp_path / split / label / f"{n:02}.jpg")
    return DataConfig(name="folder", root=str(tmp_path), train_size=16, eval_size=16, workers=0)


def with_workers(data, workers):
    return data.model_copy(update={"workers": workers})


def plan(epoch, **kwargs):
    return train_batches(N, 5, epoch, 8, 4, **kwargs)


def run(data, workers, epochs=(0, 1)):
    """All batches of some epochs, from one loader."""
    data = with_workers(data, workers)
    with train_loader(build_datasets(data)[0], data, AugmentConfig(), CPU) as loader:
        return [batch for e in epochs for batch in loader.batches(plan(e), draw_number=e)]


def assert_equal(a, b):
    """The same batches, whole: views and cached too, bit for bit."""
    assert len(a) == len(b) > 0
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def alone(transform, dataset, draw_number, index):
    """What a transform makes of one image, without a loader: (1, C, S, S)."""
    return torch.stack(transform(lambda: dataset.open(index), draw_number, index))


def children():
    """Process numbers of this process's children."""
    pids = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):  # a thread that just ended
            pids |= set(Path(f"/proc/self/task/{task}/children").read_text().split())
    return pids


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_no_bit(data, workers):
    assert_equal(run(data, workers), run(data, 0))


def test_batches_hold_what_the_transform_makes(data):
    train, _ = build_datasets(data)
    transform = train_transform(data, AugmentConfig())
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    for images, labels, indices, views, cached, broken, boxes in run(data, 0, epochs=(1,)):
        assert views == {} and cached is None and broken == () and boxes is None
        assert images.dtype == torch.float32 and images.is_contiguous()
        assert labels.dtype == indices.dtype == torch.int64
        assert labels.tolist() == train.labels[indices].tolist()
        pixels = torch.cat([alone(transform, train, 1, i) for i in indices.tolist()])
        assert torch.equal(images, normalise(pixels, mean, std))
    order = [batch[2].tolist() for batch in run(data, 0, epochs=(1,))]
    assert order == list(plan(1))


def test_images_of_an_epoch_depend_on_its_draw_number_alone(data):
    first, again = run(data, 0, epochs=(0, 1)), run(data, 0, epochs=(1,))
    assert_equal(first[len(again) :], again)
    for draw_number, same in ((1, True), (0, False)):
        with train_loader(build_datasets(data)[0], data, AugmentConfig(), CPU) as loader:
            other = list(loader.batches(plan(1), draw_number))
        assert torch.equal(other[0][0], again[0][0]) is same


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_within_an_epoch_to_the_bit(data, workers):
    whole = run(data, 0, epochs=(0, 1))
    steps = steps_per_epoch(N, 8)
    data = with_workers(data, workers)
    with train_loader(build_datasets(data)[0], data, AugmentConfig(), CPU) as loader:
        part = list(loader.batches(plan(0, start_step=1), 0)) + list(loader.batches(plan(1), 1))
    assert len(whole) == 4 * steps
    assert_equal(part, whole[2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_left_early_does_not_disturb_the_next(data, workers):
    whole = run(data, 0)
    data = with_workers(data, workers)
    with train_loader(build_datasets(data)[0], data, AugmentConfig(), CPU) as loader:
        for _ in range(3):
            left = loader.batches(plan(0), 0)
            assert torch.equal(next(left)[0], whole[0][0])
            left.close()
        assert_equal(list(loader.batches(plan(1), 1)), whole[len(whole) // 2 :])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_states_stay(data, workers):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    run(data, workers)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("in_chans", [1, 3])
def test_memory_format_is_the_one_asked_for(data, in_chans):
    data = data.model_copy(
        update={"in_chans": in_chans, "mean": (0.5,) * in_chans, "std": (0.2,) * in_chans}
    )
    train, _ = build_datasets(data)
    pair = []
    for channels_last in (False, True):
        with train_loader(train, data, AugmentConfig(), CPU, channels_last) as loader:
            images = next(loader.batches(plan(0)))[0]
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert images.is_contiguous(memory_format=wanted) and images.shape[1] == in_chans
        pair.append(images)
    assert torch.equal(*pair)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_yields_every_image_once_as_the_transform_makes_it(data, workers, world):
    data = with_workers(data, workers)
    _, val = build_datasets(data)
    transform, seen = eval_transform(data), []
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    for rank in range(world):
        with eval_loader(val, data, CPU) as loader:
            batches = list(loader.batches(eval_batches(eval_indices(N, rank, world), 5)))
            assert_equal(
                batches, list(loader.batches(eval_batches(eval_indices(N, rank, world), 5)))
            )
        for images, labels, indices, *_ in batches:
            pixels = torch.cat([alone(transform, val, 0, i) for i in indices.tolist()])
            assert torch.equal(images, normalise(pixels, mean, std))
            assert labels.tolist() == val.labels[indices].tolist()
            seen += indices.tolist()
    assert sorted(seen) == list(range(N))


def test_more_workers_than_cores_or_batches_is_no_warning(data):
    data = with_workers(data, 2 * (os.cpu_count() or 1) + 1)
    with eval_loader(build_datasets(data)[1], data, CPU) as loader:
        assert len(list(loader.batches([[0], [1]]))) == 2


# --- views and cached --------------------------------------------------------------------------

VIEWS = ((40, "bilinear"), (25, "bicubic"))


class Stored:
    """A cache that outputs with what it was asked, and by whom."""

    def read(self, draw_number, indices):
        assert isinstance(draw_number, int) and all(isinstance(i, int) for i in indices)
        me = list(os.getpid().to_bytes(4, "big"))
        return torch.tensor([[draw_number, i, *me] for i in indices], dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_views_show_what_their_own_transform_makes_and_leave_the_rest(data, workers, channels_last):
    train, _ = build_datasets(data)
    data = with_workers(data, workers)
    with train_loader(train, data, AugmentConfig(), CPU, channels_last) as loader:
        plain = list(loader.batches(plan(1), 1))
    with train_loader(train, data, AugmentConfig(), CPU, channels_last, VIEWS) as loader:
        viewed = list(loader.batches(plan(1), 1))
    assert_equal([batch._replace(views={}) for batch in viewed], plain)
    for batch in viewed:
        assert tuple(batch.views) == VIEWS
        for (side, interpolation), pixels in batch.views.items():
            assert pixels.dtype == torch.uint8
            settings = data.model_copy(update={"train_size": side, "interpolation": interpolation})
            transform = train_transform(settings, AugmentConfig())
            expected = [alone(transform, train, 1, i) for i in batch.indices.tolist()]
            assert torch.equal(pixels, torch.cat(expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_views_of_evaluation_are_centre_crops_of_their_size(data, workers):
    data = with_workers(data.model_copy(update={"crop_pct": 0.7}), workers)
    _, val = build_datasets(data)
    order = list(eval_batches(eval_indices(N), 5))
    with eval_loader(val, data, CPU) as loader:
        plain = list(loader.batches(order))
    with eval_loader(val, data, CPU, views=VIEWS) as loader:
        viewed = list(loader.batches(order))
    assert_equal([batch._replace(views={}) for batch in viewed], plain)
    for (side, interpolation), pixels in viewed[1].views.items():
        settings = data.model_copy(update={"eval_size": side, "interpolation": interpolation})
        expected = [alone(eval_transform(settings), val, 0, i) for i in order[1]]
        assert torch.equal(pixels, torch.cat(expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_records_travel_in_order_with_their_draw_from_the_workers(data, workers):
    data = with_workers(data, workers)
    train, _ = build_datasets(data)
    with train_loader(train, data, AugmentConfig(), CPU, cached=Stored().read) as loader:
        for draw_number in (0, 3):
            batches = list(loader.batches(plan(1), draw_number))
            assert [batch.indices.tolist() for batch in batches] == list(plan(1))
            for batch in batches:
                assert batch.cached.dtype == torch.uint8
                assert batch.cached[:, 0].eq(draw_number).all()
                assert torch.equal(batch.cached[:, 1].long(), batch.indices)
            readers = {tuple(batch.cached[0, 2:].tolist()) for batch in batches}
            assert len(readers) == max(workers, 1)
            assert (tuple(os.getpid().to_bytes(4, "big")) in readers) is (workers == 0)
    with train_loader(train, data, AugmentConfig(), CPU) as loader:
        plain = list(loader.batches(plan(1), 3))
    assert_equal([batch._replace(cached=None) for batch in batches], plain)


def damaged(draw_number, indices):
    if draw_number == 1:
        raise UserError("shard 7 is damaged: type cache --repair")
    return torch.zeros(len(indices), 3, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_records_refuse_is_the_same_one_line_from_anywhere(data, workers):
    data = with_workers(data, workers)
    with train_loader(
        build_datasets(data)[0], data, AugmentConfig(), CPU, cached=damaged
    ) as loader:
        with pytest.raises(UserError) as raised:
            list(loader.batches(plan(0), 1))
        assert str(raised.value) == "shard 7 is damaged: type cache --repair"
        assert len(list(loader.batches(plan(0), 0))) == len(list(plan(0)))  # they are still there


@pytest.fixture
def spawned_workers():
    """Processes that inherit nothing, as is the rule on macOS: all must pickle."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_workers_that_inherit_nothing_change_no_bit(data, spawned_workers):
    train, _ = build_datasets(data)
    results = []
    for workers in (1, 0):
        with train_loader(
            train, with_workers(data, workers), AugmentConfig(), CPU, False, VIEWS, damaged
        ) as loader:
            results.append(list(loader.batches(plan(0), 2)))
    assert_equal(*results)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_the_same_one_line_from_anywhere(data, workers):
    path = Path(data.root, "train", "b", "03.jpg")
    path.write_bytes(path.read_bytes()[:-300])
    data = with_workers(data, workers)
    with train_loader(build_datasets(data)[0], data, AugmentConfig(), CPU) as loader:
        with pytest.raises(UserError) as raised:
            list(loader.batches(plan(0)))
        assert str(raised.value).startswith(f"cannot decode {path} (")
        assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)
        intact = [[0, 1], [2, 3]]
        assert len(list(loader.batches(intact))) == 2  # the workers are still there


def fails(opened, draw_number, index):
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_keeps_its_stack_trace(data, workers):
    data = with_workers(data, workers)
    loader = Loader(build_datasets(data)[0], fails, data, CPU, False)
    before = children()
    with pytest.raises(ZeroDivisionError, match="a bug") as raised, loader:
        list(loader.batches([[0]]))
    assert any(frame.name == "fails" for frame in raised.traceback) or "in fails" in str(
        raised.value
    )
    assert children() == before  # although the traceback still refers to torch's iterator


# --- processes --------------------------------------------------------------------------------


def test_workers_serve_all_epochs_and_end_with_the_block(data):
    data = with_workers(data, 2)
    before = children()
    with train_loader(build_datasets(data)[0], data, AugmentConfig(), CPU) as loader:
        list(loader.batches(plan(0)))
        first = children() - before
        list(loader.batches(plan(1)))
        assert children() - before == first and len(first) == 2
    assert children() == before


def tells_handler(opened, draw_number, index):
    raise UserError(repr(signal.getsignal(signal.SIGINT)))


def test_workers_ignore_ctrl_c_and_the_main_process_still_gets_it(data):
    data = with_workers(data, 1)
    with Loader(build_datasets(data)[0], tells_handler, data, CPU, False) as loader:
        with pytest.raises(UserError, match="SIG_IGN"):
            list(loader.batches([[0]]))
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_workers_end_when_the_loop_fails_and_close_may_come_twice(data):
    data = with_workers(data, 2)
    before = children()
    loader = train_loader(build_datasets(data)[0], data, AugmentConfig(), CPU)
    loader.close()
    with pytest.raises(KeyboardInterrupt), loader:
        for _ in loader.batches(plan(0)):
            assert len(children() - before) == 2
            raise KeyboardInterrupt
    assert children() == before
    loader.close()
    assert len(list(loader.batches(plan(1)))) == 6  # new workers
    loader.close()
    assert children() == before


SCRIPT = """
import sys, time, torch
from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import train_loader
data = DataConfig(name="folder", root=sys.argv[1], train_size=16, workers=2)
with train_loader(build_datasets(data)[0], data, AugmentConfig(), torch.device("cpu")) as loader:
    for _ in loader.batches([[0, 1]] * 100_000):
        print("batch", flush=True)
        time.sleep(0.01)
"""


@pytest.mark.parametrize("everyone", [True, False])
def test_ctrl_c_ends_everything_with_one_traceback(data, everyone):
    """`everyone`: a terminal interrupts the whole process group; else only the main process."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, data.root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "batch\n"
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- cost ----------------------------------------------------------------------------------------


def test_small_images_in_memory_are_cheap():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (256, 64, 64), dtype=np.uint8)
    dataset = ArrayDataset("noise", ["0"], np.zeros(256, np.int64), 3, images)
    data = DataConfig(train_size=64, eval_size=64, crop_pct=1.0, workers=0, flip=False)
    with train_loader(dataset, data, AugmentConfig(), CPU) as loader:
        list(loader.batches(eval_batches(range(256), 64)))
        calls = count_calls(lambda: list(loader.batches(eval_batches(range(256), 64))))
    assert calls / 256 < 1500  # 850 where it was written, which take 0.3 ms
