"""What a network is changed to while converters trace it."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch.nn import functional as F

from ghosttrain.deploy.tracing import exact_upsampling, quietly


def test_upsampling_is_equal_to_the_bit_and_ordinary_again_afterwards() -> None:
    ordinary = F.interpolate
    for height in range(1, 12):
        for width in (1, 3, 8):
            x = torch.randn(2, 3, height, width)
            for more in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0)):
                size = (2 * height + more[0], 2 * width + more[1])
                expected = F.interpolate(x, size=size, mode="nearest")
                with exact_upsampling():
                    assert F.interpolate is not ordinary
                    assert torch.equal(F.interpolate(x, size=size, mode="nearest"), expected)
                    smooth = F.interpolate(x, size=size, mode="bilinear")
                    scaled = F.interpolate(x, scale_factor=2)
                assert F.interpolate is ordinary
                assert torch.equal(smooth, F.interpolate(x, size=size, mode="bilinear"))
                assert torch.equal(scaled, F.interpolate(x, scale_factor=2))


def test_upsampling_that_is_not_whole_is_not_in_the_graph() -> None:
    class Stretch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.interpolate(x, size=(7, 7), mode="nearest")

    x = torch.randn(1, 2, 3, 3)
    with exact_upsampling():
        graph = torch.export.export(Stretch(), (x,))
    sizes = [node.args[1] for node in graph.graph.nodes if "upsample" in str(node.target)]
    assert sizes == [[6, 6]]
    assert torch.equal(graph.module()(x), Stretch()(x))


def test_converters_are_silent_and_what_they_raise_is_raised(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyError), quietly():
        print("printed")
        os.write(1, b"from C++")
        warnings.warn("a warning", stacklevel=1)
        raise KeyError
    assert capfd.readouterr() == ("", "")
    print("after")
    assert capfd.readouterr().out == "after\n"
