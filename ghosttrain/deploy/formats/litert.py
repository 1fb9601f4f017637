"""LiteRT, formerly TensorFlow Lite: converted by litert-torch, run by ai-edge-litert.

Its nearest upsampling picks other rows than PyTorch's where the factor is no whole number (3 to 7:
rows 0 0 1 1 1 2 2 in place of 0 0 0 1 1 2 2, measured with litert-torch 0.10.0), so such layers are
written in another, equal way (`tracing.exact_upsampling`).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, Runner
from ghosttrain.deploy.tracing import exact_upsampling, quietly


def convert(
    network: nn.Module, example: Tensor, path: Path, precision: str, dynamic_batch: bool
) -> None:
    """Write a .tflite file; fp16 keeps weights in half precision and computes in float32."""
    with quietly(), exact_upsampling():
        import litert_torch

        model = litert_torch.convert(network.eval(), (example,))
        model.export(str(path))
    if precision == "fp16":
        _halve(path)


def _halve(path: Path) -> None:
    """Store the weights of convolutions and matrices in half precision."""
    with quietly():
        from ai_edge_quantizer import qtyping, quantizer

    settings = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            num_bits=16, dtype=qtyping.TensorDataType.FLOAT
        ),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    with quietly():
        halves = quantizer.Quantizer(str(path))
        for operation in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
            halves.update_quantization_recipe(
                ".*",
                qtyping.TFLOperationName[operation],
                settings,
                quantizer.AlgorithmName.FLOAT_CASTING,
            )
        path.write_bytes(halves.quantize().quantized_model)


def load(path: Path, threads: int = 1) -> Runner:
    """Return what runs a .tflite file."""
    with quietly():
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    (images,) = interpreter.get_input_details()
    outputs = interpreter.get_output_details()
    outputs.sort(key=lambda output: [int(n) for n in re.findall(r"output_(\d+)", output["name"])])

    def run(x: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(images["index"], x)
        interpreter.invoke()
        return [interpreter.get_tensor(output["index"]) for output in outputs]

    shape = tuple(int(side) for side in images["shape"])
    return Runner(run, shape, np.dtype(images["dtype"]).name)


FORMAT = Format(
    "litert",
    ".tflite",
    convert,
    load,
    packages=("litert-torch", "ai-edge-litert"),
    precisions=("fp32", "fp16", "int8"),
    conflicts={"torch": "2.15"},
)
