"""Layers that round as INT8 files do: what they compute, what is learned, what is left of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ghosttrain.config.compose import compose
from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model
from ghosttrain.models.int8 import MOMENTUM, round_layers
from ghosttrain.models.reparam import fuse


def rounded(x: Tensor, step: Tensor, low: int, high: int, zero: Tensor | float = 0) -> Tensor:
    return ((x.double() / step).round() + zero).clamp(low, high).sub(zero) * step


@pytest.mark.parametrize("bits", [7, 8])
def test_a_layer_multiplies_what_integers_hold(bits: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 3, groups=3)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    net = round_layers(nn.Sequential(layer), bits)
    x = torch.randn(4, 3, 8, 8) + 0.5
    y = net(x)
    largest = 2 ** (bits - 1) - 1
    step = weight.abs().amax((1, 2, 3), keepdim=True) / largest
    low, high = x.double().min(), x.double().max()
    input_step = (high - low) / 255
    zero = (-low / input_step).round()
    expected = nn.functional.conv2d(
        rounded(x, input_step, 0, 255, zero),
        rounded(weight, step, -largest, largest),
        bias,
        groups=3,
    )
    assert torch.allclose(y.double(), expected, atol=1e-5)


def test_ranges_are_averaged_in_training_and_fixed_after_it() -> None:
    net = round_layers(nn.Sequential(nn.Linear(2, 2)), 8)
    net(torch.tensor([[0.5, 4.0]]))
    assert (net[0].low, net[0].high) == (0, 4)  # 0 is always within
    net(torch.tensor([[-1.0, 2.0]]))
    assert float(net[0].low) == pytest.approx(-MOMENTUM)
    assert float(net[0].high) == pytest.approx(4 - 2 * MOMENTUM)
    before = net[0].high.clone()
    net.eval()(torch.tensor([[100.0, 100.0]]))
    assert net[0].high == before


def test_the_gradient_passes_but_for_what_is_cut_off() -> None:
    net = round_layers(nn.Sequential(nn.Linear(3, 1, bias=False)), 8)
    net(torch.tensor([[-1.0, 0.0, 1.0]]))
    x = torch.tensor([[-2.0, 0.3, 2.0]], requires_grad=True)
    net.eval()(x).sum().backward()
    middle = net[0].weight[0, 1].item()
    step = net[0].weight.abs().max().item() / 127
    assert x.grad is not None and x.grad[0, [0, 2]].tolist() == [0, 0]
    assert x.grad[0, 1].item() == pytest.approx(middle, abs=step / 2)
    assert net[0].weight.grad.abs().sum() > 0


def test_a_student_rounds_every_layer_and_gives_its_weights_back() -> None:
    torch.manual_seed(0)
    plain = create_model("ghostnetv3_050", 10, fused=True).eval()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    net = round_layers(plain, 8).train()
    x = torch.randn(8, 3, 64, 64)
    net(x)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert layers and all(float(layer.high) > float(layer.low) for layer in layers)
    state = net.state_dict()
    assert {name for name in state if not name.endswith((".low", ".high"))} == set(before)
    back = fuse(net.eval())
    assert {type(m) for m in back.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert back.state_dict().keys() == before.keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in before.items())
    with torch.inference_mode():
        exact, coarse = back(x), net(x)
    assert 0 < (exact - coarse).abs().max() < 0.3 * exact.abs().max()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.weight_bits=8"], "trains the fused form of a finished run: type model.weights"),
        (["model=timm", "model.name=resnet18", "model.weights=F"], "with a student of this"),
        (["model.weights=.", "ema.warmup=false"], "ranges of inputs begin empty"),
        (["model.weight_bits=4"], "model.weight_bits"),
    ],
)
def test_what_cannot_be_rounded(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(["+recipe=baseline", "model.weight_bits=8", *words])
