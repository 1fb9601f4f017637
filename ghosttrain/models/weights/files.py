"""Files of weights as other trainers and this one write them: the tensors, and what they are.

Owns reading: which types a torch file may hold beside tensors, where in it the weights lie, and the
description that files written here carry. Whether they fit a network is for `weights.py`, where
files come from for `sources.py`.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pathlib
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import omegaconf
import torch
from numpy import dtypes
from torch import Tensor

from ghosttrain.errors import UserError, raise_if_of_the_system
from ghosttrain.files import Damaged, no_file, open_file
from ghosttrain.models.weights.packing import read_metadata, read_packed
from ghosttrain.text import listed

State = dict[str, Tensor]

# What trainers and compilers put in front of every name: DistributedDataParallel, torch.compile,
# Lightning, and classes that hold the network as one of their parts.
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "net.", "network.", "student.", "backbone."),
    *("ema.", "ema_model.", "model_ema.", "averaged_model.", "_forward_module."),
)
# Counters that are no weights: of torch.optim.swa_utils.AveragedModel, and of the profiler thop,
# which are in the official GhostNetV2 releases (Efficient-AI-Backbones, issue 175).
COUNTERS = ("n_averaged", "total_ops", "total_params")
# EMA weights are the ones that are meant to be used: `state_dict_ema`, `model_ema`, `ema.model`.
_EMA = re.compile(r"(^|[._])(ema|averaged)([._]|$)", re.IGNORECASE)
_DEPTH = 5  # of mappings in mappings


class Content(NamedTuple):
    """What a file holds."""

    state: State
    """Its tensors by bare parameter name, on the CPU."""
    about: WeightsInfo
    """What it says about them."""
    note: str
    """Which of several state dicts was taken; empty where there was one."""


@dataclass(frozen=True)
class WeightsInfo:
    """What is known of weights beside the tensors; None: not known."""

    name: str | None = None
    """Of the network."""
    source: str | None = None
    """`ghosttrain` (a student of this project) or `timm`."""
    input_stride: str = "standard"
    """Stride of a student's stem."""
    classes: tuple[str, ...] | None = None
    """Names in the order of the logits."""
    input_size: int | None = None
    """Side of the images in pixels."""
    mean: tuple[float, ...] | None = None
    """Channel means, on pixels in [0, 1]."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations."""
    interpolation: str | None = None
    """`bilinear` or `bicubic`."""
    detector: Mapping[str, Any] | None = None
    """Settings `detector.*` where the network is the backbone of one."""


def read_state(path: str | Path) -> State:
    """Return the tensors of a file of weights by bare parameter name, on the CPU.

    Raises UserError as `read_file` does.
    """
    return read_file(Path(path), f"weights {str(path)!r}").state


def read_file(path: Path, origin: str) -> Content:
    """Return what a `.safetensors` or torch file holds; `origin` stands for it in messages.

    Torch files are read with `weights_only=True`: no code in them runs. The largest state dict
    among nested mappings is taken, an EMA one before any other; `PREFIXES` that all names share and
    `COUNTERS` are removed.

    Raises UserError where there is no such file, no weights in it, or a value that is not finite;
    OSError where the system cannot read it now.
    """
    if not path.is_file():
        raise UserError(f"{origin}: {no_file(path)}.")
    content = _read(path, origin)
    found = list(_state_dicts(content))
    if not found:
        raise UserError(f"{origin} holds no state dict: {_contents(content)}.")
    # Half as large as the largest: a few averaged tensors are no network.
    least = max(_elements(state) for _, state in found) / 2
    found = [(where, state) for where, state in found if _elements(state) >= least]
    found.sort(key=lambda named: (not _EMA.search(named[0]), -_elements(named[1])))
    where, state = found[0]
    others = ", ".join(other or "the top level" for other, _ in found[1:])
    note = f"{where or 'the top level'} is taken, not {others}" if others else ""
    _validate_finite(state, origin)
    return Content(_bare(state), read_about(path, origin), note)


def _read(path: Path, origin: str) -> Any:
    """Return the unpickled content of a torch file, or the tensors of a .safetensors file."""
    try:
        if path.suffix == ".safetensors":
            return read_packed(path)[0]
        with torch.serialization.safe_globals(ALLOWED), open_file(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch's unpickler raises almost anything
        raise_if_of_the_system(error, path)
        if isinstance(error, Damaged):
            raise UserError(
                f"{origin} is damaged ({error}): copy it again or write it anew"
            ) from None
        text = str(error)
        if found := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", text):
            reason = f"it holds a {found[1]}, and reading that may run code"
        else:
            lines = text.split(". ")[0].splitlines()  # not torch's advice to load it unsafely
            reason = ": ".join([type(error).__name__, *lines[:1]])
        raise UserError(
            f"{origin} cannot be read as weights ({reason}): give a .safetensors file, or a torch "
            "file that holds tensors only, torch.save(model.state_dict(), FILE)."
        ) from None


def _state_dicts(content: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield every mapping of names to tensors within `content`, and where it was: `state.model`.

    An optimizer's are left out: torch's number the parameters, and others say what they are.
    """
    if not _is_mapping(content) or depth > _DEPTH or "optim" in where.lower():
        return
    names = [key for key in content if isinstance(key, str)]
    state = {
        key: content[key]
        for key in names
        if isinstance(content[key], Tensor) and key.rpartition(".")[2] not in COUNTERS
    }
    if state:
        yield where, state
    for key in names:
        yield from _state_dicts(content[key], f"{where}.{key}" if where else key, depth + 1)


def _is_mapping(content: Any) -> bool:
    """Whether `content` may hold state dicts; settings of OmegaConf do not, and to read them is to
    resolve them, which fails where that needs the program that wrote them.
    """
    return isinstance(content, Mapping) and not isinstance(content, omegaconf.Container)


def _elements(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


def _bare(state: State) -> State:
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _validate_finite(state: State, origin: str) -> None:
    """Raise UserError, naming the first tensor with a value that is NaN or infinite."""
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        wrong = int((~tensor.float().isfinite()).sum())
        if wrong:
            raise UserError(
                f"{origin} is broken: {wrong:,} of the {tensor.numel():,} values of {key} are NaN "
                "or infinite; give weights from before that run diverged."
            )


def _contents(content: Any) -> str:
    """Say what stands in a file without weights."""
    if not _is_mapping(content):
        return f"it holds a {type(content).__name__}"
    if not content:
        return "it is empty"
    entries = [f"{key} ({type(value).__name__})" for key, value in content.items()]
    return f"it holds {listed(entries, most=6)}, and no tensor by name"


def part_of(state: State, wanted: Collection[str]) -> tuple[State, str]:
    """Return the part of a state dict in which a network lies, under bare names, and a note.

    A trainer's module may hold a network as one of several parts. The part is what lies below the
    prefix with which most names are `wanted` ones, that of an EMA before any other; all of it where
    no name is wanted.
    """
    hits = collections.Counter[str]()
    for key in state:
        parts = key.split(".")
        for cut in range(len(parts)):
            hits[".".join(parts[:cut])] += ".".join(parts[cut:]) in wanted
    least = max(hits.values(), default=0) / 2
    prefixes = [prefix for prefix, count in hits.items() if count and count >= least]
    if not prefixes:
        return state, ""
    best = min(prefixes, key=lambda prefix: (not _EMA.search(prefix), -hits[prefix]))
    if not best:
        return state, ""
    part = {k.removeprefix(f"{best}."): v for k, v in state.items() if k.startswith(f"{best}.")}
    left = len(state) - len(part)
    note = f"{best!r} of the file is taken, {left} entries beside it are not" if left else ""
    return part, note


# --- What a file says about itself ----------------------------------------------------------------


def read_about(path: Path, origin: str) -> WeightsInfo:
    """Return what the metadata of a file say, as `engine/weights_file.py` and `save_packed` wrote
    them. Nothing is known where there are none; UserError where they are damaged.
    """
    if path.suffix != ".safetensors":
        return WeightsInfo()
    try:
        metadata = read_metadata(path)
        if "ghosttrain" in metadata:
            return _about_run(json.loads(metadata["ghosttrain"]))
        if "architecture" in metadata:
            return _about_packed({key: json.loads(text) for key, text in metadata.items()})
    except Exception as error:
        raise_if_of_the_system(error, path)
        raise UserError(
            f"{origin} has damaged metadata ({type(error).__name__}: {error}): write it anew, or "
            "give weights without metadata."
        ) from None
    return WeightsInfo()


def other_normalisation(about: WeightsInfo, mean: Sequence[float], std: Sequence[float]) -> str:
    """Return a note where weights were trained with another mean or std of images, else ""."""
    if about.mean is None or about.std is None or len(about.mean) != len(mean):
        return ""
    pairs = zip((*about.mean, *about.std), (*mean, *std), strict=True)
    if all(abs(theirs - given) <= 1e-3 for theirs, given in pairs):
        return ""
    theirs, given = (
        f"data.mean=[{','.join(f'{x:g}' for x in m)}] data.std=[{','.join(f'{x:g}' for x in s)}]"
        for m, s in ((about.mean, about.std), (mean, std))
    )
    return f"they were trained with another normalisation than {given}: type {theirs} for theirs"


def other_input_stride(about: WeightsInfo, input_stride: str) -> str:
    """Return a note where weights were trained with another stride of the stem, else "".

    All shapes are equal then, and the function is another. Weights of which nothing is known are
    silent.
    """
    if about.source is None or about.input_stride == input_stride:
        return ""
    return (
        f"they were trained with another stem than model.input_stride={input_stride}: type "
        f"model.input_stride={about.input_stride} for theirs"
    )


def _about_run(values: Mapping[str, Any]) -> WeightsInfo:
    model, seen = values.get("model") or {}, values.get("input") or {}
    return WeightsInfo(
        name=model.get("name"),
        source=model.get("source"),
        input_stride=model.get("input_stride", "standard"),
        classes=_tuple(values.get("classes")),
        input_size=seen.get("eval_size"),
        mean=_tuple(seen.get("mean")),
        std=_tuple(seen.get("std")),
        interpolation=seen.get("interpolation"),
        detector=values.get("detector"),
    )


def _about_packed(values: Mapping[str, Any]) -> WeightsInfo:
    return WeightsInfo(
        name=values["architecture"],
        source="timm",
        classes=_tuple(values["classes"]),
        input_size=values["input_size"],
        mean=_tuple(values["mean"]),
        std=_tuple(values["std"]),
        interpolation=values["interpolation"],
    )


def _tuple(values: Any) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


# --- What torch files may hold beside tensors -----------------------------------------------------


def _allowed() -> list[Any]:
    """Return the types that trainers keep beside the weights: plain data, no code.

    A path becomes a pure one, which cannot touch the disk.
    """
    allowed: list[Any] = [argparse.Namespace, types.SimpleNamespace, set, frozenset, slice, range]
    allowed += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta]
    allowed += [datetime.timezone, (_ordinary_dict, "collections.defaultdict")]
    for module in ("pathlib", "pathlib._local"):  # the second is Python 3.13's
        allowed += [(pathlib.PurePosixPath, f"{module}.PosixPath")]
        allowed += [(pathlib.PurePosixPath, f"{module}.PurePosixPath")]
        allowed += [(pathlib.PureWindowsPath, f"{module}.WindowsPath")]
        allowed += [(pathlib.PureWindowsPath, f"{module}.PureWindowsPath")]
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
        allowed += [(scalar, f"{module}.scalar"), (rebuild, f"{module}._reconstruct")]
    allowed += [np.dtype, np.ndarray]
    allowed += [dtype for dtype in vars(dtypes).values() if isinstance(dtype, type)]
    nodes = ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    allowed += [getattr(omegaconf, f"{node}Node") for node in nodes]
    allowed += [omegaconf.DictConfig, omegaconf.ListConfig]
    allowed += [omegaconf.base.ContainerMetadata, omegaconf.base.Metadata]
    allowed += [(Any, "typing.Any"), (dict, "builtins.dict"), (list, "builtins.list")]
    return allowed + [(int, "builtins.int"), (str, "builtins.str"), (float, "builtins.float")]


def _ordinary_dict(*factory: Any) -> collections.OrderedDict[Any, Any]:
    """Return what torch's reader fills in the place of a defaultdict, which it refuses to fill."""
    return collections.OrderedDict()


ALLOWED = _allowed()
