"""`export`: files that answer as their network, and what happens where they do not."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ghosttrain import load_run
from ghosttrain.cli import main
from ghosttrain.deploy.formats import find, onnx, own_environment, torch_export
from ghosttrain.deploy.network import inference_form
from ghosttrain.deploy.parity import compare
from ghosttrain.engine.run_files import damaged_products, read_result
from ghosttrain.models.create import create_model

RUN = ["+recipe=baseline", "model=shufflenetv2_050", "launch.device=cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    words = ["train.max_steps=12", "train.global_batch=64", f"run.root={root}", "run.name=it"]
    assert main([*RUN, *words]) == 0
    return root / "it"


def report(run: Path, name: str) -> dict:
    return json.loads((run / "export" / name / "report.json").read_text())


def test_onnx_answers_as_the_run_does(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    assert main(["export", str(finished), "--to", "onnx,torch_export"]) == 0
    text = capsys.readouterr().out
    result = json.loads((finished / "result.json").read_text())
    fused = f"{result['weights']['fused']['top1']:.2f}"
    assert text.count(f"360 images: top-1 {fused} % (PyTorch {fused} %)") == 2
    found = report(finished, "onnx")
    assert found["passed"] and found["input"] == [None, 3, 64, 64]
    assert found["bytes"] == (finished / "export/onnx/model.onnx").stat().st_size
    # Both computed once more, without ghosttrain's own comparison.
    session = onnxruntime.InferenceSession(finished / "export/onnx/model.onnx")
    network = load_run(finished, "ema")
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(images).numpy()
    (logits,) = session.run(None, {"images": images.numpy()})
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    card = (finished / "card.md").read_text()
    assert card.count("## Exported files") == 1 and "`export/torch_export/model.pt2`" in card
    assert f"| {fused} | {fused} |" in card and f"{found['latency_ms']:.2f} ms" in card
    assert main(["export", str(finished), "--to", "torch_export"]) == 0
    assert (finished / "card.md").read_text().count("## Exported files") == 1
    assert not damaged_products(finished, read_result(finished) or {})
    about = json.loads((finished / "export/onnx/preprocess.json").read_text())
    assert about["classes"] == [str(k) for k in range(10)] and about["size"] == [64, 64]


def test_predict_takes_the_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = ["--to", "torch_export", "--images", "9"]
    shown = {}
    for name, more in {"plain": [], "whole": ["--include-preprocess"]}.items():
        assert main(["export", str(finished), *words, *more]) == 0
        file = str(finished / "export/torch_export/model.pt2")
        capsys.readouterr()
        assert main(["predict", file, str(tmp_path)]) == 0
        shown[name] = capsys.readouterr().out
    assert main(["predict", str(finished), str(tmp_path)]) == 0
    shown["run"] = capsys.readouterr().out
    assert shown["plain"] == shown["run"] == shown["whole"]
    assert main(["predict", file, str(tmp_path), "--weights", "raw"]) == 2
    (finished / "export/torch_export/preprocess.json").write_text("{}")
    assert main(["predict", file, str(tmp_path)]) == 2
    assert "needs preprocess.json beside it" in capsys.readouterr().err


def test_pixels_in_probabilities_out(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    words = ["--include-preprocess", "--batch", "7", "--size", "64x49", "--images", "10"]
    assert main(["export", str(finished), "--to", "onnx", *words]) == 0
    assert "largest difference of a probability" in capsys.readouterr().out
    found = report(finished, "onnx")
    assert found["input"] == [7, 64, 49, 3] and found["comparison"]["images"] == 10
    session = onnxruntime.InferenceSession(finished / "export/onnx/model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 64, 49, 3), dtype=np.uint8)
    (probabilities,) = session.run(None, {"images": pixels})
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    data, network = load_run(finished).transform.data, load_run(finished)
    images = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    with torch.inference_mode():
        expected = network((images - mean) / std).softmax(1)
    assert np.allclose(probabilities, expected, atol=1e-5)


def test_half_precision_is_smaller_and_close(finished: Path) -> None:
    assert main(["export", str(finished), "--to", "onnx", "--precision", "fp16"]) == 0
    half = finished / "export/onnx_fp16/model.onnx"
    assert str(Path.cwd()).encode() not in half.read_bytes()  # of a stack trace
    network = load_run(finished, "fused")
    assert half.stat().st_size < 2.4 * sum(p.numel() for p in network.parameters())
    assert 0 < report(finished, "onnx_fp16")["comparison"]["largest"] < 0.05


def broken_at(layer: str) -> Callable[..., None]:
    """A converter that makes a mistake in one layer."""

    def convert(network: torch.nn.Module, *rest: object) -> None:
        (weight,) = (p for name, p in network.named_parameters() if name.endswith(layer))
        weight.data.mul_(2)
        try:
            torch_export.convert(network, *rest)  # type: ignore[arg-type]
        finally:
            weight.data.div_(2)

    return convert


def test_a_file_that_differs_is_rejected(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = broken_at("stages.1.2.right.depthwise.weight")
    monkeypatch.setattr(
        torch_export, "FORMAT", dataclasses.replace(torch_export.FORMAT, convert=wrong)
    )
    assert main(["export", str(finished), "--to", "torch_export"]) == 1
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("REJECTED"))
    assert "the first layer that differs is stages.1.2.right.depthwise, by" in line
    folder = finished / "export" / "torch_export"
    assert (folder / "model.pt2.rejected").exists() and not (folder / "model.pt2").exists()
    found = report(finished, "torch_export")
    assert found["passed"] is False and found["file"] == "model.pt2.rejected"


def test_a_converter_that_fails_is_named_and_the_others_go_on(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*given: object) -> None:
        raise KeyError("no such\noperator")

    monkeypatch.setattr(onnx, "FORMAT", dataclasses.replace(onnx.FORMAT, convert=fails))
    assert main(["export", str(finished), "--to", "onnx,torch_export", "--images", "5"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^onnx fp32: its converter failed \(KeyError: .*error.txt$", text, re.M)
    assert "torch_export fp32: " in text
    assert "in fails" in (finished / "export/onnx.error.txt").read_text()


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "export needs --to FORMAT: onnx, torch_export, litert"),
        (["--to", "tflite"], "Did you mean 'litert'?"),
        (["--to", "torch_export", "--precision", "fp16"], "does not exist for torch_export"),
        (["--to", "onnx", "--precision", "int4"], "choose fp32, fp16 or int8"),
        (["--to", "onnx", "--size", "0"], "--size 0: give a side in pixels"),
        (["--to", "onnx", "--batch", "0"], "--batch 0: give a whole number"),
        (["--to", "onnx", "--nms"], "--nms is for detectors"),
        (["--to", "onnx", "data.classes=[1,2]"], "'data.classes' cannot be changed"),
        (["--to", "onnx", "model.name=x"], "cannot be changed for a run that exists"),
    ],
)
def test_mistakes_are_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert main(["export", str(finished), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line, line


def test_unfinished_and_damaged_runs_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert main(["export", str(run), "--to", "onnx"]) == 2
    assert "model.safetensors is missing or damaged" in capsys.readouterr().err
    (run / "result.json").unlink()
    assert main(["export", str(run), "--to", "onnx"]) == 2
    assert "is not finished" in capsys.readouterr().err


def test_missing_and_unfit_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ghosttrain.deploy import formats
    from ghosttrain.errors import UserError

    with monkeypatch.context() as patch:
        patch.setattr(formats, "_installed", lambda package: False)
        with pytest.raises(UserError, match=r"not installed here: pip install '.*\[ncnn\]'"):
            find("ncnn")
        with pytest.raises(UserError, match=re.escape(own_environment("litert"))):
            find("litert")
        patch.setattr(formats.metadata, "version", lambda package: "2.15.0+cpu")
        with pytest.raises(UserError, match="litert needs torch below 2.15, here is 2.15.0"):
            find("litert")


def test_ghostnet_with_an_odd_map() -> None:
    """At 97 px the last maps are 4 and 7 wide: the attention stretches 3 to 7."""
    torch.manual_seed(0)
    network = create_model("ghostnetv3_050", num_classes=10)
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(8, 3, 97, 97))
    network = inference_form(network, own=True)
    images = torch.randn(3, 3, 97, 97)
    made = find("onnx")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        made.convert(network, images[:2], path, "fp32", True)
        batches = [(images, torch.zeros(3)), (images[:1], torch.zeros(1))]
        found = compare(network, made.load(path, 1), batches, None, 1e-4)
    assert found.passes(1e-4) and found.images == 4


def test_timms_own_fusing_is_used() -> None:
    torch.manual_seed(0)
    network = timm.create_model("ghostnetv3_050", num_classes=10)
    network(torch.randn(8, 3, 64, 64))
    form = inference_form(network, own=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(form(images), network(images), atol=1e-4)
    count = [sum(p.numel() for p in each.parameters()) for each in (form, network)]
    assert count[0] < count[1] and not any(p.requires_grad for p in form.parameters())
