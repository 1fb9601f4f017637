"""`export` and `latency` of a run of detection: files that give the boxes of their detector."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from boxes import make_coco
from test_export import broken_at

from ghosttrain.cli import main
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import eval_loader
from ghosttrain.deploy import export
from ghosttrain.deploy.detector import score_differences
from ghosttrain.deploy.formats import Runner, onnx, torch_export
from ghosttrain.deploy.network import deployed
from ghosttrain.detect import inference
from ghosttrain.detect.coco_numbers import Found
from ghosttrain.detect.decode import Decoder
from ghosttrain.engine.load import load_detector
from ghosttrain.engine.run_files import read_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SSDLite of a few steps: its scores are low, and above what it keeps."""
    root = tmp_path_factory.mktemp("detection")
    make_coco(root / "coco")
    words = [
        "+recipe=detect_ssdlite", "model=mobilenetv2_050", "data=coco", f"data.root={root}/coco",
        "data.train_size=64", "data.eval_size=64", "data.workers=0", "train.global_batch=8",
        "train.max_steps=4", "schedule.warmup_epochs=0", "optim.lr=0.002", "launch.device=cpu",
        f"run.root={root}", "run.name=it",
    ]  # fmt: skip
    assert main(["detect", *words]) == 0
    return root / "it"


@pytest.fixture(scope="module")
def images(finished: Path) -> np.ndarray:
    """Two held-out images as the network takes them: (2, 3, 64, 64)."""
    data = read_config(finished).data
    held_out = build_datasets(data)[1]
    with eval_loader(held_out, data, torch.device("cpu")) as loader:
        return next(iter(loader.batches([[0, 5]]))).images.contiguous().numpy()


def expected(run: Path, images: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What the detector finds in PyTorch, not fused."""
    with torch.inference_mode():
        found = load_detector(run)(torch.from_numpy(images))
    return [{key: value.numpy() for key, value in each.items()} for each in found]


def assert_same(found: tuple[np.ndarray, ...], wanted: dict[str, np.ndarray]) -> None:
    """Of the best boxes, whose scores are apart by more than rounding."""
    assert len(wanted["scores"]) > 50
    for mine, key in zip(found, ("boxes", "scores", "labels"), strict=True):
        np.testing.assert_allclose(mine[:5], wanted[key][:5], rtol=1e-3, atol=1e-3)


def report(run: Path, name: str) -> dict:
    return json.loads((run / "export" / name / "report.json").read_text())


def test_files_with_and_without_the_choice_of_boxes(
    finished: Path,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import onnxruntime

    made = Mock(wraps=inference.settings_of)
    monkeypatch.setattr(inference, "settings_of", made)
    assert main(["export", str(finished), "--to", "onnx"]) == 0
    assert main(["export", str(finished), "--to", "onnx", "--nms", "--images", "3"]) == 0
    assert made.call_count == 2  # one pass of the backbone for each export
    text = capsys.readouterr().out
    result = json.loads((finished / "result.json").read_text())
    ap = f"{result['weights']['fused']['ap']:.2f}"
    assert f"8 images: AP {ap} % (PyTorch {ap} %), 100.00 % of" in text
    for name, images_seen, batch in (("onnx", 8, None), ("onnx_nms", 3, 1)):
        found = report(finished, name)
        assert found["passed"] and found["input"] == [batch, 3, 64, 64]
        assert found["comparison"]["images"] == images_seen and found["comparison"]["boxes"] > 200
    card = (finished / "card.md").read_text()
    assert "| AP % |" in card and "`export/onnx_nms/model.onnx`" in card

    # Both computed once more, without ghosttrain's own comparison.
    folder = finished / "export"
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx")
    raw = session.run(["logits", "deltas"], {"images": images})
    assert [y.shape for y in raw] == [(2, 144, 3), (2, 144, 4)]
    decoder = Decoder.read(folder / "onnx/preprocess.json")
    assert decoder.classes == ["disc", "bar"]
    whole = onnxruntime.InferenceSession(folder / "onnx_nms/model.onnx")
    for number, wanted in enumerate(expected(finished, images)):
        assert_same(decoder(raw[0][number], raw[1][number]), wanted)
        names = ["boxes", "scores", "labels"]
        assert_same(whole.run(names, {"images": images[number : number + 1]}), wanted)
    about = json.loads((folder / "onnx/preprocess.json").read_text())
    assert about["output"].startswith("class logits (B, A, K + 1)")
    assert about["size"] == [64, 64] and "crop_pct" not in about
    assert main(["predict", str(folder / "onnx/model.onnx"), str(finished)]) == 2
    assert "is a detector, which predict does not take" in capsys.readouterr().err


def test_pixels_in_and_a_file_that_differs_is_rejected(
    finished: Path,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["export", str(finished), "--to", "torch_export", "--include-preprocess"]
    assert main(words) == 0
    folder, data = finished / "export/torch_export", read_config(finished).data
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (data.mean, data.std))
    pixels = np.round((images * std + mean) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    outputs = torch_export.load(folder / "model.pt2")(np.ascontiguousarray(pixels))
    shown = (pixels.transpose(0, 3, 1, 2) / np.float32(255) - mean) / std
    decoder = Decoder.read(folder / "preprocess.json")
    for number, wanted in enumerate(expected(finished, shown.astype(np.float32))):
        assert_same(decoder(outputs[0][number], outputs[1][number]), wanted)

    wrong = broken_at("network.stages.2.0.depthwise.weight")
    monkeypatch.setattr(
        torch_export, "FORMAT", dataclasses.replace(torch_export.FORMAT, convert=wrong)
    )
    assert main(words[:-1]) == 1
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("REJECTED"))
    assert "and 99 % of the boxes have to be the same; the first layer that differs is" in line
    assert "stages.2.0.depthwise, by" in line
    assert (folder / "model.pt2.rejected").exists() and not (folder / "model.pt2").exists()


@pytest.mark.parametrize(("spoil", "code"), [("boxes", 1), ("score", 1), ("one", 0)])
def test_chosen_boxes_are_compared_one_by_one(
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: str,
    code: int,
) -> None:
    """In the place of a file the network itself, spoilt; the order of boxes does not count, and one
    of a hundred may be missing, but not have another score.
    """
    detector = deployed(finished)
    network = detector.with_nms(detector.box_settings((64, 64))).network

    def call(pixels: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            boxes, scores, labels = (y.numpy()[::-1].copy() for y in network(torch.tensor(pixels)))
        if spoil == "boxes":
            return [boxes + 3, scores, labels]
        if spoil == "score":
            scores[0] += 1e-3
            return [boxes, scores, labels]
        return [boxes[1:], scores[1:], labels[1:]]

    fake = dataclasses.replace(
        onnx.FORMAT,
        convert=lambda network, example, path, *more: path.write_bytes(b""),
        load=lambda path, threads: Runner(call, (1, 3, 64, 64)),
    )
    monkeypatch.setattr(onnx, "FORMAT", fake)
    monkeypatch.setattr(export, "first_difference", lambda *given: None)
    assert main(["export", str(finished), "--to", "onnx", "--nms", "--images", "2"]) == code
    found = report(finished, "onnx_nms")
    assert found["passed"] is (code == 0)
    if spoil != "boxes":
        assert 99 < found["comparison"]["same"] < 100
    if spoil == "score":
        assert found["comparison"]["largest"] == pytest.approx(1e-3, rel=1e-3)
        words = "REJECTED: scores of boxes at one place may differ by 1e-04, and 99 % of the boxes"
        assert words in capsys.readouterr().out


def test_boxes_are_paired_by_class_and_place_and_then_by_score() -> None:
    def boxes(*rows: tuple[float, ...]) -> Found:
        corners = np.array([row[:4] for row in rows], np.float32)
        return Found(corners, np.array([r[4] for r in rows]), np.array([r[5] for r in rows]))

    box, far = (10, 10, 30, 20, 0.5, 1), (10, 10, 30, 20, 0.2, 1)
    line = (10, 10, 10, 20, 0.25, 2)  # without area
    assert score_differences(boxes(box, line), boxes(line, box)) == [0, 0]
    assert score_differences(boxes(box, box), boxes(box)) == [0]
    assert score_differences(boxes(far, box), boxes(box)) == [0]
    assert score_differences(boxes(box), boxes((10, 10, 30.1, 20, 0.501, 1))) == [
        pytest.approx(1e-3)
    ]
    assert score_differences(boxes(box), boxes((10, 10, 30, 20, np.nan, 1))) == [np.inf]
    for other in ((10, 10, 30.3, 20, 0.5, 1), (10, 10, 30, 20, 0.5, 2)):
        assert score_differences(boxes(box), boxes(other)) == []
    assert score_differences(boxes(line), boxes((10, 10, 10, 20.1, 0.25, 2))) == []


def test_a_file_that_finds_nothing_is_not_called_verified(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsure(folder: Path) -> torch.nn.Module:
        detector = load_detector(folder)
        detector.score_thresh = 1.0
        return detector

    monkeypatch.setattr("ghosttrain.deploy.network.load_detector", unsure)
    none = [np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)]
    fake = dataclasses.replace(
        onnx.FORMAT,
        convert=lambda network, example, path, *more: path.write_bytes(b""),
        load=lambda path, threads: Runner(lambda pixels: none, (1, 3, 64, 64)),
    )
    monkeypatch.setattr(onnx, "FORMAT", fake)
    assert main(["export", str(finished), "--to", "onnx", "--nms"]) == 0
    assert "not verified: the detector finds no box in these images" in capsys.readouterr().out
    assert report(finished, "onnx_nms")["passed"] is None


def test_latency_has_the_decoder_beside_the_network(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--backend", "torch,torch_unfused", "--rounds", "2"]
    assert main(["latency", str(finished), *words]) == 0
    assert re.search(r"^decoder +1 +\d+\.\d\d ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["export", "RUN", "--to", "onnx,litert", "--nms"], "--nms does not exist for litert"),
        (["export", "RUN", "--to", "onnx", "--nms", "--batch", "2"], "one image at a time in fp32"),
        (["export", "RUN", "--to", "onnx", "--size", "96"], "96 px: the anchors of this run are"),
        (["latency", "RUN", "--size", "96"], "96 px: the anchors of this run are those of 64 px"),
        (["export", "RUN", "--to", "onnx", "--precision", "int8"], "--precision int8 is for class"),
        (["quantize", "RUN"], "quantize is for classification"),
        (["pareto", "RUN", "--models", "none"], "pareto is for classification"),
        (["publish", "RUN", "--to-folder", "NEW"], "is a run of detection"),
    ],
)
def test_mistakes_are_one_line(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    part: str,
) -> None:
    given = {"RUN": str(finished), "NEW": str(tmp_path / "new")}
    assert main([given.get(word, word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line, line
    if "is for class" in part:
        assert f"type python -m ghosttrain export {finished} --to onnx (fp32)" in line
