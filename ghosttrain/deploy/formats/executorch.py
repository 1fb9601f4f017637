"""ExecuTorch: PyTorch's own runtime for devices, with the XNNPACK backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, InFloat, Runner
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


def quantize(
    network: nn.Module,
    calibration: Sequence[Tensor],
    path: Path,
    kept: InFloat,
    dynamic_batch: bool,
) -> None:
    """Write a .pte file in INT8, by torchao's PT2E with XNNPACK's quantizer: weights per output
    channel, activations per tensor.
    """
    import torch

    example = calibration[0][:1]
    with quietly():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer()
        quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
        quantizer.set_filter_function(lambda node: _is_quantized(node, kept))
        prepared = prepare_pt2e(exported(network, example, False).module(), quantizer)
        with torch.no_grad():
            for batch in calibration:
                for image in batch:
                    prepared(image[None].contiguous())
        write(exported(convert_pt2e(prepared), example, False), path)


def _is_quantized(node: Any, kept: InFloat) -> bool:
    """Whether a node of an exported graph is to be quantized. What clips the output of a layer
    belongs to the layer.
    """
    kind = str(node.target)
    if kind.startswith(("aten.relu", "aten.hardtanh")):
        return _is_quantized(node.args[0], kept)
    if not kind.startswith(("aten.conv", "aten.linear")):
        return not kept.rest
    places = node.meta.get("nn_module_stack") or {}
    layer = [path for path, _ in places.values()][-1] if places else ""
    return layer not in kept.layers


FORMAT = Format(
    "executorch",
    ".pte",
    convert,
    load,
    quantize,
    packages=("executorch", "torchao"),
    precisions=("fp32", "int8"),
)
