"""The networks of a run: its average, what the optimizer left, or the fused inference form."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import Dataset, build_held_out
from ghosttrain.engine.checkpoint import Checkpoint, newest_checkpoint
from ghosttrain.engine.predict import give_predictions
from ghosttrain.engine.run_files import read_config
from ghosttrain.engine.same_data import renamed
from ghosttrain.engine.state import fit_saved, student_weights
from ghosttrain.engine.student import build_student, has_fused_form, without_start
from ghosttrain.engine.weights_file import WeightsKind, read_weights
from ghosttrain.errors import UserError
from ghosttrain.files import expanded
from ghosttrain.models.reparam import fuse
from ghosttrain.text import listed


def load_run(folder: str | Path, weights: WeightsKind = "ema") -> nn.Module:
    """Return the model of a run in eval mode, on the CPU.

    It has `classes`, the names in the order of the logits; `transform`, image -> (C, S, S) as the
    network takes it; and `predict(images, top=5)` (`predict.predict`).

    Args:
        folder: a run folder.
        weights: `ema` (the result), `raw` (as the optimizer left them), or `fused` (EMA in
            inference form).

    Raises:
        UserError: no run there, or nothing saved yet, or an unknown `weights`.
    """
    folder = expanded(folder)
    config = read_config(folder)
    if config.detects:
        raise UserError(
            f"{folder} is a run of detection, which this does not take: type python -m ghosttrain "
            f"detect eval {folder}"
        )
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
        return give_predictions(model.eval(), config.data, about["classes"])
    saved = _last(folder)
    model = build_student(without_start(config), saved["classes"])
    fit_saved(model, student_weights(saved, weights), folder)
    return give_predictions(model.eval(), config.data, saved["classes"])


def load_detector(folder: Path, weights: WeightsKind = "ema") -> nn.Module:
    """Return the detector of a run in eval mode, on the CPU; the arguments are those of `load_run`.

    Raises:
        UserError: no run of detection there, or nothing saved yet.
    """
    from ghosttrain.engine.detection import build_detector

    config = read_config(folder)
    if not config.detects:
        raise UserError(f"{folder} classifies: type python -m ghosttrain eval {folder}")
    if weights == "fused":
        return fuse(load_detector(folder, "ema"))
    final = folder / "model.safetensors"
    if weights == "ema" and final.is_file():
        state, about = read_weights(final)
        classes, origin = about["classes"], final
    else:
        saved = _last(folder)
        state, classes, origin = student_weights(saved, weights), saved["classes"], folder
    detector = build_detector(without_start(config), classes)
    fit_saved(detector, state, origin)
    return detector.eval()


def _last(folder: Path) -> Checkpoint:
    found = newest_checkpoint(folder / "checkpoints")
    if found is None:
        raise UserError(f"{folder} has no weights yet: no checkpoint was written")
    return found[0]


def held_out_of(folder: Path, config: Config) -> tuple[Dataset, int]:
    """Return the held-out images of a run, and how many of them to look at in one forward pass. The
    training images need not be there.

    Raises:
        UserError: the data are not there, have other classes than the run, or no box of any of
            them.
    """
    classes, train = classes_of(folder), config.train
    held_out = build_held_out(config.data, classes)
    if classes != held_out.classes:
        raise UserError(
            f"{held_out.source} has other classes than {folder} was trained on "
            f"({renamed(classes, held_out.classes)}): type data.root=/the/data/it/was/trained/on"
        )
    if held_out.boxes is not None and held_out.boxes.crowd.all():
        raise UserError(
            f"{held_out.source} has no box of a class that {folder} was trained on "
            f"({listed(classes)}): type data.root=/path of data that have some"
        )
    return held_out, train.eval_batch or train.micro_batch or train.global_batch


def classes_of(folder: Path) -> list[str]:
    """Return the class names a run was trained with."""
    final = folder / "model.safetensors"
    if final.is_file():
        return read_weights(final)[1]["classes"]
    return _last(folder)["classes"]
