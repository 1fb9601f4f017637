"""Batch norm over several processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from layers import (
    FORWARDS,
    LAYERS,
    images,
    layer,
)
from torch import Tensor, nn

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.detect.backbones import build_backbone
from ghosttrain.detect.detectors import SSDLITE_REDUCTIONS, ssdlite
from ghosttrain.models.collapse import choose_forward
from ghosttrain.models.create import create_model
from ghosttrain.models.reparam import RepConv2d
from ghosttrain.models.sync_bn import SyncBatchNorm2d, synchronize


def test_two_processes_equal_one_with_the_joint_batch(tmp_path):
    """Rank 0 has three images, rank 1 two; gradients are summed over ranks by hand."""
    run_on_two(
        tmp_path,
        f"""
        from layers import FORWARDS, images
        from test_sync_bn import synced_network
        from ghosttrain.models.reparam import using_forward
        for forward in ("branches", *FORWARDS):
            network = synchronize(synced_network())
            x = images(5, 3, 9, 7).double().to(memory_format=torch.channels_last)
            part = (x[:3] if rank == 0 else x[3:]).requires_grad_()
            with using_forward(network, forward):
                y = network(part)
                (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).square().sum().backward()
            grads = torch.cat([p.grad.flatten() for p in network.parameters()])
            dist.all_reduce(grads)
            buffers = torch.cat([b.flatten().double() for b in network.buffers()])
            results = y.detach(), part.grad, grads, buffers
            torch.save(results, f"{tmp_path}/{{forward}}{{rank}}.pt")
    """,
    )
    network = synced_network()
    x = images(5, 3, 9, 7).double().to(memory_format=torch.channels_last).requires_grad_()
    y = network(x)
    (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).square().sum().backward()
    joint = torch.cat([p.grad.flatten() for p in network.parameters()])
    statistics = torch.cat([b.flatten().double() for b in network.buffers()])
    close = {"rtol": 1e-9, "atol": 1e-9}
    for forward in ("branches", *FORWARDS):
        (y0, dx0, grads, buffers), (y1, dx1, grads1, buffers1) = (
            torch.load(tmp_path / f"{forward}{rank}.pt") for rank in (0, 1)
        )
        assert torch.equal(grads, grads1), forward
        torch.testing.assert_close(buffers, buffers1, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([y0, y1]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([dx0, dx1]), x.grad, **close)
        torch.testing.assert_close(grads, joint, **close)
        torch.testing.assert_close(buffers, statistics, rtol=1e-12, atol=1e-12)


def run_on_two(tmp_path: Path, body: str) -> None:
    """Run Python as rank 0 and as rank 1 of one group, from where this file can be imported."""
    script = f"""
import sys, torch, torch.distributed as dist
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
from ghosttrain.models.sync_bn import synchronize
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
{textwrap.dedent(body)}
dist.destroy_process_group()  # or its threads abort the process, now and then
"""
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err.decode()


def test_a_whole_detector_sees_the_joint_batch(tmp_path):
    """Backbone, extra maps and torchvision's head; rank 0 has three images, rank 1 two."""
    run_on_two(
        tmp_path,
        f"""
        from test_sync_bn import seen_by_head, small_detector
        part = slice(0, 3) if rank == 0 else slice(3, 5)
        y, grads, buffers = seen_by_head(synchronize(small_detector()), part)
        dist.all_reduce(grads)
        torch.save((y, grads, buffers), f"{tmp_path}/{{rank}}.pt")
    """,
    )
    expected, joint, statistics = seen_by_head(small_detector(), slice(0, 5))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([y for y, _, _ in ranks]), expected, rtol=1e-8, atol=1e-8)
    for _, grads, buffers in ranks:
        torch.testing.assert_close(grads, joint, rtol=1e-6, atol=1e-6 * float(joint.abs().max()))
        torch.testing.assert_close(buffers, statistics, rtol=1e-9, atol=1e-9)


def small_detector() -> nn.Module:
    torch.manual_seed(0)
    student = create_model("mobilenetv2_050", 2, reparam="none")
    return ssdlite(build_backbone(student, SSDLITE_REDUCTIONS, "mobilenetv2_050"), 2, 64).double()


def seen_by_head(detector: nn.Module, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the head says of some of five images (B, anchors, 4 + classes), the gradients of
    all parameters, and the running statistics.
    """
    x = images(5, 3, 64, 64).double()[part]
    output = detector.head(list(detector.backbone(x).values()))
    y = torch.cat([output["bbox_regression"], output["cls_logits"]], dim=2)
    (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])).square().sum().backward()
    grads = torch.cat([p.grad.flatten() for p in detector.parameters()])
    buffers = torch.cat([b.flatten().double() for b in detector.buffers()])
    return y.detach(), grads, buffers


def synced_network() -> nn.Module:
    """Every form, and a batch norm alone."""
    torch.manual_seed(0)
    settings = ReparamConfig(forward="branches")
    return nn.Sequential(
        RepConv2d(3, 12, 3, 2, reparam=settings),
        nn.BatchNorm2d(12),
        RepConv2d(12, 12, 1, reparam=settings),
        RepConv2d(12, 12, 3, 1, 12, reparam=settings),
    ).double()


def test_synchronized_layers_exchange_the_same_sums_whatever_their_input():
    """One rank with a single position, or another format, must not go through the branches."""
    for kind in LAYERS:
        rep = synchronize(layer(kind))
        rep.forward_mode = "auto"
        for x in (images(1, LAYERS[kind][0], 1, 1), images(2, LAYERS[kind][0], 6, 5)):
            assert choose_forward(rep, x) != "branches"


def test_a_single_value_on_all_ranks_is_refused():
    with pytest.raises(ValueError, match="more than 1 value"):
        SyncBatchNorm2d(4)(images(1, 4, 1, 1))


def test_batch_norms_of_another_kind_are_not_synchronized_in_silence():
    with pytest.raises(TypeError, match="BatchNorm3d"):
        synchronize(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm3d(2)))
