"""Workers that cannot send their batches, or die: one line within seconds, never a wait."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import resource
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data import loader as loader_module
from ghosttrain.data.datasets import ArrayDataset
from ghosttrain.data.loader import Loader, train_loader
from ghosttrain.errors import UserError

CPU = torch.device("cpu")
DATA = DataConfig(train_size=16, workers=2)
FULL = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"


@pytest.fixture(autouse=True)
def _no_wait_for_ever():
    """What is tested here once waited for ever: then fail, minutes after any machine is done."""

    def waited(number, frame):
        pytest.fail("waits for a batch that never comes")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 16, 16)).astype(np.uint8)
    return ArrayDataset("here", ["a", "b"], np.arange(12) % 2, 3, images)


def message_of(dataset, batches=((0, 1), (2, 3), (4, 5)), workers=2):
    data = DATA.model_copy(update={"workers": workers})
    with (
        pytest.raises(UserError) as raised,
        train_loader(dataset, data, AugmentConfig(), CPU) as loader,
    ):
        list(loader.batches(map(list, batches)))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (RuntimeError(FULL), ("do not fit into shared memory", "data.workers=0", "--shm-size")),
        (OSError(errno.ENOSPC, "No space left on device"), ("do not fit into shared memory",)),
        (OSError(errno.EMFILE, "Too many open files"), ("too many files", "ulimit -n")),
        (RuntimeError("received 0 items of ancdata"), ("too many files", "ulimit -n")),
        (OSError(errno.EPERM, "Operation not permitted"), ("not permitted", "data.workers=0")),
        (ValueError("no idea"), ("could not send its batch (no idea)", "data.workers=0")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_whatever_is_raised_while_a_batch_is_sent_is_one_line(dataset, monkeypatch, error, parts):
    def fails(storage):
        raise error

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", fails)
    message = message_of(dataset)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), EOFError()])
def test_whatever_is_raised_while_a_batch_arrives_is_one_line(dataset, monkeypatch, error):
    def fails(pickled):
        raise error

    monkeypatch.setattr(loader_module, "pickle", SimpleNamespace(loads=fails))
    assert ("EOFError" if type(error) is EOFError else "ulimit -n") in message_of(dataset)


def test_workers_that_cannot_be_started_are_one_line(dataset, monkeypatch, capfd):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(number) for number in os.listdir("/proc/self/fd")}
    free = (number for number in range(10_000) if number not in used)
    limit = next(itertools.islice(free, 12, None))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        message = message_of(dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "too many files are open" in message
    monkeypatch.setattr(
        loader_module.multiprocessing, "Lock", lambda: os.open("/dev/null/shm", os.O_RDONLY)
    )
    assert "(Not a directory): type data.workers=0" in message_of(dataset)
    monkeypatch.undo()
    assert capfd.readouterr().err == ""  # no traceback of a half-made iterator
    with train_loader(dataset, DATA, AugmentConfig(), CPU) as loader:
        assert len(list(loader.batches([[0], [1]]))) == 2


def leaves_files(free, opened, draw_number, index):
    used = len(os.listdir("/proc/self/fd")) - 1
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = next(n for n in range(10_000) if n - used >= free)  # a worker's numbers have few gaps
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, before[1]))
    return [torch.zeros(3, 4, 4, dtype=torch.uint8)]


def test_a_worker_keeps_files_for_handing_batches_over(dataset, capfd):
    """Else the thread that does it fails, and the main process waits for its output."""
    data, refused = DATA.model_copy(update={"workers": 1}), []
    for free in range(1, 16):
        with Loader(dataset, functools.partial(leaves_files, free), data, CPU) as loader:
            try:
                assert len(list(loader.batches([[0], [1]]))) == 2
            except UserError as error:
                assert "too many files are open" in str(error)
                refused.append(free)
    assert refused[:3] == [1, 2, 3]
    assert capfd.readouterr().err == ""


def test_a_worker_that_hangs_up_had_no_file_left(monkeypatch):
    """Seen once, with the limit of open files reached while another batch was handed over."""

    def hung_up(pickled):
        raise EOFError

    monkeypatch.setattr(loader_module.pickle, "loads", hung_up)
    failure = loader_module._unpacked(b"")
    assert "too many files are open" in failure.message and "\n" not in failure.message


def dies(forward, opened, draw_number, index):
    forward()
    raise AssertionError("still alive")


def test_an_error_without_workers_keeps_its_own_words(dataset):
    def reads(draw_number, indices):
        raise OSError(errno.EIO, "Input/output error")

    data = DATA.model_copy(update={"workers": 0})
    with train_loader(dataset, data, AugmentConfig(), CPU, cached=reads) as loader:
        with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
            list(loader.batches([[0]]))


def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(60)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (functools.partial(kill, signal.SIGKILL), "memory runs out: type a smaller data.workers"),
        (functools.partial(kill, signal.SIGBUS), "do not fit into shared memory"),
        (functools.partial(kill, signal.SIGTERM), "a data worker died"),
        (functools.partial(os._exit, 3), "type data.workers=0 to see why"),
    ],
)
def test_a_worker_that_dies_is_one_line(dataset, forward, expected):
    data = DATA.model_copy(update={"workers": 1})
    loader = Loader(dataset, functools.partial(dies, forward), data, CPU)
    with pytest.raises(UserError) as raised, loader:
        list(loader.batches([[0], [1]]))
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_a_worker_that_dies_while_the_main_process_computes_is_one_line(dataset):
    with pytest.raises(UserError, match="a data worker was killed"):
        with train_loader(dataset, DATA, AugmentConfig(), CPU) as loader:
            next(loader.batches([[i] for i in range(12)]))
            (pid, *_) = (worker.pid for worker in loader._loader._iterator._workers)
            os.kill(pid, signal.SIGKILL)
            while True:  # torch raises it here, in what has nothing to do with the loader
                time.sleep(0.01)


def test_memory_of_batches_that_are_never_fetched_is_freed(dataset):
    """An epoch left early leaves packed batches behind: they must not stay in shared memory."""
    held = []
    with train_loader(dataset, DATA, AugmentConfig(), CPU) as loader:
        for _ in range(4):
            next(loader.batches([[i] for i in range(12)]))
            workers = loader._loader._iterator._workers
            held.append(sum(len(os.listdir(f"/proc/{worker.pid}/fd")) for worker in workers))
        assert len(list(loader.batches([[i] for i in range(12)]))) == 12
    assert held[-1] <= held[0] + 24  # one epoch's batches of 3 tensors may still be on the way


# --- through the command line -------------------------------------------------------------------


def failing_after(n, real=torch.UntypedStorage._share_fd_cpu_):
    """Shared memory that is full from the n-th tensor of a worker on."""
    count = 0

    def share(storage, *args):
        nonlocal count
        count += 1
        if count > n:
            raise RuntimeError(FULL)
        return real(storage, *args)

    return share


def test_training_ends_in_one_line(ghosttrain, tiny, monkeypatch):
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", failing_after(0))
    outcome = ghosttrain(*tiny, "data.workers=2")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "do not fit into shared memory (/dev/shm has " in outcome.err
    assert "one batch takes 0.2 MB" in outcome.err  # 16 x 3 x 64 x 64


@pytest.fixture
def few_digits(tmp_path):
    """60 of the embedded digits as IDX files, and what makes the shipped teacher store outputs."""
    from ghosttrain.data.datasets import build_datasets

    train = build_datasets(DataConfig(name="digits"))[0]
    chosen = np.arange(len(train))[:: len(train) // 60][:60]
    images = train.images[chosen]
    images[7] = 0
    for prefix in ("train", "val"):
        write_idx(tmp_path / prefix, images, train.labels[chosen])
    return [
        "cache", "teacher=digits", "distill=soft_ce", "data=idx", f"data.root={tmp_path}",
        "data.val_split=val", "data.train_size=64", "teacher.check_samples=0", "train.epochs=1",
        "cache.codec=topk:3", "cache.shard_size=10", "train.eval_batch=5",
    ]  # fmt: skip


def write_idx(prefix, images, labels):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        path = prefix.with_name(f"{prefix.name}-{kind}-ubyte")
        path.write_bytes(head + array.astype(np.uint8).tobytes())


def test_cache_ends_in_one_line_and_its_cache_is_right_when_it_goes_on(
    ghosttrain, few_digits, tmp_path, monkeypatch
):
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    args = [*few_digits, "data.workers=1"]
    # A batch has 4 tensors, with the teacher's view 5; the sample takes 24 batches of another
    # loader: the first files are written, then the memory is full.
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", failing_after(5 * 5))
    monkeypatch.setattr("ghosttrain.engine.codec_choice.SAMPLE", 5)
    outcome = ghosttrain(*args, f"cache.dir={cache}")
    assert outcome.code == 2 and "do not fit into shared memory" in outcome.err
    assert outcome.err.count("\n") == 1
    assert 0 < len(list(cache.rglob("*.shard"))) < 6
    monkeypatch.undo()
    monkeypatch.setattr("ghosttrain.engine.codec_choice.SAMPLE", 5)
    outcome = ghosttrain(*args, f"cache.dir={cache}")
    assert outcome.code == 0
    assert "note: 1 of 60 images looked at in" in outcome.out  # notes on the data are said here too
    assert ghosttrain(*args, f"cache.dir={whole}").code == 0

    def files(folder):
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".yaml",))
        return {str(p.relative_to(folder)): p.read_bytes() for p in paths}

    assert files(cache) == files(whole)
