"""GhostNetV3 against timm's own implementation, in float64: outputs, statistics, gradients."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from ghosttrain.models.create import create_model
from ghosttrain.models.layers import Student
from ghosttrain.models.weights.export import export_state
from ghosttrain.models.weights.fit import load_student_weights, translate


def pair(ours: str, theirs: str, reparam: str, in_chans: int = 3) -> tuple[Student, nn.Module]:
    """Both networks with timm's random weights and randomised statistics, without dropout."""
    torch.manual_seed(0)
    reference = timm.create_model(theirs, num_classes=5, in_chans=in_chans, drop_rate=0.0)
    for bn in (m for m in reference.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.running_mean.uniform_(-0.3, 0.3)
        bn.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.uniform_(bn.bias, -0.3, 0.3)
    model = create_model(ours, 5, in_chans, reparam, dropout=0.0)
    assert load_student_weights(model, reference.state_dict(), theirs).dialect == "timm"
    return model, reference


def relative_error(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("ours", "theirs", "reparam", "dtype", "bound"),
    [
        ("ghostnetv3_050", "ghostnetv3_050", "full", torch.float64, 1e-12),
        ("ghostnetv3_100", "ghostnetv3_100", "full", torch.float64, 1e-12),
        ("ghostnetv3_130", "ghostnetv3_130", "full", torch.float32, 1e-5),
        ("ghostnetv3_160", "ghostnetv3_160", "full", torch.float64, 1e-12),
        ("ghostnetv3_100", "ghostnetv2_100", "none", torch.float64, 1e-12),
    ],
)
def test_eval_outputs_agree(ours, theirs, reparam, dtype, bound):
    model, reference = (m.to(dtype).eval() for m in pair(ours, theirs, reparam))
    x = torch.randn(1, 3, 33, 65, dtype=dtype)
    with torch.no_grad():
        features, expected = model.forward_features(x), reference.forward_features(x)
        assert features.shape[1] == model.num_features == reference.num_features
        assert relative_error(features, expected) <= bound
        logits = model.forward_head(features)
        assert relative_error(logits, reference.forward_head(expected)) <= bound


def test_a_training_step_agrees():
    # NHWC on our side: another path of the pointwise convolutions than timm's NCHW.
    model, reference = pair("ghostnetv3_050", "ghostnetv3_050", "full", in_chans=1)
    x = torch.randn(3, 1, 33, 47, dtype=torch.float64)
    results = []
    for network, memory_format in (
        (model, torch.channels_last),
        (reference, torch.contiguous_format),
    ):
        network.double().train().to(memory_format=memory_format)
        inputs = x.clone(memory_format=memory_format).requires_grad_()
        logits = network(inputs)
        nn.functional.cross_entropy(logits, torch.tensor([0, 4, 2])).backward()
        grads = {k: p.grad for k, p in network.named_parameters()}
        results.append((logits.detach(), inputs.grad, grads, dict(network.named_buffers())))
    (logits, grad_x, grads, buffers), (logits_ref, grad_x_ref, grads_ref, buffers_ref) = results

    assert relative_error(logits, logits_ref) <= 1e-10
    assert relative_error(grad_x, grad_x_ref) <= 1e-9
    renamed = translate({**grads_ref, **buffers_ref}, {**grads, **buffers})
    assert renamed.keys() == {**grads, **buffers}.keys()
    grads_ref, buffers_ref = ({key: renamed[key] for key in ours} for ours in (grads, buffers))
    # Where a batch norm follows, a gradient may be zero but for rounding: compare with the largest.
    largest = max(grad.abs().max() for grad in grads_ref.values())
    for key, grad in grads.items():
        assert (grad - grads_ref[key]).abs().max() <= 1e-10 * largest, key
    for key, value in buffers.items():
        torch.testing.assert_close(value, buffers_ref[key], rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize(
    ("ours", "theirs", "reparam"),
    [
        ("ghostnetv3_050", "ghostnetv3_050", "full"),
        ("ghostnetv3_100", "ghostnetv2_100", "none"),
    ],
)
def test_weights_of_ours_load_into_timm(ours, theirs, reparam):
    model = create_model(ours, 5, reparam=reparam)
    name, translated = export_state(model, "timm")
    assert name == theirs
    timm.create_model(theirs, num_classes=5).load_state_dict(translated)
    back = translate(translated, model.state_dict())
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
