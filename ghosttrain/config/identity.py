"""What a run is: its settings by dotted name, their hash, and the name of its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from ghosttrain.config.schema import Config, Use
from ghosttrain.errors import UserError
from ghosttrain.text import has_controls

LONGEST = 220
"""Bytes of a folder's name: file systems take 255, `run.fresh` adds a time to it."""
MOVED = re.compile(r"\.moved-\d{8}-\d{6}$")
"""How the name of a run folder ends that `run.fresh` moved aside."""


def run_name(config: Config) -> str:
    """`<recipe>/<data>-<model>[-mixup]-<hash of what changes the result>-s<seed>`: the run folder
    under run.root.
    """
    if config.run.name is not None:
        return config.run.name
    mixed = "-mixup" if config.augment.mixup_alpha or config.augment.cutmix_alpha else ""
    recipe = config.recipe.replace("ablation/", "").replace("/", ".")
    label = f"{config.data.name}-{config.model.name.replace('/', '.')}{mixed}"
    return f"{recipe}/{label}-{settings_hash(config)}-s{config.seed}"


def validate_run_name(config: Config) -> None:
    """Refuse names that cannot be a run folder below `run.root`.

    Raises:
        UserError: naming what is wrong with `run.name`, or with the name derived in its place.
    """
    name = run_name(config)
    fault = _fault_of(name)
    if fault is None:
        return
    given = f"run.name={name!r}"
    if config.run.name is None:
        given = f"the name of the run folder, {name!r} (of recipe, data and model.name),"
    raise UserError(f"{given} {fault}; type run.name=NAME, a folder below run.root")


def _fault_of(name: str) -> str | None:
    """Return why `name` cannot be a run folder; None: it can."""
    parts = name.split("/")
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return "is not UTF-8"
    if fault := fault_below(name):
        return fault
    if not name.isprintable():
        return "holds characters that cannot be printed"
    if any(part.startswith(".") for part in parts):
        return "begins with a dot, as folders do that belong to no run"
    if any(MOVED.search(part) for part in parts):
        return "ends as the names of runs do that were moved aside"
    if longest > LONGEST:
        return f"is longer than {LONGEST} bytes"
    return None


def fault_below(name: str) -> str | None:
    """Return why `name` leads to nothing below the folder that it is to be in; None: it does."""
    parts = name.split("/")
    if not name.strip():
        return "is empty"
    if has_controls(name):
        return "holds characters that cannot be printed"
    if parts[0] in ("", "~"):
        return "is absolute"
    if any(part in ("", ".", "..") for part in parts):
        return "names no folder of its own"
    return None


def settings_hash(config: Config) -> str:
    """Hash (8 hex digits) of every setting that can change the result, except the seed.

    A setting at its schema default does not enter it: adding one to the schema leaves the folders
    of earlier runs where they are.
    """
    return _short(result_settings(config, exclude_defaults=True))


def typed_hash(config: Config, words: Sequence[str]) -> str:
    """Hash the same settings with paths as they were typed: what does not change where images and
    weights are not on this machine.

    Args:
        config: as composed, without digests.
        words: the command line.
    """
    settings = result_settings(config, exclude_defaults=True)
    typed = dict(word.lstrip("+").partition("=")[::2] for word in words)
    if "budget" in typed:  # not the one that the number of images chose
        settings["budget"] = typed["budget"]
    if "teacher.run" in typed:  # composed, it is the teacher's weights
        typed["teacher.weights"] = typed["teacher.run"]
    return _short(settings | {key: typed[key] for key in settings if _digest(key) and key in typed})


def _short(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def knows_all_paths(config: Config) -> bool:
    """Whether a digest stands for every path of the settings."""
    flat = flatten(config.model_dump(mode="json"))
    digests = {key: _digest(key) for key, value in flat.items() if value is not None}
    return all(flat[digest] for digest in digests.values() if digest in flat)


DIGESTS = {"root": "digest", "table": "digest", "dir": "digest", "weights": "weights_digest"}
"""Last part of a setting that is a path -> that of the setting which stands for it, once known."""


def result_settings(config: Config, exclude_defaults: bool = False) -> dict[str, Any]:
    """Dotted name -> value of every setting that can change the result, except the seed. In the
    place of a path stands the digest of what lies there, where it is known.
    """
    flat = flatten(config.model_dump(mode="json", exclude_defaults=exclude_defaults))
    known = {key for key, value in flat.items() if value is not None}
    left_out = {key for key in flat if key in ("seed", "recipe") or changeable(key, "run")}
    left_out |= {key for key in flat if _digest(key) in known}
    return {key: value for key, value in flat.items() if key not in left_out}


def _digest(key: str) -> str | None:
    """Return the setting that stands for the path `key`; None where `key` is none."""
    section, _, name = key.rpartition(".")
    return f"{section}.{DIGESTS[name]}" if name in DIGESTS else None


def run_settings(config: Config) -> dict[str, Any]:
    """Dotted name -> value of every setting that can change the result, and the seed: what a run
    is.
    """
    return {**result_settings(config), "seed": config.seed}


def changeable(key: str, use: Use) -> bool:
    """Whether a setting, by its dotted name, may differ for this use of what exists
    (`schema.may_change`).
    """
    field = field_of(key)
    extra = field.json_schema_extra if field else None
    return isinstance(extra, dict) and use in extra.get("may_change", ())  # type: ignore[operator]


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


def listed_values(key: str) -> list[str]:
    """Return the values that a setting takes, where there are few: words, or true and false."""
    field = field_of(key)
    values: list[str] = []
    for kind in (field.annotation, *get_args(field.annotation)) if field else ():
        if get_origin(kind) is Literal:
            values += map(str, get_args(kind))
        elif kind is bool:
            values += ["true", "false"]
        elif kind is type(None):
            values.append("null")
    return list(dict.fromkeys(values))


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
