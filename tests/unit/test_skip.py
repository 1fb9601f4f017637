"""`data.on_error`: an image that cannot be read ends the run, or its place is taken."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refusal
from PIL import Image

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.augment import train_transform
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import eval_loader, train_loader
from ghosttrain.data.order import mix
from ghosttrain.engine.evaluate import evaluate

CPU = torch.device("cpu")
BROKEN = ("train/a/1.png", "train/b/0.png", "val/a/1.png", "val/b/0.png")


@pytest.fixture
def photos(tmp_path):
    """Two classes of six training and three held-out images; two of each half are damaged."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    for path in BROKEN:
        with open(tmp_path / "data" / path, "r+b") as file:
            file.truncate(500)
    return tmp_path / "data"


def settings(photos, **more):
    return DataConfig(
        name="folder", root=str(photos), train_size=16, eval_size=16, **{"workers": 0, **more}
    )


def batches(photos, plan, draw=0, cached=None, **more):
    data = settings(photos, on_error="skip", **more)
    train, _ = build_datasets(data)
    with train_loader(train, data, AugmentConfig(seed=3), CPU, cached=cached) as loader:
        return list(loader.batches(plan, draw)), loader.broken, train


def test_the_place_is_taken_by_a_number_that_depends_on_seed_draw_and_image_alone(photos):
    plan = [[0, 1, 2], [7, 6, 1], [13]]  # 13: image 1 once more, as a balanced order has it
    for draw in (0, 5):
        found, broken, train = batches(photos, plan, draw)
        assert set(broken) == {1, 6}
        assert all("damaged or cut short" in reason for reason in broken.values())
        names = [train.short_name(n) for n in (1, 6)]
        assert names == [b"a/1.png", b"b/0.png"]

        def taken(number, draw=draw):
            for attempt in range(8):
                other = mix(3, 9, draw, number, attempt) % 12
                if other not in (1, 6):
                    return other
            raise AssertionError

        expected = [[0, taken(1), 2], [7, taken(6), taken(1)], [taken(13)]]
        assert [batch.indices.tolist() for batch in found] == expected
        transform = train_transform(settings(photos), AugmentConfig(seed=3))
        data = settings(photos)
        for batch, numbers in zip(found, expected, strict=True):
            assert batch.labels.tolist() == [int(n >= 6) for n in numbers]
            for image, number in zip(batch.images, numbers, strict=True):
                (pixels,) = transform(partial(train.open, number), draw, number)
                shown = image * torch.tensor(data.std).view(3, 1, 1)
                shown = 255 * (shown + torch.tensor(data.mean).view(3, 1, 1))
                assert (shown - pixels).abs().max() < 1e-2
        for workers in (1, 2):
            again, seen, _ = batches(photos, plan, draw, workers=workers)
            assert seen == broken
            for one, other in zip(found, again, strict=True):
                assert torch.equal(one.images, other.images)
                assert torch.equal(one.indices, other.indices) and one.broken == other.broken


def read_numbers(draw, numbers):
    return torch.tensor([[draw, number] for number in numbers], dtype=torch.uint8)


def test_stored_outputs_are_those_of_the_image_that_is_shown(photos):
    found, _, _ = batches(photos, [[1, 2, 6]], 4, cached=read_numbers)
    assert found[0].cached[:, 1].tolist() == found[0].indices.tolist()
    assert found[0].cached[:, 0].tolist() == [4, 4, 4]


def test_a_held_out_image_counts_as_wrong_whatever_the_network_says(photos):
    data = settings(photos, on_error="skip")
    _, held_out = build_datasets(data)

    class Knows(torch.nn.Module):
        """Names the class of every image of this order."""

        def forward(self, x):
            return 9.0 * torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 1, 1]), 2).float()

    with eval_loader(held_out, data, CPU) as loader:
        found = evaluate({"ema": Knows()}, loader.batches([[0, 1, 2, 3, 4, 5]]), CPU, 2)
    assert set(loader.broken) == {1, 3}
    assert found.table["ema"]["top1"] == pytest.approx(100 * 4 / 6)
    counts = found.counts["ema"]
    assert counts.confusion_TP.tolist() == [[2, 1], [1, 2]]


def test_by_default_it_ends_the_run_and_says_what_else_there_is(photos):
    data = settings(photos)
    train, held_out = build_datasets(data)
    with train_loader(train, data, AugmentConfig(), CPU) as loader:
        refusal(lambda: list(loader.batches([[1]])), "a/1.png", "data.on_error=skip", "its place")
    with eval_loader(held_out, data, CPU) as loader:
        refusal(lambda: list(loader.batches([[1]])), "a/1.png", "data.on_error=skip", "as wrong")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_happens_to_a_file_after_it_was_listed_is_one_line(photos, workers):
    """It vanishes, is cut, becomes another one, a folder, or a FIFO that nobody writes into."""
    changes = {
        "0": Path.unlink,
        "2": lambda path: os.truncate(path, 30),
        "3": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0"),
        "4": lambda path: (path.unlink(), path.mkdir()),
        "5": lambda path: (path.unlink(), os.mkfifo(path)),
    }
    data = settings(photos, workers=workers)
    train, _ = build_datasets(data)
    with train_loader(train, data, AugmentConfig(), CPU) as loader:
        assert len(list(loader.batches([[0]]))) == 1
        for name, change in changes.items():
            change(photos / "train" / "a" / f"{name}.png")
            line = refusal(lambda: list(loader.batches([[int(name)]])), f"a/{name}.png")  # noqa: B023
            assert "\n" not in line


def test_where_nothing_can_be_read_it_ends_all_the_same(photos):
    for path in photos.glob("train/*/*"):
        os.truncate(path, 60)
    data = settings(photos, on_error="skip")
    train, _ = build_datasets(data)
    with train_loader(train, data, AugmentConfig(), CPU) as loader:
        refusal(lambda: list(loader.batches([[1]])), "a/1.png", "8 images drawn for its place")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_lists_them_and_the_result_says_how_many(photos, tmp_path, processes):
    words = [
        "+recipe=baseline", "model=shufflenetv2_050", "data=folder", f"data.root={photos}",
        "data.train_size=32", "data.eval_size=32", "train.global_batch=4", "train.epochs=2",
        "data.workers=1", f"launch.nproc={processes}", "launch.device=cpu", "run.name=it",
        "optim.lr=0.001", "model.input_stride=small",
    ]  # fmt: skip

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "ghosttrain", *words], cwd=tmp_path, capture_output=True,
            text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip

    if processes == 1:
        refused = run(*words)
        assert refused.returncode == 2 and "data.on_error=skip" in refused.stderr
    done = run(*words, "data.on_error=skip")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "it"
    with open(folder / "skipped.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    listed = {row["image"] for row in rows}
    assert {str(photos / path) for path in BROKEN if path.startswith("val")} <= listed
    assert listed <= {str(photos / path) for path in BROKEN}
    assert all("cut short" in row["reason"] for row in rows)
    result = json.loads((folder / "result.json").read_text())
    assert result["skipped"] == {"train": len(rows) - 2, "held_out": 2}
    assert result["weights"]["ema"]["n"] == 6
    assert "note: 2 held-out images could not be read and count as wrong" in done.stdout
    assert done.stdout.count("could not be read and are skipped") <= 2
    if processes == 1:
        again = run("eval", "runs/it")
        assert again.returncode == 0, again.stderr
        assert "2 held-out images could not be read" in again.stdout
        assert "as reported" in again.stdout and "a/1.png" in again.stdout
        shown = run("wrong", "runs/it")
        assert shown.returncode == 0, shown.stderr
