"""The networks of a run: its average, what the optimizer left, or the fused inference form."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save
from torch import nn

from ghosttrain.config.errors import UserError
from ghosttrain.config.paths import expanded
from ghosttrain.config.schema import Config
from ghosttrain.engine.folder import read_config, replacing
from ghosttrain.engine.state import Checkpoint, fit_saved, read_checkpoint, student_weights
from ghosttrain.engine.student import build_student, has_fused_form
from ghosttrain.engine.weights_file import (
    WeightsKind,
    describe_weights,
    read_weights,
    write_weights,
)
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.models.layers import Student
from ghosttrain.models.reparam import fuse, using_forward
from ghosttrain.models.weights.export import export_state


def load_run(folder: str | Path, weights: WeightsKind = "ema") -> nn.Module:
    """Return the model of a run in eval mode, on the CPU.

    Args:
        folder: a run folder.
        weights: `ema` (the result), `raw` (as the optimizer left them), or `fused` (EMA in
            inference form).

    Raises:
        UserError: no run there, or nothing saved yet, or an unknown `weights`.
    """
    folder = expanded(folder)
    config = read_config(folder)
    if weights not in ("ema", "raw", "fused"):
        raise UserError(f"weights={weights!r}: choose 'ema', 'raw' or 'fused'")
    if weights == "fused":
        if not has_fused_form(config):
            raise UserError(f"{config.model.name} is a timm model: it has no fused form")
        return fuse(load_run(folder, "ema"))
    final = folder / "model.safetensors"
    if weights == "ema" and final.is_file():
        state, about = read_weights(final)
        model = build_student(without_start(config), about["classes"])
        fit_saved(model, state, final)
        return model.eval()
    saved = _last(folder)
    model = build_student(without_start(config), saved["classes"])
    fit_saved(model, student_weights(saved, weights), folder)
    return model.eval()


def _last(folder: Path) -> Checkpoint:
    path = folder / "checkpoints" / "last.pt"
    if not path.is_file():
        raise UserError(f"{folder} has no weights yet: no epoch has ended")
    return read_checkpoint(path)


def without_start(config: Config) -> Config:
    """Return the settings without `model.weights`: a saved run does not need the file it started
    from.
    """
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})


def classes_of(folder: Path) -> list[str]:
    """Return the class names a run was trained with."""
    final = folder / "model.safetensors"
    if final.is_file():
        return read_weights(final)[1]["classes"]
    return _last(folder)["classes"]


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
        difference = (model(x) - fused(x)).abs().max().item()
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


def _write_for(library: str, model: nn.Module, fused: nn.Module, path: Path) -> Path:
    """Write a run's weights for a network of `library`: the plain one, or timm's GhostNetV3."""
    try:
        form, (name, state) = "fused", export_state(cast("Student", fused), library)
    except UserError as refusal:
        try:
            form, (name, state) = "in training form", export_state(cast("Student", model), library)
        except UserError:
            raise refusal from None
    with replacing(path) as file:
        file.write(save(state, metadata={"format": "pt"}))
    classes, chans = (getattr(model, key) for key in ("num_classes", "in_chans"))
    how = {
        "timm": f"timm.create_model({name!r}, num_classes={classes}, in_chans={chans}, "
        f"checkpoint_path={str(path)!r})",
        "torchvision": f"torchvision.models.get_model({name!r}, num_classes={classes})"
        f".load_state_dict(safetensors.torch.load_file({str(path)!r}))",
    }
    print(f"{path} ({form})\nload it: {how[library]}")
    return path
