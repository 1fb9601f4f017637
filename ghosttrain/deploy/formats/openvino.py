"""OpenVINO's intermediate representation, run by its processor plugin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, Runner
from ghosttrain.deploy.tracing import quietly


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


FORMAT = Format(
    "openvino",
    ".xml",
    convert,
    load,
    packages=("openvino",),
    precisions=("fp32", "fp16", "int8"),
    dynamic_batch=True,
)
