"""State-dict dialects: read a file of weights, tell who wrote it, translate names, load what fits.

Dialects: `ghosttrain` (training form, any number of branches), `fused` (the output of `fuse`) and
`timm` (its `ghostnetv3_*` and, for the plain form, `ghostnetv2_*`). Owns names and shapes, no
algebra.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ghosttrain.config.errors import UserError
from ghosttrain.models.layers import Student

Dialect = Literal["ghosttrain", "fused", "timm", "unknown"]
State = dict[str, Tensor]

# Where trainers keep the weights, best first: EMA weights are the ones that are meant to be used.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What DistributedDataParallel and torch.compile put in front of every name.
PREFIXES = ("module.", "_orig_mod.")

# Module paths here and in timm. S stage, B block, G ghost1 or ghost2, N branch: any one segment.
_SHARED = {
    "stem.conv": "conv_stem",
    "stem.bn": "bn1",
    "stages.S.B.ghost1.attention.0.conv": "blocks.S.B.ghost1.short_conv.0",
    "stages.S.B.ghost1.attention.0.bn": "blocks.S.B.ghost1.short_conv.1",
    "stages.S.B.ghost1.attention.1.conv": "blocks.S.B.ghost1.short_conv.2",
    "stages.S.B.ghost1.attention.1.bn": "blocks.S.B.ghost1.short_conv.3",
    "stages.S.B.ghost1.attention.2.conv": "blocks.S.B.ghost1.short_conv.4",
    "stages.S.B.ghost1.attention.2.bn": "blocks.S.B.ghost1.short_conv.5",
    "stages.S.B.se.reduce": "blocks.S.B.se.conv_reduce",
    "stages.S.B.se.expand": "blocks.S.B.se.conv_expand",
    "stages.S.B.shortcut.0.conv": "blocks.S.B.shortcut.0",
    "stages.S.B.shortcut.0.bn": "blocks.S.B.shortcut.1",
    "stages.S.B.shortcut.1.conv": "blocks.S.B.shortcut.2",
    "stages.S.B.shortcut.1.bn": "blocks.S.B.shortcut.3",
    "last.conv": "blocks.9.0.conv",
    "last.bn": "blocks.9.0.bn1",
    "head": "conv_head",
    "classifier": "classifier",
}
_BRANCHED = {
    "stages.S.B.G.primary.branches.N.conv": "blocks.S.B.G.primary_rpr_conv.N.conv",
    "stages.S.B.G.primary.branches.N.bn": "blocks.S.B.G.primary_rpr_conv.N.bn1",
    "stages.S.B.G.cheap.branches.N.conv": "blocks.S.B.G.cheap_rpr_conv.N.conv",
    "stages.S.B.G.cheap.branches.N.bn": "blocks.S.B.G.cheap_rpr_conv.N.bn1",
    "stages.S.B.G.cheap.scale.conv": "blocks.S.B.G.cheap_rpr_scale.conv",
    "stages.S.B.G.cheap.scale.bn": "blocks.S.B.G.cheap_rpr_scale.bn1",
    "stages.S.B.G.cheap.identity": "blocks.S.B.G.cheap_rpr_skip",
    "stages.S.B.depthwise.branches.N.conv": "blocks.S.B.dw_rpr_conv.N.conv",
    "stages.S.B.depthwise.branches.N.bn": "blocks.S.B.dw_rpr_conv.N.bn1",
    "stages.S.B.depthwise.scale.conv": "blocks.S.B.dw_rpr_scale.conv",
    "stages.S.B.depthwise.scale.bn": "blocks.S.B.dw_rpr_scale.bn1",
}
_PLAIN = {
    "stages.S.B.G.primary.branches.0.conv": "blocks.S.B.G.primary_conv.0",
    "stages.S.B.G.primary.branches.0.bn": "blocks.S.B.G.primary_conv.1",
    "stages.S.B.G.cheap.branches.0.conv": "blocks.S.B.G.cheap_operation.0",
    "stages.S.B.G.cheap.branches.0.bn": "blocks.S.B.G.cheap_operation.1",
    "stages.S.B.depthwise.branches.0.conv": "blocks.S.B.conv_dw",
    "stages.S.B.depthwise.branches.0.bn": "blocks.S.B.bn_dw",
}
# Layers on pooled maps: a matrix here, a 1x1 convolution in timm.
_MATRIX = re.compile(r"(head|.*\.se\.(reduce|expand))\.weight")


def read_state(path: str | Path) -> State:
    """Return the tensors of a `.safetensors` or torch file, on the CPU, by bare parameter name.

    Torch files are read with `weights_only=True` (`argparse.Namespace`, in which trainers store
    their settings beside the weights, is allowed). `WRAPPERS` are opened, `PREFIXES` removed.
    Raises UserError where there is no such file, or no weights in it.
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
    state: State = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    state.pop("n_averaged", None)  # the update counter of torch.optim.swa_utils.AveragedModel
    if not state:
        raise UserError(
            f"Weights {str(path)!r} hold no state dict: there is no tensor in the file."
        )
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return content if isinstance(content, Mapping) else {}


def detect(state: Mapping[str, Tensor]) -> Dialect:
    """Return the dialect in which the names of a student's state dict are written."""
    if "conv_stem.weight" in state:
        return "timm"
    if "stem.conv.weight" in state:
        return "ghosttrain"
    if "stem.bias" in state:
        return "fused"
    return "unknown"


def from_timm(state: Mapping[str, Tensor]) -> State:
    """Translate a state dict of timm's `ghostnetv3_*` or `ghostnetv2_*` to ours.

    Names that neither has stay as they are, so that `fit_state` reports them.
    """
    tables = (_SHARED, _BRANCHED, _PLAIN)
    renamed = _rename(state, [(timm, ours) for table in tables for ours, timm in table.items()])
    return {k: v.flatten(1) if _MATRIX.fullmatch(k) else v for k, v in renamed.items()}


def to_timm(state: Mapping[str, Tensor]) -> State:
    """Translate our training form to a state dict of timm.

    3 branches with scale and identity become `ghostnetv3_*`, the plain form `ghostnetv2_*`. Raises
    UserError for any other form: timm has no network for it.
    """
    form = _form(state)
    if form not in ((3, True, True), (1, False, False)):
        raise UserError(
            "timm has GhostNetV3 with reparam.branches=3 reparam.scale=true reparam.identity=true, "
            f"and the plain network; these weights have {_spell(form)}."
        )
    shaped = {k: v[:, :, None, None] if _MATRIX.fullmatch(k) else v for k, v in state.items()}
    table = _BRANCHED if form == (3, True, True) else _PLAIN
    return _rename(shaped, [*_SHARED.items(), *table.items()])


def load_state(model: Student, state: Mapping[str, Tensor], origin: str) -> Dialect:
    """Load a state dict of any dialect into a student of the same form; return the dialect.

    Raises UserError, naming `origin` (a file) and what does not fit, as `fit_state` does.
    """
    dialect = detect(state)
    if dialect == "fused" and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        raise UserError(
            f"{origin} holds fused weights, without batch norms: they fit the fused form only, "
            f"create_model({model.name!r}, fused=True, weights=...)."
        )
    fit_state(model, from_timm(state) if dialect == "timm" else state, model.name, origin)
    return dialect


def fit_state(model: nn.Module, state: Mapping[str, Tensor], name: str, origin: str) -> None:
    """Load `state` into `model` if all names and shapes agree.

    Else raises UserError with the keys that differ; `name` (the model) and `origin` (a file) stand
    in it. Counters of batch norms (`num_batches_tracked`) may be missing: not all trainers store
    them, and only a batch norm without momentum reads them.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    reshaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    if not missing and not unexpected and not reshaped:
        model.load_state_dict(dict(state), strict=False)
        return
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in reshaped]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    parts = [f"{len(keys)} {what} ({_first(keys)})" for what, keys in found.items() if keys]
    hint = ""
    if not missing and not unexpected:
        hint = _hint_for_shapes(own, state, reshaped)
    elif not reshaped and _form(own) != _form(state):
        hint = f" The file has {_spell(_form(state))}."
    raise UserError(f"{origin} does not fit {name}: {'; '.join(parts)}.{hint}")


def _hint_for_shapes(own: State, state: Mapping[str, Tensor], reshaped: list[str]) -> str:
    """Say which setting the weights belong to, where only the classes or the channels differ."""
    if all(key.startswith("classifier.") for key in reshaped):
        given, wanted = (len(s["classifier.bias"]) for s in (state, own))
        return (
            f" It has {given} classes, the model {wanted}: use data of {given} classes "
            f"(num_classes={given}) or other weights."
        )
    if reshaped in (["stem.conv.weight"], ["stem.weight"]):
        given, wanted = (s[reshaped[0]].shape[1] for s in (state, own))
        return (
            f" It takes {given} channels, the model {wanted}: use data.in_chans={given} "
            f"(in_chans={given}) or other weights."
        )
    return ""


def _first(texts: list[str], limit: int = 6) -> str:
    more = f", and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _form(state: Mapping[str, Tensor]) -> tuple[int, bool, bool]:
    """Branches, scale and identity of the re-parameterized convolutions in our training form."""
    numbers = {int(n) for key in state for n in re.findall(r"\.branches\.(\d+)\.", key)}
    has_scale, has_identity = (any(p in key for key in state) for p in (".scale.", ".identity."))
    return max(numbers, default=-1) + 1, has_scale, has_identity


def _spell(form: tuple[int, bool, bool]) -> str:
    names = ("branches", "scale", "identity")
    return " ".join(f"reparam.{n}={str(v).lower()}" for n, v in zip(names, form, strict=True))


def _rename(state: Mapping[str, Tensor], pairs: Iterable[tuple[str, str]]) -> State:
    """Replace module paths by (old, new) patterns whose single capital letters match a segment."""
    letter = re.compile(r"\b([A-Z])\b")
    rules = [
        (re.compile(letter.sub(r"(?P<\1>\\w+)", re.escape(old))), letter.sub(r"\\g<\1>", new))
        for old, new in pairs
    ]

    def rename(key: str) -> str:
        path, _, leaf = key.rpartition(".")
        matches = ((pattern.fullmatch(path), new) for pattern, new in rules)
        renamed = next((match.expand(new) for match, new in matches if match), path)
        return f"{renamed}.{leaf}"

    return {rename(key): value for key, value in state.items()}
