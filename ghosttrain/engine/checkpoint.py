"""Saving and loading: the state of a run (to resume), and weights (to evaluate, fuse, deploy).

`checkpoints/last.pt` holds everything a run needs to go on: raw weights, EMA, optimizer, step,
best-so-far. Weights files are safetensors whose metadata says which model they are, so that they
load again without the run. All writes are atomic; all reads are `weights_only`: a checkpoint can
hold data, never code. The teacher is in none of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ghosttrain.config.errors import UserError, raise_if_of_the_system
from ghosttrain.config.paths import expanded, utf8_name
from ghosttrain.config.schema import Config
from ghosttrain.engine.folder import read_config, replacing
from ghosttrain.models.files import other_input_stride, other_normalisation
from ghosttrain.models.layers import Student
from ghosttrain.models.profile import count_macs, count_params
from ghosttrain.models.registry import create_model, create_timm_model
from ghosttrain.models.reparam import fuse, using_engine
from ghosttrain.models.weights import export_state, mismatch

Which = Literal["ema", "raw", "fused"]


def build_student(config: Config, classes: Sequence[str]) -> nn.Module:
    """Return the student of `config`, freshly initialised or with `model.weights`.

    `classes` are the names of the data's classes in the order of its labels.
    """
    model, in_chans = config.model, config.data.in_chans
    student: Any
    if model.source == "timm":
        student = create_timm_model(
            model.name,
            len(classes),
            in_chans,
            model.dropout,
            model.weights,
            new_classifier=True,
            classes=classes,
        )
    else:
        student = create_model(
            model.name,
            len(classes),
            in_chans,
            config.reparam,
            model.dropout,
            model.weights,
            input_stride=model.input_stride,
            new_classifier=True,
            classes=classes,
        )
    if model.weights:
        about, notes = student.weights_about, [student.weights_note]
        if model.source == "ghosttrain":  # a timm model has no such setting
            notes.append(other_input_stride(about, model.input_stride))
        notes.append(other_normalisation(about, config.data.mean, config.data.std))
        student.weights_note = "; ".join(filter(None, notes))
    return student


def can_fuse(config: Config) -> bool:
    """Whether the student of `config` has an inference form of its own."""
    return config.model.source == "ghosttrain"


def describe_weights(config: Config, classes: list[str], form: Which) -> dict[str, str]:
    """Return safetensors metadata: what the weights are and what images they expect."""
    data = config.data
    about = {
        "model": config.model.model_dump(mode="json", exclude={"weights"}),
        "reparam": None if form == "fused" else config.reparam.model_dump(mode="json"),
        "form": form,
        "classes": classes,
        "input": data.model_dump(
            mode="json",
            include={"in_chans", "mean", "std", "eval_size", "crop_pct", "interpolation"},
        ),
    }
    return {"format": "pt", "ghosttrain": json.dumps(about)}


def save_weights(path: Path, model: nn.Module, about: dict[str, str]) -> None:
    """Write a model's weights as safetensors, atomically."""
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    with replacing(path) as file:
        file.write(save(state, metadata=about))  # save_file would make it private to the user


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    with replacing(path) as file:
        torch.save(state, file)


def load_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        UserError: the file is damaged, or is no checkpoint of this project.
        OSError: it cannot be read now: no permission, no memory, a failing disk.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler lets anything out: KeyError, struct.error
        raise_if_of_the_system(error, path)
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())[:80]}); move it away to start this "
            "run anew"
        ) from None
    if not isinstance(state, dict) or "student" not in state:
        raise UserError(
            f"{path} is no checkpoint of ghosttrain; move it away to start this run anew"
        )
    return state


def load_into(model: nn.Module, state: dict[str, Tensor], origin: Path) -> None:
    """Load a state dict whose every key and shape must match.

    Raises:
        UserError: naming what does not fit: these are the weights of another model.
    """
    wrong = [key for keys in mismatch(model.state_dict(), state).values() for key in keys]
    if wrong:
        raise UserError(
            f"{origin} holds the weights of another model: {len(wrong)} entries do not fit (first: "
            f"{wrong[0]}); "
            "choose another run.name or run.fresh=true"
        )
    model.load_state_dict(state)


def load_run(folder: str | Path, weights: Which = "ema") -> nn.Module:
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
        if not can_fuse(config):
            raise UserError(f"{config.model.name} is a timm model: it has no fused form")
        return fuse(load_run(folder, "ema"))
    final = folder / "model.safetensors"
    if weights == "ema" and final.is_file():
        state, about = read_weights(final)
        model = build_student(without_start(config), about["classes"])
        load_into(model, state, final)
        return model.eval()
    saved = _last(folder)
    model = build_student(without_start(config), saved["classes"])
    load_into(model, saved["student"] if weights == "raw" else saved["ema"]["model"], folder)
    return model.eval()


def _last(folder: Path) -> dict[str, Any]:
    path = folder / "checkpoints" / "last.pt"
    if not path.is_file():
        raise UserError(f"{folder} has no weights yet: no epoch has ended")
    return load_state(path)


def without_start(config: Config) -> Config:
    """Return the settings without `model.weights`: a saved run does not need the file it started
    from.
    """
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a weights file's tensors and what its metadata says they are.

    Raises:
        UserError: damaged, or not written by `save_weights`.
        OSError: it cannot be read now: no permission, no memory, a failing disk.
    """
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:
            about = json.loads((file.metadata() or {})["ghosttrain"])
            return load_file(name), about
    except (OSError, SafetensorError, KeyError, ValueError, MemoryError) as error:
        raise_if_of_the_system(error, path)
        raise UserError(
            f"{path} cannot be read as weights of ghosttrain: {' '.join(str(error).split())}"
        ) from None


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
    with torch.inference_mode(), using_engine(model, "branches"):
        difference = (model(x) - fused(x)).abs().max().item()
    save_weights(path, fused, describe_weights(config, classes_of(folder), "fused"))
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
