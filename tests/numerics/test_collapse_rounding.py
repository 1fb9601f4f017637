"""Rounding of the collapsed forward in float32 and bf16, on inputs that make it hard."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import (
    FORWARDS,
    LAYERS,
    Results,
    error,
    images,
    layer,
    outputs_gradient,
    scale_of,
    step,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.models.reparam import RepConv2d, using_forward


def shifted(ratio: float):
    return lambda *s: images(*s, mean=0) + ratio * torch.sign(images(1, s[1], 1, 1, seed=5))


def tiny_spread(*s: int) -> Tensor:
    return 30 + 0.01 * images(*s, mean=0)


def constant_channels(*s: int) -> Tensor:
    x = images(*s, mean=0)
    x[:, ::2] = 7.0
    return x


HARD = {
    "mean / std 100": shifted(100),
    "mean 30, std .01": tiny_spread,
    "constant channels": constant_channels,
}


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("zero_sum", [False, True])
@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_in_float32(case, zero_sum, kind, forward):
    """At most ten times the branches' own error, and never NaN."""
    rep = layer(kind)
    if zero_sum:
        for branch in rep.branches:
            branch.conv.weight.data -= branch.conv.weight.data.mean((1, 2, 3), keepdim=True)
    x = HARD[case](8, LAYERS[kind][0], 15, 14).to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    exact = step(copy.deepcopy(rep).double(), x.double(), dy.double(), "branches")
    branches, given = step(rep, x, dy, "branches"), step(rep, x, dy, forward)
    for key in exact:
        assert given[key].isfinite().all(), key
        floor = 1e-7 * scale_of(key, exact) / (scale_of(key, exact) + 1e-300)
        assert error(given, exact, key) <= 10 * error(branches, exact, key) + floor, key


@pytest.mark.parametrize("kind", ["expansion", "depthwise 3"])
def test_a_large_batch_of_large_maps_in_float32(kind):
    """256 images of 112 x 112: sums of 3.2 million terms."""
    rep = layer(kind)
    x = shifted(3)(256, LAYERS[kind][0], 112, 112)[:, :, :, :112]
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(rep).double()
        for part in (exact, rep):
            part.branches[0].bn.momentum = 1.0
        conv = exact.branches[0].conv
        z = F.conv2d(x.double(), conv.weight, None, 1, conv.padding, 1, conv.groups)
        var, mean = torch.var_mean(z, (0, 2, 3))
        with using_forward(rep, "collapsed"):
            rep(x)
    bn = rep.branches[0].bn
    assert ((bn.running_var - var) / var).abs().max() <= 1e-6
    assert ((bn.running_mean - mean) / var.sqrt()).abs().max() <= 1e-6


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize(
    "kind", ["expansion", "projection", "depthwise 3", "depthwise 5, stride 2"]
)
def test_bf16_errs_at_most_twice_as_much_as_the_branches(kind, forward):
    rep = layer(kind)
    x = images(4, LAYERS[kind][0], 15, 14).to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    exact = step(copy.deepcopy(rep).double(), x.double(), dy.double(), "branches")

    def run(name: str) -> Results:
        with torch.autocast("cpu", torch.bfloat16):
            return step(rep, x, dy.bfloat16(), name)

    branches, given = run("branches"), run(forward)
    assert given["y"].dtype == branches["y"].dtype == torch.bfloat16
    for key in ("y", "dx", *(f"d {name}" for name, _ in rep.named_parameters())):
        assert given[key].dtype == branches[key].dtype
        floor = 1e-7 + 2**-8 * (key == "y")  # the output itself is rounded
        assert error(given, exact, key) <= 2 * error(branches, exact, key) + floor, key
    for key in (name for name, b in rep.named_buffers() if b.is_floating_point()):
        assert error(given, exact, key) <= 2 * error(branches, exact, key) + 1e-7, key


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    settings = ReparamConfig(forward="branches")

    def rep(*shape: int) -> RepConv2d:
        return RepConv2d(*shape, reparam=settings)

    return nn.Sequential(
        rep(3, 8, 3, 2), nn.ReLU(), rep(8, 24, 1), nn.ReLU(), rep(24, 24, 3, 1, 24), nn.ReLU(),
        rep(24, 24, 5, 2, 24), rep(24, 8, 1), rep(8, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 5),
    ).double()  # fmt: skip


def hundred_steps(forward: str, nudge: float = 0.0) -> Tensor:
    network = small_network()
    first = network[0].branches[0].conv.weight
    with torch.no_grad():
        first *= 1 + nudge
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    x = images(6, 3, 16, 16).double().to(memory_format=torch.channels_last)
    labels = torch.arange(6) % 5
    with using_forward(network, forward):
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(network(x), labels).backward()
            optimizer.step()
    state = network.state_dict().values()
    return torch.cat([t.flatten() for t in state if t.is_floating_point()])


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_hundred_steps_stay_as_near_as_a_rounding_error(forward):
    """Training is chaotic: the measure is a run whose first kernel is off by one unit in 2^52."""
    branches = hundred_steps("branches")
    nudged = (hundred_steps("branches", nudge=2**-52) - branches).norm()
    assert nudged > 0
    assert (hundred_steps(forward) - branches).norm() <= 10 * nudged


@pytest.mark.parametrize("kind", ["expansion", "projection"])
@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_kernels_that_cancel_what_channels_share(kind, ratio):
    """Zero-sum kernels over channels that share a signal `ratio` times their own: R loses most."""
    rep = layer(kind)
    for branch in rep.branches:
        branch.conv.weight.data -= branch.conv.weight.data.mean(1, keepdim=True)
    Ci = LAYERS[kind][0]
    x = images(8, Ci, 14, 14, mean=0) + ratio * images(8, 1, 14, 14, mean=0, seed=9)
    x = x.to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    exact = step(copy.deepcopy(rep).double(), x.double(), dy.double(), "branches")
    branches, given = step(rep, x, dy, "branches"), step(rep, x, dy, "collapsed")
    for key in exact:
        assert error(given, exact, key) <= 10 * error(branches, exact, key) + 1e-7, key


@pytest.mark.parametrize("kind", ["expansion", "depthwise 3"])
@pytest.mark.parametrize("case", ["constant channels", "mean 30, std .01", "mean / std 100"])
def test_bf16_outputs_of_channels_far_from_zero(kind, case):
    rep = layer(kind)
    x = HARD[case](8, LAYERS[kind][0], 15, 14).to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(rep).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            branches = rep(x).double()
            with using_forward(rep, "collapsed"):
                given = rep(x)
    assert given.dtype == torch.bfloat16
    errors = ((y.double() - exact).norm() / exact.norm() for y in (given, branches))
    given_error, branches_error = errors
    assert given_error <= 2 * branches_error + 2**-8
