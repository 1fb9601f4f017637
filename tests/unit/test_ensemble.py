"""Several teachers as one, each with its own view; classes matched by name; how they are run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config import schema
from ghosttrain.distill.features import Network, pooled_width
from ghosttrain.distill.pretrained import class_columns
from ghosttrain.distill.teacher import Teacher, build_teacher, measure_teacher
from ghosttrain.engine.cache_key import network_digest
from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model
from ghosttrain.models.weights.packing import packed

CLASSES = ["ant", "bee", "cat", "dog"]
DATA = schema.DataConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), train_size=40)
SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def network(seed: int, name: str = "test_resnet", num_classes: int = 4) -> nn.Module:
    """Return a network with statistics as after training, sure of its outputs."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
        model.get_classifier().weight.mul_(20)
    return model


def member(tmp_path: Path, seed: int, weight: float = 1.0, **settings) -> schema.MemberConfig:
    path = tmp_path / f"{seed}.safetensors"
    save_file(network(seed).state_dict(), path)
    values = {"name": "test_resnet", "weights": str(path), "input_size": 40, **settings}
    return schema.MemberConfig(weight=weight, **values)


def build(
    members: dict[str, schema.MemberConfig], data: schema.DataConfig = DATA, **settings
) -> Teacher:
    cfg = schema.TeacherConfig(members=members, **settings)
    return build_teacher(cfg, CLASSES, data, "cpu")  # type: ignore[return-value]


def student_view(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (DATA.mean, DATA.std))
    return (pixels - mean) / std


def logits_of(seed: int, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return network(seed)((pixels - 0.5) / 0.5).double()


# --- The mean of outputs ---


@pytest.mark.parametrize("average", ["probability", "logit"])
def test_outputs_are_averaged_with_their_weights(tmp_path: Path, average: str) -> None:
    pixels = torch.rand(5, 3, 40, 40)
    members = {"a": member(tmp_path, 1, weight=3.0), "b": member(tmp_path, 2)}
    output = build(members, average=average)(student_view(pixels))
    first, two = logits_of(1, pixels), logits_of(2, pixels)
    if average == "logit":
        expected = 0.75 * first + 0.25 * two
        torch.testing.assert_close(output.logits.double(), expected, rtol=1e-4, atol=1e-4)
    expected = (
        0.75 * first.softmax(1) + 0.25 * two.softmax(1)
        if average == "probability"
        else (0.75 * first + 0.25 * two).softmax(1)
    )
    assert (first.softmax(1) - two.softmax(1)).abs().max() > 0.1, "the members differ"
    torch.testing.assert_close(output.logits.double().softmax(1), expected, rtol=1e-4, atol=1e-6)


def test_one_member_is_that_network(tmp_path: Path) -> None:
    pixels = torch.rand(2, 3, 40, 40)
    for average in ("probability", "logit"):
        teacher = build({"a": member(tmp_path, 1, weight=7.0)}, average=average)
        logits = teacher(student_view(pixels)).logits.double()
        torch.testing.assert_close(logits, logits_of(1, pixels), rtol=1e-4, atol=1e-4)


def test_certain_members_that_disagree_have_a_finite_mean(tmp_path: Path) -> None:
    teacher = build({"a": member(tmp_path, 1), "b": member(tmp_path, 2)})
    extreme = [output._replace(logits=torch.full((1, 4), -1e4)) for output in teacher.each(
        student_view(torch.rand(1, 3, 40, 40)))]  # fmt: skip
    extreme[0].logits[0, 0], extreme[1].logits[0, 1] = 1e4, 1e4
    assert torch.allclose(
        teacher.joined(extreme).logits.softmax(1), torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    )


def test_the_order_in_which_members_are_typed_does_not_matter(tmp_path: Path) -> None:
    """Stored features of one order must not meet the classifier of another."""
    single, two = member(tmp_path, 1, weight=3.0), member(tmp_path, 2)
    images = student_view(torch.rand(2, 3, 40, 40))
    first = build({"a": single, "b": two}, average="logit")
    second = build({"b": two, "a": single}, average="logit")
    assert torch.equal(first(images).features, second(images).features)
    assert torch.equal(first(images).logits, second(images).logits)
    assert torch.equal(first.classifier()[0], second.classifier()[0])


# --- Features ---


def test_features_of_the_members_make_the_logits(tmp_path: Path) -> None:
    members = {"a": member(tmp_path, 1, weight=3.0), "b": member(tmp_path, 2)}
    teacher = build(members, average="logit")
    output = teacher(student_view(torch.rand(3, 3, 40, 40)))
    weight, bias = teacher.classifier()
    assert output.features is not None and len(teacher.widths) == 2
    assert output.features.shape == (3, sum(teacher.widths)) and weight.shape[1] == sum(
        teacher.widths
    )
    made = output.features @ weight.T + bias
    torch.testing.assert_close(made, output.logits, rtol=1e-4, atol=1e-4)


def test_probabilities_of_several_have_no_features(tmp_path: Path) -> None:
    teacher = build({"a": member(tmp_path, 1), "b": member(tmp_path, 2)})
    assert teacher.widths == ()
    assert teacher(student_view(torch.rand(1, 3, 40, 40))).features is None


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("test_resnet", True),
        ("test_vit", True),
        ("test_efficientnet", True),
        ("tf_efficientnet_lite0", True),
        ("beitv2_base_patch16_224", True),
        ("mobilenetv3_small_050", True),
        ("deit_tiny_distilled_patch16_224", False),  # two heads, averaged
        ("vgg11", True),
    ],
)
def test_networks_that_are_features_and_one_linear_layer(name: str, linear: bool) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    size = model.pretrained_cfg["input_size"][-1]
    layer = model.get_classifier()
    assert pooled_width(model, 3, size) == (layer.in_features if linear else 0)


@pytest.mark.parametrize("name", ["ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050"])
def test_a_student_gives_its_pooled_features_with_its_logits(name: str) -> None:
    torch.manual_seed(0)
    student = create_model(name, 4, dropout=0.0).eval()
    before = student.training
    width = pooled_width(student, 3, 64)
    assert width == student.classifier.in_features and student.training == before
    images = torch.rand(2, 3, 64, 64)
    logits, projected = Network(student, torch.nn.Linear(width, 7))(images)
    assert Network(student)(images).features is None
    torch.testing.assert_close(logits, student(images))
    assert projected.shape == (2, 7)


# --- What each of them sees ---


def test_larger_inputs_ask_for_a_view_and_take_it(tmp_path: Path) -> None:
    members = {
        "a": member(tmp_path, 1),
        "b": member(tmp_path, 2, input_size=64),
        "c": member(tmp_path, 3, input_size=36),
    }
    teacher = build(members)
    assert teacher.views == ((64, "bilinear"),)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    images = student_view(torch.rand(2, 3, 40, 40))
    outputs = teacher.each(images, {(64, "bilinear"): pixels})
    for output, view in (
        (outputs[1].logits, pixels / 255),
        (outputs[0].logits, images * torch.tensor(DATA.std).view(3, 1, 1)
         + torch.tensor(DATA.mean).view(3, 1, 1)),
    ):  # fmt: skip
        seed = 2 if view.shape[-1] == 64 else 1
        torch.testing.assert_close(output.double(), logits_of(seed, view), rtol=1e-3, atol=1e-3)
    as_float = teacher.each(images, {(64, "bilinear"): pixels / 255})
    torch.testing.assert_close(as_float[1].logits, outputs[1].logits)
    small = F.interpolate(
        images * torch.tensor(DATA.std).view(3, 1, 1) + torch.tensor(DATA.mean).view(3, 1, 1),
        (36, 36), mode="bilinear", antialias=True,
    )  # fmt: skip
    torch.testing.assert_close(
        outputs[2].logits.double(), logits_of(3, small), rtol=1e-3, atol=1e-3
    )


def test_chunks_change_nothing(tmp_path: Path) -> None:
    members = {"a": member(tmp_path, 1), "b": member(tmp_path, 2, input_size=64)}
    images = student_view(torch.rand(7, 3, 40, 40))
    views = {(64, "bilinear"): torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8)}
    whole = build(members, average="logit")(images, views)
    parts = build(members, average="logit", chunk=3)(images, views)
    torch.testing.assert_close(parts.logits, whole.logits)
    torch.testing.assert_close(parts.features, whole.features)


def test_bf16_is_close_and_outputs_in_float32(tmp_path: Path) -> None:
    images = student_view(torch.rand(4, 3, 40, 40))
    exact = build({"a": member(tmp_path, 1)})(images)
    teacher = build({"a": member(tmp_path, 1)}, dtype="bf16")
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    output = teacher(images)
    assert output.logits.dtype == torch.float32
    assert output.features is not None and output.features.dtype == torch.float32
    difference = (output.logits - exact.logits).abs().max()
    assert 0 < difference < 0.05 * exact.logits.abs().max()


def test_autocast_does_not_reach_it(tmp_path: Path) -> None:
    images = student_view(torch.rand(2, 3, 40, 40))
    teacher = build({"a": member(tmp_path, 1)})
    expected = teacher(images).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(images).logits, expected)


# --- Which classes ---


def test_classes_in_another_order_are_matched_by_the_names_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    about = {"ghosttrain": json.dumps({"classes": ["dog", "ant", "owl", "cat", "bee"]})}
    model = network(1, num_classes=5)
    path.write_bytes(packed(model.state_dict(), about))
    cfg = schema.TeacherConfig(name="test_resnet", weights=str(path), input_size=40)
    teacher = build_teacher(cfg, CLASSES, DATA, "cpu")
    assert teacher is not None
    pixels = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        expected = model((pixels - 0.5) / 0.5)[:, [1, 4, 3, 0]]
    output = teacher(student_view(pixels))
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    weight, bias = teacher.classifier()
    assert output.features is not None
    made = output.features @ weight.T + bias
    torch.testing.assert_close(made, output.logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"lacks fox:") as error:
        build_teacher(cfg, ["ant", "fox"], DATA, "cpu")
    assert "5 classes (dog, ant, owl and 2 more)" in str(error.value)
    assert "2 classes (ant, fox)" in str(error.value)


def test_synsets_are_matched_in_any_number_and_order() -> None:
    assert class_columns("t", 1000, None, SYNSETS) == (None, "classes matched by synset")
    columns, note = class_columns("t", 1000, None, [SYNSETS[7], SYNSETS[2]])
    assert columns == [7, 2] and note == "2 of its 1000 classes, by synset"
    with pytest.raises(UserError, match="lacks n04399382:"):  # ImageNet-22k has no teddy bear
        class_columns("t", 21841, None, SYNSETS)
    others = [synset for synset in SYNSETS if synset != "n04399382"]
    columns, _ = class_columns("t", 21841, None, others)
    large = ImageNetInfo("imagenet-22k").label_names()
    assert columns is not None and [large[k] for k in columns] == others
    with pytest.raises(UserError, match="lacks n00000000:"):
        class_columns("t", 1000, None, ["n00000000", *SYNSETS[1:]])


def test_names_that_are_no_synsets_are_matched_by_number() -> None:
    assert class_columns("t", 4, None, CLASSES)[0] is None
    with pytest.raises(UserError, match=r"knows 1000 classes, the data has 4 classes \(ant"):
        class_columns("t", 1000, None, CLASSES)


# --- Checks ---


def test_every_member_is_checked(tmp_path: Path) -> None:
    teacher = build({"a": member(tmp_path, 1), "b": member(tmp_path, 2)})
    images = student_view(torch.rand(8, 3, 40, 40))
    labels = teacher.each(images)[1].logits.argmax(1)
    scores = measure_teacher(teacher, [(images, labels, {})])
    top1 = [found.top1 for found in scores]
    assert scores[0].n == 8 and len(top1) == 3 and top1[2] == 1.0
    agree = (teacher.each(images)[0].logits.argmax(1) == labels).float().mean().item()
    assert top1[1] == pytest.approx(agree)


def test_the_digest_is_of_the_file_and_needs_no_network(tmp_path: Path) -> None:
    first, second = member(tmp_path, 1), member(tmp_path, 2)
    assert network_digest(first) != network_digest(second)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path(str(first.weights)).read_bytes())
    assert network_digest(first.model_copy(update={"weights": str(moved)})) == network_digest(first)
    assert network_digest(schema.PretrainedConfig(name="test_resnet", weights="gone.pth")) is None
    hub = schema.PretrainedConfig(name="beitv2_base_patch16_224.in1k_ft_in22k_in1k", weights="hub")
    assert network_digest(hub) is None
