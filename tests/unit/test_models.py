"""The table of students: their sizes, shapes and refusals, and the settings files of both.

The structure of each family is compared with the published networks in
`tests/numerics/test_students.py`.
"""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import ModelConfig, ReparamConfig
from ghosttrain.config.students import FAMILIES, STUDENTS
from ghosttrain.errors import UserError
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.models.create import (
    REPARAM,
    as_reparam,
    create_model,
    create_timm_model,
)
from ghosttrain.models.layers import ConvBN, SqueezeExcite, make_divisible
from ghosttrain.models.reparam import RepConv2d, fuse

CONF = Path(__file__).parents[2] / "conf"
SMALLEST = "ghostnetv3_050"
WIDEST = ("ghostnetv3_160", "mobilenetv2_140", "shufflenetv2_200")

FULL = ReparamConfig(forward="branches")  # the definition that MACs are counted with

# Parameters trained -> fused (1000 classes) and MACs at 224 trained -> fused. GhostNet's are
# published: timm's ghostnetv3_* for the training form, a folded GhostNetV2 for the fused one.
SIZES = {
    "ghostnetv3_050": (3.395, 2_842_240, 117.5, 49.6),
    "ghostnetv3_100": (8.129, 6_125_716, 404.1, 167.0),
    "ghostnetv3_130": (12.218, 8_919_880, 654.8, 269.3),
    "ghostnetv3_160": (17.276, 12_342_762, 971.6, 398.6),
    "mobilenetv2_050": (2.945, 1_959_408, 259.2, 97.1),
    "mobilenetv2_100": (7.160, 3_487_816, 840.2, 300.8),
    "mobilenetv2_140": (13.172, 6_084_808, 1635.1, 582.2),
    "shufflenetv2_050": (1.660, 1_362_816, 84.1, 40.5),
    "shufflenetv2_100": (3.850, 2_270_514, 370.3, 144.9),
    "shufflenetv2_150": (7.043, 3_491_904, 799.0, 295.8),
    "shufflenetv2_200": (14.118, 7_377_138, 1534.5, 583.3),
}
MEASURED = tuple(SIZES)
SIZES |= {f"ghostnetv2_{width}": SIZES[f"ghostnetv3_{width}"] for width in (100, 130, 160)}
SMALLEST_OF_FAMILY = ("ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050")


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- sizes and shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURED)
def test_sizes(name):
    params, fused_params, macs, fused_macs = SIZES[name]
    with torch.device("meta"):  # shapes only: nothing is computed
        model = create_model(name, reparam=FULL)
        assert model.training and model.name == name
        assert round(count_params(model) / 1e6, 3) == params
        assert round(count_macs(model, 224) / 1e6, 1) == macs
        fused = fuse(model.eval())
        assert count_params(fused) == fused_params
        assert round(count_macs(fused, 224) / 1e6, 1) == fused_macs


def test_ghostnetv2_is_the_network_of_ghostnetv3():
    pairs = [(n, n.replace("v2", "v3")) for n in STUDENTS if n.startswith("ghostnetv2")]
    assert len(pairs) == 3 and all(STUDENTS[v2] == STUDENTS[v3] for v2, v3 in pairs)


def test_counting_restores_the_mode_of_every_module():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Dropout())
    model[1].eval()
    assert count_macs(model, size=5, in_chans=1) == 3 * 3 * 9 * 2
    assert [m.training for m in model] == [True, False, True]
    assert count_params(model) == 18 + 4
    with pytest.raises(RuntimeError):
        count_macs(model, size=2, in_chans=1)
    assert [m.training for m in model] == [True, False, True]


@pytest.mark.parametrize("name", ["test_vit", "test_byobnet"])
def test_macs_are_those_of_torchs_own_counter(name):
    model = timm.create_model(name).eval()
    x = torch.zeros(1, 3, 160, 160)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert count_macs(model, 160) == counter.get_total_flops() // 2 > 0


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
    full, none = ReparamConfig(), REPARAM["none"]
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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in WIDEST else pytest.mark.slow)
        for name in STUDENTS
        if not name.startswith("ghostnetv2")  # ghostnetv3 of the same width
    ],
)
def test_the_first_loss_is_that_of_guessing(name):
    """ln K within 5 %, mean of 5 seeds, before and after any statistics were taken; not exactly."""
    for classes in (2,) if name in WIDEST else (2, 3, 10, 100, 1000):  # 2 is the hardest
        labels = torch.arange(8) % classes
        losses = []
        for seed in range(5):
            torch.manual_seed(seed)
            model, images = create_model(name, classes), torch.randn(8, 3, 64, 64)
            with torch.inference_mode():
                pair = [
                    nn.functional.cross_entropy(m(images), labels) for m in (model, model.eval())
                ]
            losses.append(pair)
        for loss in torch.tensor(losses).mean(0) / math.log(classes):
            assert 0.95 < loss < 1.05 and loss != 1, (name, classes, loss)


def test_branches_share_the_gain_of_a_plain_layer():
    for name in ("mobilenetv2_050", "shufflenetv2_050"):
        reps = [m for m in create_model(name, 2).modules() if isinstance(m, RepConv2d)]
        for rep in reps:
            gains = torch.stack([norm.weight for norm in rep.norms()])
            torch.testing.assert_close(gains.square().sum(0), torch.ones(gains.shape[1]))
        assert len({len(rep.norms()) for rep in reps}) > 1


@pytest.mark.parametrize("name", SMALLEST_OF_FAMILY)
def test_dropout_stands_before_the_classifier(name):
    model = create_model(name, 4, dropout=0.5)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5]
    model.head = model.classifier = nn.Identity()
    features = torch.ones(8, model.num_features, 1, 1)
    values = set(model.forward_head(features).unique().tolist())
    assert values == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(features), features.flatten(1))


@pytest.mark.parametrize("name", ["mobilenetv2_050", "ghostnetv3_050"])
def test_blocks_are_skipped_in_training_only_the_last_most_often(name):
    torch.manual_seed(0)
    model = create_model(name, 5, reparam="none", drop_path=0.4)
    blocks = [m for m in model.modules() if hasattr(m, "drop_path")]
    rates = [block.drop_path.p for block in blocks]
    assert rates == pytest.approx([0.4 * i / (len(blocks) - 1) for i in range(len(blocks))])
    block = next(b for b in reversed(blocks) if getattr(b, "has_shortcut", True) and
                 getattr(b, "shortcut", None) is None)  # fmt: skip
    channels = next(m for m in block.modules() if isinstance(m, torch.nn.Conv2d)).in_channels
    x_BCHW = torch.randn(400, channels, 2, 2)
    with torch.no_grad():
        skipped = (block(x_BCHW) == x_BCHW).flatten(1).all(1).float().mean().item()
    deviation = (block.drop_path.p * (1 - block.drop_path.p) / 400) ** 0.5
    assert abs(skipped - block.drop_path.p) < 4 * deviation
    plain = create_model(name, 5, reparam="none")
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), plain.eval()(images))
    with pytest.raises(UserError, match=r"no shortcuts.*model.drop_path=0"):
        create_model("shufflenetv2_050", drop_path=0.1)


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


@pytest.mark.parametrize("stride", ["standard", "small"])
@pytest.mark.parametrize("name", SMALLEST_OF_FAMILY)
def test_the_table_of_sides_is_where_the_networks_begin_to_work(name, stride):
    model = create_model(name, 2, reparam="none", input_stride=stride)
    least, one_value = FAMILIES[STUDENTS[name].family].sides[stride]
    assert (model.min_size, model.one_value_size) == (least, one_value)
    model.check_input = lambda x: None  # what happens without the refusals

    def works(batch: int, size: int, training: bool = True) -> bool:
        try:
            model.train(training)(torch.randn(batch, 3, size, size))
        except (RuntimeError, ValueError):
            return False
        return True

    assert works(2, least) and works(2, least, training=False) and not works(2, least - 1)
    assert works(1, least, training=False) and not works(1, least - 1, training=False)
    assert works(1, one_value + 1) and not works(1, one_value)


def test_the_sides_count_when_the_run_is_composed(tmp_path):
    def refusal(*overrides: str) -> str:
        with pytest.raises(UserError) as error:
            compose(overrides)
        return one_line(error)

    ghost, small = "model=ghostnetv3_050", "model.input_stride=small"
    message = refusal(ghost, "data.train_size=32")
    assert "data.train_size=32 is too small for ghostnetv3_050" in message
    assert "33x33" in message and "model.input_stride=small (from 17)" in message
    assert "data.eval_size=32 is too small" in refusal(ghost, "data.eval_size=32")
    assert "input_stride" not in refusal(ghost, "data.train_size=16")
    assert "17x17" in refusal(ghost, small, "data.train_size=16")
    compose([ghost, small, "data.train_size=17", "data.eval_size=17"])
    compose(["model=mobilenetv2_050", "data.train_size=8", "data.eval_size=8"])
    compose(["model=timm", "model.name=resnet18", "data.train_size=8"])

    first = "train.micro_batch=1"
    message = refusal(ghost, first, "data.train_size=96")
    assert "batches of 1" in message and "train.micro_batch=2" in message
    assert "data.train_size=97" in message
    compose([ghost, first, "data.train_size=97"])
    compose([ghost, first, small, "data.train_size=49"])
    assert "data.train_size=33" in refusal("model=shufflenetv2_100", first, "data.train_size=32")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nsource: ghosttrain\n")
    with pytest.raises(UserError, match=r"model.name=mine is no student\. Choose from: ghostnet"):
        compose(["model=mine"], str(tmp_path))


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (8, 8)])
def test_too_small_an_image_is_refused(size):
    model = create_model(SMALLEST, 2).eval()
    with pytest.raises(UserError, match=r"at least 33x33 pixels, got \d+x\d+: set data.train_size"):
        model(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (3, 64, 64)])
def test_images_of_other_channels_are_refused(shape):
    with pytest.raises(UserError, match=r"takes images \(B, 3, H, W\), got .* in_chans="):
        create_model(SMALLEST, 2)(torch.zeros(shape))


# GhostNet: stride 2, squeeze-excite, attention, shortcut. The other stages have both strides.
@pytest.mark.parametrize(
    ("name", "stage", "channels"),
    [("ghostnetv3_050", 3, 12), ("mobilenetv2_050", 1, 8), ("shufflenetv2_050", 0, 24)],
)
def test_the_input_check_and_a_stage_compile_to_one_graph(name, stage, channels):
    model = create_model(name, 2, reparam={"branches": 2, "forward": "branches"})
    blocks = model.stages[stage]
    graphs = []

    def step(x, y):
        model.check_input(x)
        return blocks(y)

    def backend(graph, _):
        graphs.append(graph)
        return graph

    x = torch.randn(2, 3, 33, 33)
    y = torch.randn(2, channels, 9, 9).to(memory_format=torch.channels_last)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, y), step(x, y))
    assert len(graphs) == 1


# --- names and settings -------------------------------------------------------------------------


def test_the_table_of_students_needs_no_torch():
    code = (
        "import sys, ghosttrain.config.students; "
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules, 'slow import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parent)
    with pytest.raises(UserError, match="Did you mean 'ghostnetv3_100'"):
        create_model("ghostnet_v3_100")


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"name": "ghostnet_v3_130"}, "Did you mean 'ghostnetv3_130'?"),
        ({"name": "vgg"}, "Choose from: ghostnetv2_100, "),
        ({"name": "mobilenet_v2_100"}, "Did you mean 'mobilenetv2_100'?"),
        ({"input_stride": "smal"}, "Did you mean 'small'?"),
        ({"input_stride": "1"}, "Choose from: small, standard."),
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
    assert as_reparam("full") == ReparamConfig() == as_reparam(ReparamConfig())
    assert as_reparam({"branches": 2, "identity": False}) == ReparamConfig(
        branches=2, identity=False
    )
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
    pretrained = {f"efficientnet_lite{size}" for size in range(3)}
    assert files == {*STUDENTS, "timm", "torchvision", *pretrained}
    for name in pretrained:
        settings = ModelConfig(**read(CONF / "model" / f"{name}.yaml"))
        assert (settings.source, settings.weights) == ("timm", "efficientnet-lite")
        assert settings.name == f"tf_{name}"
    for name in STUDENTS:
        settings = ModelConfig(**read(CONF / "model" / f"{name}.yaml"))
        published = 0.2 if name.startswith(("ghostnetv2", "mobilenetv2")) else 0.0
        assert settings == ModelConfig(name=name, dropout=published)
        params, fused_params, macs, fused_macs = SIZES[name]
        head = (CONF / "model" / f"{name}.yaml").read_text().splitlines()[0]
        assert f"{params:.3f} -> {fused_params / 1e6:.3f} M" in head
        assert f"{macs} -> {fused_macs} M" in head
    timm = read(CONF / "model" / "timm.yaml")
    assert timm["name"] is None, "no default: the composer asks for it"
    assert ModelConfig(**{**timm, "name": "resnet18"}).source == "timm"


@pytest.mark.parametrize("name", REPARAM)
def test_reparam_files_are_the_named_settings(name):
    assert ReparamConfig(**read(CONF / "reparam" / f"{name}.yaml")) == REPARAM[name]


def test_defaults_are_those_of_the_schema():
    signature = inspect.signature(create_model).parameters
    assert signature["dropout"].default == ModelConfig().dropout
