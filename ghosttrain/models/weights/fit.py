"""Weights that fit a network: load a state dict of any dialect.

Dialects of students, named in `dialects/`: `ghosttrain` (training form, any branches), `fused`
(the output of `fuse`), `timm` (`ghostnetv3_*`, `ghostnetv2_*`, `mobilenetv2_*`), `official` and
`deployed` (GhostNetV3) and `torchvision` (`shufflenet_v2_*`, `mobilenet_v2`). Files are read by
`files.py`, what others can load is written by `export.py`.

A file without some of a model's branches, for instance a plain pretrained network, loads too: the
branches it lacks start with gain 0 (batch norms with weight and bias 0). They add exactly nothing,
in training and in evaluation, until the optimizer moves their gain, whose gradient is not 0;
their kernels keep their random, hence different, initialisation. The trick is that of
https://arxiv.org/abs/1706.02677, section 5.1.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghosttrain.config.schema import PLAIN, ReparamConfig
from ghosttrain.errors import UserError
from ghosttrain.models.layers import Student
from ghosttrain.models.reparam import fold_norm
from ghosttrain.models.weights.dialects import Dialect, detect
from ghosttrain.models.weights.files import State, part_of
from ghosttrain.text import listed

EPS = 1e-5  # of every batch norm of the networks that others name
# An entry of a re-parameterized layer: layer, branch, entry of the branch.
_BRANCH = re.compile(r"(.+)\.(branches\.\d+|scale|identity)\.(.+)")


class LoadReport(NamedTuple):
    """What `load_student_weights` found in a file."""

    dialect: Dialect
    note: str
    """What a reader should know about it; empty if the file holds the whole model."""


class Ends(NamedTuple):
    """The layers of a network whose sizes are the data's: module names."""

    first: tuple[str, ...]
    """What takes the images."""
    classifier: tuple[str, ...]
    """What makes the logits; several where a network has several heads."""


STARTS_ANEW = "starts near 0"
"""In the note of weights whose classifier was left out: the new one begins at a loss of ln K."""
STUDENT_ENDS = Ends(("stem",), ("classifier",))


def load_student_weights(
    model: Student,
    state: Mapping[str, Tensor],
    origin: str,
    new_classifier: bool = False,
    known: Sequence[str] | None = None,
    classes: Sequence[str] = (),
) -> LoadReport:
    """Load a state dict of any dialect into a student of the same family.

    Branches of the model that the file lacks start with gain 0, so that the function is the file's.
    With `new_classifier` the model keeps its own where the file has none, or one of other classes;
    a classifier of the same classes in another order is put in the model's. Classes are compared by
    name where both are given: `known` are those of the file, `classes` those of the model, in the
    order of the logits; else by their number.
    Raises UserError, naming `origin` (a file), for another family, for fused weights in a model
    with batch norms, and for what does not fit, key by key, as `fit_state` does.
    """
    model_state = model.state_dict()
    ours, theirs = detect(model_state), detect(state)
    if theirs.dialect != "unknown" and theirs.family != ours.family:
        raise UserError(
            f"{origin} holds a {theirs.dialect} {theirs.family}, the model is {model.name}: choose "
            f"a model of the family {theirs.family}, or other weights."
        )
    if theirs.dialect in ("fused", "deployed") and ours.dialect != "fused":
        raise UserError(
            f"{origin} holds {theirs.dialect} weights, whose branches are folded into one "
            "convolution each: they cannot be trained as branches and fit the fused form only, "
            f"create_model({model.name!r}, fused=True, weights=...), or a teacher."
        )
    if theirs.dialect == "deployed":
        state = _fold_deployed(state, model_state)
    state = translate(state, model_state)
    spare, notes = _silent_branches(model_state, state), []
    if count := sum(key.endswith(".running_mean") for key in spare):
        notes.append(f"{count} branches that it lacks start with gain 0")
    if new_classifier:
        state, note = _with_new_classifier(
            state, model_state, STUDENT_ENDS.classifier, known, classes
        )
        notes += [note] if note else []
    reparam = None if theirs.dialect in ("ghosttrain", "unknown") else theirs.reparam
    fit_state(model, state, model.name, origin, spare, reparam)
    return LoadReport(theirs.dialect, "; ".join(notes))


def load_timm_weights(
    network: nn.Module,
    state: State,
    name: str,
    origin: str,
    new_classifier: bool = False,
    known: Sequence[str] | None = None,
    classes: Sequence[str] = (),
) -> str:
    """Load a state dict into a timm network; return what a reader should know about it.

    Names and shapes that do not fit are given to timm's own reader of that model first, which knows
    the names that its authors gave. `new_classifier`, `known`, `classes` and errors are as in
    `load_student_weights`.
    """
    model_state, ends = network.state_dict(), ends_of(network)
    state, note = part_of(state, model_state.keys())
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    others = ("missing", "unexpected", "of another shape")
    ours = _body(model_state, ends.classifier)
    body = _body(state, ends.classifier)
    reader = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if reader and any(mismatch(ours, body)[kind] for kind in others):
        with contextlib.suppress(Exception):
            translated = reader(dict(state), network)
            if not any(mismatch(ours, _body(translated, ends.classifier)).values()):
                state = translated
    notes = [note] if note else []
    if new_classifier:
        state, note = _with_new_classifier(state, model_state, ends.classifier, known, classes)
        notes += [note] if note else []
    fit_state(network, state, name, origin, ends=ends)
    return "; ".join(notes)


def ends_of(network: Any) -> Ends:
    """Return the first layers and the classifiers of a timm network."""
    cfg = getattr(network, "pretrained_cfg", None) or {}
    first, classifier = (_names(cfg.get(key)) for key in ("first_conv", "classifier"))
    with contextlib.suppress(Exception):  # some networks have no classifier, or not by a method
        layers = network.get_classifier()
        layers = layers if isinstance(layers, tuple) else (layers,)
        classifier += tuple(
            path for path, module in network.named_modules() if any(module is x for x in layers)
        )
    return Ends(first, tuple(dict.fromkeys(classifier)))


def _names(value: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _below(key: str, layers: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{layer}.") for layer in layers)


def _body(state: Mapping[str, Tensor], classifier: tuple[str, ...]) -> State:
    """Return a state dict without the classifier and without counters of batch norms."""
    return {
        key: value
        for key, value in state.items()
        if not (_below(key, classifier) or key.endswith("num_batches_tracked"))
    }


def _with_new_classifier(
    state: Mapping[str, Tensor],
    model_state: State,
    classifier: tuple[str, ...],
    known: Sequence[str] | None,
    classes: Sequence[str],
) -> tuple[State, str]:
    """Return `state` with a classifier of the model's classes, and a note.

    It is the model's own where that of `state` is missing or has other classes.
    """
    mine = {key: value for key, value in model_state.items() if _below(key, classifier)}
    theirs = {key: value for key, value in state.items() if _below(key, classifier)}
    new = _classes(mine, classifier)
    if new is None:
        return dict(state), ""
    if not theirs:
        return {**state, **mine}, f"it has no classifier, one of {new} starts near 0"
    old = _classes(theirs, classifier)
    if old is None:
        return dict(state), ""
    rest = {key: value for key, value in state.items() if key not in theirs}
    if old != new:
        note = f"its classifier of {old} classes is left out, one of {new} starts near 0"
        return {**rest, **mine}, note
    named = known is not None and len(known) == len(classes) == new
    if known is None or not named or list(known) == list(classes):
        return dict(state), ""
    if set(known) != set(classes):
        note = (
            f"its classifier of other classes ({listed(known)}) is left out, one of "
            f"{listed(classes)} starts near 0"
        )
        return {**rest, **mine}, note
    rows = [list(known).index(name) for name in classes]
    layers = [f"{layer}.{leaf}" for layer in classifier for leaf in ("weight", "bias")]
    sorted_rows = {key: value[rows] for key, value in theirs.items() if key in layers}
    note = "the outputs of its classifier are put in the order of the data's classes"
    return {**state, **sorted_rows}, note


def _classes(state: Mapping[str, Tensor], classifier: tuple[str, ...]) -> int | None:
    """Return the number of classes of a classifier; None where there is none."""
    weights = (state[f"{layer}.weight"] for layer in classifier if f"{layer}.weight" in state)
    return next((len(weight) for weight in weights), None)


def _fold_deployed(state: Mapping[str, Tensor], model_state: State) -> State:
    """Return a deployed GhostNetV3 under the names of the fused form `own`.

    The layers that had no branches keep a batch norm in it, which is folded here. Entries without
    a counterpart keep their names.
    """
    layout, rest = detect(state), dict(state)
    folded: State = {}
    for path in dict.fromkeys(key.rpartition(".")[0] for key in model_state):
        names = [layout.rename(f"{path}.conv.{leaf}") for leaf in ("weight", "bias")]
        norm = layout.rename(f"{path}.bn.weight").removesuffix("weight")
        leaves = [f"{norm}{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        if names[0] not in state:  # an ordinary linear layer
            keys = {
                f"{path}.{leaf}": layout.rename(f"{path}.{leaf}") for leaf in ("weight", "bias")
            }
            folded |= {key: rest.pop(name) for key, name in keys.items() if name in rest}
            continue
        kernel = rest.pop(names[0])
        if names[1] in state:
            bias = rest.pop(names[1])
        elif all(leaf in state for leaf in leaves):
            weight, shift, mean, var = (rest.pop(leaf) for leaf in leaves)
            kernel, bias = fold_norm(kernel, weight, shift, mean, var, EPS)
            rest.pop(f"{norm}num_batches_tracked", None)
        else:
            continue
        folded |= {f"{path}.weight": kernel, f"{path}.bias": bias}
    return {**rest, **folded}


def translate(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> State:
    """Return `state`, of any dialect, under the names of `own`, a student's state dict.

    Entries without a counterpart keep their names. The weights of a plain layer become branch 0.
    """
    layout = detect(state)
    ours = {}
    for key in model_state:
        names = (layout.rename(key), layout.rename(key.replace(".branches.0.", ".")))
        ours.update({name: key for name in names if name in state})
    renamed = {ours.get(name, name): value for name, value in state.items()}
    # A layer on a pooled map may be a 1x1 convolution theirs.
    matrices = {key for key in model_state if model_state[key].ndim == 2}
    return {k: v.flatten(1) if k in matrices and v.ndim == 4 else v for k, v in renamed.items()}


def same_widths(plain: State, state: Mapping[str, Tensor]) -> bool:
    """Whether every convolution of a plain student but the stem has its shape in `state`.

    `state` may be of any dialect, with more branches or with none.
    """
    fused = {key: re.sub(r"(\.branches\.0)?\.conv\.", ".", key) for key in plain}
    as_plain = translate(state, plain)
    as_fused = translate(state, {fused[key]: value for key, value in plain.items()})
    for key, value in plain.items():
        if value.ndim == 4 and not key.startswith("stem."):
            found = as_plain.get(key, as_fused.get(fused[key]))
            if found is None or found.shape != value.shape:
                return False
    return True


def _silent_branches(model_state: State, state: State) -> State:
    """Return the entries of `own` in branches that `state` lacks wholly, with gain and bias 0.

    A layer of which `state` does not even have branch 0 is missing, not plain.
    """
    held = {match.expand(r"\1.\2") for match in map(_BRANCH.fullmatch, state) if match}
    silent = {}
    for key, value in model_state.items():
        match = _BRANCH.fullmatch(key)
        if match and match.expand(r"\1.\2") not in held and f"{match[1]}.branches.0" in held:
            is_gain_or_bias = match[3] in ("bn.weight", "bn.bias", "weight", "bias")
            silent[key] = torch.zeros_like(value) if is_gain_or_bias else value
    return silent


def fit_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    name: str,
    origin: str,
    spare: Mapping[str, Tensor] = {},
    reparam: ReparamConfig | None = None,
    ends: Ends = STUDENT_ENDS,
    remedy: str = "",
) -> None:
    """Load `state` into `model` if all names and shapes agree.

    Else raises UserError with the keys that differ; `name` (the model), `origin` (a file) and
    `remedy` stand in it. What `state` lacks may come from `spare`; `reparam` is that of the network
    it comes from, where its own names do not tell; `ends` are the layers of `model` that the data
    decide. Counters of batch norms (`num_batches_tracked`) may be missing: not all trainers store
    them, and only a batch norm without momentum reads them.
    """
    model_state = model.state_dict()
    counters = {key: model_state[key] for key in model_state if key.endswith("num_batches_tracked")}
    complete = {**counters, **spare, **state}
    found = mismatch(model_state, complete)
    if not any(found.values()):
        model.load_state_dict(complete)
        return
    missing, unexpected, reshaped = found.values()
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(model_state[k].shape)}" for k in reshaped
    ]
    parts = [
        f"{len(keys)} {what} ({listed(keys, most=6)})"
        for what, keys in zip(found, (missing, unexpected, shapes), strict=True)
        if keys
    ]
    hint = ""
    if not missing and not unexpected:
        hint = _hint_for_shapes(model_state, state, reshaped, ends)
    elif not unexpected and missing and all(_below(key, ends.classifier) for key in missing):
        hint = " It has no classifier: give weights with one."
    elif not reshaped and (reparam or branches_of(state)) not in (None, branches_of(model_state)):
        hint = f" The file has {spelled(reparam or branches_of(state) or PLAIN)}."
    raise UserError(f"{origin} does not fit {name}: {'; '.join(parts)}.{hint}{remedy}")


def mismatch(
    model_state: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Return the keys in which `state` differs from `own`, a model's state dict, by what is wrong.

    "missing", "unexpected" and "of another shape", in this order, each possibly empty.
    """
    return {
        "missing": [key for key in model_state if key not in state],
        "unexpected": [key for key in state if key not in model_state],
        "of another shape": [
            k for k in model_state if k in state and model_state[k].shape != state[k].shape
        ],
    }


def _hint_for_shapes(
    model_state: State, state: Mapping[str, Tensor], reshaped: list[str], ends: Ends
) -> str:
    """Say which setting the weights belong to, where only the classes or the channels differ."""
    if all(_below(key, ends.classifier) for key in reshaped):
        given, wanted = (_classes(s, ends.classifier) for s in (state, model_state))
        return (
            f" It has {given} classes, the model {wanted}: use data of {given} classes "
            f"(num_classes={given}) or other weights."
        )
    if all(_below(key, ends.first) for key in reshaped):
        given, wanted = (s[reshaped[0]].shape[1] for s in (state, model_state))
        return (
            f" It takes {given} channels, the model {wanted}: use data.in_chans={given} "
            f"(in_chans={given}) or other weights."
        )
    return ""


def branches_of(state: Mapping[str, Tensor]) -> ReparamConfig | None:
    """Return the settings that give the branches of a training form; None if it is none."""
    layers: dict[str, set[str]] = {}
    sides: dict[str, int] = {}
    for match in filter(None, map(_BRANCH.fullmatch, state)):
        layers.setdefault(match[1], set()).add(match[2])
        if match[3] == "conv.weight" and match[2] != "scale":
            sides[match[1]] = state[match[0]].shape[-1]
    if not layers:
        return None
    rich = {layer for layer, branches in layers.items() if len(branches) > 1}
    if not rich:
        return PLAIN
    names = set[str]().union(*layers.values())
    in_blocks = {sides.get(layer) for layer in rich - {"stem"}}
    return ReparamConfig(
        branches=len(names - {"scale", "identity"}),
        scale="scale" in names,
        identity="identity" in names,
        pointwise=1 in in_blocks,
        depthwise=bool(in_blocks - {1}),
        stem="stem" in rich,
    )


def spelled(reparam: ReparamConfig) -> str:
    """Return settings as they are typed."""
    settings = reparam.model_dump(exclude={"forward"})
    return " ".join(f"reparam.{name}={str(value).lower()}" for name, value in settings.items())
