"""Parameter groups by module type, every trainable parameter once; the optimizers on them."""

from __future__ import annotations

import inspect
import re

import pytest
import timm
import torch
from timm import layers
from torch import nn

from ghosttrain.config.schema import OptimConfig
from ghosttrain.optim.build import build_optimizer
from ghosttrain.optim.groups import is_norm, param_groups
from ghosttrain.optim.lamb import Lamb


class Named(nn.Module):
    """Names that would mislead whoever goes by them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Conv2d(3, 4, 3)  # a convolution called norm
        self.conv = nn.BatchNorm2d(4)  # a batch norm called conv
        self.bias = nn.Linear(4, 2)  # a linear layer called bias
        self.scale = nn.Parameter(torch.ones(4))  # one-dimensional, but no norm and no bias
        self.attention = nn.MultiheadAttention(4, 2)


def names_in(model: nn.Module, group: dict) -> list[str]:
    name_of = {p: name for name, p in model.named_parameters()}
    return [name_of[p] for p in group["params"]]


def test_types_decide_not_names_and_not_dimensions() -> None:
    model = Named()
    decayed, plain = param_groups(model, 0.05)
    assert names_in(model, decayed) == [
        "scale",
        "norm.weight",
        "bias.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    assert names_in(model, plain) == [
        "norm.bias",
        "conv.weight",
        "conv.bias",
        "bias.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    ]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_every_trainable_parameter_of_a_real_model_exactly_once() -> None:
    model = timm.create_model("ghostnetv3_050")
    model.conv_stem.weight.requires_grad_(False)
    params = [p for group in param_groups(model, 0.05) for p in group["params"]]
    assert len(params) == len(set(params))
    assert set(params) == {p for p in model.parameters() if p.requires_grad}
    assert model.conv_stem.weight not in set(params)


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    (group,) = param_groups(model, 0.1)
    assert group["params"] == [model[0].weight]


def test_the_order_is_the_same_every_time() -> None:
    first, second = (timm.create_model("ghostnetv3_050") for _ in range(2))
    groups = [param_groups(model, 0.1) for model in (first, second)]
    for single, other in zip(*groups, strict=True):
        assert names_in(first, single) == names_in(second, other)


def test_empty_groups_are_left_out() -> None:
    assert len(param_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    assert len(param_groups(nn.BatchNorm2d(2), 0.1)) == 1
    assert param_groups(nn.ReLU(), 0.1) == []


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
    ],
)
def test_norm_layers_of_torch(norm: nn.Module) -> None:
    assert is_norm(norm)


def timm_classes(norms: bool) -> list[type[nn.Module]]:
    """Tell norms by their names, save composites such as ConvNormAct, NormMlpClassifierHead."""
    classes = [cls for _, cls in sorted(vars(layers).items()) if inspect.isclass(cls)]
    return [
        cls
        for cls in classes
        if issubclass(cls, nn.Module)
        and norms == ("Norm" in cls.__name__ and not {"Conv", "Mlp"} & set(words(cls.__name__)))
    ]


def words(name: str) -> list[str]:
    return re.findall("[A-Z][a-z]+", name)


def without_init(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


@pytest.mark.parametrize("cls", timm_classes(norms=True))
def test_every_norm_layer_of_timm_is_known(cls: type[nn.Module]) -> None:
    assert is_norm(without_init(cls))


def test_no_other_layer_of_timm_is_a_norm() -> None:
    assert [cls for cls in timm_classes(norms=False) if is_norm(without_init(cls))] == []


@pytest.mark.parametrize(
    ("name", "cls"),
    [("lamb", Lamb), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_optimizers_get_their_settings(name: str, cls: type) -> None:
    settings = {"lr": 0.3, "weight_decay": 0.2, "beta1": 0.7, "beta2": 0.8, "eps": 0.01}
    optimizer = build_optimizer(OptimConfig(name=name, **settings), Named())  # type: ignore[arg-type]
    assert type(optimizer) is cls
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    for group in optimizer.param_groups:
        assert group["lr"] == 0.3
        if name == "sgd":
            assert (group["momentum"], group["nesterov"]) == (0.7, True)
        else:
            assert (group["betas"], group["eps"]) == ((0.7, 0.8), 0.01)


def test_sgd_without_momentum() -> None:
    (group, _) = build_optimizer(OptimConfig(name="sgd", beta1=0.0), Named()).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.0, False)


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_every_optimizer_learns(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    y = x.sum(dim=1, keepdim=True)
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.02), model)  # type: ignore[arg-type]
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
