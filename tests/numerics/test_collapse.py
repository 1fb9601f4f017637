"""Stacked and collapsed training against the branches themselves: values, gradients, statistics."""

from __future__ import annotations

import copy
import itertools

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

from ghosttrain import native
from ghosttrain.models import depthwise
from ghosttrain.models.depthwise import reference

# Batch 1 and 2; odd sides; 33 channels or rows of 7 leave a vector partly empty.
SHAPES = [(2, 9, 7), (1, 5, 5), (2, 8, 8)]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_float64_steps_equal_those_of_the_branches(kind, channels_last):
    for form, shape, forward in itertools.product(FORMS, SHAPES, FORWARDS):
        rep = layer(kind, form).double()
        x = images(shape[0], LAYERS[kind][0], *shape[1:]).double()
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        dy = outputs_gradient(rep, x)
        expected, given = step(rep, x, dy, "branches"), step(rep, x, dy, forward)
        assert given.keys() == expected.keys()
        for key in expected:
            assert given[key].dtype == expected[key].dtype
            assert error(given, expected, key) <= 1e-12, (forward, form, shape, key)


@pytest.mark.parametrize("kind", LAYERS)
def test_float32_steps_are_as_good_as_those_of_the_branches(kind):
    # These are the C++ kernels where they exist, which know float32 only; 33 channels fill no
    # vector, 64 are cut into chunks of whole vectors.
    for form, shape, forward in itertools.product(FORMS, SHAPES, FORWARDS):
        rep = layer(kind, form)
        x = images(shape[0], LAYERS[kind][0], *shape[1:])
        x = x.to(memory_format=torch.channels_last)
        dy = outputs_gradient(rep, x)
        expected = step(copy.deepcopy(rep).double(), x.double(), dy.double(), "branches")
        given = step(rep, x, dy, forward)
        for key in expected:
            assert error(given, expected, key) <= 2e-6, (forward, form, shape, key)


@pytest.mark.parametrize("shape", [(2, 33, 13, 15), (1, 64, 7, 7), (3, 480, 7, 7), (2, 20, 28, 3)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_the_kernels_equal_their_definition(shape, kernel, stride):
    if native.load() is None:
        pytest.skip("no C++ compiler here")
    g = torch.Generator().manual_seed(0)
    x = images(*shape).to(memory_format=torch.channels_last)
    C = shape[1]
    w, shift = torch.randn(3, kernel, kernel, C, generator=g), x.mean((0, 2, 3))
    abc, tap_abc = torch.randn(3, 3, C, generator=g), torch.randn(3, C, generator=g)
    side = [-(-s // stride) for s in shape[2:]]
    dy = torch.randn(shape[0], C, *side, generator=g).to(memory_format=torch.channels_last)
    calls = {
        "stats": (depthwise.depthwise_stats, (x, w, shift), (stride,)),
        "reduce": (depthwise.depthwise_reduce, (x, dy, shift), (kernel, stride)),
        "grads": (depthwise.depthwise_grads, (x, dy, w, shift, abc, tap_abc), (stride,)),
    }
    for name, (function, tensors, numbers) in calls.items():
        assert depthwise.kernels_for(x, kernel) is not reference
        given = function(*tensors, *numbers)
        expected = function(*(t.double() for t in tensors), *numbers)  # float64: PyTorch's form
        pairs = zip(given, expected, strict=True) if name == "grads" else [(given, expected)]
        for one_given, one_expected in pairs:
            difference = (one_given.double() - one_expected).norm() / one_expected.norm()
            assert difference <= 3e-7, name


def test_results_do_not_depend_on_the_number_of_threads():
    rep = layer("depthwise 3")
    x = images(5, 12, 9, 7).to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(step(rep, x, dy, "collapsed"))
    finally:
        torch.set_num_threads(before)
    # dx and statistics come from the kernels; PyTorch's own mean and convolution may differ.
    assert torch.allclose(runs[0]["dx"], runs[1]["dx"], rtol=0, atol=1e-6)
    w = torch.randn(3, 3, 3, 12)
    sums = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        sums.append(depthwise.depthwise_stats(x, w, torch.zeros(12), 1))
    torch.set_num_threads(before)
    assert torch.equal(*sums)
