"""The collapsed forward among accumulation, checkpointing and torch.compile."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from layers import (
    FORWARDS,
    LAYERS,
    images,
    layer,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ghosttrain.models.create import create_model
from ghosttrain.models.reparam import using_forward


@pytest.mark.parametrize("forward", FORWARDS)
def test_gradients_accumulate(forward):
    rep = layer("depthwise 3").double()
    other = copy.deepcopy(rep)
    with using_forward(rep, forward), using_forward(other, "branches"):
        for seed in (1, 2):
            x = images(2, 12, 5, 6, seed=seed).double()
            for r in (rep, other):
                r(x).square().sum().backward()
    for p, q in zip(rep.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_updates_running_statistics_once(forward, reentrant):
    rep, x = layer("expansion").double(), images(2, 6, 5, 6).double().requires_grad_()
    other = copy.deepcopy(rep)
    with using_forward(rep, forward), using_forward(other, forward):
        checkpoint(rep, x, use_reentrant=reentrant).square().sum().backward()
        other(x).square().sum().backward()
    for (name, given), expected in zip(
        rep.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(given, expected), name
    for p, q in zip(rep.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_what_follows_may_work_in_place():
    x = images(2, 6, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    for forward in ("branches", *FORWARDS):
        rep = layer("expansion")
        with using_forward(rep, forward):
            y = rep(x)
            y += 1
            F.relu(y, inplace=True).sum().backward()


def test_compiling_gives_one_graph():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    for kind in ("expansion", "depthwise 3", "stem"):
        torch._dynamo.reset()
        counter.frame_count = 0
        rep = layer(kind)
        rep.forward_mode = "stacked" if kind == "stem" else "collapsed"
        plain = copy.deepcopy(rep)
        x = images(2, LAYERS[kind][0], 6, 5).to(memory_format=torch.channels_last)
        compiled = torch.compile(rep, backend=counter, fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            y = compiled(x)
        y.square().sum().backward()
        expected = plain(x)
        expected.square().sum().backward()
        assert counter.frame_count == 1
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for p, q in zip(rep.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
        for b, c in zip(rep.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-5)


def test_checkpointing_a_plain_batch_norm_updates_it_once():
    from ghosttrain.models.layers import ConvBN

    layer, x = ConvBN(6, 4), images(2, 6, 5, 6).requires_grad_()
    other = copy.deepcopy(layer)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    other(x).square().sum().backward()
    for given, expected in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(given, expected)
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050"])
def test_a_whole_student_compiles_to_one_graph(model):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    student = create_model(model, 5, dropout=0).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(student)
    x = images(4, 3, 64, 64).to(memory_format=torch.channels_last)
    counter = CompileCounterWithBackend("aot_eager")
    y = torch.compile(student, backend=counter, fullgraph=True)(x)
    y.square().sum().backward()
    plain(x).square().sum().backward()
    assert counter.frame_count == 1
    for (name, p), q in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * (q.grad.norm() + 1), name
    for (name, b), c in zip(student.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-5, msg=name)
