"""The formats a network is exported to, one module each: what it knows, how it is made and run.

A module has `FORMAT`, and imports its packages only where it needs them: each is an extra.
"""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import extra

if TYPE_CHECKING:
    import numpy as np

FORMATS = {
    "onnx": "ONNX, run by onnxruntime",
    "torch_export": "torch.export's archive, run by PyTorch",
    "litert": "LiteRT (TensorFlow Lite): Android, iOS, Linux",
    "executorch": "ExecuTorch with XNNPACK: Android, iOS, Linux",
    "openvino": "OpenVINO: processors and graphics of Intel, processors of ARM",
    "coreml": "Core ML: iOS, macOS; it runs on macOS only",
    "ncnn": "ncnn: Android, iOS, Linux",
}
"""Name of a format -> what it is for; its module is `ghosttrain.deploy.formats.<name>`."""
PRECISIONS = ("fp32", "fp16", "int8")
Quantize = Callable[..., None]
"""(network, calibration inputs in batches, file, what stays in float, whether the batch is free):
writes the file."""


@dataclass(frozen=True)
class InFloat:
    """What of a network is not quantized."""

    layers: frozenset[str] = frozenset()
    """Names of convolutions and linear layers."""
    rest: bool = False
    """Whether all that is no convolution and no linear layer: sums, products, pools."""


def saturates() -> bool:
    """Whether this processor is an x86 one without instructions for INT8 products (VNNI): the sum
    of two products then overflows 16 bits, silently, where weights have all 8 bits.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return not re.search(r"\b(avx512_vnni|avx_vnni|avx_vnni_int8)\b", flags)


@dataclass(frozen=True)
class Runner:
    """A file, ready to run."""

    call: Callable[[np.ndarray], list[np.ndarray]]
    """Images, float32 (B, C, H, W) or uint8 (B, H, W, C) as the file wants them -> its outputs,
    each (B, ...)."""
    shape: tuple[int | None, ...] | None = None
    """Of its input, as the file says; None in it: any number. None: the file does not say."""
    dtype: str = "float32"
    """Of its input."""

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Return its outputs."""
        return self.call(images)


Convert = Callable[..., None]
"""(network, example images, file, precision, whether the batch is free): writes the file."""


@dataclass(frozen=True)
class Format:
    """What is known of a format."""

    name: str
    suffix: str
    """Of the file that its runtime opens."""
    convert: Convert
    load: Callable[[Path, int], Runner]
    """(file, threads) -> what runs it."""
    quantize: Quantize | None = None
    packages: tuple[str, ...] = ()
    """Distributions that must be installed."""
    precisions: tuple[str, ...] = ("fp32",)
    dynamic_batch: bool = False
    """Whether a file can take any number of images at once."""
    nms: bool = False
    """Whether a file can choose a detector's boxes (non-maximum suppression)."""
    conflicts: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> first version that does not go together with this format."""
    runs_here: Callable[[], str] = lambda: ""
    """Why its runtime cannot run on this system; "" where it can."""


def find(name: str) -> Format:
    """Return a format by its name.

    Raises:
        UserError: there is none of this name, or its packages are missing or do not go together.
    """
    found = known(name)
    for package, first in found.conflicts.items():
        if _numbers(metadata.version(package)) >= _numbers(first):
            raise UserError(
                f"{name} needs {package} below {first}, here is {metadata.version(package)}: "
                f"{own_environment(name, f'{package}<{first}')}"
            )
    missing = [package for package in found.packages if not _installed(package)]
    if missing:
        raise UserError(
            f"{name} needs {' and '.join(missing)}, not installed here: "
            + (own_environment(name) if found.conflicts else f"pip install {extra(name)}")
        )
    return found


def known(name: str) -> Format:
    """Return a format by its name, whatever is installed; UserError where there is none."""
    if name not in FORMATS:
        raise UserError(f"{name!r} is no format.{did_you_mean(name, FORMATS)}")
    module: Any = importlib.import_module(f"ghosttrain.deploy.formats.{name}")
    return module.FORMAT


def of_file(path: Path) -> str:
    """Return the format of an exported file, by its suffix.

    Raises:
        UserError: no such file, or no format has this suffix.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    suffixes = {known(name).suffix: name for name in FORMATS}
    for suffix, name in suffixes.items():
        if path.name.endswith(suffix):
            return name
    raise UserError(
        f"{path} is no file of a format that can be run: its name ends with none of "
        f"{', '.join(suffixes)}"
    )


def runnable(path: Path) -> Format:
    """Return the format of an exported file that can be run here.

    Raises:
        UserError: as `of_file` and `find`, or its runtime does not run on this system.
    """
    found = find(of_file(path))
    if reason := found.runs_here():
        raise UserError(f"{path} cannot be run here: {reason}")
    return found


def is_file(path: Path) -> bool:
    """Whether a path is a file, not a run or the name of a model; that of Core ML is a folder."""
    return path.is_file() or (path.is_dir() and path.suffix == ".mlpackage")


def folder_name(name: str, precision: str, nms: bool = False) -> str:
    """Return the folder of a format's file in RUN/export: onnx, onnx_fp16, onnx_nms."""
    return "_".join(
        [name, *([precision] if precision != "fp32" else []), *(["nms"] if nms else [])]
    )


def own_environment(name: str, also: str = "") -> str:
    """Return what makes an environment for a format that does not go together with others."""
    packages = " ".join(filter(None, (extra(name), also and f"'{also}'")))
    return f"python -m venv .venv-{name} && .venv-{name}/bin/pip install {packages}"


def versions(found: Format) -> dict[str, str]:
    """Return the versions of PyTorch and of a format's packages."""
    return {name: metadata.version(name) for name in ("torch", *found.packages)}


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
