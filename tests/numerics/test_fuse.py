"""Folding against the branches themselves, in float64, on randomised batch-norm statistics."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghosttrain.config.schema import Reparam
from ghosttrain.models.layers import ConvBN
from ghosttrain.models.registry import create_model
from ghosttrain.models.reparam import RepConv2d, fuse

FORMS = [
    Reparam(branches=n, scale=scale, identity=identity)
    for n, scale, identity in itertools.product((1, 2, 3), (False, True), (False, True))
]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm other statistics and weights, some gains negative; set eval mode."""
    g = torch.Generator().manual_seed(seed)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor, low, high in (
            (bn.running_mean, -0.5, 0.5),
            (bn.running_var, 0.3, 2.0),
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


@pytest.mark.parametrize("form", [FORMS[-1], FORMS[0], FORMS[5]], ids=str)
def test_a_whole_network_folds_every_batch_norm(form):
    model = randomise(create_model("ghostnetv3_050", 7, reparam=form).double())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    fused = fuse(model)
    assert torch.equal(torch.get_rng_state(), rng), "fusing must draw no random numbers"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d | RepConv2d | ConvBN) for m in fused.modules())
    x = images(1, 3, 65, 40)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) <= 1e-12


def test_float32_folds_as_exactly_as_float32_computes():
    model = randomise(create_model("ghostnetv3_050", 7))
    x = images(2, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        fused = fuse(model)
        exact = fuse(model.double())
        assert relative_error(fused(x).double(), model(x.double())) <= 1e-5
    for key, value in fused.state_dict().items():
        assert torch.equal(value, exact.state_dict()[key].float()), (
            "folded in float64, rounded once"
        )


def test_a_fused_model_trains_and_fuses_to_an_equal_copy():
    fused = fuse(randomise(create_model("ghostnetv3_050", 7)))
    assert not fused.training and all(p.requires_grad for p in fused.parameters())
    again = fuse(fused)
    assert again is not fused
    own = fused.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, own[key]) and value.data_ptr() != own[key].data_ptr()
    fused.train()(images(1, 3, 33, 33, dtype=torch.float32)).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


def test_frozen_branches_fuse_to_a_trainable_convolution():
    rep = RepConv2d(4, 4, 3, reparam=Reparam()).requires_grad_(False)
    assert all(p.requires_grad for p in fuse(rep.eval()).parameters())
