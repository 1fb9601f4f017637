"""Clipping by unit against Brock et al.'s rule, written out."""

import copy

import pytest
import torch
from torch import nn

from ghosttrain.config.schema import OptimConfig
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.optim.clip import AGC_EPS, clip_gradients


@pytest.mark.parametrize("source", ["student", "timm"])
def test_agc_bounds_every_unit_but_the_classifiers(source):
    torch.manual_seed(0)
    if source == "student":
        model = create_model("mobilenetv2_050", 5)
        classifier = model.classifier
    else:
        model = create_timm_model("mobilenetv3_small_050", 5)
        classifier = model.get_classifier()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = copy.deepcopy({name: p.grad for name, p in model.named_parameters()})
    clip_gradients(OptimConfig(clip_grad=0.02, clip_mode="agc"), model, model)
    left_alone = set(classifier.parameters())
    assert left_alone
    for name, p in model.named_parameters():
        grad, old = p.grad.double(), before[name].double()
        if p in left_alone:
            assert torch.equal(grad, old)
            continue
        axes = tuple(range(1, p.ndim))
        norm = (
            (lambda x, axes=axes: x.square().sum(axes, keepdim=True).sqrt()) if axes else torch.norm
        )
        most = 0.02 * norm(p.detach().double()).clamp(min=AGC_EPS)
        scale = (most / norm(old)).clamp(max=1)
        torch.testing.assert_close(grad, old * scale, rtol=1e-5, atol=1e-9)


def test_the_norm_of_all_and_no_clipping():
    layer = nn.Linear(3, 3)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    clip_gradients(OptimConfig(), layer, layer)
    assert layer.bias.grad.tolist() == [2.0] * 3
    clip_gradients(OptimConfig(clip_grad=1.0), layer, layer)
    assert torch.cat([p.grad.flatten() for p in layer.parameters()]).norm() == pytest.approx(1)
