"""Students against the published networks of timm and torchvision: sizes, structure, formats.

That the outputs agree is tested with the translation of weights (`test_weights_*.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.shufflenetv2 import channel_shuffle

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.models.create import REPARAM, create_model
from ghosttrain.models.layers import ConvBN
from ghosttrain.models.reparam import RepConv2d, fuse
from ghosttrain.models.shufflenetv2 import ShuffleBlock, interleave

SMALLEST = ("ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050")
PUBLISHED: dict[str, Callable[[], nn.Module]] = {
    **{
        f"ghostnetv2_{w}": lambda w=w: timm.create_model(f"ghostnetv2_{w}") for w in (100, 130, 160)
    },
    **{
        f"mobilenetv2_{w}": lambda w=w: timm.create_model(f"mobilenetv2_{w}")
        for w in ("050", "100", "140")
    },
    "shufflenetv2_050": torchvision.models.shufflenet_v2_x0_5,
    "shufflenetv2_100": torchvision.models.shufflenet_v2_x1_0,
    "shufflenetv2_150": torchvision.models.shufflenet_v2_x1_5,
    "shufflenetv2_200": torchvision.models.shufflenet_v2_x2_0,
}
# One after the other: more branches, fewer kinds of them, fewer layers that have them.
SETTINGS = [
    ReparamConfig(forward="branches", **fields)
    for fields in (
        {},
        {"branches": 1},
        {"branches": 2, "scale": False},
        {"identity": False},
        {"pointwise": False},
        {"depthwise": False},
        {"stem": True},
    )
]


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plain_form_has_the_size_of_the_published_network(name):
    with torch.device("meta"):  # shapes only: nothing is computed
        model, published = create_model(name, reparam="none"), PUBLISHED[name]()
        assert count_params(model) == count_params(published)
        assert count_macs(model, 224) == count_macs(published, 224)


@pytest.mark.parametrize("name", SMALLEST)
def test_every_form_folds_to_the_size_of_the_folded_plain_network(name):
    with torch.device("meta"):
        plain = fuse(create_model(name, reparam="none").eval())
        size = count_params(plain), count_macs(plain, 64)
        for reparam in SETTINGS:
            fused = fuse(create_model(name, reparam=reparam).eval())
            assert (count_params(fused), count_macs(fused, 64)) == size


def test_mobilenetv2_starts_with_the_spread_of_timms_convolutions():
    """The classifier starts smaller: test_models.py."""
    model = create_model("mobilenetv2_100", reparam="none")
    ours, theirs = (
        [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        for net in (model, PUBLISHED["mobilenetv2_100"]())
    )
    compared = 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.weight.shape == other.weight.shape
        if mine.weight.numel() >= 1000:
            assert mine.weight.std().item() == pytest.approx(other.weight.std().item(), rel=0.15)
            compared += 1
    assert compared > 40


# --- which layers have branches -----------------------------------------------------------------


def with_branches(name: str, **fields: bool) -> dict[str, int]:
    """Number of layers with more than one branch: 1x1, depthwise, other."""
    with torch.device("meta"):
        model = create_model(name, reparam=ReparamConfig(**fields))
    counts = {"pointwise": 0, "depthwise": 0, "stem": 0}
    for rep in (m for m in model.modules() if isinstance(m, RepConv2d)):
        conv = rep.branches[0].conv
        kind = "pointwise" if conv.kernel_size == (1, 1) else "depthwise"
        kind = kind if kind == "pointwise" or conv.groups > 1 else "stem"
        extra = (rep.scale is not None) + (rep.identity is not None)
        counts[kind] += len(rep.branches) + extra > 1
    return counts


# GhostNet: 16 blocks of two modules, 4 with stride 2. MobileNetV2: 17 blocks, the first does not
# expand. ShuffleNetV2: 13 blocks, and 3 with stride 2 that also work on the other half.
@pytest.mark.parametrize(
    ("name", "pointwise", "depthwise"),
    [
        ("ghostnetv3_050", 32, 36),
        ("mobilenetv2_050", 33, 17),
        ("shufflenetv2_050", 35, 19),
    ],
)
def test_the_switches_leave_their_layers_plain(name, pointwise, depthwise):
    full = {"pointwise": pointwise, "depthwise": depthwise, "stem": 0}
    assert with_branches(name) == full
    assert with_branches(name, pointwise=False) == full | {"pointwise": 0}
    assert with_branches(name, depthwise=False) == full | {"depthwise": 0}
    assert with_branches(name, stem=True) == full | {"stem": 1}
    none = {"branches": 1, "scale": False, "identity": False}
    assert set(with_branches(name, **none, stem=True).values()) == {0}


@pytest.mark.parametrize("name", ["mobilenetv2_050", "shufflenetv2_050"])
def test_only_stem_and_last_convolution_stay_plain(name):
    with torch.device("meta"):
        model = create_model(name, reparam="full")
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    plain = {n for n in convolutions if ".branches." not in n and ".scale." not in n}
    assert plain == {"stem.conv", "last.conv"}


# --- small images -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("stride", ["standard", "small"])
def test_sides_of_the_maps(name, stride):
    model = create_model(name, 2, reparam="none", input_stride=stride).eval()
    sides = {}
    for part, module in (("stem", model.stem), ("last", model.last)):
        hook = lambda m, x, y, part=part: sides.update({part: y.shape[-1]})  # noqa: E731
        module.register_forward_hook(hook)
    for size in (64, 65):
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
        whole = 1 if stride == "small" else 2
        assert sides == {"stem": -(-size // whole), "last": -(-size // (16 * whole))}


@pytest.mark.parametrize("name", SMALLEST)
def test_every_student_trains_at_32x32(name):
    model = create_model(name, 10, input_stride="small", reparam=ReparamConfig(forward="branches"))
    model(images(2, 3, 32, 32)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not dead


# --- memory formats -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALLEST)
def test_channels_last_maps_stay_so_forward_and_backward(name):
    model = create_model(name, 2, reparam=ReparamConfig(forward="branches", branches=2))
    model = model.to(memory_format=torch.channels_last)
    forward, backward = {}, {}

    def watch(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            forward[layer] = [
                x.is_contiguous(memory_format=torch.channels_last) for x in (args[0], output)
            ]
            # Part of a map, where maps were concatenated, but its channels lie side by side.
            output.register_hook(lambda g: backward.update({layer: g.stride(1) == 1}))

        return hook

    for layer, module in model.named_modules():
        if isinstance(module, RepConv2d | ConvBN):
            module.register_forward_hook(watch(layer))
    x = images(2, 3, 97, 97).to(memory_format=torch.channels_last)  # no map is 1x1
    model(x).square().sum().backward()
    backward.pop("last")  # the gradient of a mean is one value, expanded
    assert len(forward) == len(backward) + 1 > 100
    assert not [layer for layer, kept in forward.items() if not all(kept)]
    assert not [layer for layer, kept in backward.items() if not kept]


@pytest.mark.parametrize("channels_last", [True, False])
def test_interleaving_is_the_published_shuffle_in_the_same_format(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    whole = images(2, 12, 3, 5).to(memory_format=layout)
    left, right = whole.chunk(2, 1)
    for half in (left, left.clone()):  # part of a map, and a map of its own
        y = interleave(half, right.clone())
        assert torch.equal(y, channel_shuffle(whole.contiguous(), 2))
        assert y.is_contiguous(memory_format=layout)
    block = ShuffleBlock(12, 12, 1, reparam=REPARAM["none"])
    assert block(whole).is_contiguous(memory_format=layout)
