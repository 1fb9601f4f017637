"""ExecuTorch: PyTorch's own runtime for devices, with the XNNPACK backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, Runner
from ghosttrain.deploy.tracing import exported, quietly


def convert(
    network: nn.Module, example: Tensor, path: Path, precision: str, dynamic_batch: bool
) -> None:
    """Write a .pte file whose layers run by XNNPACK, as far as it has them."""
    write(exported(network, example, dynamic_batch), path)


def write(program, path: Path) -> None:  # type: ignore[no-untyped-def]
    """Lower an exported program to XNNPACK and write it."""
    with quietly():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)


def load(path: Path, threads: int = 1) -> Runner:
    """Return what runs a .pte file. It misreads tensors that are not contiguous, without an error
    (version 1.5.1): they are made so. Its threads are its own.
    """
    import torch

    with quietly():
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")

    def run(x: np.ndarray) -> list[np.ndarray]:
        outputs = method.execute([torch.from_numpy(np.ascontiguousarray(x)).contiguous()])
        return [y.numpy().copy() for y in outputs]

    images = method.metadata.input_tensor_meta(0)
    return Runner(run, tuple(images.sizes()), {0: "uint8"}.get(images.dtype(), "float32"))


FORMAT = Format(
    "executorch",
    ".pte",
    convert,
    load,
    packages=("executorch", "torchao"),
    precisions=("fp32", "int8"),
)
