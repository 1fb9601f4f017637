"""Shared fixtures: a small folder of real image files, and the command line run in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import Outcome, make_images, paint, write_idx

THREADS = int(os.environ.get("TEST_THREADS", "1"))
"""Threads of this process and of those that tests start: rounding may depend on their number."""
os.environ["OMP_NUM_THREADS"] = str(THREADS)
# Ignored in what a script starts with `&` or nohup, and inherited by what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who owns a folder in this process gives it back while a test waits for it."""
    from ghosttrain import locks

    monkeypatch.setattr(locks, "PATIENCE", 0.0)


@pytest.fixture(params=["kernel", "no kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the C++ kernels do what they can do."""
    from ghosttrain import native

    if request.param == "no kernel":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("no C++ kernels here")
    return request.param == "kernel"


@pytest.fixture
def ghosttrain(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `python -m ghosttrain ARGS` in this process; return exit code and output."""
    from ghosttrain.cli import main

    def run(*args: str) -> Outcome:
        capsys.readouterr()
        code = main([str(a) for a in args])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes: 16 training and 7 held-out JPEG files each, telling classes by
    colour."""
    root = tmp_path_factory.mktemp("images")
    make_images(root, classes=3)
    return root


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 5 ImageNet classes: 12 training and 4 held-out JPEG crops of a photo each."""
    from photos import make_photos

    root = tmp_path_factory.mktemp("photos")
    make_photos(root)
    return root


@pytest.fixture
def tiny(image_folder: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run of seconds: 48 images of 64 pixels, the quickest student, no teacher."""
    return [
        "+recipe=compact_kd",
        "model=shufflenetv2_050",
        "teacher=none",
        "distill=none",
        "data=folder",
        f"data.root={image_folder}",
        "data.train_size=64",
        "data.eval_size=64",
        "data.workers=0",
        "train.global_batch=16",
        "train.epochs=2",
        f"run.root={tmp_path / 'runs'}",
    ]


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for k, label in enumerate(("bird", "Ant", "cat")):
            for n in range(3 if split == "train" else 1):
                paint(tmp_path / split / label / f"{n}.JPEG", (k, n, 0))
    return tmp_path


@pytest.fixture(params=[False, True], ids=["plain", "gz"])
def idx(request, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 7, 5)), np.arange(12) % 4 + 1
    write_idx(tmp_path, "train", images, labels, request.param)
    write_idx(tmp_path, "t10k", images[:3] // 2, labels[:3], request.param)
    return tmp_path, images


@pytest.fixture
def photos(photo_folder: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run of seconds: 60 photo crops of 64 pixels, EfficientNet-Lite0 teaches."""
    return [
        "+recipe=compact_kd",
        "model=mobilenetv2_050",
        "teacher=efficientnet_lite0",
        "teacher.input_size=96",
        "teacher.check_samples=20",
        "data=folder",
        f"data.root={photo_folder}",
        "data.train_size=64",
        "data.eval_size=64",
        "data.workers=0",
        "train.global_batch=20",
        "train.epochs=2",
        "tracker.log_every=1",
        f"run.root={tmp_path / 'runs'}",
    ]
