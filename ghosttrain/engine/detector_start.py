"""What a detector takes from `model.weights` beside its backbone: all of a run of detection, where
that is a detector of the same kind.

Shapes: A anchors of a place of the map, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from ghosttrain.config.schema import Config
from ghosttrain.models.weights.files import WeightsInfo, read_file
from ghosttrain.models.weights.fit import fit_state
from ghosttrain.models.weights.sources import about_weights, weights_path
from ghosttrain.text import listed

CLASS_PREDICTOR = re.compile(
    r"head\.classification_head\.(module_list\.\d+\.1|cls_logits)\.(weight|bias)"
)
"""The parameters of torchvision's SSDLite and RetinaNet whose shape depends on the number of
classes: (A * (K + 1), ...), the background's first."""


def same_kind(config: Config) -> WeightsInfo | None:
    """Return what is known of `model.weights` where they are of a detector of the name, channels
    and backbone that `config` has; else None.

    Raises:
        UserError: the file is not there or damaged.
    """
    if not config.model.weights:
        return None
    about = about_weights(config.model.weights)
    backbone = (config.model.source, config.model.name)
    same = about.detector == config.detector.model_dump(mode="json")
    return about if same and (about.source, about.name) == backbone else None


def load_the_rest(
    detector: nn.Module, config: Config, about: WeightsInfo, classes: Sequence[str], backbone: str
) -> str:
    """Load the weights of a detector of the same kind, its class predictor where it is of the same
    classes; return a note about that.

    A student's backbone is left as it is: it was loaded as any student is, with the branches that
    the file lacks.

    Args:
        detector: gets them.
        config: all settings.
        about: what the file says.
        classes: names of the K classes, in the order of the labels.
        backbone: where the backbone stands in the detector.

    Raises:
        UserError: naming the parameters that do not fit.
    """
    origin = f"model.weights={config.model.weights}"
    path = weights_path(str(config.model.weights), None, "model.weights")
    state, own = read_file(path, origin).state, detector.state_dict()
    if config.model.source == "ghosttrain":
        own_backbone = {key: value for key, value in own.items() if key.startswith(f"{backbone}.")}
        rest = {k: v for k, v in state.items() if not k.startswith(f"{backbone}.")}
        state = {**rest, **own_backbone}
    known = list(about.classes or ())
    predictor = [key for key in own if CLASS_PREDICTOR.fullmatch(key)]
    note = f"the whole {config.detector.name}"
    if {*known} != {*classes}:
        state = {**state, **{key: own[key] for key in predictor}}
        note = f"all but the class predictor, of {listed(known)}; one of {listed(classes)} starts "
        note += "anew"
    elif known != list(classes):
        rows = [0, *(known.index(name) + 1 for name in classes)]
        state = {**state, **{key: _in_order(state[key], rows) for key in predictor}}
        note += ", its classes in the order of the data's"
    fit_state(detector, state, f"{config.detector.name} on {config.model.name}", origin)
    return note


def _in_order(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Return a parameter (A * (K + 1), ...) with the classes of every anchor in another order."""
    return value.unflatten(0, (-1, len(rows)))[:, list(rows)].flatten(0, 1)
