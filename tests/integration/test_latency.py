"""`latency`: the time of one pass, and the commands for a phone."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ghosttrain.cli import main
from ghosttrain.deploy import phone
from ghosttrain.deploy.formats import find
from ghosttrain.deploy.latency import input_of
from ghosttrain.deploy.profile import profile_file
from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file that no run left: one convolution and one ReLU at 16 x 12 px, any batch."""
    path = tmp_path_factory.mktemp("mine") / "mine.onnx"
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Flatten()).eval()
    find("onnx").convert(network, torch.zeros(2, 3, 16, 12), path, "fp32", True)
    return path


def test_a_model_by_name_in_turn_with_a_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rounds", "4", "--size", "64", "--backend", "torch,torch_unfused", "--threads", "1"]
    table = tmp_path / "times.csv"
    assert main(["latency", "shufflenetv2_050", *words, "--csv", str(table)]) == 0
    text = capsys.readouterr().out
    size = sum(p.numel() for p in create_model("shufflenetv2_050", fused=True).parameters())
    assert f"shufflenetv2_050: {size / 1e6:.3f} M parameters, " in text
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["backend"] for row in rows] == ["torch", "torch_unfused"]
    for row in rows:
        low, median, high, p99 = (float(row[key]) for key in ("low", "median", "high", "p99"))
        assert 0 < low <= median <= high <= p99
        assert re.search(rf"^{row['backend']} +1 +{median:.2f} ", text, re.M)
    assert main(["latency", str(file), str(file), "--rounds", "3", "--batch", "5"]) == 0
    assert "input [5, 3, 16, 12]" in capsys.readouterr().out


def test_a_file_says_what_it_takes(file: Path) -> None:
    runner = find("onnx").load(file, 1)
    assert input_of(file, runner, None, 3).shape == (3, 3, 16, 12)
    with pytest.raises(UserError, match="takes images of 16x12 pixels only"):
        input_of(file, runner, (16, 16), 1)


def test_a_profile_names_the_operators(file: Path) -> None:
    found = {each.kind: each for each in profile_file(file, np.zeros((1, 3, 16, 12), np.float32))}
    assert found["Conv"].calls == 1  # the rest may be fused with it
    assert all(each.milliseconds >= 0 for each in found.values())


# Printed by the programs on others' devices: https://github.com/tensorflow/tensorflow/issues/42507
LITERT = """\
Loaded model /data/local/tmp/espcn_harmonic_2x_slim_w_cl.tflite
The input model file size (MB): 0.004448
Initialized session in 0.855ms.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding \
150 seconds.
count=15 first=49060 curr=33682 min=32825 max=49060 avg=34825.1 std=3930

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding \
150 seconds.
count=50 first=32891 curr=33978 min=32641 max=34005 avg=33209.4 std=450

Inference timings in us: Init: 855, First inference: 49060, Warmup (avg): 34825.1, \
Inference (avg): 33209.4
"""
EXECUTORCH = """\
I 00:00:05.833558 executorch:executor_runner.cpp:564] Model loaded in 4463.268273 ms.
I 00:00:06.075611 executorch:executor_runner.cpp:705] Iteration 1 of 2: 241.944288 ms
I 00:00:06.075611 executorch:executor_runner.cpp:705] Iteration 2 of 2: 238.000000 ms
I 00:00:06.075701 executorch:executor_runner.cpp:714] Model executed successfully 2 time(s) in \
479.944288 ms.
"""


def test_what_a_phone_prints_is_read() -> None:
    assert phone.parsed("litert", LITERT) == (33.2094, 32.641, 34.005, 50)
    assert phone.parsed("executorch", EXECUTORCH) == (239.972144, 238.0, 241.944288, 2)
    for name in phone.PROGRAMS:
        with pytest.raises(UserError, match="printed no time: error: closed"):
            phone.parsed(name, "error: closed")


def test_a_phone_is_used_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.tflite"
    model.write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["latency", str(model), "--adb", "--threads", "1,4"]) == 0
    text = capsys.readouterr().out
    assert f"adb push {model} /data/local/tmp/model.tflite" in text
    assert "--graph=/data/local/tmp/model.tflite --num_threads=4 --num_runs=50" in text
    assert text.count("not run: adb is not installed") == 2
    adb = tmp_path / "adb"
    adb.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = devices ]; then printf "List of devices\\nR58\\tdevice\\n"; exit; fi\n'
        f"/bin/cat {tmp_path}/printed\n"
    )
    adb.chmod(0o755)
    (tmp_path / "printed").write_text(LITERT)
    assert main(["latency", str(model), "--adb"]) == 0
    assert "1 threads: mean 33.21 ms, 32.64 to 34.01, 50 passes" in capsys.readouterr().out
    adb.write_text(adb.read_text() + "exit 3\n")
    assert main(["latency", str(model), "--adb"]) == 2


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "latency needs a run, a model or a file"),
        (["ghostnetv9"], "ghostnetv9 is no run, no exported file and no model. Did you mean"),
        (["ghostnetv3_050", "--backend", "tensorrt"], "--backend tensorrt is none"),
        (["ghostnetv3_050", "--threads", "0"], "--threads 0: give numbers of threads, 1,2"),
        (["ghostnetv3_050", "--rounds", "0"], "--rounds 0: give a whole number"),
        (["FILE", "--adb"], "litert and executorch have a program for the phone"),
    ],
)
def test_mistakes_are_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert main(["latency", *(str(file) if word == "FILE" else word for word in words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line, line
