"""A whole run, from the command line to its files, equals the loop written out in by_hand.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import by_hand
import pytest
import torch
from by_hand import Plain
from helpers import only_run, stop_after_saves
from safetensors.torch import load_file

from ghosttrain.engine import classification
from ghosttrain.engine import student as student_module
from ghosttrain.engine.checkpoint import read_checkpoint
from ghosttrain.engine.weights_file import read_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("squares")
    by_hand.make_images(root)
    return root


@pytest.fixture(params=[0.0, 0.5], ids=["no dropout", "dropout"])
def dropout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(
        student_module, "build_student", lambda _, classes: Plain(len(classes), request.param)
    )
    return request.param


def rows(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_losses_rates_weights_averages_and_accuracies(images, dropout, tmp_path) -> None:
    ema_warmup = dropout == 0
    assert by_hand.run(images, tmp_path, f"ema.warmup={ema_warmup}") == 0
    losses, raw, average = by_hand.loop(images, dropout, ema_warmup=ema_warmup)
    run = only_run(tmp_path)
    train_rows = rows(run, "train")
    assert [row["step"] for row in train_rows] == list(range(1, by_hand.STEPS + 1))
    rates = [by_hand.lr_of(step) for step in range(by_hand.STEPS)]
    assert [row["lr"] for row in train_rows] == pytest.approx(rates, rel=1e-12)
    assert [row["loss"] for row in train_rows] == pytest.approx(losses, rel=1e-5)  # float32 sums
    assert len({row["loss"] for row in train_rows}) == by_hand.STEPS

    saved = read_checkpoint(run / "checkpoints" / "last.pt")
    # The images of a run are float32, those of the loop float64.
    assert by_hand.difference(saved["student"], raw) < 1e-6
    assert by_hand.difference(saved["ema"]["model"], average) < 1e-6
    assert by_hand.difference(raw, average) > 1e-3  # they can be told apart
    assert by_hand.difference(load_file(run / "model.safetensors"), average) < 1e-6

    result = json.loads((run / "result.json").read_text())
    weights = {"raw": raw, "ema": average, "fused": average}
    expected = {name: by_hand.accuracy(images, state) for name, state in weights.items()}
    assert result["weights"].keys() == expected.keys()
    for name, row in expected.items():
        assert result["weights"][name] == pytest.approx(row, rel=1e-5, abs=1e-4)
        for key in ("top1", "top5", "n"):
            assert result["weights"][name][key] == row[key]
    assert result["classes"]["images"] == [by_hand.HELD_OUT] * by_hand.CLASSES
    assert dropout or expected["raw"] != expected["ema"]
    assert (result["steps"], result["headline"]) == (by_hand.STEPS, "ema")
    last = rows(run, "eval")[-1]
    assert last["raw_top1"] == expected["raw"]["top1"]
    assert last["ema_top1"] == expected["ema"]["top1"]


@pytest.mark.parametrize("dropout", [0.0], indirect=True)
def test_a_broken_held_out_image_is_said_before_the_first_step(
    images, dropout, tmp_path, capsys
) -> None:
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "val" / "class0" / "0.png").write_bytes(b"no image")
    assert by_hand.run(tmp_path / "images", tmp_path / "runs") == 2
    assert "val/class0/0.png" in capsys.readouterr().err
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_student_has_the_memory_format_of_the_settings(
    images, tmp_path, monkeypatch, channels_last
) -> None:
    students = []

    def build_student(config, classes):
        students.append(Plain(len(classes)))
        return students[0]

    monkeypatch.setattr(student_module, "build_student", build_student)
    settings = [f"train.channels_last={channels_last}", "train.max_steps=1"]
    assert by_hand.run(images, tmp_path, *settings) == 0
    weight = students[0].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last


def test_the_best_average_is_kept_with_its_epoch(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(student_module, "build_student", lambda _, classes: Plain(len(classes)))
    tops = iter([(50, 10), (20, 60), (80, 60), (10, 30), (70, 40)])  # raw and EMA, epoch by epoch
    task, averages = classification.CLASSIFICATION, []

    def evaluate(models, *others):
        found = task.evaluate(models, *others)
        table = found.table
        if "fused" not in models:
            averages.append({k: v.clone() for k, v in models["ema"].state_dict().items()})
            table["raw"]["top1"], table["ema"]["top1"] = next(tops)
        return found

    monkeypatch.setattr(classification, "CLASSIFICATION", replace(task, evaluate=evaluate))
    assert by_hand.run(images, tmp_path) == 0
    run = only_run(tmp_path)
    for name, average in (("checkpoints/best", averages[1]), ("model", averages[4])):
        state, about = read_weights(run / f"{name}.safetensors")
        assert by_hand.difference(state, average) == 0
        assert about["classes"] == [f"class{label}" for label in range(by_hand.CLASSES)]
        assert about["kind"] == "ema"
    result = json.loads((run / "result.json").read_text())
    assert result["best"] == {"top1": 60, "epoch": 2}


@pytest.mark.parametrize("optimizer", ["lamb", "sgd"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    images, tmp_path, monkeypatch, optimizer, epochs
) -> None:
    """Bit for bit, with dropout and augmentation: weights, average, metrics, the best epoch."""
    monkeypatch.setattr(
        student_module, "build_student", lambda _, classes: Plain(len(classes), 0.5)
    )
    settings = [f"optim={optimizer}", "augment=compact", "train.save_every=1epoch"]
    assert by_hand.run(images, tmp_path / "whole", *settings) == 0
    with monkeypatch.context() as patch:
        stop_after_saves(patch, epochs)
        assert by_hand.run(images, tmp_path / "cut", *settings) == 130
    assert by_hand.run(images, tmp_path / "cut", *settings) == 0

    whole, cut = only_run(tmp_path / "whole"), only_run(tmp_path / "cut")
    for name in ("model.safetensors", "checkpoints/best.safetensors"):
        assert by_hand.difference(load_file(whole / name), load_file(cut / name)) == 0
    first, two = (read_checkpoint(run / "checkpoints" / "last.pt") for run in (whole, cut))
    assert all(torch.equal(first["student"][k], two["student"][k]) for k in first["student"])
    assert first["best"] == two["best"] and first["ema"]["updates"] == two["ema"]["updates"]

    def without_times(run: Path) -> list[dict]:
        return [
            row | {"images_per_second": 0, "crc32": 0}
            for k in ("train", "eval")
            for row in rows(run, k)
        ]

    assert without_times(whole) == without_times(cut)
