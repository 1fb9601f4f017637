"""One pretrained network that teaches: what it is, what it sees, which classes it knows.

A network is never random, not even in part: whatever is missing or does not fit is a `UserError`.
It does not own where weights come from (`models/weights/sources.py`) nor what a teacher says of
images (teacher.py). timm is imported where a network of it is asked for: that takes seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghosttrain.config import schema
from ghosttrain.config.schema import PLAIN
from ghosttrain.errors import UserError
from ghosttrain.files import write_bytes
from ghosttrain.models import digits_teacher
from ghosttrain.models.create import STUDENTS, create_model, create_timm_model
from ghosttrain.models.weights import sources
from ghosttrain.models.weights.dialects import detect, telltales
from ghosttrain.models.weights.files import State, WeightsInfo, part_of
from ghosttrain.models.weights.fit import Ends, branches_of, fit_state
from ghosttrain.models.weights.packing import packed
from ghosttrain.models.weights.sources import LISTED, Weights, published, timm_info
from ghosttrain.text import listed

UNKNOWN = WeightsInfo(
    input_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
)
"""How a network is asked of which nothing is known: as most were trained on ImageNet."""
VIEW = ("input_size", "mean", "std", "interpolation")
"""What has to be known of the images that a network is shown."""


@dataclass(frozen=True)
class PretrainedNetwork:
    """A network with its weights, and what has to be known to ask it."""

    network: nn.Module
    input_size: int
    """Side of its images in pixels."""
    interpolation: str
    """`bilinear` or `bicubic`."""
    mean: list[float]
    """Channel means it was trained with, on pixels in [0, 1]."""
    std: list[float]
    """Channel standard deviations it was trained with."""
    columns: list[int] | None
    """Which of its logits are the data's classes, in their order; None: all, as they come."""
    classes_note: str
    """How its classes were matched with the data's."""
    name: str = ""
    """Of the network."""
    size_note: str = ""
    """Who says that `input_size` is its size."""


def load_pretrained(
    cfg: schema.PretrainedConfig, key: str, classes: Sequence[str], in_chans: int
) -> PretrainedNetwork:
    """Return the network of `cfg` with its weights, for images of `in_chans` channels.

    What the settings leave open (name, size, normalisation) the file says itself, if it was written
    here; else timm's configuration of the model does.

    Args:
        cfg: which network and which weights.
        key: the settings' dotted name (`teacher`, `teacher.members.a`), for messages.
        classes: names of the data's classes in the order of its labels.
        in_chans: channels of the images.

    Raises:
        UserError: no weights, an unknown name, weights that cannot be had or do not fit the network
            in every tensor, other classes or channels than the data's.
    """
    if cfg.weights is None:
        raise UserError(
            f"teacher {cfg.name} has no weights, and a random teacher teaches noise: type"
            f" {key}.weights=PATH or {key}.weights=hub"
        )
    if cfg.weights == "digits" and cfg.name != "digits":
        raise UserError(
            f"{key}.weights=digits is the shipped teacher, not {cfg.name}: type teacher=digits,"
            f" or {key}.weights=PATH for your own"
        )
    validate_published(cfg, key, classes)  # before hundreds of megabytes come
    given = sources.open_weights(cfg.weights, cfg.name, f"{key}.weights")
    name = _network_name(cfg, key, given.about)
    state, _ = part_of(given.state, telltales())
    student = _is_student(name, given.about, state)
    shipped = cfg.weights == "digits" and name == digits_teacher.NAME
    if student:
        count, chans = _student_sizes(state)
    elif shipped:
        count, chans = _dim(state, "fc.weight", 0), _dim(state, "conv1.0.weight", 1) or 3
    else:
        state, count, chans = _timm_sizes(given.state, name)
    given = replace(given, state=state)
    if count is None and student:
        raise UserError(f"{given.origin} has no classifier and cannot teach: give weights with one")
    if in_chans not in (1, chans):
        raise UserError(
            f"teacher {name} takes {chans}-channel images, the data has {in_chans} channels:"
            f" type data.in_chans={chans}, or give another teacher"
        )
    count = count or len(classes)
    columns, note = class_columns(cfg.name or name, count, given.about.classes, classes)
    build = _student if student else _digits if shipped else _timm
    with torch.random.fork_rng(devices=[]):  # its random start must not move the student's
        network = build(name, count, chans, given, cfg.input_size)
    view, size_note = _view(cfg, given, name)
    return PretrainedNetwork(
        network,
        input_size=view["input_size"],
        interpolation=view["interpolation"],
        mean=_per_channel(f"{key}.mean", view["mean"], chans),
        std=_per_channel(f"{key}.std", view["std"], chans),
        columns=columns,
        classes_note=note,
        name=cfg.name or name,
        size_note=size_note,
    )


def validate_published(cfg: schema.PretrainedConfig, key: str, classes: Sequence[str]) -> None:
    """Refuse a network of the hub that has other classes than the data, before it is fetched.

    Raises:
        UserError: it has; timm knows no such model.
    """
    if cfg.weights == "hub" and cfg.name is not None:
        expected = published(cfg.name, f"{key}.name")
        if expected.hf_hub_id:
            class_columns(cfg.name, expected.num_classes, None, classes)


# --- Which network it is -------------------------------------------------------------------------


def _network_name(cfg: schema.PretrainedConfig, key: str, about: WeightsInfo) -> str:
    """Return the name of the network: the one that is typed, or the one that its file says."""
    if cfg.weights == "digits":
        return str(about.name)
    if cfg.name is None and about.name is None:
        raise UserError(
            f"{key}.weights={cfg.weights} does not say which network it is: type {key}.name=MODEL"
            " (a timm model, or a student of this project) beside it; without a teacher:"
            " teacher=none"
        )
    name = cfg.name or str(about.name)
    if about.name is not None and about.name.partition(".")[0] != name.partition(".")[0]:
        raise UserError(
            f"{key}.weights={cfg.weights} holds a {about.name}, as the file says, but {key}.name is"
            f" {name}: type {key}.name={about.name}, or {key}.name=null"
        )
    if name not in STUDENTS:
        published(name, f"{key}.name")
    return name


def _is_student(name: str, about: WeightsInfo, state: State) -> bool:
    """Whether weights are a student's of this project; timm has networks of the same names."""
    if about.source is not None:
        return about.source == "ghosttrain"
    if name not in STUDENTS:
        return False
    if detect(state).dialect not in ("timm", "unknown"):
        return True
    import timm

    return not timm.is_model(name)


def _student_sizes(state: State) -> tuple[int | None, int]:
    """Return the numbers of classes (None: no classifier) and of channels of a student."""
    layout = detect(state)
    stems = [f"stem.{path}weight" for path in ("", "conv.", "branches.0.conv.")]
    chans = next((_dim(state, layout.rename(stem), 1) for stem in stems
                  if layout.rename(stem) in state), 3)  # fmt: skip
    return _dim(state, layout.rename("classifier.weight"), 0), chans or 3


def _timm_sizes(state: State, name: str) -> tuple[State, int | None, int]:
    """Return the tensors of a timm network by its own names, and its numbers of classes (None: not
    found) and of channels.
    """
    cfg = published(name, "name")
    layers = [cfg.classifier, cfg.first_conv]  # the first of several: all have the same sizes
    names = [f"{x if isinstance(x, str) or not x else x[0]}.weight" for x in layers]
    state, _ = part_of(state, names)
    return state, _dim(state, names[0], 0), _dim(state, names[1], 1) or 3


def _dim(state: State, key: str, dim: int) -> int | None:
    return state[key].shape[dim] if key in state else None


def _student(name: str, count: int, chans: int, given: Weights, _: int | None) -> nn.Module:
    """Return a student in the fused form: the same function, and faster."""
    layout = detect(given.state)
    reparam = branches_of(given.state) if layout.dialect == "ghosttrain" else layout.reparam
    stride = given.about.input_stride
    return create_model(
        name, count, chans, reparam or PLAIN, 0.0, given, fused=True, input_stride=stride
    )


def _digits(name: str, count: int, chans: int, given: Weights, _: int | None) -> nn.Module:
    """Return the shipped teacher."""
    network: Any = digits_teacher.DigitsTeacher(count, chans)
    network.weights_note = given.note
    fit_state(network, given.state, name, given.origin, ends=Ends(("conv1.0",), ("fc",)))
    return network


def _timm(name: str, count: int, chans: int, given: Weights, size: int | None) -> nn.Module:
    """Return a timm network, for images of `size` where it must be told."""
    options: dict[str, Any] = {}
    if size and published(name, "name").fixed_input_size:
        options["img_size"] = size
    return create_timm_model(name, count, chans, 0.0, given, **options)


# --- What it sees --------------------------------------------------------------------------------


def _view(cfg: schema.PretrainedConfig, given: Weights, name: str) -> tuple[dict[str, Any], str]:
    """Return how the network is asked, and who says so of the size.

    The settings count before what is known of the weights, and that before timm's configuration.
    """
    typed = WeightsInfo(input_size=cfg.input_size, mean=cfg.mean, std=cfg.std)
    view: dict[str, Any] = {}
    notes: dict[str, str] = {}

    def take(about: WeightsInfo, says: str) -> None:
        for key in VIEW:
            value = getattr(about, key)
            if value is not None and key not in view:
                view[key], notes[key] = value, says

    take(typed, "as set")
    take(given.about, given.says)
    if len(view) < len(VIEW):
        take(timm_info(name), LISTED)
    take(UNKNOWN, "the default")
    return view, notes["input_size"]


def _per_channel(setting: str, values: Sequence[float], chans: int) -> list[float]:
    if len(values) not in (1, chans):
        raise UserError(
            f"{setting} has {len(values)} values, but the teacher takes {chans}-channel"
            f" images: type {setting}=[...] with {chans}"
        )
    return [*values] * (chans // len(values))


# --- Which classes it knows ----------------------------------------------------------------------


def class_columns(
    name: str, count: int, known: Sequence[str] | None, classes: Sequence[str]
) -> tuple[list[int] | None, str]:
    """Return which of a network's `count` logits are the data's classes, and how that was found.

    Classes are matched by name where the network's are known: those in the metadata of a file that
    was trained here, or ImageNet's (1k, 12k, 21k, 22k: sorted synsets, as timm lists them) where
    the data's class names are synsets. The data may then have fewer classes, or another order.
    Else the number must be equal, and only the accuracy can tell whether the order is.

    Raises:
        UserError: the network lacks a class of the data, or the numbers differ.
    """
    basis = "by name"
    if known is None and all(re.fullmatch(r"n\d{8}", c) for c in classes):
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset({"num_classes": count})
        known = ImageNetInfo(subset).label_names() if subset else None
        basis = "by synset"
    if known is None:
        if count != len(classes):
            raise UserError(
                f"teacher {name} knows {count} classes, the data has {_names(classes)}:"
                " type teacher=none distill=none, or give a teacher of these classes"
                " (teacher.weights=PATH)"
            )
        return None, "classes matched by their number alone"
    position = {label: column for column, label in enumerate(known)}
    missing = [label for label in classes if label not in position]
    if missing:
        raise UserError(
            f"teacher {name} knows {_names(known)}, the data has {_names(classes)}, of which it"
            f" lacks {listed(missing)}:"
            " type teacher=none distill=none, or give a teacher of these classes"
            " (teacher.weights=PATH)"
        )
    columns = [position[label] for label in classes]
    if columns == list(range(count)):
        return None, f"classes matched {basis}"
    return columns, f"{len(columns)} of its {count} classes, {basis}"


def _names(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({listed(classes)})"


# --- The shipped teacher -------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """What the metadata of a packed teacher say; `models/weights/files.py` reads them."""

    architecture: str
    """timm model name."""
    input_size: int
    """Side of its images in pixels."""
    mean: tuple[float, ...]
    """Channel means it was trained with, on pixels in [0, 1]; one for each channel it takes."""
    std: tuple[float, ...]
    """Channel standard deviations it was trained with."""
    interpolation: str
    """`bilinear` or `bicubic`."""
    classes: tuple[str, ...]
    """Names in the order of the logits."""
    top1: float
    """Accuracy on held-out images, percent."""
    source: str
    """The command that made it, and from which data."""


def save_packed(path: Path, state: Mapping[str, Tensor], about: Packed) -> None:
    """Write weights (floating-point ones as float16) and `about` into one .safetensors file.

    ValueError where a weight is beyond the range of float16.
    """
    tensors = {k: (t.half() if t.is_floating_point() else t).contiguous() for k, t in state.items()}
    too_large = [k for k, t in tensors.items() if not t.isfinite().all()]
    if too_large:
        raise ValueError(f"not finite in float16: {', '.join(too_large)}")
    about_it = {k: json.dumps(v) for k, v in asdict(about).items()}
    write_bytes(path, packed(tensors, about_it))
