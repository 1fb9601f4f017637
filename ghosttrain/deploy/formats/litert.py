"""LiteRT, formerly TensorFlow Lite: converted by litert-torch, run by ai-edge-litert.

Its nearest upsampling picks other rows than PyTorch's where the factor is no whole number (3 to 7:
rows 0 0 1 1 1 2 2 in place of 0 0 0 1 1 2 2, measured with litert-torch 0.10.0), so such layers are
written in another, equal way (`tracing.exact_upsampling`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, InFloat, Runner
from ghosttrain.deploy.tracing import exact_upsampling, quietly

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


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
        for operation in LAYERS:
            halves.update_quantization_recipe(
                ".*",
                qtyping.TFLOperationName[operation],
                settings,
                quantizer.AlgorithmName.FLOAT_CASTING,
            )
        path.write_bytes(halves.quantize().quantized_model)


def load(path: Path, threads: int = 1) -> Runner:
    """Return what runs a .tflite file. Where its inputs or outputs are INT8, floats become them and
    they floats, by the scale and zero point that the file states.
    """
    with quietly():
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    (images,) = interpreter.get_input_details()
    outputs = interpreter.get_output_details()
    outputs.sort(key=lambda output: [int(n) for n in re.findall(r"output_(\d+)", output["name"])])

    def run(x: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(images["index"], _as_stored(x, images))
        interpreter.invoke()
        return [_as_float(interpreter.get_tensor(each["index"]), each) for each in outputs]

    shape = tuple(int(side) for side in images["shape"])
    dtype = np.dtype(images["dtype"]).name
    return Runner(run, shape, "float32" if dtype == "int8" else dtype)


def _as_stored(x: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    scale, zero = tensor["quantization"]
    if x.dtype == tensor["dtype"] or not scale:
        return x
    return np.clip(np.round(x / scale) + zero, -128, 127).astype(tensor["dtype"])


def _as_float(y: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    scale, zero = tensor["quantization"]
    return y if y.dtype == np.float32 or not scale else ((y.astype(np.float32) - zero) * scale)


def quantize(
    network: nn.Module,
    calibration: Sequence[Tensor],
    path: Path,
    kept: InFloat,
    dynamic_batch: bool,
) -> None:
    """Write a .tflite file in INT8, by ai-edge-quantizer: weights per output channel, activations
    per tensor.
    """
    convert(network, calibration[0][:1], path, "fp32", False)
    with quietly():
        from ai_edge_quantizer import qtyping, quantizer

        kinds = qtyping.TFLOperationName
        images = [{"args_0": image[None].numpy()} for batch in calibration for image in batch]
        every = quantizer.Quantizer(str(path))
        every.add_static_config(".*", kinds.ALL_SUPPORTED, 8, 8)
        ranges = every.calibrate({"serving_default": images}, num_threads=1)

        quantized = quantizer.Quantizer(str(path))
        for kind in LAYERS if kept.rest else ("ALL_SUPPORTED",):
            quantized.add_static_config(".*", kinds[kind], 8, 8)
        if kept.layers:
            quantized.update_quantization_recipe(
                "|".join(map(_place, sorted(kept.layers))),
                kinds.ALL_SUPPORTED,
                algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE,
            )
        path.write_bytes(quantized.quantize(ranges).quantized_model)


def _place(layer: str) -> str:
    """Return what the name of an operator's output looks like that computes a layer: litert-torch
    writes the layer a.b as ".../Class_a/Class_b;".
    """
    return "/".join(f"[^/;]*_{re.escape(part)}" for part in layer.split(".")) + ";"


FORMAT = Format(
    "litert",
    ".tflite",
    convert,
    load,
    quantize,
    packages=("litert-torch", "ai-edge-litert", "ai-edge-quantizer"),
    precisions=("fp32", "fp16", "int8"),
    conflicts={"torch": "2.15"},
)
