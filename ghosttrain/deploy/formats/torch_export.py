"""torch.export's archive, run by PyTorch: what other compilers of PyTorch take as their input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, Runner
from ghosttrain.deploy.tracing import exported, quietly


def convert(
    network: nn.Module, example: Tensor, path: Path, precision: str, dynamic_batch: bool
) -> None:
    """Write an archive of the exported graph and its weights."""
    import torch

    with quietly():
        torch.export.save(exported(network, example, dynamic_batch), path)


def load(path: Path, threads: int = 1) -> Runner:
    """Return what runs an archive; `threads` are those of this process (torch.set_num_threads)."""
    import torch

    with quietly():
        program = torch.export.load(path)
        module = program.module()
    images = next(
        node.meta["val"]
        for node in program.graph.nodes
        if node.name in program.graph_signature.user_inputs
    )

    @torch.inference_mode()
    def run(x: np.ndarray) -> list[np.ndarray]:
        outputs = module(torch.from_numpy(x))
        return [y.numpy() for y in (outputs if isinstance(outputs, tuple | list) else [outputs])]

    shape = tuple(side if isinstance(side, int) else None for side in images.shape)
    return Runner(run, shape, str(images.dtype).removeprefix("torch."))


FORMAT = Format("torch_export", ".pt2", convert, load, dynamic_batch=True)
