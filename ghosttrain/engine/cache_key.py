"""What a cached output depends on: the key that ties a cache to teacher, data, policy, versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from ghosttrain.config import schema
from ghosttrain.config.schema import Config
from ghosttrain.data import augment
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.decode import jpeg_decoder
from ghosttrain.distill.cache import TeacherCache
from ghosttrain.errors import UserError
from ghosttrain.models.weights import sources
from ghosttrain.text import listed

# What the first caches name. A setting that came later is named only where it is not at its
# default, so that a cache from before it still serves.
_AUGMENT = {
    "policy",
    "seed",
    "scale_min",
    "scale_max",
    "ratio_min",
    "ratio_max",
    "operations",
    "randaugment_ops",
    "randaugment_magnitude",
    "randaugment_std",
    "jitter",
    "erasing_prob",
    "mixup_alpha",
    "cutmix_alpha",
}


def cache_key(config: Config, train_set: Dataset) -> dict[str, Any]:
    """Return everything that a cached output depends on, by name, as JSON values.

    The weights are a digest of their file, or `absent`. What their file says about itself counts
    like settings that say the same.
    """
    cfg, data = config.teacher, config.data
    decisive = {"name", "input_size", "mean", "std", "weight"}
    classes, decoder = json.dumps(train_set.classes), jpeg_decoder(data.decoder)
    return {
        "teacher": {
            name: completed(member).model_dump(mode="json", include=decisive)
            | {"weights": network_digest(member) or absent(member)}
            for name, member in cfg.networks.items()
        },
        "teacher.average": cfg.average if len(cfg.members) > 1 else "",
        "teacher.dtype": cfg.dtype,
        "classes": f"{len(train_set.classes)}, {hashlib.sha256(classes.encode()).hexdigest()}",
        "augment": config.augment.model_dump(
            mode="json", include={"policy"} if config.augment.policy == "none" else _AUGMENT
        )
        | config.augment.model_dump(mode="json", exclude=_AUGMENT, exclude_defaults=True),
        "data": data.model_dump(
            mode="json",
            include={
                "train_size",
                "interpolation",
                "in_chans",
                "bit_depth",
                "mean",
                "std",
                "flip",
            },
        )
        | data.model_dump(
            mode="json",
            exclude_defaults=True,
            include={"orientation", "background"},
        ),
        "images": train_set.content_digest(),
        "versions": {
            "augmentation": augment.VERSION,
            "jpeg": f"{decoder} {_minor(decoder)}",
            **{name: _minor(name) for name in ("pillow", "torch", "timm")},
        },
    }


def absent(network: schema.PretrainedConfig) -> str:
    """Return what stands for the digest of weights that are not on this machine."""
    return f"not on this machine: {network.weights}"


def _minor(package: str) -> str:
    """Return the version of a package without its patch level."""
    return ".".join(metadata.version(package).split(".")[:2])


def validate_key(cache: TeacherCache, key: Mapping[str, Any]) -> None:
    """Raise UserError, naming what differs, unless the cache was made for `key`.

    A file of weights may be absent from this machine. It counts as the one that the cache was made
    with if the settings name it alike; what it says about itself is then read from the cache.
    """
    networks = {}
    for name, network in key["teacher"].items():
        old = cache.info.key["teacher"].get(name, {})
        if network["weights"] == cache.info.notes["absent"].get(name):
            unknown = ["weights", *cache.info.notes.get("left_open", {}).get(name, ())]
            unknown = [field for field in unknown if field == "weights" or network[field] is None]
            network = network | {field: old.get(field) for field in unknown}
        networks[name] = network
    key = {**key, "teacher": networks}
    lines = cache.difference(key)
    if lines:
        raise UserError(
            f"cache.dir={cache.folder} was stored for something else "
            f"({listed(lines, 4, joiner='; ')}): type the settings it was stored with, or store "
            "anew in another cache.dir"
        )


def loss_note(config: Config) -> str:
    """Return the loss whose gradient decides what a codec is worth."""
    return f"distill={config.distill.name} at T = {config.distill.temperature}"


def network_digest(cfg: schema.PretrainedConfig) -> str | None:
    """Return the SHA-256 of the file of weights; None where it is not on this machine."""
    return sources.weights_digest(cfg.weights, cfg.name) if cfg.weights else None


def completed(cfg: schema.PretrainedConfig) -> schema.PretrainedConfig:
    """Return the settings with what they leave open filled in from what the file says itself.

    Unchanged where it says nothing or is not on this machine.
    """
    if cfg.weights is None:
        return cfg
    try:
        about = sources.about_weights(cfg.weights)
    except UserError:
        return cfg
    return cfg.model_copy(update={field: getattr(about, field) for field in left_open(cfg)})


def left_open(cfg: schema.PretrainedConfig) -> list[str]:
    """Return which settings of a network are left to what its file, or timm, says."""
    return [f for f in ("name", "input_size", "mean", "std") if getattr(cfg, f) is None]
