"""Weights of timm, torchvision and the official code here, and ours there: outputs agree."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from ghosttrain.models.create import create_model
from ghosttrain.models.reparam import fuse
from ghosttrain.models.weights.export import export_state

K = 5
PLAIN = [
    ("ghostnetv2_100", "timm", "ghostnetv2_100"),
    ("ghostnetv3_130", "timm", "ghostnetv2_130"),
    ("ghostnetv2_160", "timm", "ghostnetv2_160"),
    ("mobilenetv2_050", "timm", "mobilenetv2_050"),
    ("mobilenetv2_100", "timm", "mobilenetv2_100"),
    ("mobilenetv2_140", "timm", "mobilenetv2_140"),
    ("mobilenetv2_100", "torchvision", "mobilenet_v2"),
    ("shufflenetv2_050", "torchvision", "shufflenet_v2_x0_5"),
    ("shufflenetv2_100", "torchvision", "shufflenet_v2_x1_0"),
    ("shufflenetv2_150", "torchvision", "shufflenet_v2_x1_5"),
    ("shufflenetv2_200", "torchvision", "shufflenet_v2_x2_0"),
]
FAMILIES = [
    ("ghostnetv2_100", "timm", "ghostnetv2_100"),
    ("mobilenetv2_050", "timm", "mobilenetv2_050"),
    ("mobilenetv2_100", "torchvision", "mobilenet_v2"),
    ("shufflenetv2_050", "torchvision", "shufflenet_v2_x0_5"),
]
SOME = {"branches": 2, "identity": False, "stem": True}


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Give every batch norm random parameters and statistics; return the model in eval mode.

    The statistics are those of a batch, disturbed: entirely random ones let the activations of a
    deep network grow until float32 means nothing, or fade until the image hardly matters.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in norms:
        nn.init.uniform_(bn.weight, 0.5, 1.0)
        nn.init.uniform_(bn.bias, -0.2, 0.2)
        bn.momentum = 1.0  # the running statistics become those of the next batch
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    model.train()(torch.randn(8, stem.in_channels, 65, 65))
    for bn in norms:
        bn.momentum = 0.1
        bn.running_var.clamp_(min=bn.running_var.mean() / 2)  # a dead channel has none
        bn.running_mean += torch.empty_like(bn.bias).uniform_(-0.2, 0.2) * bn.running_var.sqrt()
        bn.running_var *= torch.empty_like(bn.bias).uniform_(0.8, 2.0)
    return model.eval()


def network_of(library: str, name: str, **kwargs) -> nn.Module:
    """A network of another library, without dropout."""
    create = timm.create_model if library == "timm" else torchvision.models.get_model
    network = create(name, num_classes=K, **kwargs)
    if hasattr(network, "drop_rate"):
        network.drop_rate = 0.0
    for dropout in (m for m in network.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    return network


@torch.no_grad()
def assert_equal_outputs(
    ours: nn.Module, theirs: nn.Module, dtype: torch.dtype = torch.float64, in_chans: int = 3
) -> None:
    """Compare the logits of two networks in eval mode, relative to the largest."""
    x = torch.randn(2, in_chans, 49, 65, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = theirs.to(dtype).eval()(x)
    bound = 1e-11 if dtype == torch.float64 else 1e-5
    assert (ours.to(dtype).eval()(x) - expected).abs().max() <= bound * expected.abs().max()
    difference = (expected[0] - expected[1]).abs().max()
    assert difference > 1e-3 * expected.abs().max(), "the images hardly matter: a weak test"


# --- theirs here --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "library", "theirs"), PLAIN)
def test_weights_of_others_load_here(tmp_path, name, library, theirs):
    torch.manual_seed(0)
    reference = randomised(network_of(library, theirs))
    torch.save(reference.state_dict(), tmp_path / "x.pth")
    model = create_model(name, K, reparam="none", weights=str(tmp_path / "x.pth"))
    assert (model.weights_dialect, model.weights_note) == (library, "")
    assert_equal_outputs(model, reference, torch.float32)
    assert_equal_outputs(model, reference)


# What the official code calls the entries of its first block with stride 2, read in
# https://github.com/huawei-noah/Efficient-AI-Backbones (ghostnetv3_pytorch/ghostnetv3.py).
OFFICIAL = """
    ghost1.primary_rpr_conv.2.conv.weight  ghost1.primary_rpr_conv.2.bn.running_var
    ghost1.cheap_rpr_skip.weight  ghost1.cheap_rpr_conv.0.bn.bias  ghost1.cheap_rpr_scale.bn.weight
    ghost2.cheap_rpr_scale.conv.weight  dw_rpr_conv.1.conv.weight  dw_rpr_conv.1.bn.running_mean
    dw_rpr_scale.conv.weight  dw_rpr_scale.bn.bias  shortcut.0.weight  shortcut.3.running_mean
"""


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the official code, as a trainer with DDP saves them."""
    branch = re.compile(r"(_rpr_conv\.\d|_rpr_scale)\.bn1\.")
    renamed = {branch.sub(r"\1.bn.", key): value for key, value in state.items()}
    assert {f"blocks.1.0.{key}" for key in OFFICIAL.split()} <= renamed.keys()
    return {f"module.{key}": value for key, value in renamed.items()}


def test_the_official_checkpoint_layout(tmp_path):
    torch.manual_seed(0)
    raw, ema = (randomised(network_of("timm", "ghostnetv3_050")) for _ in range(2))
    profiled = {"module.total_ops": torch.zeros(1), "module.blocks.0.total_params": torch.zeros(1)}
    states = {"state_dict": official(raw.state_dict()) | profiled}
    torch.save({"arch": "ghostnetv3", "epoch": 599, **states}, tmp_path / "raw.pth.tar")
    states["state_dict_ema"] = official(ema.state_dict())
    torch.save({"arch": "ghostnetv3", "epoch": 599, **states}, tmp_path / "both.pth.tar")
    taken = "state_dict_ema is taken, not state_dict"
    for file, reference, note in (("raw.pth.tar", raw, ""), ("both.pth.tar", ema, taken)):
        model = create_model("ghostnetv3_050", K, weights=str(tmp_path / file))
        assert (model.weights_dialect, model.weights_note) == ("official", note)
        assert_equal_outputs(model, reference)


# --- ours there ---------------------------------------------------------------------------------


def assert_loads_elsewhere(model: nn.Module, library: str, expected: str, tmp_path) -> None:
    """Through a file in float32, and in float64."""
    name, state = export_state(model, library)
    assert name == expected
    if library == "timm":
        torch.save(state, tmp_path / "x.pth")
        kwargs = {"in_chans": model.in_chans, "checkpoint_path": str(tmp_path / "x.pth")}
        theirs = network_of(library, name, **kwargs)
    else:
        theirs = network_of(library, name)
        theirs.load_state_dict(state)
    assert_equal_outputs(model, theirs, torch.float32, model.in_chans)
    theirs.double().load_state_dict(export_state(model.double(), library)[1])
    assert_equal_outputs(model, theirs, torch.float64, model.in_chans)


def test_the_training_form_of_ghostnetv3_in_timm(tmp_path):
    torch.manual_seed(0)
    model = randomised(create_model("ghostnetv3_050", K, in_chans=1))
    assert_loads_elsewhere(model, "timm", "ghostnetv3_050", tmp_path)


@pytest.mark.parametrize(("name", "library", "theirs"), FAMILIES)
def test_fused_students_in_plain_networks(tmp_path, name, library, theirs):
    torch.manual_seed(0)
    model = fuse(randomised(create_model(name, K, reparam=SOME)))
    assert_loads_elsewhere(model, library, theirs, tmp_path)


@pytest.mark.parametrize(
    ("name", "library", "theirs"),
    PLAIN
    + [(name, "timm", name) for name in ("ghostnetv3_100", "ghostnetv3_130", "ghostnetv3_160")],
)
def test_every_width_has_its_name_and_shapes(name, library, theirs):
    reparam = "full" if theirs.startswith("ghostnetv3") else "none"
    written, state = export_state(create_model(name, K, reparam=reparam), library)
    assert written == theirs
    with torch.device("meta"):
        expected = network_of(library, theirs).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize(("name", "library", "theirs"), FAMILIES)
def test_plain_students_keep_their_batch_norms(tmp_path, name, library, theirs):
    torch.manual_seed(0)
    model = randomised(create_model(name, K, reparam="none"))
    variances = [v for k, v in export_state(model, library)[1].items() if k.endswith("running_var")]
    assert variances and not any(v.eq(1).all() for v in variances)
    assert_loads_elsewhere(model, library, theirs, tmp_path)


# --- a plain network starts a re-parameterized run ------------------------------------------------


@pytest.mark.parametrize(
    ("name", "library", "theirs", "reparam"),
    [(*PLAIN[0], "full")]
    + [(*family, r) for family in FAMILIES if family[0].endswith("_050") for r in ("full", SOME)],
)
def test_a_plain_network_starts_with_branches(tmp_path, name, library, theirs, reparam):
    torch.manual_seed(0)
    reference = randomised(network_of(library, theirs))
    torch.save(reference.state_dict(), tmp_path / "x.pth")
    assert_same_start(name, reparam, tmp_path / "x.pth", reference)


@pytest.mark.parametrize(
    ("name", "fewer", "extra"),
    [
        ("ghostnetv3_050", {"branches": 2, "scale": False}, {"branches": 4}),
        ("shufflenetv2_050", {"depthwise": False}, "full"),
        ("shufflenetv2_050", {"branches": 1, "scale": True, "identity": False}, "full"),
        ("shufflenetv2_050", {"pointwise": False}, {"stem": True}),
    ],
)
def test_fewer_branches_start_more(tmp_path, name, fewer, extra):
    torch.manual_seed(0)
    smaller = randomised(create_model(name, K, reparam=fewer, dropout=0.0))
    torch.save(smaller.state_dict(), tmp_path / "x.pth")
    assert_same_start(name, extra, tmp_path / "x.pth", smaller)


def assert_same_start(name: str, reparam, path, reference: nn.Module) -> None:
    """The function at step 0 is the reference's, in eval and in training mode; all of it learns."""
    model = create_model(name, K, reparam=reparam, dropout=0.0, weights=str(path))
    assert model.weights_note.endswith("branches that it lacks start with gain 0")
    assert_equal_outputs(model, reference)
    assert_equal_outputs(fuse(model), reference)

    x = torch.randn(4, 3, 33, 33, generator=torch.Generator().manual_seed(2)).double()
    expected, given = reference.train()(x), model.train()(x)
    assert (given - expected).abs().max() <= 1e-10 * expected.abs().max()

    nn.functional.cross_entropy(given, torch.arange(4)).backward()
    silent = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.weight.eq(0).all()]
    assert silent and all(bn.weight.grad.abs().max() > 0 for bn in silent), "asleep for ever"
