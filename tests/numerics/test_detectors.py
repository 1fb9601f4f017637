"""Detectors on backbones, against torchvision's own."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

from ghosttrain.detect.backbones import build_backbone, create_torchvision_model
from ghosttrain.detect.detectors import (
    PYRAMID,
    SSDLITE_REDUCTIONS,
    head_outputs,
    retinanet,
    ssdlite,
    targets_of,
)
from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model
from ghosttrain.models.reparam import fuse

BOXES = torch.tensor(
    [
        [[10, 12, 60, 70, 0], [30, 40, 90, 120, 2], [0, 0, 0, 0, -1]],
        [[5, 5, 50, 40, 1], [0, 0, 0, 0, -1], [0, 0, 0, 0, -1]],
        [[0, 0, 0, 0, -1]] * 3,
    ],
    dtype=torch.float32,
)


def test_ssdlite_gives_the_losses_of_torchvisions_own():
    """Same MobileNetV3, same weights, same batch with an image without boxes; gradients too."""
    torch.manual_seed(0)
    reference = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    ).train()
    norm = reference.backbone.features[0][0][1]
    network = create_torchvision_model(
        "mobilenet_v3_large",
        norm_layer=lambda c: type(norm)(c, eps=norm.eps, momentum=norm.momentum),
        reduced_tail=True,
    )
    ours = ssdlite(build_backbone(network, SSDLITE_REDUCTIONS, "mobilenet_v3_large"), 3, 320)
    theirs, state = reference.state_dict(), ours.state_dict()
    assert len(theirs) == len(state)  # in the same order: only the names differ
    ours.load_state_dict(dict(zip(state, theirs.values(), strict=True)))
    images = torch.rand(3, 3, 320, 320)
    targets = targets_of(BOXES)
    expected = reference(list(images), [dict(t) for t in targets])
    found = ours.train()((images - 0.5) / 0.5, targets)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    sum(expected.values()).backward()
    sum(found.values()).backward()
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_targets_are_boxes_and_labels_from_1_without_what_fills_up():
    targets = targets_of(BOXES)
    assert [t["labels"].tolist() for t in targets] == [[1, 3], [2], []]
    assert targets[0]["boxes"].tolist() == [[10, 12, 60, 70], [30, 40, 90, 120]]
    assert targets[2]["boxes"].shape == (0, 4)


def student(name="ghostnetv3_050"):
    return build_backbone(create_model(name, 3), SSDLITE_REDUCTIONS, name)


def network(kind, reductions):
    if kind == "timm":
        model = timm.create_model("mobilenetv3_small_050", num_classes=3)
        return build_backbone(model, reductions, "mobilenetv3_small_050")
    if kind == "torchvision":
        return build_backbone(create_torchvision_model("resnet18"), reductions, "resnet18")
    return build_backbone(create_model(kind, 3), reductions, kind)


def detector_on(kind, name, size):
    if name == "ssdlite":
        return ssdlite(network(kind, SSDLITE_REDUCTIONS), 3, size)
    return retinanet(network(kind, PYRAMID), 3, channels=32)


@pytest.mark.parametrize(
    "kind", ["ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050", "timm", "torchvision"]
)
@pytest.mark.parametrize("name", ["ssdlite", "retinanet"])
def test_every_parameter_learns_on_every_kind_of_backbone(kind, name):
    """What no loss reaches would stop training on several GPUs."""
    torch.manual_seed(0)
    detector = detector_on(kind, name, 128)
    images = torch.randn(3, 3, 128, 128)
    losses = detector.train()(images, targets_of(BOXES))
    sum(losses.values()).backward()
    missing = [n for n, p in detector.named_parameters() if p.grad is None]
    assert missing == []
    with torch.no_grad():
        for row in detector.eval()(images):
            assert row["boxes"].shape == (len(row["scores"]), 4)
            assert ((row["labels"] >= 1) & (row["labels"] <= 3)).all()


@pytest.mark.parametrize("name", ["ssdlite", "retinanet"])
def test_losses_under_autocast_are_those_of_the_same_outputs_in_float32(name):
    """In bfloat16, of a negative with p = .001 the focal loss would be 0."""
    torch.manual_seed(0)
    detector = detector_on("mobilenetv2_050", name, 128)
    kept, handle = head_outputs(detector)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()(torch.randn(3, 3, 128, 128), targets_of(BOXES))
    handle.remove()
    assert {values.dtype for values in kept.values()} == {torch.float32}
    detector.head = Fixed(kept)
    again = detector(torch.randn(3, 3, 128, 128), targets_of(BOXES))
    for key, loss in losses.items():
        torch.testing.assert_close(loss, again[key], rtol=1e-6, atol=0)


class Fixed(torch.nn.Module):
    """A head that says what it said before."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    def forward(self, maps):
        return self.said

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        return RetinaNetHead(32, 9, 4).compute_loss(targets, head_outputs, anchors, matched_idxs)


@pytest.mark.parametrize("name", ["ssdlite", "retinanet"])
def test_the_fused_detector_finds_the_same_boxes(name):
    """On statistics that a few steps left: matched at IoU >= .99, scores to 1e-4."""
    torch.manual_seed(0)
    detector = detector_on("ghostnetv3_050", name, 96)
    detector.score_thresh, images = 0.05, torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        for _ in range(20):
            detector.train()(images, targets_of(BOXES[[0, 1, 2, 0]]))
        fused = fuse(detector.eval())
        kept, others = (head_outputs(each) for each in (detector, fused))
        before, after = detector(images), fused(images)
    assert sum(len(row["scores"]) for row in before) > 20 or name == "retinanet"
    for key, value in kept[0].items():
        torch.testing.assert_close(others[0][key], value, rtol=1e-3, atol=1e-4)
    for one, other in zip(before, after, strict=True):
        assert len(one["scores"]) == len(other["scores"])
        for box, score, label in zip(one["boxes"], one["scores"], one["labels"], strict=True):
            same = other["labels"] == label
            partner = (box_iou(box[None], other["boxes"][same])[0] >= 0.99) & (
                (other["scores"][same] - score).abs() < 1e-4
            )
            assert partner.any()
    assert not any("branches" in key for key in fused.state_dict())


def test_what_a_backbone_cannot_give_is_one_line():
    with pytest.raises(UserError, match="takes images of at least"):
        ssdlite(student(), 3, 8).eval()(torch.zeros(1, 3, 8, 8))
    small = create_model("ghostnetv3_050", 3, input_stride="small")
    with pytest.raises(UserError, match="has maps of strides 1, 2, 4, 8, 16, not of 32"):
        build_backbone(small, SSDLITE_REDUCTIONS, "ghostnetv3_050")
    with pytest.raises(UserError, match="no backbone of torchvision that is known"):
        create_torchvision_model("vit_b_16")
    with pytest.raises(UserError, match="gives no maps|has maps of strides"):
        build_backbone(timm.create_model("test_vit"), PYRAMID, "test_vit")
