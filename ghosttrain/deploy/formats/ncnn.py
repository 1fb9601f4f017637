"""ncnn: converted by pnnx, run by ncnn's Python binding on the processor."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, Runner
from ghosttrain.deploy.tracing import quietly, traced
from ghosttrain.errors import UserError


def convert(
    network: nn.Module, example: Tensor, path: Path, precision: str, dynamic_batch: bool
) -> None:
    """Write model.param and, beside it, model.bin with the weights."""
    import pnnx

    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder, quietly():
        scratch = Path(folder)
        traced(network, example).save(str(scratch / "model.pt"))
        pnnx.convert(
            str(scratch / "model.pt"),
            (example,),
            ncnnparam=str(path),
            ncnnbin=str(path.with_suffix(".bin")),
            fp16=precision == "fp16",
        )
    if not path.exists() or "pnnx." in path.read_text():
        raise UserError("pnnx, which converts to ncnn, has no ncnn layer for a part of the network")


def load(path: Path, threads: int = 1) -> Runner:
    """Return what runs it, one image after another, computing in float32."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))
    outputs = sorted(net.output_names(), key=lambda name: int(name.removeprefix("out")))

    def one(x: np.ndarray) -> list[np.ndarray]:
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(np.ascontiguousarray(x)))
            return [np.array(extractor.extract(name)[1]) for name in outputs]

    def run(x: np.ndarray) -> list[np.ndarray]:
        return [np.stack(each) for each in zip(*map(one, x), strict=True)]

    return Runner(run)


FORMAT = Format(
    "ncnn",
    ".param",
    convert,
    load,
    packages=("pnnx", "ncnn"),
    precisions=("fp32", "fp16"),
)
