"""Files of weights that a run leaves: safetensors whose metadata say which network they are of.

They load again without the run. They are written atomically and can hold data, never code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor, nn

from ghosttrain.config.schema import Config
from ghosttrain.errors import UserError, raise_if_of_the_system
from ghosttrain.files import write_bytes
from ghosttrain.models.weights.packing import packed, read_packed

WeightsKind = Literal["ema", "raw", "fused"]
"""The average of a run, what its optimizer left, or the average in inference form."""


def describe_weights(config: Config, classes: Sequence[str], kind: WeightsKind) -> dict[str, str]:
    """Return safetensors metadata: what the weights are and what images they expect."""
    data = config.data
    about = {
        "model": config.model.model_dump(mode="json", exclude={"weights"}),
        "reparam": None if kind == "fused" else config.reparam.model_dump(mode="json"),
        "kind": kind,
        "classes": list(classes),
        "input": data.model_dump(
            mode="json",
            include={"in_chans", "mean", "std", "eval_size", "crop_pct", "interpolation"},
        ),
    }
    if config.detects:
        about["detector"] = config.detector.model_dump(mode="json")
    return {"format": "pt", "ghosttrain": json.dumps(about)}


def write_weights(path: Path, model: nn.Module, about: dict[str, str]) -> None:
    """Write a model's weights as safetensors, atomically."""
    write_bytes(path, weights_bytes(model, about))


def weights_bytes(model: nn.Module, about: dict[str, str]) -> bytes:
    """Return a model's weights as a safetensors file."""
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    return packed(state, about)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a weights file's tensors and what its metadata says they are.

    Raises:
        UserError: damaged, or not written by `write_weights`.
        OSError: it cannot be read now: no permission, no memory, a failing disk.
    """
    try:
        tensors, metadata = read_packed(path)
        return tensors, json.loads(metadata["ghosttrain"])
    except (OSError, SafetensorError, KeyError, ValueError, MemoryError) as error:
        raise_if_of_the_system(error, path)
        raise UserError(
            f"{path} cannot be read as weights of ghosttrain: {' '.join(str(error).split())}"
        ) from None
