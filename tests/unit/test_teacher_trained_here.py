"""A network that was trained here as a teacher: its file says what it is and how it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import refusal
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config import schema
from ghosttrain.distill.teacher import Teacher, build_teacher
from ghosttrain.engine.cache_key import completed
from ghosttrain.engine.weights_file import describe_weights, write_weights
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.models.reparam import fuse

CLASSES = ["ant", "bee", "cat", "dog"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
OWN = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
SIZE = 40


def shaken(model: nn.Module) -> nn.Module:
    """Return a network in eval mode with statistics as after training."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model.eval()


def written(
    path: Path, model: nn.Module, name: str, source: str = "ghosttrain", form: Any = "ema", **stride
) -> str:
    """Write a network as a run does, trained on SIZE pixels; return the path."""
    model_settings = {"name": name, "source": source, **stride}
    data = {**OWN, "eval_size": SIZE, "interpolation": "bilinear"}
    config = schema.Config(
        model=schema.ModelConfig(**model_settings), data=schema.DataConfig(**data)
    )
    write_weights(path, model, describe_weights(config, ["dog", "ant", "cat", "bee"], form))
    return str(path)


def build(**settings: Any) -> Teacher:
    data = schema.DataConfig(mean=MEAN, std=STD, train_size=SIZE)
    return build_teacher(schema.TeacherConfig(**settings), CLASSES, data, "cpu")  # type: ignore[return-value]


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def seen(pixels: Tensor) -> Tensor:
    """Return pixels as the student of a run sees them."""
    return (pixels - column(MEAN)) / column(STD)


CASES = [
    ("ghostnetv3_050", {}, False),
    ("ghostnetv3_050", {}, True),
    ("mobilenetv2_050", {"reparam": {"branches": 2, "stem": True}}, False),
    ("shufflenetv2_050", {"reparam": "none", "input_stride": "small"}, False),
]


@pytest.mark.parametrize(("name", "settings", "deploy"), CASES)
def test_a_student_teaches_as_its_file_says(
    tmp_path: Path, name: str, settings: dict[str, Any], deploy: bool
) -> None:
    torch.manual_seed(0)
    model = shaken(create_model(name, 4, dropout=0.5, **settings))
    saved = fuse(model) if deploy else model
    stride = {key: settings[key] for key in ("input_stride",) if key in settings}
    path = written(
        tmp_path / "w.safetensors", saved, name, form="fused" if deploy else "ema", **stride
    )
    teacher = build(weights=path)
    (member,) = teacher.members.values()
    assert member.view == (SIZE, "bilinear") and member.size_note == "as its file says"
    assert member.name == name and member.classes_note == "4 of its 4 classes, by name"
    assert not any(isinstance(m, nn.BatchNorm2d) for m in member.network.modules()), "fused"
    pixels = torch.rand(2, 3, 64, 64)
    small = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = model((small - column(OWN["mean"])) / column(OWN["std"]))[:, [1, 3, 2, 0]]
    output = teacher(seen(pixels))
    torch.testing.assert_close(output.logits, logits, rtol=1e-3, atol=1e-4)
    weight, bias = teacher.classifier()
    assert output.features is not None
    torch.testing.assert_close(output.features @ weight.T + bias, output.logits)


def test_what_is_typed_counts_before_what_the_file_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shaken(create_timm_model("test_resnet", 4))
    path = written(tmp_path / "w.safetensors", model, "test_resnet", "timm")
    (member,) = build(weights=path).members.values()
    assert member.view == (SIZE, "bilinear"), "not timm's 160"
    assert member.mean.flatten().tolist() == pytest.approx(OWN["mean"])
    typed = {"name": "test_resnet", "input_size": 56, "mean": (0.5,), "std": (0.25,)}
    (member,) = build(weights=path, **typed).members.values()
    assert member.view == (56, "bilinear") and member.size_note == "as set"
    assert member.mean.flatten().tolist() == [0.5] * 3 and member.std.flatten()[0] == 0.25
    message = refusal(lambda: build(weights=path, name="test_vit"))
    assert "holds a test_resnet, as the file says, but teacher.name is test_vit" in message
    assert "type teacher.name=test_resnet" in message


def test_files_that_do_not_say_what_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shaken(create_model("ghostnetv3_050", 4))
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    weights = str(tmp_path / "w.pth")
    message = refusal(lambda: build(weights=weights))
    assert "does not say which network it is: type teacher.name=MODEL" in message
    (member,) = build(weights=weights, name="ghostnetv3_050").members.values()
    assert type(member.network).__module__ == "ghosttrain.models.ghostnet"
    assert member.view[0] == 224 and member.size_note == "as timm lists it"
    theirs = shaken(timm.create_model("ghostnetv3_050", num_classes=4))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    (member,) = build(weights=weights, name="ghostnetv3_050").members.values()
    assert type(member.network).__module__ == "timm.models.ghostnet"
    torch.save(shaken(create_model("shufflenetv2_050", 4)).state_dict(), tmp_path / "w.pth")
    (member,) = build(weights=weights, name="shufflenetv2_050").members.values()
    assert member.view[0] == 224 and member.size_note == "the default"
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier")}
    torch.save(state, tmp_path / "w.pth")
    message = refusal(lambda: build(weights=weights, name="ghostnetv3_050"))
    assert "has no classifier and cannot teach" in message
    message = refusal(lambda: build(weights=weights, name="ghostnetv3_050x"))
    assert "Did you mean 'ghostnetv3_050'?" in message


def test_members_describe_themselves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = written(tmp_path / "1.safetensors", shaken(create_model("mobilenetv2_050", 4)),
                  "mobilenetv2_050")  # fmt: skip
    two = written(tmp_path / "2.safetensors", shaken(create_timm_model("test_resnet", 4)),
                  "test_resnet", "timm")  # fmt: skip
    members = {
        "a": schema.MemberConfig(weights=first),
        "b": schema.MemberConfig(weights=two, input_size=48),
    }
    teacher = build(members=members)
    assert [m.name for m in teacher.members.values()] == ["mobilenetv2_050", "test_resnet"]
    assert [m.view[0] for m in teacher.members.values()] == [SIZE, 48]
    assert teacher(seen(torch.rand(2, 3, SIZE, SIZE))).logits.shape == (2, 4)
    members["b"] = schema.MemberConfig(weights=two, name="test_vit")
    assert "teacher.members.b.name is test_vit" in refusal(lambda: build(members=members))


def test_what_is_asked_for_a_cache(tmp_path: Path) -> None:
    """The settings of a described file are those that say the same; others stay as typed."""
    model = create_timm_model("test_resnet", 4)
    path = written(tmp_path / "w.safetensors", model, "test_resnet", "timm")
    message = {"name": "test_resnet", "input_size": SIZE, **OWN}
    left = schema.TeacherConfig(weights=path)
    assert completed(left).model_dump(include={*message}) == message
    assert completed(schema.TeacherConfig(weights=path, **message)) == completed(left)
    typed = schema.TeacherConfig(weights=path, input_size=48)
    assert completed(typed).input_size == 48 and completed(typed).name == "test_resnet"
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for cfg in (
        schema.TeacherConfig(name="digits", weights="digits"),
        schema.TeacherConfig(name="test_resnet", weights=str(tmp_path / "plain.safetensors")),
        schema.TeacherConfig(name="test_resnet", weights=str(tmp_path / "gone.safetensors")),
        schema.TeacherConfig(name="resnet18", weights="hub"),
        schema.TeacherConfig(),
    ):
        assert completed(cfg) == cfg


def test_the_metadata_of_a_run_are_read_back(tmp_path: Path) -> None:
    """Guards the agreement of the writer with the reader: a key renamed in one is noticed."""
    from ghosttrain.models.weights.files import read_about

    path = written(tmp_path / "w.safetensors", create_model("mobilenetv2_050", 4),
                   "mobilenetv2_050", input_stride="small")  # fmt: skip
    about = read_about(Path(path), "w")
    assert json.loads(json.dumps(about.__dict__)) == {
        "name": "mobilenetv2_050", "source": "ghosttrain", "input_stride": "small",
        "classes": ["dog", "ant", "cat", "bee"], "input_size": SIZE, "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "detector": None,
    }  # fmt: skip
