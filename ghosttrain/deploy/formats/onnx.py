"""ONNX: torch.export's graph translated by onnxscript, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, Runner
from ghosttrain.deploy.tracing import exported, quietly

OPSET = 20
"""Of ONNX. onnxruntime has read it since version 1.17 (2024)."""


def convert(
    network: nn.Module, example: Tensor, path: Path, precision: str, dynamic_batch: bool
) -> None:
    """Write an ONNX file with the weights inside."""
    import onnx
    import torch

    with quietly():
        program = torch.onnx.export(
            exported(network, example, dynamic_batch),
            (),
            dynamo=True,
            input_names=["images"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _forget_where_it_was_written(model.graph)
    if precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        with quietly():
            model = convert_float_to_float16(model, keep_io_types=True)
    onnx.save(model, str(path))


def _forget_where_it_was_written(graph: Any) -> None:
    """Remove what onnxscript notes about each node: stack traces, with the paths of this machine.
    They are a tenth of a small file.
    """
    for each in (graph, *graph.node, *graph.value_info):
        del each.metadata_props[:]


def load(path: Path, threads: int = 1) -> Runner:
    """Return what runs an ONNX file on the processor."""
    session = session_of(path, threads)
    (images,) = session.get_inputs()

    def run(x: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {images.name: x})

    shape = tuple(side if isinstance(side, int) else None for side in images.shape)
    return Runner(run, shape, {"tensor(uint8)": "uint8"}.get(images.type, "float32"))


def session_of(path: Path, threads: int = 1, optimized: Path | None = None):  # type: ignore[no-untyped-def]
    """Return onnxruntime's session of a file; with `optimized` it writes there what it made of the
    graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors: its warnings are about its own rewriting
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


FORMAT = Format(
    "onnx",
    ".onnx",
    convert,
    load,
    packages=("onnx", "onnxscript", "onnxruntime"),
    precisions=("fp32", "fp16", "int8"),
    dynamic_batch=True,
)
