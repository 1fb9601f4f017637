"""Shared fixtures: a small folder of real image files, and the command line run in this process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

THREADS = int(os.environ.get("TEST_THREADS", "1"))
"""Threads of this process and of those that tests start: rounding may depend on their number."""
os.environ["OMP_NUM_THREADS"] = str(THREADS)
# Ignored in what a script starts with `&` or nohup, and inherited by what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


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


def refusal(call: Callable[[], object], *parts: str) -> str:
    """Return the one line with which a call refuses, after checking what it must hold."""
    from ghosttrain.errors import UserError

    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes: 16 training and 7 held-out JPEG files each, telling classes by
    colour."""
    root = tmp_path_factory.mktemp("images")
    make_images(root, classes=3)
    return root


def make_images(root: Path, classes: int, train: int = 16, val: int = 7) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (48, 56, 3), dtype=np.uint8)
                pixels[..., label % 3] += 120
                Image.fromarray(pixels).save(folder / f"{number}.JPEG", quality=95)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 5 ImageNet classes: 12 training and 4 held-out JPEG crops of a photo each."""
    from photos import make_photos

    root = tmp_path_factory.mktemp("photos")
    make_photos(root)
    return root


@pytest.fixture
def tiny(image_folder: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run of seconds: 48 images of 64 pixels, the smallest student, no teacher."""
    return [
        "+recipe=compact_kd",
        "model=ghostnetv3_050",
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


def count_calls(function: Callable[[], object]) -> int:
    """Return how many functions, of Python or C, are called meanwhile in this thread: what
    something costs, the same on a busy machine."""
    calls = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def only_run(root: Path) -> Path:
    """Return the one run folder below `root`."""
    (folder,) = {path.parent for path in root.rglob("config.yaml")}
    return folder
