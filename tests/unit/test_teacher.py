"""Teachers: complete weights or an error, their own view of the images, chance refused."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import refusal
from teachers import MEAN, STD, build, network, only, saved
from torch.nn import functional as F


def test_logits_are_those_of_the_network_on_its_own_view_of_the_image(tmp_path: Path) -> None:
    model = network()
    built = build(weights=saved(tmp_path, model), input_size=48)
    pixels = torch.rand(2, 3, 64, 64)
    student_view = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    small = F.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = model((small - 0.5) / 0.5)
    torch.testing.assert_close(built(student_view).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_image_of_its_size_is_not_resized(tmp_path: Path) -> None:
    model = network()
    settings = {"input_size": 40, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    built = build(weights=saved(tmp_path, model), **settings)
    pixels = torch.rand(2, 3, 40, 40)
    student_view = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    own_view = (pixels - torch.tensor(settings["mean"]).view(3, 1, 1)) / torch.tensor(
        settings["std"]
    ).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            built(student_view).logits, model(own_view), rtol=1e-4, atol=1e-5
        )


def test_its_input_size_comes_from_its_own_configuration(tmp_path: Path) -> None:
    assert only(build(weights=saved(tmp_path, network()))).view == (160, "bilinear")


def test_a_grey_image_is_repeated(tmp_path: Path) -> None:
    model = network()
    built = build(weights=saved(tmp_path, model), in_chans=1, input_size=48)
    pixels = torch.rand(2, 1, 48, 48)
    with torch.no_grad():
        expected = model((pixels.expand(-1, 3, -1, -1) - 0.5) / 0.5)
    logits = built((pixels - MEAN[0]) / STD[0]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_grey_teacher(tmp_path: Path) -> None:
    weights = saved(tmp_path, network(in_chans=1))
    message = refusal(lambda: build(weights=weights))
    assert "1-channel images" in message and "data.in_chans=1" in message
    message = refusal(lambda: build(weights=weights, in_chans=1))
    assert "teacher.mean has 3 values" in message
    built = build(weights=weights, in_chans=1, mean=(0.5,), std=(0.5,), input_size=48)
    assert built(torch.zeros(1, 1, 48, 48)).logits.shape == (1, 4)


def test_it_is_frozen_and_stays_in_eval_mode(tmp_path: Path) -> None:
    built = build(weights=saved(tmp_path, network()), input_size=48)
    assert not any(p.requires_grad for p in built.parameters())
    built.train()
    assert not any(module.training for module in built.modules())
    before = {key: value.clone() for key, value in built.state_dict().items()}
    images = torch.rand(2, 3, 48, 48, requires_grad=True)
    assert not built(images).logits.requires_grad
    assert all(torch.equal(before[key], value) for key, value in built.state_dict().items())


def test_logits_are_float32_under_autocast(tmp_path: Path) -> None:
    built = build(weights=saved(tmp_path, network()), input_size=48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert built(torch.rand(1, 3, 48, 48).bfloat16()).logits.dtype == torch.float32


def test_building_it_draws_no_random_numbers(tmp_path: Path) -> None:
    weights = saved(tmp_path, network())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build(weights=weights)
    assert torch.rand(1) == expected
