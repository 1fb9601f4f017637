"""`quantize`: what is written, what is counted, and what stays in float."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from ghosttrain.cli import main
from ghosttrain.deploy.formats import InFloat, onnx, saturates
from ghosttrain.deploy.sensitivity import int8_share, sensitivities
from ghosttrain.engine.load import load_run
from ghosttrain.files import read_json, write_json
from ghosttrain.models.cost import count_macs
from ghosttrain.models.int8 import round_inputs, round_weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    words = ["train.max_steps=40", "train.global_batch=64", f"run.root={root}", "run.name=it"]
    run = ["+recipe=baseline", "model=mobilenetv2_050", "launch.device=cpu", "ema=none"]
    assert main([*run, *words]) == 0
    return root / "it"


def test_rounding_is_to_the_nearest_of_256_steps() -> None:
    def nearest(x: torch.Tensor, step: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return (x.double() / step.double()).round().clamp(low, high) * step.double()

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 3, 5, 5, generator=draw)
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    assert torch.allclose(round_weights(weight).double(), nearest(weight, step, -127, 127))
    x = torch.randn(1000, generator=draw) * 2 + 1
    low, high = x.min() / 2, x.max() / 2  # half of them are outside
    step = (high - low) / 255
    below = float((-low / step).round())
    expected = nearest(x, step, -below, 255 - below)
    assert torch.allclose(round_inputs(x, low, high).double(), expected, atol=1e-6)


def test_sensitivity_is_the_change_of_the_outputs() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    network = network.eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = torch.randn(6, 3, 8, 8)
    found = {each.layer: each for each in sensitivities(network, [x[:4], x[4:]])}
    assert set(found) == {"0", "3"}
    assert [found[name].macs for name in ("0", "3")] == [8 * 36 * 27, 8 * 36 * 5]
    assert sum(each.macs for each in found.values()) == count_macs(network, 8)
    hidden = network[:3](x)
    rounded = round_inputs(hidden, torch.zeros(()), hidden.max())
    apart = nn.functional.linear(rounded, round_weights(network[3].weight), network[3].bias)
    expected = ((apart - network(x)).double() ** 2).sum() / (network(x).double() ** 2).sum()
    assert found["3"].error == pytest.approx(float(expected), rel=1e-5)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    shares = int8_share(list(found.values()), ["0"])
    assert shares == pytest.approx(100 * 5 / (5 + 27))


def test_finetuning_goes_on_by_the_runs_own_command(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train.max_steps=5",
        "optim.lr=0.05",
        "--finetune",
        "--images",
        "100",
        "--max-drop",
        "100",
    ]
    assert main(["quantize", str(finished), "--calibration", "64", *words]) == 0
    text = capsys.readouterr().out
    rounded = finished.with_name("it-int8")
    assert f"run folder: {rounded}" in text and "since before the fine-tuning" in text
    assert "in float vs rounded as INT8" in text
    before, after = (
        yaml.safe_load((each / "config.yaml").read_text()) for each in (finished, rounded)
    )
    changed = {
        f"{section}.{name}"
        for section, values in before.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value != after[section][name]
    }
    assert changed == {
        "model.weights", "model.weights_digest", "model.weight_bits", "train.epochs",
        "train.max_steps", "optim.lr", "schedule.warmup_epochs", "run.name",
    }  # fmt: skip
    assert f"optim.lr={before['optim']['lr'] / 100:g} " in text and after["optim"]["lr"] == 0.05
    # The file holds what the fine-tuned network computes; the drop counts from before it.
    report = json.loads((finished / "export/onnx_int8/report.json").read_text())
    seen = report["comparison"]
    assert report["finetuned"] is True
    assert report["drop"] == pytest.approx(seen["top1"] - seen["top1_exported"])
    runner = onnx.load(finished / "export/onnx_int8/model.onnx")
    x = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        tuned, old = load_run(rounded, "fused")(x), load_run(finished, "fused")(x)
    found = torch.from_numpy(runner(x.numpy())[0])
    assert (found - tuned).abs().mean() < (found - old).abs().mean()
    assert main(["eval", str(rounded)]) == 0
    assert main(["fuse", str(rounded)]) == 0


def test_finetuning_needs_a_command(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    made = read_json(copy / "provenance.json", 100_000)
    write_json(copy / "provenance.json", {**made, "command": None})
    assert main(["quantize", str(copy), "--finetune"]) == 2
    error = capsys.readouterr().err
    assert f"was not begun by a command: type one with model.weights={copy} " in error


def test_a_file_in_int8(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx as onnx_package
    import onnxruntime

    words = ["--calibration", "64", "--images", "100", "--max-drop", "100"]
    assert main(["quantize", str(finished), *words]) == 0
    text = capsys.readouterr().out
    assert "100.0 % of the MACs in INT8 (every layer), 1 tried, calibrated on 64" in text
    folder = finished / "export/onnx_int8"
    report = json.loads((folder / "report.json").read_text())
    found = report["comparison"]
    assert report["drop"] == pytest.approx(found["top1"] - found["top1_exported"])
    assert report["seven_bits"] == saturates() and report["precision"] == "int8"
    graph = onnx_package.load(folder / "model.onnx").graph
    weights = [
        each for each in graph.initializer if each.data_type == onnx_package.TensorProto.INT8
    ]
    count = sum(int(np.prod(each.dims)) for each in weights)
    rows = list(csv.DictReader((folder / "sensitivity.csv").read_text().splitlines()))
    assert len(rows) == 53 and count > 680_000  # all convolutions, the classifier
    assert [float(row["error"]) for row in rows] == sorted(
        (float(row["error"]) for row in rows), reverse=True
    )
    assert (folder / "int8.png").read_bytes()[:4] == b"\x89PNG"
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 64, 64]
    # The same seed, the same file.
    before = (folder / "model.onnx").read_bytes()
    assert main(["export", str(finished), "--to", "onnx", "--precision", "int8"]) in (0, 1)
    assert main(["quantize", str(finished), *words]) == 0
    assert (folder / "model.onnx").read_bytes() == before


@pytest.mark.slow
def test_layers_stay_in_float_until_the_accuracy_holds(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[InFloat] = []

    def spoilt(network, calibration, path, kept, dynamic_batch):
        """Answers wrongly while fewer than four layers are in float."""
        seen.append(kept)
        classifier = dict(network.named_modules())["classifier"]
        sign = -1 if len(kept.layers) < 4 else 1
        classifier.weight.data.mul_(sign)
        try:
            onnx.convert(network, calibration[0][:2], path, "fp32", dynamic_batch)
        finally:
            classifier.weight.data.mul_(sign)

    monkeypatch.setattr(onnx, "FORMAT", dataclasses.replace(onnx.FORMAT, quantize=spoilt))
    words = ["--calibration", "32", "--images", "100"]
    assert main(["quantize", str(finished), *words]) == 0
    assert [(len(kept.layers), kept.rest) for kept in seen] == [
        (0, False), (0, True), (1, True), (2, True), (4, True),
    ]  # fmt: skip
    folder = finished / "export/onnx_int8"
    report = json.loads((folder / "report.json").read_text())
    rows = list(csv.DictReader((folder / "sensitivity.csv").read_text().splitlines()))
    worst = {row["layer"] for row in rows[:4]}
    assert set(report["in_float"]["layers"]) == worst == seen[-1].layers
    total = sum(int(row["macs"]) for row in rows)
    share = 100 * sum(int(row["macs"]) for row in rows[4:]) / total
    assert report["int8_share"] == pytest.approx(share) and report["drop"] == 0
    assert [each["layers"] for each in report["tries"]] == [0, 0, 1, 2, 4]
    assert f"{share:.1f} % of the MACs in INT8 (4 layers in float" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, part",
    [
        (["--to", "torch_export"], "--precision int8 does not exist for torch_export"),
        (["--max-drop", "-1"], "--max-drop -1: give points of top-1, 0 or more"),
        (["--calibration", "0"], "--calibration 0: give a whole number"),
        (["--to", "tensorrt"], "'tensorrt' is no format"),
    ],
)
def test_mistakes_are_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert main(["quantize", str(finished), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line, line
