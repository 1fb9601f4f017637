"""What a detector takes from the weights of another one."""

from __future__ import annotations

import pytest
import torch

from ghosttrain.config.compose import compose
from ghosttrain.detect.detectors import head_outputs
from ghosttrain.engine.detection import build_detector
from ghosttrain.engine.detector_start import CLASS_PREDICTOR
from ghosttrain.engine.weights_file import describe_weights, write_weights
from ghosttrain.errors import UserError

STUDENT = ["model=mobilenetv2_050", "reparam=none"]
SSDLITE = ["+recipe=detect_ssdlite", "data.train_size=64", "data.eval_size=64"]
RETINANET = ["+recipe=detect_retinanet", "detector.channels=16"]
CLASSES = ["cat", "dog", "emu"]


def settings(*words):
    return compose([*words], trains=False).config


@pytest.fixture
def saved(tmp_path):
    """Write a detector that is like no freshly initialised one; return it and its file."""

    def write(*words):
        detector = build_detector(settings(*words), CLASSES)
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.copy_(0.1 * torch.randn_like(parameter))
        path = tmp_path / "model.safetensors"
        write_weights(path, detector, describe_weights(settings(*words), CLASSES, "ema"))
        return detector.state_dict(), path

    return write


@pytest.mark.parametrize(
    "words",
    [
        [*SSDLITE, *STUDENT],
        [*RETINANET, *STUDENT],
        [*SSDLITE, "model=timm", "model.name=mobilenetv3_small_050"],
        [*RETINANET, "model=torchvision", "model.name=mobilenet_v3_small"],
    ],
)
def test_all_of_a_detector_of_the_same_kind_is_taken(saved, words):
    before, path = saved(*words)
    found = build_detector(settings(*words, f"model.weights={path}"), CLASSES)
    assert found.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in found.state_dict().items())
    assert "the whole " in found.weights_note

    others = build_detector(settings(*words, f"model.weights={path}"), ["cat", "shoe"])
    anew = {k for k, value in others.state_dict().items() if not _equal(value, before[k])}
    assert anew == {key for key in before if CLASS_PREDICTOR.fullmatch(key)} and anew
    assert "class predictor, of cat, dog, emu; one of cat, shoe starts anew" in others.weights_note


def _equal(value, other):
    return value.shape == other.shape and torch.equal(value, other)


@pytest.mark.parametrize("words", [SSDLITE, RETINANET])
def test_classes_in_another_order_keep_what_was_learnt_of_them(saved, words):
    _, path = saved(*words, *STUDENT)
    logits = []
    for classes in (CLASSES, ["emu", "cat", "dog"]):
        detector = build_detector(settings(*words, *STUDENT, f"model.weights={path}"), classes)
        kept, _ = head_outputs(detector.eval())
        with torch.no_grad():
            detector(torch.ones(1, 3, 64, 64))
        logits.append(kept["cls_logits"])
    assert torch.equal(logits[1], logits[0][..., [0, 3, 1, 2]])
    assert not torch.equal(logits[1], logits[0])


def test_branches_start_on_a_plain_detector_and_other_kinds_give_the_backbone(saved):
    before, path = saved(*SSDLITE, *STUDENT)
    start = f"model.weights={path}"
    rich = build_detector(settings(*SSDLITE, "model=mobilenetv2_050", start), CLASSES)
    heads = [key for key in before if key.startswith(("head", "backbone.extra"))]
    assert len(heads) > 100
    assert all(torch.equal(rich.state_dict()[key], before[key]) for key in heads)
    other = build_detector(settings(*RETINANET, *STUDENT, start), CLASSES)
    assert "the backbone alone" in other.weights_note and "name=ssdlite" in other.weights_note
    taken = [k for k, v in other.state_dict().items() if k in before and _equal(v, before[k])]
    assert len(taken) > 200
    with pytest.raises(UserError, match="mobilenetv2_050"):
        build_detector(settings(*SSDLITE, "model=mobilenetv2_100", "reparam=none", start), CLASSES)
