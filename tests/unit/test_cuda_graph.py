"""`train.cuda_graph` on a CPU: what surrounds the recording. What only a GPU can show is in
scripts/gpu_check.py (`cuda_graph`)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ghosttrain.config.compose import compose
from ghosttrain.distill.features import Network, StudentOutput
from ghosttrain.engine import cuda_graph
from ghosttrain.engine.train import mixed_precision
from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model

SMALL = ["data=digits", "model=ghostnetv3_050", "data.train_size=64"]


def network(features: bool) -> Network:
    torch.manual_seed(0)
    student = create_model("ghostnetv3_050", 10)
    return Network(student, nn.Linear(1280, 8) if features else None)


@pytest.mark.parametrize("features", [False, True])
def test_recording_leaves_the_network_as_it_was(
    monkeypatch: pytest.MonkeyPatch, features: bool
) -> None:
    """A recording runs the network; statistics, and gradients that are summed, are as without."""
    config = compose([*SMALL, "train.cuda_graph=true", "train.precision=fp32"]).config
    plain, recorded = network(features), network(features)
    before = copy.deepcopy(recorded.state_dict())
    monkeypatch.setattr(cuda_graph, "validate_on_cuda", lambda device: None)

    def run_it(module: nn.Module, inputs: tuple[torch.Tensor], **_: Any) -> None:
        (images,) = inputs
        assert images.shape == (4, config.data.in_chans, 64, 64)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert not torch.is_autocast_cache_enabled()
        outputs = module(images)
        assert all(isinstance(output, torch.Tensor) for output in outputs)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", run_it)
    replica = cuda_graph.record(recorded, config, 4, mixed_precision("bf16", torch.device("cpu")))
    for name, value in recorded.state_dict().items():
        assert torch.equal(value, before[name]), name
    images = torch.rand(4, config.data.in_chans, 64, 64)
    for model in (plain, replica):
        for _ in range(2):
            output = model(images)
            assert isinstance(output, StudentOutput)
            assert (output.features is not None) == features
            output.logits.square().mean().backward()
    gradients = zip(plain.named_parameters(), recorded.parameters(), strict=True)
    for (name, parameter), other in gradients:
        if parameter.grad is None:
            assert other.grad is not None and not other.grad.any(), name
        else:
            assert torch.equal(parameter.grad, other.grad), name


def test_the_tap_of_an_identity_is_where_the_definition_says() -> None:
    from ghosttrain.models.collapse import identity_kernel

    for channels, groups, k in ((6, 1, 1), (6, 6, 3), (6, 2, 5)):
        conv = nn.Conv2d(channels, channels, k, padding=k // 2, groups=groups, bias=False)
        with torch.no_grad():
            conv.weight.copy_(identity_kernel(conv))
        images = torch.rand(2, channels, 7, 5)
        assert torch.equal(conv(images), images)


def test_runs_that_cannot_be_recorded_are_refused() -> None:
    with pytest.raises(UserError, match=r"is not for train\.compile=true"):
        compose([*SMALL, "train.cuda_graph=true", "train.compile=true"])
    with pytest.raises(UserError, match="is not for a run of 2 processes"):
        compose([*SMALL, "train.cuda_graph=true", "launch.nproc=2"])
    config = compose([*SMALL, "train.cuda_graph=true"]).config
    with pytest.raises(UserError, match="needs CUDA, and this run is on the cpu"):
        cuda_graph.record(network(False), config, 4, mixed_precision("fp32", torch.device("cpu")))
