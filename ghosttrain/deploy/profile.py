"""Where the time of one pass goes, operator by operator, as far as a runtime tells it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ghosttrain.deploy.formats import of_file
from ghosttrain.errors import UserError

PASSES = 20
"""That are profiled, after as many that warm up."""


class Operator(NamedTuple):
    """All operators of one kind in one pass."""

    kind: str
    milliseconds: float
    calls: float


def profile_file(path: Path, images: np.ndarray) -> list[Operator]:
    """Return the operators of a file, the dearest first, on one thread.

    Raises:
        UserError: its runtime has no profile.
    """
    ways = {"onnx": _profile_onnx, "openvino": _profile_openvino}
    name = of_file(path)
    if name not in ways:
        raise UserError(f"--profile: the runtime of {name} tells nothing about its operators")
    return ways[name](path, images)


def profile_network(network: nn.Module, images: torch.Tensor) -> list[Operator]:
    """Return the operators of a network in PyTorch, the dearest first."""
    from torch.profiler import ProfilerActivity, profile

    from ghosttrain.deploy.tracing import quietly

    with torch.inference_mode():
        for _ in range(PASSES):
            network(images)
        with quietly(), profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(PASSES):
                network(images)
    events = seen.key_averages()
    return _sorted((each.key, each.self_cpu_time_total / 1e3, each.count) for each in events)


def _profile_onnx(path: Path, images: np.ndarray) -> list[Operator]:
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = 1, True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        name = session.get_inputs()[0].name
        for _ in range(2 * PASSES):
            session.run(None, {name: images})
        events = json.loads(Path(session.end_profiling()).read_text())
    runs = [e["ts"] for e in events if e["name"] == "model_run"]
    start = sorted(runs)[PASSES]
    kernels = [
        (event["args"]["op_name"], event["dur"] / 1e3, 1)
        for event in events
        if event["name"].endswith("_kernel_time") and event["ts"] >= start
    ]
    return _sorted(kernels)


def _profile_openvino(path: Path, images: np.ndarray) -> list[Operator]:
    import openvino

    settings = {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    found: list[tuple[str, float, int]] = []
    for number in range(2 * PASSES):
        request.infer([images])
        if number >= PASSES:
            found += [
                (each.node_type, each.real_time.total_seconds() * 1e3, 1)
                for each in request.profiling_info
                if each.real_time.total_seconds()
            ]
    return _sorted(found)


def _sorted(events: Iterable[tuple[str, float, int]]) -> list[Operator]:
    """Sum events of `PASSES` passes by their kind; return those of one pass, the dearest first."""
    sums: dict[str, tuple[float, int]] = {}
    for kind, milliseconds, count in events:
        before = sums.get(kind, (0.0, 0))
        sums[kind] = before[0] + milliseconds, before[1] + count
    found = [Operator(kind, ms / PASSES, n / PASSES) for kind, (ms, n) in sums.items()]
    return sorted(found, key=lambda each: -each.milliseconds)


def profile_lines(found: list[Operator], most: int = 12) -> list[str]:
    """Return operators as lines, with their share of the pass."""
    total = sum(each.milliseconds for each in found)
    width = max(len(each.kind) for each in found[:most])
    lines = [f"  {'operator':{width}} {'ms':>8} {'share':>7} {'calls':>6}"]
    for each in found[:most]:
        share = 100 * each.milliseconds / total
        lines.append(
            f"  {each.kind:{width}} {each.milliseconds:8.3f} {share:5.1f} % {each.calls:6.0f}"
        )
    return lines
