"""OpenVINO's intermediate representation, run by its processor plugin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, InFloat, Runner, saturates
from ghosttrain.deploy.tracing import quietly

LAYERS = ("Convolution", "GroupConvolution", "MatMul")


def convert(
    network: nn.Module, example: Tensor, path: Path, precision: str, dynamic_batch: bool
) -> None:
    """Write model.xml and, beside it, model.bin with the weights.

    Its default stores weights as fp16; fp32 has to be asked for. The network is traced by OpenVINO
    itself: of a torch.export graph it refuses outputs with names such as "cat" (2026.4.1).
    """
    import openvino

    shape = [-1 if dynamic_batch else example.shape[0], *example.shape[1:]]
    with quietly():
        model = openvino.convert_model(
            network, example_input=(example,), input=[openvino.PartialShape(shape)]
        )
        openvino.save_model(model, str(path), compress_to_fp16=precision == "fp16")


def load(path: Path, threads: int = 1) -> Runner:
    """Return what runs it, computing in float32: its default may take bfloat16 or fp16."""
    import openvino

    compiled = openvino.Core().compile_model(
        str(path),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads},
    )
    outputs = list(compiled.outputs)

    def run(x: np.ndarray) -> list[np.ndarray]:
        found = compiled([np.ascontiguousarray(x)])
        return [np.array(found[output]) for output in outputs]

    images = compiled.inputs[0]
    shape = tuple(side.get_length() if side.is_static else None for side in images.partial_shape)
    return Runner(run, shape, {"u8": "uint8"}.get(images.element_type.get_type_name(), "float32"))


def quantize(
    network: nn.Module,
    calibration: Sequence[Tensor],
    path: Path,
    kept: InFloat,
    dynamic_batch: bool,
) -> None:
    """Write model.xml and model.bin in INT8, by NNCF: weights per output channel, with 7 bits where
    the processor `saturates`.
    """
    import openvino

    with quietly():
        import nncf

        plain = path.with_name("plain.xml")
        convert(network, calibration[0][:1], plain, "fp32", dynamic_batch)
        model = openvino.Core().read_model(str(plain))
        images = [image[None].contiguous().numpy() for batch in calibration for image in batch]
        quantized = nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            ignored_scope=_ignored(nncf, model, kept),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE if saturates() else nncf.OverflowFix.DISABLE
            ),
        )
        openvino.save_model(quantized, str(path), compress_to_fp16=False)
        for part in (plain, plain.with_suffix(".bin")):
            part.unlink()


def _ignored(nncf: Any, model: Any, kept: InFloat) -> Any:
    """Return what NNCF leaves in float: OpenVINO calls the convolution of the layer a.b
    "__module.a.b/aten::_convolution/Convolution".
    """
    kinds = {node.get_friendly_name(): node.get_type_name() for node in model.get_ordered_ops()}
    names = [
        name
        for name, kind in kinds.items()
        if kind in LAYERS and name.removeprefix("__module.").partition("/")[0] in kept.layers
    ]
    types = set(kinds.values()) - {*LAYERS, "Constant", "Parameter", "Result"}
    return nncf.IgnoredScope(names=names, types=sorted(types) if kept.rest else [])


FORMAT = Format(
    "openvino",
    ".xml",
    convert,
    load,
    quantize,
    packages=("openvino", "nncf"),
    precisions=("fp32", "fp16", "int8"),
    dynamic_batch=True,
)
