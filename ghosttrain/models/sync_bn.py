"""Batch norm over the images of all processes, on any device."""

from __future__ import annotations

from torch import Tensor, nn

from ghosttrain.models.collapse.normalize import Normalize
from ghosttrain.models.collapse.step import SumOfBranches, Way, update_running
from ghosttrain.models.layers import BatchNorm


class SyncBatchNorm2d(BatchNorm):
    """Batch norm over the images of all processes, on any back end.

    torch.nn.SyncBatchNorm does the same and refuses a CPU. Parameters, buffers and names are those
    of BatchNorm2d. Raises ValueError in training where all processes together have one value.
    """

    synced = True

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W)."""
        if not self.training:
            return super().forward(x)
        weight = self.weight.new_empty(0, len(self.weight), 1, 1, 1)
        taps = self.weight.new_ones(1, len(self.weight))
        gamma, beta = self.weight[None], self.bias[None]
        way = Way(Normalize, 1, 0, 1, self.eps, synced=True)
        y, *statistics = SumOfBranches.apply(x, weight, taps, gamma, beta, way)
        update_running([self], *statistics)
        return y


def synchronize(model: nn.Module) -> nn.Module:
    """Give every batch norm of a student statistics over all processes; in place, and returned.

    Raises TypeError for batch norms of another kind, such as timm's with an activation.
    """
    for bn in model.modules():
        if type(bn) in (nn.BatchNorm2d, BatchNorm):
            bn.__class__ = SyncBatchNorm2d  # the same parameters and buffers, under the same names
        elif isinstance(bn, nn.modules.batchnorm._BatchNorm) and type(bn) is not SyncBatchNorm2d:
            raise TypeError(f"cannot synchronize a {type(bn).__name__}")
    return model
