"""`eval --weights`: weights that belong to no run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ghosttrain.cli import main

MODEL = ["+recipe=compact_kd", "model=shufflenetv2_050"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps and its fused file."""
    root = tmp_path_factory.mktemp("runs")
    words = ["train.max_steps=6", "train.global_batch=64", "launch.device=cpu", f"run.root={root}"]
    assert main([*MODEL, *words, "run.name=it"]) == 0
    assert main(["fuse", str(root / "it")]) == 0
    return root / "it"


def rows(text: str) -> dict[str, list[str]]:
    """Name of the weights -> the numbers of their row."""
    found = re.findall(r"^(raw|ema|fused|weights) +(\d[\d. ]+)", text, re.M)
    return {name: numbers.split() for name, numbers in found}


def test_numbers_are_those_of_the_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished)]) == 0
    expected = rows(capsys.readouterr().out)
    ours = "model=shufflenetv2_050"
    assert main(["eval", "--weights", str(finished), ours, "launch.device=cpu"]) == 0
    text = capsys.readouterr().out
    found = rows(text)
    assert found["weights"] == expected["ema"] and found["fused"] == expected["fused"]
    assert "largest difference of a logit" in text and "digits, held out: 360 images" in text
    file = str(finished / "model.fused.safetensors")
    assert main(["eval", "--weights", file, ours, "launch.device=cpu"]) == 0
    assert rows(capsys.readouterr().out) == {"weights": expected["fused"]}


@pytest.mark.parametrize(
    "words, parts",
    [
        (["model=shufflenetv2_100"], ["shufflenetv2_050, not of shufflenetv2_100"]),
        (["model=shufflenetv2_050", "data.classes=[1,2]"], ["It has 10 classes, the model 2"]),
        (["model=shufflenetv2_050", "RUN"], ["takes no run", "type model=NAME data=NAME"]),
        (["--top", "2", "model=shufflenetv2_050"], ["--top does not belong to eval"]),
    ],
)
def test_mistakes_are_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    words = [str(finished) if word == "RUN" else word for word in words]
    assert main(["eval", "--weights", str(finished), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(part in line for part in parts), line
