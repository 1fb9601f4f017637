"""Which forward a layer takes, and which layers are left to the branches."""

from __future__ import annotations

import pytest
import torch
from layers import (
    FORMS,
    FORWARDS,
    LAYERS,
    error,
    images,
    layer,
    outputs_gradient,
    step,
)
from torch import nn

from ghosttrain import native
from ghosttrain.models import depthwise
from ghosttrain.models.collapse import choose_forward
from ghosttrain.models.reparam import RepConv2d, using_forward


def test_auto_follows_its_rule():
    def choice(kind: str, form: tuple[int, bool, bool] = FORMS[0], last: bool = True) -> str:
        rep = layer(kind, form)
        rep.forward_mode = "auto"
        x = images(2, LAYERS[kind][0], 6, 5)
        return choose_forward(rep, x.to(memory_format=torch.channels_last) if last else x)

    fast = "collapsed" if native.load() is not None else "branches"
    assert choice("expansion") == choice("projection") == "collapsed"
    assert choice("projection", (2, False, False)) == "stacked"
    assert choice("stem") == choice("pointwise, stride 2") == "stacked"
    assert choice("depthwise 3") == choice("depthwise 5, stride 2") == fast
    assert choice("expansion", last=False) == choice("depthwise 3", last=False) == "branches"
    assert choice("expansion", (1, False, False)) == "branches"
    rep = layer("expansion").eval()
    assert choose_forward(rep, images(2, 6, 6, 5)) == "branches", "asked for by name"
    rep.forward_mode = "auto"
    assert choose_forward(rep, images(2, 6, 6, 5)) == "folded"


def test_without_the_kernels_depthwise_layers_fall_back(monkeypatch):
    rep = layer("depthwise 3")
    x = images(2, 12, 6, 5).to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    with_kernels = step(rep, x, dy, "collapsed")
    monkeypatch.setattr(depthwise, "_functions", lambda device_type: None)
    rep.forward_mode = "auto"
    assert choose_forward(rep, x) == "branches"
    without = step(rep, x, dy, "collapsed")
    for key in without:
        assert error(without, with_kernels, key) <= 2e-6, key


def test_the_engine_is_restored_after_a_block():
    rep = layer("expansion")
    rep.forward_mode = "auto"
    with pytest.raises(RuntimeError), using_forward(rep, "stacked"):
        assert rep.forward_mode == "stacked"
        raise RuntimeError
    assert rep.forward_mode == "auto"


def changed(rep: RepConv2d, name: str) -> RepConv2d:
    if name == "eps":
        rep.branches[1].bn.eps = 0.5
    elif name == "no weights":
        for branch in rep.branches:
            branch.bn = nn.BatchNorm2d(branch.bn.num_features, affine=False)
    elif name == "another norm":
        rep.branches[0].bn = nn.GroupNorm(2, rep.branches[0].bn.num_features)
    elif name == "torch's own synchronized":
        rep = nn.SyncBatchNorm.convert_sync_batchnorm(rep)
    else:
        rep = rep.bfloat16()
    rep.forward_mode = "collapsed"
    return rep


@pytest.mark.parametrize(
    "name", ["eps", "no weights", "another norm", "torch's own synchronized", "bf16 parameters"]
)
def test_unusual_layers_are_left_to_the_branches(name):
    rep = changed(layer("expansion", (3, False, False)), name)
    x = images(2, 6, 5, 6).to(next(rep.parameters()).dtype)
    assert choose_forward(rep, x) == "branches"
    assert choose_forward(rep.eval(), x) == "branches"
    assert rep(x).isfinite().all()


@pytest.mark.parametrize("forward", FORWARDS)
def test_second_derivatives_are_refused(forward):
    rep, x = layer("expansion"), images(2, 6, 5, 6).requires_grad_()
    with using_forward(rep, forward):
        (g,) = torch.autograd.grad(rep(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()
