"""Core ML's model package. It is converted anywhere, and runs on macOS only."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, Runner
from ghosttrain.deploy.tracing import exact_upsampling, quietly, traced


def convert(
    network: nn.Module, example: Tensor, path: Path, precision: str, dynamic_batch: bool
) -> None:
    """Write a model package (a folder).

    Nearest upsampling by a factor that is no whole number is written in another, equal way: what
    Core ML makes of it cannot be checked where it does not run.
    """
    with quietly(), exact_upsampling():
        import coremltools

        model = coremltools.convert(
            traced(network, example),
            inputs=[coremltools.TensorType(name="images", shape=tuple(example.shape))],
            compute_precision=getattr(
                coremltools.precision, {"fp32": "FLOAT32", "fp16": "FLOAT16"}[precision]
            ),
            minimum_deployment_target=coremltools.target.iOS16,
        )
        model.save(str(path))


def load(path: Path, threads: int = 1) -> Runner:
    """Return what runs a model package, on macOS."""
    import coremltools

    model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
    outputs = [output.name for output in model.get_spec().description.output]

    def run(x: np.ndarray) -> list[np.ndarray]:
        found = model.predict({"images": x})
        return [np.asarray(found[name]) for name in outputs]

    return Runner(run)


FORMAT = Format(
    "coreml",
    ".mlpackage",
    convert,
    load,
    packages=("coremltools",),
    precisions=("fp32", "fp16"),
    runs_here=lambda: "" if sys.platform == "darwin" else "Core ML runs on macOS only",
)
