"""Files for deployment: the inference model of a run, or weights that another library loads."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn

from ghosttrain.engine.load import classes_of, load_run
from ghosttrain.engine.run_files import read_config
from ghosttrain.engine.weights_file import describe_weights, write_weights
from ghosttrain.errors import UserError
from ghosttrain.files import expanded, write_bytes
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.models.layers import Student
from ghosttrain.models.reparam import using_forward
from ghosttrain.models.weights.export import export_state
from ghosttrain.models.weights.files import State
from ghosttrain.models.weights.packing import packed

FUSE_BOUND = 1e-3
"""Largest difference of a logit that rounding explains, as a share of the largest logit."""


def fuse_run(folder: str | Path, out: str | None = None, library: str | None = None) -> Path:
    """Write the inference model of a run, or with `library` the weights of its plain network.

    `create_model(name, weights=FILE, fused=True)` loads the first; the second is for timm or
    torchvision (`weights.export_state`).

    Raises:
        UserError: no run there, or nothing to fuse, or the file cannot be written, or `library`
            has no such network.
    """
    folder = expanded(folder)
    config = read_config(folder)
    model = load_run(folder, "ema")
    fused = load_run(folder, "fused")
    name = f"model.{library}" if library else "model.fused"
    path = expanded(out) if out else folder / f"{name}.safetensors"
    if library is not None:
        return _write_for(library, model, fused, path)
    size, chans = config.data.eval_size, config.data.in_chans
    x = torch.randn(4, chans, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), using_forward(model, "branches"):
        logits = model(x)
        difference = (logits - fused(x)).abs().max().item()
    bound = FUSE_BOUND * max(1.0, logits.abs().max().item())
    if not difference <= bound and not config.model.weight_bits:  # NaN too
        raise UserError(
            f"the fused form of {folder} differs from the trained one by {difference:.1e} in a "
            f"logit, rounding explains {bound:.1e}: nothing was written; the weights of this run "
            "are broken"
        )
    write_weights(path, fused, describe_weights(config, classes_of(folder), "fused"))
    print(
        f"{path}\nparameters {count_params(model):,} -> {count_params(fused):,}; "
        f"MACs at {size} px {count_macs(model, size, chans):,} -> "
        f"{count_macs(fused, size, chans):,}; "
        f"largest difference of a logit {difference:.1e}\n"
        f"load it: ghosttrain.create_model({config.model.name!r}, "
        f"num_classes={len(classes_of(folder))}, "
        f"in_chans={chans}, fused=True, weights={str(path)!r})"
    )
    return path


def in_library(model: nn.Module, fused: nn.Module, library: str) -> tuple[str, str, State]:
    """Return the form that `library` has a network for, fused before training form; its name there
    and its state dict.

    Raises:
        UserError: it has neither; the message is about the fused one.
    """
    try:
        return "fused", *export_state(cast("Student", fused), library)
    except UserError as refusal:
        try:
            return "in training form", *export_state(cast("Student", model), library)
        except UserError:
            raise refusal from None


def _write_for(library: str, model: nn.Module, fused: nn.Module, path: Path) -> Path:
    """Write a run's weights for a network of `library`: the plain one, or timm's GhostNetV3."""
    shown, name, state = in_library(model, fused, library)
    write_bytes(path, packed(state, {"format": "pt"}))
    classes, chans = (getattr(model, key) for key in ("num_classes", "in_chans"))
    commands = {
        "timm": f"timm.create_model({name!r}, num_classes={classes}, in_chans={chans}, "
        f"checkpoint_path={str(path)!r})",
        "torchvision": f"torchvision.models.get_model({name!r}, num_classes={classes})"
        f".load_state_dict(safetensors.torch.load_file({str(path)!r}))",
    }
    print(f"{path} ({shown})\nload it: {commands[library]}")
    return path
