"""The table of students: their sizes, shapes and refusals, and the settings files of both."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ghosttrain.config.errors import UserError
from ghosttrain.config.schema import Model, Reparam
from ghosttrain.models.layers import ConvBN, SqueezeExcite, make_divisible
from ghosttrain.models.profile import count_macs, count_params
from ghosttrain.models.registry import (
    REPARAM,
    STUDENTS,
    as_reparam,
    create_model,
    create_timm_model,
)
from ghosttrain.models.reparam import RepConv2d, fuse

CONF = Path(__file__).parents[2] / "conf"
SMALLEST = "ghostnetv3_050"

# Parameters trained -> fused (1000 classes) and MACs at 224 trained -> fused, rounded as published:
# timm's ghostnetv3_* for the training form, a folded GhostNetV2 for the fused one.
SIZES = {
    "ghostnetv3_050": (3.395, 2_842_240, 117.5, 49.6),
    "ghostnetv3_100": (8.129, 6_125_716, 404.1, 167.0),
    "ghostnetv3_130": (12.218, 8_919_880, 654.8, 269.3),
    "ghostnetv3_160": (17.276, 12_342_762, 971.6, 398.6),
}


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- sizes and shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDENTS)
def test_sizes_are_the_published_ones(name):
    params, fused_params, macs, fused_macs = SIZES[name]
    model = create_model(name)
    assert model.training and model.name == name
    assert round(count_params(model) / 1e6, 3) == params
    assert round(count_macs(model, 224) / 1e6, 1) == macs
    fused = fuse(model.eval())
    assert count_params(fused) == fused_params
    assert round(count_macs(fused, 224) / 1e6, 1) == fused_macs


def test_the_plain_network_has_the_size_of_ghostnetv2():
    model = create_model("ghostnetv3_100", reparam="none")
    assert count_params(model) == 6_156_908
    assert round(count_macs(model, 224) / 1e6, 1) == 167.0


def test_counting_restores_the_mode_of_every_module():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Dropout())
    model[1].eval()
    assert count_macs(model, size=5, in_chans=1) == 3 * 3 * 9 * 2
    assert [m.training for m in model] == [True, False, True]
    assert count_params(model) == 18 + 4
    with pytest.raises(RuntimeError):
        count_macs(model, size=2, in_chans=1)
    assert [m.training for m in model] == [True, False, True]


@pytest.mark.parametrize("size", [(33, 33), (64, 40), (97, 33)])
def test_shapes_for_any_classes_and_channels(size):
    model = create_model(SMALLEST, num_classes=3, in_chans=2).eval()
    assert (model.num_classes, model.in_chans, model.num_features) == (3, 2, 480)
    x = torch.randn(1, 2, *size)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, 480, -(-size[0] // 32), -(-size[1] // 32))
        logits = model(x)
    assert logits.shape == (1, 3)
    assert torch.equal(logits, model.forward_head(features))


def test_branches_follow_the_settings_and_the_shapes():
    full, none = Reparam(), REPARAM["none"]
    depthwise = RepConv2d(4, 4, 3, groups=4, reparam=full)
    assert depthwise.num_branches == len(depthwise.branches) == 3
    assert depthwise.scale is not None and depthwise.identity is not None
    assert RepConv2d(4, 4, 1, reparam=full).scale is None, "a 1x1 branch beside 1x1 adds nothing"
    assert RepConv2d(4, 8, 3, reparam=full).identity is None
    assert RepConv2d(4, 4, 3, stride=2, reparam=full).identity is None
    plain = RepConv2d(4, 4, 3, reparam=none)
    assert (len(plain.branches), plain.scale, plain.identity) == (1, None, None)


def test_stem_shortcuts_and_attention_stay_plain():
    model = create_model(SMALLEST, reparam="full")
    folded = [m for m in model.modules() if isinstance(m, RepConv2d)]
    assert len(folded) == 16 * 4 + 4  # two ghost modules of two convolutions, four with stride 2
    inside = {id(m) for rep in folded for m in rep.modules()}
    plain = [m for m in model.modules() if isinstance(m, ConvBN) and id(m) not in inside]
    assert len(plain) == 1 + 5 * 2 + 14 * 3 + 1  # stem, shortcuts, attention, last


def test_dropout_stands_before_the_classifier():
    model = create_model(SMALLEST, 4, dropout=0.5)
    model.head, model.classifier = nn.Identity(), nn.Identity()
    features = torch.ones(8, 480, 1, 1)
    values = set(model.forward_head(features).unique().tolist())
    assert values == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(features), features.flatten(1))


def test_a_pointwise_convolution_is_the_same_in_both_memory_formats():
    layer = ConvBN(5, 7).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    nhwc = x.to(memory_format=torch.channels_last)
    y = layer(nhwc)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)


def test_squeeze_excite_by_hand():
    layer = SqueezeExcite(8).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    hidden = torch.clamp(x.mean((2, 3)) @ layer.reduce.weight.T + layer.reduce.bias, min=0)
    gate = torch.clamp(hidden @ layer.expand.weight.T / 6 + layer.expand.bias / 6 + 0.5, 0, 1)
    torch.testing.assert_close(layer(x), x * gate[..., None, None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 4), (4.4, 4), (4.5, 8), (17.7, 16), (17.9, 20), (18, 20), (20.8, 20)],
)
def test_channels_round_to_multiples_of_4_but_not_down_by_over_a_tenth(value, expected):
    assert make_divisible(value) == expected


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [33, 64, 96])
def test_one_value_in_a_batch_norm_is_refused(size):
    model = create_model(SMALLEST, 2)
    with pytest.raises(UserError) as error:
        model(torch.zeros(1, 3, size, size))
    message = one_line(error)
    assert "batch of 1" in message and f"{size}x{size}" in message and "micro_batch" in message
    assert "96" in message


@pytest.mark.parametrize("shape", [(1, 3, 97, 33), (1, 3, 97, 97), (2, 3, 33, 33)])
def test_two_values_are_enough(shape):
    create_model(SMALLEST, 2, reparam="none")(torch.randn(shape)).sum().backward()


def test_a_batch_of_1_trains_where_nothing_is_normalised_over_it():
    frozen = create_model(SMALLEST, 2)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    frozen(torch.zeros(1, 3, 33, 33))
    create_model(SMALLEST, 2, fused=True)(torch.zeros(1, 3, 33, 33))


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (8, 8)])
def test_too_small_an_image_is_refused(size):
    model = create_model(SMALLEST, 2).eval()
    with pytest.raises(UserError, match=r"at least 33x33 pixels, got \d+x\d+: set data.train_size"):
        model(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (3, 64, 64)])
def test_images_of_other_channels_are_refused(shape):
    with pytest.raises(UserError, match=r"takes images \(B, 3, H, W\), got .* in_chans="):
        create_model(SMALLEST, 2)(torch.zeros(shape))


def test_the_input_check_and_a_block_compile_to_one_graph():
    model = create_model(SMALLEST, 2, reparam={"branches": 2})
    block = model.stages[3]  # stride 2, squeeze-excite, attention, shortcut
    graphs = []

    def step(x, y):
        model.check_input(x)
        return block(y)

    def backend(graph, _):
        graphs.append(graph)
        return graph

    x = torch.randn(2, 3, 33, 33)
    y = torch.randn(2, 12, 9, 9).to(memory_format=torch.channels_last)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, y), step(x, y))
    assert len(graphs) == 1


# --- names and settings -------------------------------------------------------------------------


def test_importing_the_registry_needs_no_torch():
    code = (
        "import sys, ghosttrain.models.registry as r; "
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules, 'slow import'; "
        "\ntry: r.create_model('ghostnet_v3_100')\n"
        "except ValueError as e: assert 'ghostnetv3_100' in str(e)\n"
        "assert 'torch' not in sys.modules, 'a typo must be reported at once'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parent)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"name": "ghostnet_v3_130"}, "Did you mean 'ghostnetv3_130'?"),
        ({"name": "vgg"}, "Choose from: ghostnetv3_050, "),
        ({"reparam": "ful"}, "Did you mean 'full'?"),
        ({"reparam": {"branches": 0}}, "reparam.branches=0"),
        ({"reparam": {"branch": 2}}, "Did you mean 'branches'?"),
        ({"reparam": {"scale": "yes"}}, "reparam.scale='yes'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"in_chans": -1}, "in_chans=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"weights": "nowhere.pth"}, "no such file"),
    ],
)
def test_mistakes_in_arguments(kwargs, expected):
    with pytest.raises(UserError) as error:
        create_model(**{"name": SMALLEST, **kwargs})
    assert expected in one_line(error)


def test_settings_come_in_four_forms():
    assert as_reparam("full") == Reparam() == as_reparam(Reparam())
    assert as_reparam({"branches": 2, "identity": False}) == Reparam(branches=2, identity=False)
    assert as_reparam("none") == REPARAM["none"]


def test_the_fused_form_holds_no_batch_norm_and_starts_in_training_mode():
    model = create_model(SMALLEST, 2, fused=True, reparam="full")
    assert model.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_fuse_refuses_training_mode():
    model = create_model(SMALLEST, 2).eval()
    model.stem.bn.train()
    with pytest.raises(UserError, match=r"call model.eval\(\) first"):
        fuse(model)


def test_a_seed_gives_the_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create_model(SMALLEST, 2, reparam="none").state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_timm_model():
    model = create_timm_model("resnet10t", num_classes=3, in_chans=1, dropout=0.1)
    assert model.training and model.drop_rate == 0.1
    assert model.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 3)
    with pytest.raises(UserError, match="no timm model. Did you mean 'resnet10t'"):
        create_timm_model("resnet10tt")
    with pytest.raises(UserError, match="num_classes=0"):
        create_timm_model("resnet10t", num_classes=0)


# --- conf/ --------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_student_has_its_file_and_every_file_its_student():
    files = {path.stem for path in (CONF / "model").glob("*.yaml")}
    assert files == {*STUDENTS, "timm"}
    for name in STUDENTS:
        settings = Model(**read(CONF / "model" / f"{name}.yaml"))
        assert settings == Model(name=name)
        params, fused_params, macs, fused_macs = SIZES[name]
        head = (CONF / "model" / f"{name}.yaml").read_text().splitlines()[0]
        assert f"{params:.3f} -> {fused_params / 1e6:.3f} M" in head
        assert f"{macs} -> {fused_macs} M" in head
    timm = read(CONF / "model" / "timm.yaml")
    assert timm["name"] is None, "no default: the composer asks for it"
    assert Model(**{**timm, "name": "resnet18"}).source == "timm"


@pytest.mark.parametrize("name", REPARAM)
def test_reparam_files_are_the_named_settings(name):
    assert Reparam(**read(CONF / "reparam" / f"{name}.yaml")) == REPARAM[name]


def test_defaults_are_those_of_the_schema():
    signature = inspect.signature(create_model).parameters
    assert signature["dropout"].default == Model().dropout
