"""What tests of several subjects share: runs, refusals, small data, the cost of a call."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:  # conftest.py sets the number of threads before torch is imported
    from torch import Tensor


@dataclass
class Outcome:
    """Of a command: exit code and output."""

    code: int
    out: str
    err: str


def load_script(name: str) -> ModuleType:
    """Import `scripts/<name>.py`."""
    path = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- refusals -----------------------------------------------------------------------------------


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


def refused_settings(*overrides: str, config_dir: str | None = None) -> str:
    """Return the one line with which composing these overrides is refused."""
    from ghosttrain.config.compose import compose

    return refusal(lambda: compose(overrides, config_dir))


def refused_data(settings: object, *parts: str) -> None:
    """Check the one line with which the data of these settings are refused."""
    from ghosttrain.data.datasets import build_datasets

    refusal(lambda: build_datasets(settings), *parts)


# --- runs ---------------------------------------------------------------------------------------


def only_run(root: Path) -> Path:
    """Return the one run folder below `root`."""
    (folder,) = {path.parent for path in root.rglob("config.yaml")}
    return folder


def stop_after_saves(patch: pytest.MonkeyPatch, count: int) -> None:
    """Interrupt a run when its `count`-th checkpoint is copied; it is still written."""
    from ghosttrain.engine.saving import Saver

    real, saved = Saver.save, []

    def save(self: Saver, step: int, *args: object) -> None:
        real(self, step, *args)
        saved.append(step)
        if len(saved) == count:
            raise KeyboardInterrupt

    patch.setattr(Saver, "save", save)


def some_result(config: object, **parts: object) -> dict:
    """What `result.json` may hold of a run with these settings."""
    from ghosttrain.config.identity import settings_hash

    tops = {"top1": 12.5, "top5": 50.0, "n": 8, "balanced": 10.0, "macro_f1": 9.0, "ece": 5.0,
            "loss": 2.0}  # fmt: skip
    classes = {"names": ["a", "b"], "images": [6, 2], "recall": [0.0, 50.0],
               "precision": [None, 12.5], "confusion": [[0, 6], [1, 1]]}  # fmt: skip
    half = {"images": 8, "digest": "x"}
    sizes = ("params_train", "params_fused", "macs_train", "macs_fused", "eval_size")
    whole = {
        "headline": "ema",
        "weights": {name: tops for name in ("raw", "ema")},
        "classes": classes,
        "best": {"top1": 12.5, "epoch": 1},
        "fuse_max_diff": 0.0,
        "model": {"name": "ghostnetv3_100", **dict.fromkeys(sizes, 1)},
        "seconds": 61.0,
        "images_per_second": 1.0,
        "steps": 3,
        "data": {"train": half, "held_out": half},
        "settings": settings_hash(config),
        "seed": config.seed,
        "notes": [],
        "files": {},
    }
    assert parts.keys() <= whole.keys()
    return whole | parts


def some_detection(config: object, ap: float) -> dict:
    """What `result.json` may hold of a detector with these settings."""
    row = {"ap": ap, "ap50": 2 * ap, "ap_large": -1.0, "n": 8}
    return some_result(
        config,
        weights={"raw": row | {"ap": ap - 1}, "ema": row},
        classes={"names": ["a", "b"], "boxes": [6, 2], "ap": [ap, None], "confusion": None},
        best={"ap": ap, "epoch": 1},
    ) | {"ignoring": row | {"ap": 2.5}}


def raw_weights(root: Path) -> Tensor:
    """Return all raw weights of the one run below `root`, flattened."""
    import torch

    from ghosttrain.engine.load import load_run

    state = load_run(only_run(root), "raw").state_dict().values()
    return torch.cat([tensor.double().flatten() for tensor in state])


def train_rows(root: Path) -> list[dict]:
    """Return the rows of training of the one run below `root`."""
    from ghosttrain.engine.rows import read_metrics

    return [row for row in read_metrics(only_run(root)) if row["kind"] == "train"]


# --- data ---------------------------------------------------------------------------------------


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


def paint(path, color=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", (8, 6), color).save(file, format="PNG")


def write_idx(folder, prefix, images, labels, zipped=False):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        raw = (
            bytes([0, 0, 8, array.ndim])
            + np.array(array.shape, ">u4").tobytes()
            + array.astype(np.uint8).tobytes()
        )
        path = folder / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(raw) if zipped else raw)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


# --- cost ---------------------------------------------------------------------------------------


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
