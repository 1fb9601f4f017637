"""Name -> network: `create_model` for the students of `config/students.py`, `create_timm_model`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ghosttrain.config.schema import FULL, PLAIN, ReparamConfig
from ghosttrain.config.students import FAMILIES, STUDENTS, validate_drop_path
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.models.layers import start_small
from ghosttrain.models.reparam import fuse
from ghosttrain.models.weights.dialects import detect, telltales
from ghosttrain.models.weights.files import part_of
from ghosttrain.models.weights.fit import (
    STARTS_ANEW,
    ends_of,
    load_student_weights,
    load_timm_weights,
    same_widths,
)
from ghosttrain.models.weights.sources import Weights, open_weights

REPARAM = {"full": FULL, "none": PLAIN}


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    reparam: str | Mapping[str, Any] | ReparamConfig = "full",
    dropout: float = 0.0,
    weights: str | Weights | None = None,
    fused: bool = False,
    input_stride: str = "standard",
    new_classifier: bool = False,
    classes: Sequence[str] = (),
    drop_path: float = 0.0,
) -> nn.Module:
    """Build a student in training mode: images (B, in_chans, H, W) -> logits (B, num_classes).

    - `reparam`: "full" (3 branches, scale, identity), "none" (the plain published network), or
      settings of `config.schema.ReparamConfig`.
    - `dropout`: probability before the classifier.
    - `weights`: file of a state dict in any dialect of `weights/dialects`, another source of
      `weights/sources.py`, or what `open_weights` returned; the model's `weights_dialect` says
      which it was, its `weights_note` what it lacked (branches, which then start with gain 0), its
      `weights_about` what is known of it.
    - `fused`: build the inference form, convolutions with bias and no batch norm. It takes fused
      weights as they are, and folds weights of the training form (of the given `reparam`).
    - `new_classifier`: where `weights` have no classifier, or one of another number of classes,
      keep the new one and say so in `weights_note`; else they are refused.
    - `classes`: names of the classes in the order of the logits. With `new_classifier`, and where
      the file of weights names as many, its classifier is put in this order, or the new one is kept
      where a name differs.
    - `drop_path`: probability that an image skips the last block, falling linearly to 0 at the
      first (stochastic depth).
    - `input_stride`: "standard", or "small": the stem keeps the map, for images of 32x32 or so.

    Raises UserError for an unknown name or setting and for weights that do not fit.
    """
    _validate_numbers(num_classes, in_chans, dropout)
    settings = as_reparam(reparam)
    if name not in STUDENTS:
        raise UserError(f"Model {name!r} is no student.{did_you_mean(name, STUDENTS)}")
    strides = FAMILIES[STUDENTS[name].family].sides
    if input_stride not in strides:
        hint = did_you_mean(input_stride, strides)
        raise UserError(f"input_stride={input_stride!r} is unknown.{hint}")
    given = open_weights(weights, name, "model.weights") if isinstance(weights, str) else weights
    state, note = part_of(given.state, telltales()) if given else ({}, "")
    holds_branches = given is not None and detect(state).dialect not in ("fused", "deployed")
    if fused and not holds_branches:
        settings = PLAIN  # every setting folds to the same shapes; the least to build
    if given is not None:
        if given.about.source == "timm" and detect(state).dialect == "unknown":
            raise _other_network(given, f"of {name}")
        _validate_width(state, name, given.origin)
    model: Any = _build(name, num_classes, in_chans, settings, dropout, input_stride)
    if drop_path:
        validate_drop_path(name, drop_path)
        _drop_paths(model, drop_path)

    def load(model: Any) -> None:
        assert given is not None
        dialect, lacks = load_student_weights(
            model, state, given.origin, new_classifier, given.about.classes, classes
        )
        model.weights_dialect, model.weights_about = dialect, given.about
        model.weights_note = "; ".join(filter(None, (given.note, note, lacks)))
        if STARTS_ANEW in lacks:
            start_small(model.classifier)

    if holds_branches:
        load(model)
    if fused:
        model = fuse(model.eval()).train()
    if given is not None and not holds_branches:
        load(model)
    return model


def _drop_paths(model: nn.Module, last: float) -> None:
    """Let images skip blocks in training, the last one with probability `last`."""
    from torchvision.ops import StochasticDepth  # two seconds, with what it imports

    blocks: list[Any] = [block for block in model.modules() if hasattr(block, "drop_path")]
    for place, block in enumerate(blocks):
        block.drop_path = StochasticDepth(last * place / max(len(blocks) - 1, 1), "row")


def _build(
    name: str,
    num_classes: int,
    in_chans: int,
    reparam: ReparamConfig,
    dropout: float = 0.0,
    input_stride: str = "standard",
) -> Any:
    family, arguments = STUDENTS[name]
    row = FAMILIES[family]
    return getattr(importlib.import_module(row.module), row.cls)(
        name,
        **arguments,
        num_classes=num_classes,
        in_chans=in_chans,
        reparam=reparam,
        dropout=dropout,
        input_stride=input_stride,
    )


def _validate_width(state: Mapping[str, Tensor], name: str, origin: str) -> None:
    """Raise UserError, naming the right student, where `state` is that of another width."""
    family = STUDENTS[name].family
    if detect(state).family != family:
        return
    siblings = [key for key, row in STUDENTS.items() if row.family == family and key != name]
    prefix = name.rpartition("_")[0]  # the two names of GhostNet are one family
    siblings.sort(key=lambda other: other.rpartition("_")[0] != prefix)
    for other in (name, *siblings):
        with torch.device("meta"):
            plain = _build(other, 1, 1, PLAIN).state_dict()
        if not same_widths(plain, state):
            continue
        if other == name:
            return
        raise UserError(
            f"{origin} holds the weights of {other}, not of {name}: type model={other}, or give "
            "other weights."
        )


def create_timm_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    dropout: float = 0.0,
    weights: str | Weights | None = None,
    new_classifier: bool = False,
    classes: Sequence[str] = (),
    drop_path: float = 0.0,
    **options: Any,
) -> Any:
    """Build any timm model, randomly initialised or with weights, in training mode.

    It is trained as it is: no branches, no fused form. `weights`, `new_classifier`, `classes`
    and what is known of the weights are as for `create_model`; `options` go to `timm.create_model`.
    Raises UserError for a name that timm does not know and for weights that do not fit.
    """
    _validate_numbers(num_classes, in_chans, dropout)
    if drop_path:
        options["drop_path_rate"] = drop_path
    import timm

    if not timm.is_model(name):
        raise UserError(f"Model {name!r} is no timm model.{did_you_mean(name, timm.list_models())}")
    given = open_weights(weights, name, "model.weights") if isinstance(weights, str) else weights
    if given is not None:
        _validate_network(given, name)
    model: Any = timm.create_model(
        name, num_classes=num_classes, in_chans=in_chans, drop_rate=dropout, **options
    )
    if given is not None:
        lacks = load_timm_weights(
            model, given.state, name, given.origin, new_classifier, given.about.classes, classes
        )
        model.weights_note = "; ".join(filter(None, (given.note, lacks)))
        model.weights_about = given.about
        if STARTS_ANEW in lacks:
            _start_classifiers_small(model)
    return model


def _start_classifiers_small(model: nn.Module) -> None:
    """Let a new classifier on pretrained features begin at a loss of ln K."""
    for path in ends_of(model).classifier:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            start_small(layer)


def _validate_network(given: Weights, name: str) -> None:
    """Raise UserError where a file says that it holds another network than timm's `name`."""
    about = given.about
    if about.name is None:
        return
    if about.source == "ghosttrain" or about.name.partition(".")[0] != name.partition(".")[0]:
        raise _other_network(given, f"of timm's {name}")


def _other_network(given: Weights, wanted: str) -> UserError:
    about = given.about
    student = about.source == "ghosttrain"
    right = f"model={about.name}" if student else f"model=timm model.name={about.name}"
    return UserError(
        f"{given.origin} holds the weights of {about.name}, not {wanted}: type {right}, or give "
        "other weights."
    )


def as_reparam(reparam: str | Mapping[str, Any] | ReparamConfig) -> ReparamConfig:
    """Return settings for "full", "none", a mapping of fields, or settings themselves."""
    if isinstance(reparam, ReparamConfig):
        return reparam
    if isinstance(reparam, str):
        if reparam not in REPARAM:
            raise UserError(f"reparam={reparam!r} is unknown.{did_you_mean(reparam, REPARAM)}")
        return REPARAM[reparam]
    try:
        return ReparamConfig(**reparam)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        names = ReparamConfig.model_fields
        hint = "" if field in names else did_you_mean(field, names)
        raise UserError(f"reparam.{field}={first['input']!r}: {first['msg']}.{hint}") from None


def _validate_numbers(num_classes: int, in_chans: int, dropout: float) -> None:
    if num_classes < 1 or in_chans < 1:
        raise UserError(f"num_classes={num_classes} and in_chans={in_chans} must be 1 or more.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout} must be a probability of at least 0 and less than 1.")
