"""Weights of students: read a file of any dialect, load what fits, write what others can load.

Dialects, named in `layouts.py`: `ghosttrain` (training form, any branches), `fused` (the output of
`fuse`), `timm` (`ghostnetv3_*`, `ghostnetv2_*`, `mobilenetv2_*`), `official` (GhostNetV3) and
`torchvision` (`shufflenet_v2_*`, `mobilenet_v2`). Owns no folding algebra.

A file without some of a model's branches, for instance a plain pretrained network, loads too: the
branches it lacks start with gain 0 (batch norms with weight and bias 0). They add exactly nothing,
in training and in evaluation, until the optimizer moves their gain, whose gradient is not 0;
their kernels keep their random, hence different, initialisation. The trick is that of
https://arxiv.org/abs/1706.02677, section 5.1.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ghosttrain.config.errors import UserError
from ghosttrain.config.paths import utf8_name
from ghosttrain.config.schema import Reparam
from ghosttrain.models.layers import Student
from ghosttrain.models.layouts import FULL, LAYOUTS, PLAIN, Dialect, Layout, detect

State = dict[str, Tensor]

# Where trainers keep the weights, best first: EMA weights are the ones that are meant to be used.
# The official GhostNetV3 release holds `state_dict` and `state_dict_ema`.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What DistributedDataParallel and torch.compile put in front of every name.
PREFIXES = ("module.", "_orig_mod.")
# Counters that are no weights: of torch.optim.swa_utils.AveragedModel, and of the profiler thop,
# which are in the official GhostNetV2 releases (Efficient-AI-Backbones, issue 175).
COUNTERS = ("n_averaged", "total_ops", "total_params")

EPS = 1e-5  # of every batch norm of the networks in LAYOUTS
# An entry of a re-parameterized layer: layer, branch, entry of the branch.
_BRANCH = re.compile(r"(.+)\.(branches\.\d+|scale|identity)\.(.+)")
# Layers on pooled maps: a matrix here, a 1x1 convolution in timm.
_MATRIX = re.compile(r"(head|.*\.se\.(reduce|expand))\.weight")


class Loaded(NamedTuple):
    """What `load_state` found in a file."""

    dialect: Dialect
    note: str
    """What a reader should know about it; empty if the file holds the whole model."""


def read_state(path: str | Path) -> State:
    """Return the tensors of a `.safetensors` or torch file, on the CPU, by bare parameter name.

    Torch files are read with `weights_only=True` (`argparse.Namespace`, in which trainers store
    their settings beside the weights, is allowed). `WRAPPERS` are opened, `PREFIXES` and `COUNTERS`
    removed. Raises UserError where there is no such file, or no weights in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"Weights {str(path)!r}: there is no such file.")
    try:
        content = _read(path)
    except Exception as error:  # on a damaged file torch's unpickler raises almost anything
        lines = str(error).split(". ")[0].splitlines()  # not torch's advice to load it unsafely
        reason = ": ".join([type(error).__name__, *lines[:1]])
        raise UserError(
            f"Weights {str(path)!r} cannot be read ({reason}): expected a .safetensors file, or a "
            "torch file that holds tensors only."
        ) from None
    while wrapper := next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None):
        content = content[wrapper]
    state: State = {
        key: value
        for key, value in content.items()
        if isinstance(value, Tensor) and key.rpartition(".")[2] not in COUNTERS
    }
    if not state:
        raise UserError(
            f"Weights {str(path)!r} hold no state dict: there is no tensor in the file."
        )
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        with utf8_name(path) as name:
            return load_file(name)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return content if isinstance(content, Mapping) else {}


def load_state(
    model: Student, state: Mapping[str, Tensor], origin: str, new_classifier: bool = False
) -> Loaded:
    """Load a state dict of any dialect into a student of the same family.

    Branches of the model that the file lacks start with gain 0, so that the function is the file's.
    With `new_classifier` a classifier of another number of classes is left out.
    Raises UserError, naming `origin` (a file), for another family, for fused weights in a model
    with batch norms, and for what does not fit, key by key, as `fit_state` does.
    """
    own = model.state_dict()
    here, there = detect(own), detect(state)
    if there.dialect != "unknown" and there.family != here.family:
        raise UserError(
            f"{origin} holds a {there.dialect} {there.family}, the model is {model.name}: choose a "
            f"model of the family {there.family}, or other weights."
        )
    if there.dialect == "fused" and here.dialect != "fused":
        raise UserError(
            f"{origin} holds fused weights, without batch norms: they fit the fused form only, "
            f"create_model({model.name!r}, fused=True, weights=...)."
        )
    state = translate(state, own)
    spare, notes = _silent_branches(own, state), []
    if count := sum(key.endswith(".running_mean") for key in spare):
        notes.append(f"{count} branches that it lacks start with gain 0")
    old, new = (len(s.get("classifier.bias", ())) for s in (state, own))
    if new_classifier and old not in (0, new):
        spare |= {key: own[key] for key in own if key.startswith("classifier.")}
        state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
        notes.append(f"its classifier of {old} classes is left out, one of {new} starts at random")
    form = None if there.dialect in ("ghosttrain", "unknown") else there.form
    fit_state(model, state, model.name, origin, spare, form)
    return Loaded(there.dialect, "; ".join(notes))


def translate(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> State:
    """Return `state`, of any dialect, under the names of `own`, a student's state dict.

    Entries without a counterpart keep their names. The weights of a plain layer become branch 0.
    """
    layout = detect(state)
    ours = {}
    for key in own:
        names = (layout.rename(key), layout.rename(key.replace(".branches.0.", ".")))
        ours.update({name: key for name in names if name in state})
    renamed = {ours.get(name, name): value for name, value in state.items()}
    # A layer on a pooled map may be a 1x1 convolution there.
    matrices = {key for key in own if own[key].ndim == 2}
    return {k: v.flatten(1) if k in matrices and v.ndim == 4 else v for k, v in renamed.items()}


def _silent_branches(own: State, state: State) -> State:
    """Return the entries of `own` in branches that `state` lacks wholly, with gain and bias 0.

    A layer of which `state` does not even have branch 0 is missing, not plain.
    """
    held = {match.expand(r"\1.\2") for match in map(_BRANCH.fullmatch, state) if match}
    silent = {}
    for key, value in own.items():
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
    form: Reparam | None = None,
) -> None:
    """Load `state` into `model` if all names and shapes agree.

    Else raises UserError with the keys that differ; `name` (the model) and `origin` (a file) stand
    in it. What `state` lacks may come from `spare`; `form` is that of the network it comes from,
    where its own names do not tell. Counters of batch norms (`num_batches_tracked`) may be missing:
    not all trainers store them, and only a batch norm without momentum reads them.
    """
    own = model.state_dict()
    counters = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
    complete = {**counters, **spare, **state}
    found = mismatch(own, complete)
    if not any(found.values()):
        model.load_state_dict(complete)
        return
    missing, unexpected, reshaped = found.values()
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in reshaped]
    parts = [
        f"{len(keys)} {what} ({_first(keys)})"
        for what, keys in zip(found, (missing, unexpected, shapes), strict=True)
        if keys
    ]
    hint = ""
    if not missing and not unexpected:
        hint = _hint_for_shapes(own, state, reshaped)
    elif not reshaped and (form := form or _form(state)) not in (None, _form(own)):
        hint = f" The file has {_spell(form)}."
    raise UserError(f"{origin} does not fit {name}: {'; '.join(parts)}.{hint}")


def mismatch(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the keys in which `state` differs from `own`, a model's state dict, by what is wrong.

    "missing", "unexpected" and "of another shape", in this order, each possibly empty.
    """
    return {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [k for k in own if k in state and own[k].shape != state[k].shape],
    }


def _hint_for_shapes(own: State, state: Mapping[str, Tensor], reshaped: list[str]) -> str:
    """Say which setting the weights belong to, where only the classes or the channels differ."""
    if all(key.startswith("classifier.") for key in reshaped):
        given, wanted = (len(s["classifier.bias"]) for s in (state, own))
        return (
            f" It has {given} classes, the model {wanted}: use data of {given} classes "
            f"(num_classes={given}) or other weights."
        )
    if all(key.startswith("stem.") for key in reshaped):
        given, wanted = (s[reshaped[0]].shape[1] for s in (state, own))
        return (
            f" It takes {given} channels, the model {wanted}: use data.in_chans={given} "
            f"(in_chans={given}) or other weights."
        )
    return ""


def _first(texts: list[str], limit: int = 6) -> str:
    more = f", and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _form(state: Mapping[str, Tensor]) -> Reparam | None:
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
    return Reparam(
        branches=len(names - {"scale", "identity"}),
        scale="scale" in names,
        identity="identity" in names,
        pointwise=1 in in_blocks,
        depthwise=bool(in_blocks - {1}),
        stem="stem" in rich,
    )


def _spell(form: Reparam) -> str:
    settings = form.model_dump(exclude={"engine"})
    return " ".join(f"reparam.{name}={str(value).lower()}" for name, value in settings.items())


def export_state(model: Student, library: str) -> tuple[str, State]:
    """Return the name of a student's network in `library`, timm or torchvision, and its weights.

    GhostNetV3 in the training form of reparam=full is timm's `ghostnetv3_*`. The fused form becomes
    the plain network, whose batch norms then are identities plus the bias; the plain training form
    (reparam=none) keeps its own. The state dict is on the CPU and loads strictly:
    `timm.create_model(name, num_classes=K, in_chans=C, checkpoint_path=FILE)`, or
    `load_state_dict` of `torchvision.models.get_model(name, num_classes=K)`.

    Raises UserError where `library` has no such network.
    """
    own = model.state_dict()
    layout, name = _counterpart(model, own, library)
    if detect(own).dialect == "fused":
        own = _with_identity_norms(own)
    elif layout.form == PLAIN:
        own = {key.replace(".branches.0.", "."): value for key, value in own.items()}
    shaped = {k: v[:, :, None, None] if _MATRIX.fullmatch(k) else v for k, v in own.items()}
    return name, {layout.rename(key): value.cpu().contiguous() for key, value in shaped.items()}


def _counterpart(model: Student, own: State, library: str) -> tuple[Layout, str]:
    """Return the layout and the name of a student's network in `library`; UserError if none."""
    here, form, width = detect(own), _form(own) or PLAIN, model.name.rpartition("_")[2]
    written = [layout for layout in LAYOUTS if layout.networks and layout.family == here.family]
    layouts = [layout for layout in written if layout.dialect == library]
    if not layouts:
        known = " or ".join(sorted({layout.dialect for layout in written}))
        raise UserError(f"{library!r} has no network for {model.name}: choose {known}.")
    if not any(width in la.networks for la in layouts):
        known = ", ".join(sorted({name for la in layouts for name in la.networks.values()}))
        also = sorted({la.dialect for la in written if width in la.networks})
        hint = f"; choose {' or '.join(also)}" if also else ""
        raise UserError(
            f"{library} has no network of the width of {model.name}, only {known}{hint}."
        )
    layout = next((la for la in layouts if la.form == form and width in la.networks), None)
    if layout is None:
        shown = "fused" if here.dialect == "fused" else _spell(form)
        forms = {True: "with reparam=full", False: "fused or with reparam=none"}
        offers = [f"{', '.join(la.networks.values())} {forms[la.form == FULL]}" for la in layouts]
        raise UserError(
            f"{library} has no network for {model.name} in this form ({shown}), only for "
            f"{', and '.join(offers)}; ghosttrain.fuse(model) fuses."
        )
    name = layout.networks[width]
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    if stem.stride == (1, 1):
        raise UserError(
            f"This {model.name} has input_stride=small, but the stem of {library}'s {name} halves "
            "the image: only input_stride=standard can be written."
        )
    if library == "torchvision" and model.in_chans != 3:
        raise UserError(
            f"This {model.name} takes images of {model.in_chans} channels, torchvision's {name} "
            "of 3: only data.in_chans=3 (in_chans=3) can be written."
        )
    return layout, name


def _with_identity_norms(fused: State) -> State:
    """Return a fused state dict as that of the plain form: its biases are those of batch norms.

    A batch norm with running mean 0, variance 1 and weight sqrt(1 + eps) adds its bias.
    """
    state = {}
    for key, value in fused.items():
        path, _, leaf = key.rpartition(".")
        if fused[f"{path}.weight"].ndim == 2:  # an ordinary linear layer
            state[key] = value
        elif leaf == "weight":
            state[f"{path}.conv.weight"] = value
        else:
            state[f"{path}.bn.weight"] = torch.full_like(value, (1 + EPS) ** 0.5)
            state[f"{path}.bn.bias"] = value
            state[f"{path}.bn.running_mean"] = torch.zeros_like(value)
            state[f"{path}.bn.running_var"] = torch.ones_like(value)
            state[f"{path}.bn.num_batches_tracked"] = torch.zeros((), dtype=torch.long)
    return state
