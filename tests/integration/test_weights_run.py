"""Weights through the command line: a run that teaches, timm students, what is said about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from helpers import only_run
from safetensors import safe_open
from safetensors.torch import load_file

from ghosttrain.models.weights.packing import packed


def line_of(out: str, start: str) -> str:
    (line,) = (x for x in out.splitlines() if x.startswith(start))
    return line


@pytest.fixture
def quick(tiny: list[str]) -> list[str]:
    """A run of one step with a small student."""
    kept = [x for x in tiny if not x.startswith(("model=", "teacher=", "distill="))]
    return [*kept, "model=mobilenetv2_050", "reparam=none", "train.max_steps=1", "augment=none"]


def test_a_run_teaches_the_next_one(ghosttrain: Callable, quick: list[str], tmp_path: Path) -> None:
    outcome = ghosttrain(*quick, "teacher=none", "distill=none", "data.eval_size=40",
                         f"run.root={tmp_path / 'teacher'}", "data.mean=[0.1,0.2,0.3]")  # fmt: skip
    assert outcome.code == 0, outcome.err
    run = only_run(tmp_path / "teacher")
    taught = [*quick, "teacher=file", "distill=kl", "teacher.trust=true"]
    outcome = ghosttrain(*taught, f"teacher.weights={run}")
    assert outcome.code == 0, outcome.err
    line = line_of(outcome.out, "teacher: ")
    assert f"mobilenetv2_050 ({run}), 40 px as its file says, classes matched by name" in line
    assert "on 48 unaugmented training images (33.3 % are of one class)" in line
    card = (only_run(tmp_path / "runs") / "card.md").read_text()
    assert f"Teacher: {run} (kl)" in card

    store = [*taught, f"cache.dir={tmp_path / 'store'}"]
    outcome = ghosttrain("cache", *store, f"teacher.weights={run}", "cache.codec=logits:16")
    assert outcome.code == 0, outcome.err
    file, fresh = run / "model.safetensors", ["run.fresh=true"]
    outcome = ghosttrain(*store, *fresh, f"teacher.weights={file}", "teacher.input_size=64")
    assert outcome.code == 2 and "input_size: stored 40, now 64" in outcome.err
    # As if this file had been asked by timm's configuration, as it was before.
    about = json.loads((tmp_path / "store" / "cache.json").read_text())
    assert about["key"]["teacher"]["teacher"]["mean"] == [0.1, 0.2, 0.3]
    shutil.move(run, tmp_path / "away")
    outcome = ghosttrain(*store, *fresh, f"teacher.weights={run}")
    assert outcome.code == 0, outcome.err
    outcome = ghosttrain(*store, *fresh, f"teacher.weights={run}", "teacher.input_size=64")
    assert outcome.code == 2 and "input_size: stored 40, now 64" in outcome.err


def test_a_timm_student_starts_from_other_classes(
    ghosttrain: Callable, quick: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    theirs = timm.create_model("test_resnet", num_classes=1000)
    about = {"model": {"name": "test_resnet", "source": "timm"},
             "input": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}  # fmt: skip
    path.write_bytes(packed(theirs.state_dict(), {"ghosttrain": json.dumps(about)}))
    kept = [x for x in quick if not x.startswith("model=")]
    student = [*kept, "teacher=none", "distill=none", "model=timm", "model.name=test_resnet"]
    outcome = ghosttrain(*student, f"model.weights={path}")
    assert outcome.code == 0, outcome.err
    assert line_of(outcome.out, "weights: ") == (
        f"weights: {path} (timm; its classifier of 1000 classes is left out, one of 3 starts near "
        "0)"
    )
    shown = line_of(outcome.out, "images: ")
    assert (
        shown == "images: 64 px in training, 64 px held out; mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5"
    )
    typed = ghosttrain(*student, f"model.weights={path}", "data.mean=[0.4,0.4,0.4]",
                       f"run.root={tmp_path / 'typed'}")  # fmt: skip
    assert typed.code == 0, typed.err
    assert line_of(typed.out, "weights: ").endswith(
        "they were trained with another normalisation than data.mean=[0.4,0.4,0.4] "
        "data.std=[0.5,0.5,0.5]: type data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5] for theirs)"
    )
    run = only_run(tmp_path / "runs")
    with safe_open(run / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["ghosttrain"])["model"]["name"] == "test_resnet"
    assert load_file(run / "model.safetensors")["fc.weight"].shape[0] == 3


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model.weights=nowhere.pth", "no such file; give the path of"),
        ("model.weights=hub", "cannot be had from the hub"),
        ("model.weights=efficientnet-lite", "has none for mobilenetv2_050"),
        ("model.weights=nan.pth", "values of features.0.0.weight are NaN or infinite"),
        ("model.weights=wide.pth", "type model=mobilenetv2_140"),
    ],
)
def test_weights_that_cannot_start_a_run(
    ghosttrain: Callable,
    quick: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argument: str,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    torch.save({"features.0.0.weight": torch.full((2,), float("nan"))}, "nan.pth")
    torch.save(timm.create_model("mobilenetv2_140", num_classes=3).state_dict(), "wide.pth")
    outcome = ghosttrain(*quick, "teacher=none", "distill=none", argument)
    assert outcome.code == 2 and expected in outcome.err and outcome.err.count("\n") == 1
