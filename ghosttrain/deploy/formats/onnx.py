"""ONNX: torch.export's graph translated by onnxscript, run by onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, InFloat, Runner, saturates
from ghosttrain.deploy.tracing import exported, quietly

OPSET = 20
"""Of ONNX. onnxruntime has read it since version 1.17 (2024)."""
LAYERS = ["Conv", "Gemm", "MatMul"]


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
            output_names=getattr(network, "output_names", None),
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


def quantize(
    network: nn.Module,
    calibration: Sequence[Tensor],
    path: Path,
    kept: InFloat,
    dynamic_batch: bool,
) -> None:
    """Write an ONNX file with QDQ nodes: weights INT8 per output channel, activations UINT8.

    Weights have 7 bits where the processor `saturates` (onnxruntime's `reduce_range`; measured
    here, ghostnetv3_050 on the digits: 78.6 % top-1 without, 92.8 % with it, 92.2 % in float).
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder, quietly():
        plain, prepared = Path(folder) / "plain.onnx", Path(folder) / "prepared.onnx"
        convert(network, calibration[0][:2], plain, "fp32", dynamic_batch)
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        nodes = onnx.load(str(prepared)).graph.node
        layer_of = {
            node.name: node.input[1].removesuffix(".weight")
            for node in nodes
            if node.op_type in LAYERS
        }
        quantization.quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=saturates(),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=LAYERS if kept.rest else None,
            nodes_to_exclude=[node for node, layer in layer_of.items() if layer in kept.layers],
        )


def count_nodes(path: Path) -> int:
    """Return how many nodes a file has after onnxruntime's own optimisation."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        session_of(path, optimized=optimized)
        return len(onnx.load(str(optimized)).graph.node)


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
    quantize,
    packages=("onnx", "onnxscript", "onnxruntime"),
    precisions=("fp32", "fp16", "int8"),
    dynamic_batch=True,
    nms=True,
)
