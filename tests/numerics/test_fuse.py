"""Folding against the branches themselves, in float64, on randomised batch-norm statistics.

The reference is always `forward=branches`: another way to compute the branches may fold them too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.config.students import STUDENTS
from ghosttrain.models import ghostnet, mobilenetv2, shufflenetv2
from ghosttrain.models.create import create_model
from ghosttrain.models.layers import ConvBN
from ghosttrain.models.reparam import RepConv2d, fuse

FORMS = [
    ReparamConfig(forward="branches", branches=n, scale=scale, identity=identity)
    for n, scale, identity in itertools.product((1, 2, 3), (False, True), (False, True))
]
FULL, PLAIN = FORMS[-1], FORMS[0]
# Branches on 1x1 convolutions of the blocks, on depthwise ones, on the stem.
SWITCHES = [
    (True, True, False),
    (True, True, True),
    (False, True, False),
    (True, False, False),
    (False, False, True),
]
SIDE = {"ghostnetv3": 33, "mobilenetv2": 16, "shufflenetv2": 16}  # of a small image
SMALLEST = {family: f"{family}_050" for family in SIDE}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm other statistics and weights, some gains negative; set eval mode."""
    g = torch.Generator().manual_seed(seed)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor, low, high in (
            (bn.running_mean, -0.5, 0.5),
            # Less, and the deep networks amplify a rounding error a thousandfold.
            (bn.running_var, 0.5, 3.0),
            (bn.weight, -0.5, 1.5),
            (bn.bias, -0.5, 0.5),
        ):
            tensor.data.uniform_(low, high, generator=g)
    return model.eval()


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


def by_hand(rep: RepConv2d, x: torch.Tensor) -> torch.Tensor:
    """Sum of branches written with functions only, as the definition says."""

    def norm(z: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
        m, v, g, b = (
            t[:, None, None] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        return (z - m) / torch.sqrt(v + bn.eps) * g + b

    convs = [*rep.branches, *([rep.scale] if rep.scale else [])]
    stride, groups = convs[0].conv.stride, convs[0].conv.groups
    y = sum(
        norm(
            F.conv2d(x, c.conv.weight, None, stride, c.conv.weight.shape[-1] // 2, 1, groups), c.bn
        )
        for c in convs
    )
    return y + norm(x, rep.identity) if rep.identity else y


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "groups"),
    [
        (6, 6, 1, 1, 1),
        (6, 8, 1, 1, 1),
        (6, 6, 3, 1, 6),
        (6, 6, 5, 2, 6),
        (6, 6, 3, 1, 2),
        (4, 8, 3, 2, 1),
    ],
)
def test_every_form_of_a_convolution_folds(form, inputs, outputs, kernel, stride, groups):
    rep = RepConv2d(inputs, outputs, kernel, stride, groups, reparam=form).double()
    randomise(rep)
    x = images(2, inputs, 7, 9)
    with torch.no_grad():
        expected = by_hand(rep, x)
        folded = fuse(rep)
        assert isinstance(folded, nn.Conv2d) and folded.bias is not None
        assert relative_error(rep(x), expected) <= 1e-13
        assert relative_error(folded(x), expected) <= 1e-12


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave of every family one block of each kind."""
    kinds = (
        ((3, 16, 16, False, 1),),
        ((5, 24, 24, True, 2),),
        ((3, 32, 24, False, 1),),
    )
    monkeypatch.setattr(ghostnet, "STAGES", kinds)
    monkeypatch.setattr(mobilenetv2, "STAGES", ((1, 16, 1, 1), (6, 24, 2, 2)))
    monkeypatch.setattr(shufflenetv2, "DEPTHS", (2, 1, 1))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("family", SIDE)
def test_every_setting_of_every_family_folds(family, switches):
    pointwise, depthwise, stem = switches
    x = images(2, 3, SIDE[family], SIDE[family])
    for form in FORMS if pointwise and depthwise else (FULL, FORMS[6]):
        update = {"pointwise": pointwise, "depthwise": depthwise, "stem": stem}
        form = form.model_copy(update=update)
        model = randomise(create_model(SMALLEST[family], 7, reparam=form))
        with torch.no_grad():
            single, unfused = fuse(model)(x.float()), model(x.float())
            model.double()
            exact = model(x)
            assert relative_error(fuse(model)(x), exact) <= 1e-12
            assert relative_error(single.double(), exact) <= 10 * error_floor(unfused, exact)


def error_floor(unfused: torch.Tensor, exact: torch.Tensor) -> float:
    """What float32 loses without folding, and at least half of its resolution."""
    return max(relative_error(unfused.double(), exact), 6e-8)


@pytest.mark.parametrize("name", [n for n in STUDENTS if not n.startswith("ghostnetv2")])
def test_every_student_folds_every_batch_norm(name):
    """Layer by layer, which no depth can blur, and as a whole."""
    family = name.rpartition("_")[0]
    model = randomise(create_model(name, 7, reparam=FULL).double())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    fused = fuse(model)
    assert torch.equal(torch.get_rng_state(), rng), "fusing must draw no random numbers"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d | RepConv2d | ConvBN) for m in fused.modules())

    errors = {}

    def compare(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
            errors[layer] = relative_error(fused.get_submodule(layer)(args[0]), y)

        return hook

    for layer, module in fused.named_modules():
        if isinstance(module, nn.Conv2d):
            model.get_submodule(layer).register_forward_hook(compare(layer))
    x = images(2, 3, SIDE[family], SIDE[family])
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) <= 1e-12
    assert len(errors) > 50 and max(errors.values()) <= 1e-12


@pytest.mark.parametrize("form", [PLAIN, FULL], ids=str)
@pytest.mark.parametrize("family", SIDE)
def test_float32_folds_as_exactly_as_float32_computes(family, form):
    model = randomise(create_model(SMALLEST[family], 7, reparam=form))
    x = images(2, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        fused, unfused = fuse(model), model(x)
        exact = fuse(model.double())
        expected = model(x.double())
        assert relative_error(fused(x).double(), expected) <= 10 * error_floor(unfused, expected)
    for key, value in fused.state_dict().items():
        assert torch.equal(value, exact.state_dict()[key].float()), (
            "folded in float64, rounded once"
        )


@pytest.mark.parametrize("family", SIDE)
def test_a_fused_model_trains_and_fuses_to_an_equal_copy(family):
    fused = fuse(randomise(create_model(SMALLEST[family], 7)))
    assert not fused.training and all(p.requires_grad for p in fused.parameters())
    again = fuse(fused)
    assert again is not fused
    unfused = fused.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, unfused[key]) and value.data_ptr() != unfused[key].data_ptr()
    x = images(1, 3, SIDE[family], SIDE[family], dtype=torch.float32)
    fused.train()(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


def test_frozen_branches_fuse_to_a_trainable_convolution():
    rep = RepConv2d(4, 4, 3, reparam=ReparamConfig()).requires_grad_(False)
    assert all(p.requires_grad for p in fuse(rep.eval()).parameters())
