"""What a run is: its settings by dotted name, their hash, and the name of its folder."""

from __future__ import annotations

import hashlib
import json
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

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
    """Hash (8 hex digits) of every setting that can change the result, except the seed.

    A setting at its schema default does not enter it: adding one to the schema leaves the folders
    of earlier runs where they are.
    """
    text = json.dumps(result_settings(config, exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def result_settings(config: Config, exclude_defaults: bool = False) -> dict[str, Any]:
    """Dotted name -> value of every setting that can change the result, except the seed."""
    tree = config.model_dump(mode="json", exclude_defaults=exclude_defaults)
    return {
        key: value
        for key, value in flatten(tree).items()
        if key not in ("seed", "recipe") and not _result_neutral(key)
    }


def _result_neutral(key: str) -> bool:
    field = field_of(key)
    extra = field.json_schema_extra if field else None
    return isinstance(extra, dict) and bool(extra.get("result_neutral"))


def field_of(key: str) -> FieldInfo | None:
    """Return the schema's field behind `optim.lr` or `teacher.members.ANY.weight`; None if there is
    none.
    """
    kind: Any = Config
    field: FieldInfo | None = None
    for part in key.split("."):
        if get_origin(kind) is dict:  # `part` is a name of the user's choice, not a field
            kind, field = get_args(kind)[1], None
            continue
        field = getattr(kind, "model_fields", {}).get(part)
        if field is None:
            return None
        kind = field.annotation
    return field


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn `{"optim": {"lr": 1}}` into `{"optim.lr": 1}`; an empty dictionary stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
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
