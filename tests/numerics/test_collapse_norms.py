"""The collapsed forward with every setting of batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import (
    FORWARDS,
    LAYERS,
    error,
    images,
    layer,
    outputs_gradient,
    step,
)

from ghosttrain.models.reparam import using_forward


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_momentum_and_cumulative_average(forward, momentum):
    rep = layer("depthwise 3").double()
    for bn in rep.norms():
        bn.momentum = momentum
    other = copy.deepcopy(rep)
    with using_forward(rep, forward), using_forward(other, "branches"):
        for seed in range(3):
            x = images(2, 12, 5, 6, seed=seed).double()
            rep(x), other(x)
    for (name, given), expected in zip(rep.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", ["expansion", "depthwise 3", "stem"])
def test_without_running_statistics_every_batch_is_its_own(forward, kind):
    rep = layer(kind).double()
    for bn in rep.norms():
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None
        bn.track_running_stats = False
    x = images(2, LAYERS[kind][0], 6, 5).double()
    dy = outputs_gradient(rep, x)
    expected, given = step(rep, x, dy, "branches"), step(rep, x, dy, forward)
    for key in expected:  # "eval" too: it uses the batch
        assert error(given, expected, key) <= 1e-12, key


@pytest.mark.parametrize("forward", ["auto", *FORWARDS])
@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_batch_norms_are_folded_and_stay_as_they_are(forward, kind):
    rep = layer(kind).double()
    for bn in rep.norms():
        bn.eval()
    x = images(2, LAYERS[kind][0], 6, 5).double()
    dy = outputs_gradient(rep, x)
    expected, given = step(rep, x, dy, "branches"), step(rep, x, dy, forward)
    for key in expected:
        assert error(given, expected, key) <= 1e-12, key


def test_some_batch_norms_frozen_and_others_not_are_left_to_the_branches():
    rep = layer("expansion").double()
    rep.branches[1].bn.eval()
    x = images(2, 6, 6, 5).double()
    dy = outputs_gradient(rep, x)
    expected, given = step(rep, x, dy, "branches"), step(rep, x, dy, "collapsed")
    assert all(torch.equal(given[key], expected[key]) for key in expected if key != "eval")


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_single_value_per_channel_is_refused_as_batch_norm_does(forward):
    rep = layer("expansion")
    with using_forward(rep, forward), pytest.raises(ValueError, match="more than 1 value"):
        rep(images(1, 6, 1, 1))
