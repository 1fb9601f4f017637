"""What a run is: its settings by dotted name, their hash, and the name of its folder."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ghosttrain.config.schema import Config


def run_name(config: Config) -> str:
    """`<recipe>/<data>-<model>[-mixup]-<hash of what changes the result>-s<seed>`: the run folder
    under run.root.
    """
    if config.run.name:
        return config.run.name
    mixed = "-mixup" if config.augment.mixup_alpha or config.augment.cutmix_alpha else ""
    recipe = config.recipe.replace("ablation/", "").replace("/", ".")
    label = f"{config.data.name}-{config.model.name.replace('/', '.')}{mixed}"
    return f"{recipe}/{label}-{fingerprint(config)}-s{config.seed}"


def fingerprint(config: Config) -> str:
    """Hash (8 hex digits) of every setting that can change the result, except the seed."""
    text = json.dumps(result_settings(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def result_settings(config: Config) -> dict[str, Any]:
    """Dotted name -> value of every setting that can change the result, except the seed."""
    flat = {}
    for key, value in flatten(config.model_dump(mode="json")).items():
        section, _, name = key.rpartition(".")
        model = type(getattr(config, section)) if section else Config
        extra = model.model_fields[name].json_schema_extra
        if not (isinstance(extra, dict) and extra.get("result_neutral")) and key not in (
            "seed",
            "recipe",
        ):
            flat[key] = value
    return flat


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn `{"optim": {"lr": 1}}` into `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Turn `{"optim.lr": 1}` into `{"optim": {"lr": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree
