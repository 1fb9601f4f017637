"""`train.cuda_graph`: forward and backward of the network recorded once, then started as a whole.

A compact network is hundreds of small kernels, and a GPU waits for a processor that starts them one
by one: figures in README, "On a GPU". A recorded step computes what an unrecorded one does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ghosttrain.config.schema import Config
from ghosttrain.distill.features import Network, StudentOutput
from ghosttrain.errors import UserError


def record(
    network: Network,
    config: Config,
    micro_batch: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> nn.Module:
    """Return `network` with forward and backward of its training recorded as CUDA graphs.

    Parameters, running statistics and their names stay the network's own, which evaluates as
    before. Gradients get memory of their own, to be zeroed in place: a recorded backward always
    writes to the same place, so that with gradient accumulation a gradient that autograd took as it
    came would be overwritten.

    Args:
        network: on a CUDA device.
        config: the images' size and memory format.
        micro_batch: images in every batch.
        autocast: the context in which it is trained.

    Raises:
        UserError: the network is not on a CUDA device.
    """
    device = next(network.parameters()).device
    validate_on_cuda(device)
    # A note of the recording itself, which runs on a stream of its own.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
    network.train()
    before = [buffer.clone() for buffer in network.buffers()]
    tensors = _Tensors(network)
    size = config.data.train_size
    images = torch.zeros(micro_batch, config.data.in_chans, size, size, device=device)
    if config.train.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with autocast():
        torch.cuda.make_graphed_callables(tensors, (images,), allow_unused_input=True)
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)  # recording ran some forwards
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return _Recorded(tensors)


def validate_on_cuda(device: torch.device) -> None:
    """Refuse a device that has no CUDA graphs."""
    if device.type != "cuda":
        raise UserError(
            f"train.cuda_graph=true needs CUDA, and this run is on the {device}; "
            "type train.cuda_graph=false"
        )


class _Tensors(nn.Module):
    """A network without the None in its output: graphs return tensors only."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.network(images) if tensor is not None)


class _Recorded(nn.Module):
    def __init__(self, tensors: _Tensors) -> None:
        super().__init__()
        self.tensors = tensors

    def forward(self, images: Tensor) -> StudentOutput:
        return StudentOutput(*self.tensors(images))
