"""The choice of boxes outside torchvision: the decoder in numpy, and the network that has it within
its graph.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ghosttrain.detect import decode
from ghosttrain.detect.backbones import build_backbone
from ghosttrain.detect.decode import Decoder
from ghosttrain.detect.detectors import PYRAMID, SSDLITE_REDUCTIONS, retinanet, ssdlite
from ghosttrain.detect.inference import WithNms, settings_of
from ghosttrain.models.create import create_model

SIZE = {"ssdlite": (96, 96), "retinanet": (64, 96)}
CLASSES = ["disc", "bar", "ring"]


class Says(nn.Module):
    """Gives the same outputs whatever it is shown."""

    def __init__(self, *outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs


@pytest.fixture(params=["ssdlite", "retinanet"])
def case(request):
    """A detector, how it makes boxes, and outputs of two images; the second has one box."""
    name = request.param
    reductions = SSDLITE_REDUCTIONS if name == "ssdlite" else PYRAMID
    torch.manual_seed(0)
    backbone = build_backbone(create_model("mobilenetv2_050", 3), reductions, "mobilenetv2_050")
    detector = (
        ssdlite(backbone, 3, 96) if name == "ssdlite" else retinanet(backbone, 3, 16)
    ).eval()
    detector.score_thresh, detector.nms_thresh = 0.3, 0.4
    detector.box_coder.bbox_xform_clip = 0.5
    images = torch.zeros(1, 3, *SIZE[name])
    settings = settings_of(detector, images)
    count = len(settings["anchors"])
    logits, deltas = torch.randn(2, count, 4) * 2, torch.randn(2, count, 4) * 3
    deltas[:, ::7, 2:] += 30  # beyond what the box coder lets through
    logits[1] = torch.tensor([9.0, -9, -9, -9]) if name == "ssdlite" else -9
    logits[1, 5, 2] = 9
    return detector, settings, logits, deltas


def expected_of(detector, settings, logits, deltas):
    """What torchvision's own choice makes of the outputs of one image."""
    found = {"cls_logits": logits[None], "bbox_regression": deltas[None]}
    anchors = torch.tensor(settings["anchors"])
    size = tuple(settings["size"])
    if settings["scores"] == "softmax":
        (boxes,) = detector.postprocess_detections(found, [anchors], [size])
    else:
        counts = settings["anchors_per_map"]
        split = {key: list(value.split(counts, dim=1)) for key, value in found.items()}
        (boxes,) = detector.postprocess_detections(split, [list(anchors.split(counts))], [size])
    return [boxes[key].numpy() for key in ("boxes", "scores", "labels")]


@pytest.mark.parametrize(("candidates", "most"), [(60, 40), (5, 300)])
def test_boxes_scores_and_labels_are_torchvisions(case, candidates, most, tmp_path):
    """Where the number of detections is the limit, and where that of candidates is."""
    detector, settings, logits, deltas = case
    detector.topk_candidates, detector.detections_per_img = candidates, most
    settings = {**settings, "topk_candidates": candidates, "detections_per_image": most}
    path = tmp_path / "preprocess.json"
    path.write_text(json.dumps({"detector": settings, "classes": CLASSES}))
    decoder = Decoder.read(path)
    assert decoder.classes == CLASSES
    counts = []
    for one, moves in zip(logits, deltas, strict=True):
        boxes, scores, labels = expected_of(detector, settings, one, moves)
        graph = WithNms(Says(one[None], moves[None]), settings)(torch.zeros(0))
        for found in (decoder(one.numpy(), moves.numpy()), [y.numpy() for y in graph]):
            np.testing.assert_allclose(found[0], boxes, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(found[1], scores, rtol=1e-5)
            assert found[2].tolist() == labels.tolist() and found[0].dtype == np.float32
        counts.append(len(scores))
    assert counts[0] == 40 if most == 40 else 5 < counts[0] <= 25
    assert counts[1] == 1


def test_the_settings_are_those_that_the_detector_uses(case):
    """Anchors included: those of a forward pass."""
    detector, settings, _, _ = case
    seen = []
    generator = detector.anchor_generator
    handle = generator.register_forward_hook(lambda *call: seen.append(call[2][0]))
    with torch.inference_mode():
        detector(torch.zeros(1, 3, *settings["size"]))
    handle.remove()
    assert torch.equal(torch.tensor(settings["anchors"]), seen[0])
    assert sum(settings["anchors_per_map"]) == len(seen[0])


def test_nothing_found_is_no_box(case):
    detector, settings, logits, deltas = case
    settings = {**settings, "score_threshold": 1.0}
    boxes, scores, labels = Decoder(settings, CLASSES)(logits[0].numpy(), deltas[0].numpy())
    assert boxes.shape == (0, 4) and scores.shape == labels.shape == (0,)


def test_the_decoder_can_be_taken_along():
    """Its one import that Python does not bring is numpy."""
    tree = ast.parse(Path(decode.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"numpy"}
