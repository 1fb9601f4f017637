"""Weights that another library can load: timm's and torchvision's networks of the same name."""

from __future__ import annotations

import re

import torch
from torch import nn

from ghosttrain.config.schema import FULL, PLAIN
from ghosttrain.errors import UserError
from ghosttrain.models.layers import Student
from ghosttrain.models.weights.dialects import Layout, detect, foreign_layouts
from ghosttrain.models.weights.files import State
from ghosttrain.models.weights.fit import EPS, branches_of, spelled

# Layers on pooled maps: a matrix here, a 1x1 convolution in timm.
_MATRIX = re.compile(r"(head|.*\.se\.(reduce|expand))\.weight")


def export_state(model: Student, library: str) -> tuple[str, State]:
    """Return the name of a student's network in `library`, timm or torchvision, and its weights.

    GhostNetV3 in the training form of reparam=full is timm's `ghostnetv3_*`. The fused form becomes
    the plain network, whose batch norms then are identities plus the bias; the plain training form
    (reparam=none) keeps its own. The state dict is on the CPU and loads strictly:
    `timm.create_model(name, num_classes=K, in_chans=C, checkpoint_path=FILE)`, or
    `load_state_dict` of `torchvision.models.get_model(name, num_classes=K)`.

    Raises UserError where `library` has no such network.
    """
    model_state = model.state_dict()
    layout, name = _counterpart(model, model_state, library)
    if detect(model_state).dialect == "fused":
        model_state = _with_identity_norms(model_state)
    elif layout.reparam == PLAIN:
        model_state = {
            key.replace(".branches.0.", "."): value for key, value in model_state.items()
        }
    shaped = {k: v[:, :, None, None] if _MATRIX.fullmatch(k) else v for k, v in model_state.items()}
    return name, {layout.rename(key): value.cpu().contiguous() for key, value in shaped.items()}


def _counterpart(model: Student, model_state: State, library: str) -> tuple[Layout, str]:
    """Return the layout and the name of a student's network in `library`; UserError if none."""
    ours, reparam, width = (
        detect(model_state),
        branches_of(model_state) or PLAIN,
        model.name.rpartition("_")[2],
    )
    written = [
        layout for layout in foreign_layouts() if layout.networks and layout.family == ours.family
    ]
    layouts = [layout for layout in written if layout.dialect == library]
    if not layouts:
        known = " or ".join(sorted({layout.dialect for layout in written}))
        choose = f": choose {known}" if known else ", and no other library has one"
        raise UserError(f"{library!r} has no network for {model.name}{choose}.")
    if not any(width in la.networks for la in layouts):
        known = ", ".join(sorted({name for la in layouts for name in la.networks.values()}))
        others = sorted({la.dialect for la in written if width in la.networks})
        hint = f"; choose {' or '.join(others)}" if others else ""
        raise UserError(
            f"{library} has no network of the width of {model.name}, only {known}{hint}."
        )
    layout = next((la for la in layouts if la.reparam == reparam and width in la.networks), None)
    if layout is None:
        shown = "fused" if ours.dialect == "fused" else spelled(reparam)
        forms = {True: "with reparam=full", False: "fused or with reparam=none"}
        offers = [
            f"{', '.join(la.networks.values())} {forms[la.reparam == FULL]}" for la in layouts
        ]
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
