"""conf/ + recipes/ + the command line -> one frozen `Config`.

Order, weakest first: schema defaults, groups (conf/), base recipe, budget of the data, ablation
recipes, command line. Recipes and budgets are read here as *layers* (group choices + values),
merged in that order, and handed to Hydra as one node between the groups and the command line;
everything after this module sees plain typed data.

A recipe that chooses a file of a group (`override /optim: lamb`) writes its values of that group
(the learning rate) for that file: when a stronger layer chooses another one (`optim=sgd`), they go
with it.

This module imports no torch: a mistake in the command costs the user half a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ghosttrain import ranks
from ghosttrain.config.detection import validate_detection
from ghosttrain.config.distillation import validate_cache_settings, validate_loss, validate_teacher
from ghosttrain.config.identity import changeable, field_of, flatten, unflatten, validate_run_name
from ghosttrain.config.names import (
    KEYS,
    MEMBERS,
    NAME_A_MEMBER,
    Layer,
    Names,
    merged,
    merged_layer,
    parse_override,
    settings_near,
)
from ghosttrain.config.normalization import validate_normalization
from ghosttrain.config.policy import validate_policy
from ghosttrain.config.schema import (
    BOX_DATA,
    EMBEDDED_DATA,
    FULL,
    NAMED_SOURCES,
    PLAIN,
    STUDENT_SOURCES,
    Config,
    DataConfig,
    Use,
)
from ghosttrain.config.students import STUDENTS, validate_drop_path, validate_sides
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import expanded, no_file, resolved
from ghosttrain.text import one_line


@dataclass(frozen=True)
class Composed:
    """A checked configuration and what the user should hear about how it came about."""

    config: Config
    replaced: tuple[str, ...]
    """Every recipe value that the budget replaced: `train.epochs: 600 -> 30`."""
    groups: dict[str, str]
    """Group -> chosen file, for the card of the run."""
    arguments: tuple[str, ...]
    """The command line again, for processes that this run starts."""
    hydra_overrides: tuple[str, ...]
    """The overrides Hydra saw: what `--info` needs to show the same composition."""
    free: frozenset[str] = frozenset()
    """Settings that neither the command line nor a recipe nor a budget names: weights to start from
    may say them (`identify.settled`)."""


def compose(
    overrides: Sequence[str],
    config_dir: str | None = None,
    trains: bool = True,
    needs_data: bool = True,
    needs_weights: bool = True,
) -> Composed:
    """Compose and check one run.

    Args:
        overrides: Hydra overrides without sweeps, such as `+recipe=compact_kd`, `optim.lr=1e-3`.
        config_dir: a folder of the user's own groups (`D/optim/x.yaml`) and recipes
            (`D/recipe/x.yaml`).
        trains: whether the batch must fit the processes and the student.
        needs_data: whether the images must be on this machine.
        needs_weights: whether the weights of student and teacher must be.

    Raises:
        UserError: unknown name, wrong type, missing or contradictory value; the message is one
            line.
    """
    names = Names(config_dir)
    with names.hydra():
        user = names.parse(overrides)
        user_groups = {
            o.key_or_group: str(o.value()) for o in user if o.key_or_group in names.groups
        }
        if _pick(user, "teacher.run") is not None:
            user_groups.setdefault("teacher", "run")
        recipes = names.recipes(_pick(user, "recipe"))
        bases = [layer for layer in recipes if not layer.name.startswith("ablation/")]
        ablations = [layer for layer in recipes if layer not in bases]
        defaults = Layer("defaults", names.default_groups())
        without = merged_layer("without a budget", [defaults, *bases])
        typed = Layer("typed", user_groups)
        strongest = merged_layer("strongest", [without, *ablations, typed]).groups
        choice = _pick(user, "budget") or without.values.get("budget")
        recipe = "+".join(layer.name for layer in (*bases, *ablations)) or "none"
        names_of_it = {"recipe": recipe, "budget": "full"}
        layers = [defaults, *bases, *ablations, typed]
        tree, chosen, passed = _composed(names, layers, user, names_of_it)
        before = flatten(tree) | chosen
        budget = names.budget(choice, strongest, _typed(tree).model_dump())
        # A budget picks a smaller teacher; it does not give one to a recipe that has none.
        unused = {group for group, choice in without.groups.items() if choice == "none"}
        smaller = {g: choice for g, choice in budget.groups.items() if g not in unused}
        budget = replace(budget, groups=smaller)
        if budget.groups or budget.values or budget.name != "full":
            names_of_it["budget"] = budget.name
            layers = [defaults, *bases, budget, *ablations, typed]
            tree, chosen, passed = _composed(names, layers, user, names_of_it)
        config = _with_teacher_of_run(_typed(tree), needs_weights)
    named = {o.key_or_group for o in user}
    if "optim.lr" in named and "optim.lr_batch" not in named:
        config = _replace(config, "optim", lr_batch=None)  # typed by hand: used as typed
    teacher = user_groups.get("teacher", "none")
    members = [o.key_or_group for o in user if o.key_or_group.startswith(MEMBERS)]
    asked = [f"teacher={teacher}"] if teacher != "none" else members
    if asked and config.distill.name == "none":
        raise UserError(
            f"{asked[0]} would never be asked, because distill=none; type distill=soft_ce (or kl) "
            "too"
        )
    config = _replace(config, "data", **_data_paths(config.data))
    config = _replace(config, "cache", dir=_absolute(config.cache.dir))
    _check(config, names, chosen, trains, needs_weights)
    if needs_data:
        validate_data_here(config.data)
    if (
        config.model.source != "ghosttrain"
    ):  # it has no branches: no setting of them tells runs apart
        config = config.model_copy(update={"reparam": PLAIN})
    replaced = _replaced(budget, before, flatten(tree) | chosen)
    arguments = (*overrides, *(("--config-dir", config_dir) if config_dir else ()))
    set_by = named.union(*(flatten(layer.values) for layer in layers))
    free = frozenset(KEYS) - set_by
    return Composed(config, replaced, chosen, arguments, passed, free)


def cells(
    overrides: Sequence[str], config_dir: str | None = None, hydra_words: Sequence[str] = ()
) -> list[list[str]]:
    """Expand a sweep (`seed=1,2 model=a,b`) into one list of overrides per run, last key
    fastest.
    """
    listed = Names(config_dir).cells(overrides, hydra_words).listed
    if listed is None:
        raise UserError("a search chooses its runs while it goes on: none can be listed before")
    return listed


def override_saved(config: Config, overrides: Sequence[str], use: Use) -> Config:
    """Return the settings of a run or a cache with a few of them changed.

    Args:
        config: as they were saved.
        overrides: `key=value`.
        use: what the settings are for (`schema.may_change`).

    Raises:
        UserError: a setting that may not change for this use, or a value that does not fit.
    """
    tree = config.model_dump(mode="json")
    parser = OverridesParser.create()
    what = "cache" if use == "cache" else "run"
    free = [key for key in flatten(tree) if changeable(key, use)]
    for text in overrides:
        key, _, _ = text.partition("=")
        if key not in free:
            raise UserError(
                f"{key!r} cannot be changed for a {what} that exists.{did_you_mean(key, free)}"
            )
        override = parse_override(parser, text)
        if override.is_sweep_override():
            raise UserError(f"{text!r} names several values; give one")
        value = override.value()
        tree = merged(tree, unflatten({key: value}))
    changed = _typed(tree)
    _validate_root_is_read(changed.data)
    return changed


def _validate_split(data: DataConfig) -> None:
    """Refuse settings of a split, or of a table, that would do nothing.

    Raises:
        UserError: naming the setting and what to type.
    """
    files = data.name in ("folder", "table")
    here = {"data.split": data.split, "data.fold": data.fold}
    given = [f"{key}={value}" for key, value in here.items() if value is not None]
    if given and not files:
        raise UserError(f"{given[0]} is for data=folder and data=table, not for data={data.name}")
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} both hold images out: leave one of them out")
    if data.fold is not None and data.fold >= data.folds:
        raise UserError(f"data.fold={data.fold} of data.folds={data.folds}: they count from 0")
    default = DataConfig()
    for key in ("group_by", "split_seed", "near_duplicates", "folds"):
        value = getattr(data, key)
        if value != getattr(default, key) and not given:
            raise UserError(
                f"data.{key}={value} says how one set is split: type data.split=0.2 too"
            )
    if data.group_by is not None:
        try:
            re.compile(data.group_by)
        except re.error as error:
            raise UserError(
                f"data.group_by={data.group_by} is no regular expression: {error}"
            ) from None
    if data.name != "table":
        for key in ("table", "split_column", "path_column", "label_column"):
            if getattr(data, key) != getattr(default, key):
                raise UserError(
                    f"data.{key}={getattr(data, key)} is for data=table, not data={data.name}"
                )
        return
    if not data.table:
        raise UserError("data=table needs its file: type data.table=FILE.csv (or .jsonl)")
    if not (table := expanded(data.table)).is_file():
        raise UserError(f"data.table={data.table}: {no_file(table)}; give a .csv or .jsonl file")
    if bool(given) == bool(data.split_column):
        both = f"{given[0]} and data.split_column={data.split_column} both" if given else ""
        raise UserError(
            f"{both} say what is held out: leave one of them out"
            if both
            else "data=table: say what is held out: type data.split=0.2, or data.split_column=NAME"
        )


def _validate_root_is_read(data: DataConfig) -> None:
    if data.name in EMBEDDED_DATA and data.root:
        others = (
            "coco or data=voc" if data.name in BOX_DATA else "imagenet, data=folder or data=idx"
        )
        raise UserError(
            f"data.root={data.root} is not used by the embedded data={data.name}; "
            f"type data={others} with it"
        )


def batch_split(config: Config, processes: int) -> tuple[int, int]:
    """Return (micro-batch per rank, accumulation steps) so that micro x accumulation x ranks =
    global_batch.

    Raises:
        UserError: when the three do not divide; the message names batches that do.
    """
    total, micro = config.train.global_batch, config.train.micro_batch
    if total % processes:
        near = sorted(
            {max(processes, total // processes * processes), (total // processes + 1) * processes}
        )
        raise UserError(
            f"train.global_batch={total} does not divide over {processes} processes; "
            f"type train.global_batch={' or '.join(map(str, near))}"
        )
    share = total // processes
    micro = micro or share
    if share % micro:
        fits = [m for m in range(1, share + 1) if share % m == 0]
        near = sorted(sorted(fits, key=lambda m: abs(m - (micro or 1)))[:3])
        raise UserError(
            f"train.micro_batch={micro} x {processes} processes does not divide "
            f"train.global_batch={total}; "
            f"train.micro_batch may be {', '.join(map(str, near))}"
        )
    return micro, share // micro


def _pick(user: Sequence[Override], key: str) -> Any:
    values = [o.value() for o in user if o.key_or_group == key]
    return values[-1] if values else None


# --- merging --------------------------------------------------------------------------------------


def _composed(
    names: Names, layers: Sequence[Layer], user: Sequence[Override], values: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """Return the settings of layers (the strongest last) and what the user typed over them, the
    group files chosen, and the overrides that Hydra was given.
    """
    layer = merged_layer("layers", layers)
    # The names of an ensemble's members are the user's: to Hydra, no such setting exists.
    members = {o.key_or_group: o.value() for o in user if o.key_or_group.startswith(MEMBERS)}
    config_store = ConfigStore.instance()
    config_store.store(name="schema", node=Config().model_dump(mode="json"))
    name = re.sub(r"[^A-Za-z0-9_+]", ".", values["recipe"])
    with as_mistakes():
        node = OmegaConf.create(merged(layer.values, unflatten(members)) | values)
        config_store.store(group="layers", name=name, node=node, package="_global_")
        passed = [f"{group}={choice}" for group, choice in layer.groups.items()]
        passed += [f"+layers={name}"]
        elsewhere = {*names.groups, "recipe", "budget", *members}
        passed += [o.input_line or "" for o in user if o.key_or_group not in elsewhere]
        passed += names.search_path()
        tree = hydra_compose("config", overrides=passed)
        settings = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    return settings, layer.groups, tuple(passed)  # type: ignore[return-value]


@contextmanager
def as_mistakes() -> Iterator[None]:
    """Turn what Hydra and OmegaConf refuse into a line for the user."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        message, _, place = one_line(cause).partition(" full_key: ")
        key = place.partition(" ")[0]
        raise UserError(f"{key}: {message}" if key else message) from None


def _typed(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_mistake(error.errors(include_url=False)[0])) from None


def _mistake(first: ErrorDetails) -> str:
    """One line about a value that its setting does not take."""
    parts = [str(part) for part in first["loc"]]
    key, kind, given = ".".join(parts), first["type"], first["input"]
    expected = first["msg"].removeprefix("Input should be ")
    about = _docstring(".".join(part for part in first["loc"] if isinstance(part, str)))
    if parts[-1] == "[key]":
        return (
            f"{MEMBERS}: {given!r} cannot name a network; use letters, digits, _ and - (a bare "
            "number in quotes)"
        )
    if kind in ("dict_type", "model_type"):
        return f"{key}={given}: {NAME_A_MEMBER}"
    if kind == "extra_forbidden":
        return f"there is no setting {key!r}.{did_you_mean(key, settings_near(key))}"
    if kind == "string_pattern_mismatch":
        field = field_of(key)
        forms = (field.examples if field else None) or [first["ctx"]["pattern"]]
        form = " or ".join(filter(None, [", ".join(forms[:-1]), forms[-1]]))
        return f"{key}={given} is not of the form {form}.{about}"
    if given is None:
        return f"{key} is missing: type {key}=...{about}"
    hint = ""
    if kind == "literal_error":
        hint = did_you_mean(str(given), expected.replace(" or ", ", ").replace("'", "").split(", "))
        hint = hint if hint.startswith(" Did") else ""
    return f"{key}={given} is not {expected}.{hint}{about}"


def _docstring(key: str) -> str:
    field = field_of(key)
    text = " ".join((field.description or "").split()) if field else ""
    return f" ({text})" if text else ""


def _replace(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _with_teacher_of_run(config: Config, needs_weights: bool) -> Config:
    """Return the settings with the folder `teacher.run` as the teacher's weights, which say the
    rest.
    """
    teacher = config.teacher
    if teacher.run is None:
        return config
    if teacher.weights or teacher.name:
        given = f"teacher.weights={teacher.weights}" if teacher.weights else "teacher.name"
        raise UserError(
            f"teacher.run={teacher.run} and {given} both name a teacher: leave one of them out"
        )
    if needs_weights and not (expanded(teacher.run) / "config.yaml").is_file():
        raise UserError(
            f"teacher.run={teacher.run} is no run folder: give that of a finished run, as its last "
            "line names it"
        )
    return _replace(config, "teacher", run=None, weights=_absolute(teacher.run))


def _data_paths(data: DataConfig) -> dict[str, str | None]:
    """Return the absolute `root` and `table`: a table is looked for here, then below the root; a
    root that is not given is the table's folder.
    """
    root = _data_root(data)
    table = _absolute(data.table)
    if data.table and root and not expanded(str(table)).is_file():
        table = _absolute(str(Path(root) / data.table))
    if table and root is None and data.name == "table":
        root = str(Path(table).parent)
    return {"root": root, "table": table}


def _data_root(data: DataConfig) -> str | None:
    root = data.root
    if root is None and data.name == "imagenet":
        root = os.environ.get("IMAGENET_DIR") or None
    return _absolute(root)


def _absolute(path: str | None) -> str | None:
    """Return a path from the root; one with a `$VARIABLE` as it is typed: every machine of a job
    puts its own value there.
    """
    if path and os.path.expandvars(path) != path:
        return path
    try:
        return str(resolved(path)) if path else None
    except ValueError as error:  # a null byte
        raise UserError(f"{path!r} is no path: {error}") from None


# --- checks across sections -----------------------------------------------------------------------


def _check(
    config: Config, names: Names, chosen: dict[str, str], trains: bool, needs_weights: bool = True
) -> None:
    """Refuse contradictions between settings, each in one line that says what to type."""
    model, data, augment = config.model, config.data, config.augment
    students = [n for n in names.groups["model"] if n in STUDENTS]
    if model.source == "ghosttrain" and model.name not in students:
        hint = did_you_mean(model.name, students)
        raise UserError(
            f"model.name={model.name} is no student.{hint} A timm model: model=timm model.name=NAME"
        )
    named = config.reparam.model_copy(update={"forward": FULL.forward}) not in (FULL, PLAIN)
    if model.source != "ghosttrain" and (named or model.input_stride != "standard"):
        raise UserError(
            f"{model.source}'s {model.name} is trained as it is: reparam settings and "
            "model.input_stride would do nothing; leave them out"
        )
    if model.source == "timm" and config.train.sync_bn:
        raise UserError(
            f"train.sync_bn=true is for this project's students, not for timm's {model.name}; type "
            "train.sync_bn=false"
        )
    if model.source == "ghosttrain":
        validate_drop_path(model.name, model.drop_path)
    if model.freeze != "none" and model.weights is None:
        raise UserError(
            f"model.freeze={_shown(model.freeze)} would keep random weights: type "
            "model.weights=FILE, RUN, hub or efficientnet-lite, or model.freeze=none"
        )
    if model.weight_bits and (model.source == "timm" or model.weights in (None, *NAMED_SOURCES)):
        raise UserError(
            f"model.weight_bits={model.weight_bits} trains the fused form of a finished run: type "
            "model.weights=RUN with a student of this project, or quantize RUN --finetune"
        )
    if model.weight_bits and config.ema.decay and not config.ema.warmup:
        raise UserError(
            f"model.weight_bits={model.weight_bits}: the ranges of inputs begin empty, and so "
            "would their average: type ema.warmup=true"
        )
    elsewhere = model.weights in (None, *NAMED_SOURCES)
    if needs_weights and not elsewhere and not expanded(str(model.weights)).exists():
        raise UserError(
            f"model.weights={model.weights}: no such file; give the path of a .safetensors or .pth "
            f"file, the folder of a finished run, or one of {', '.join(STUDENT_SOURCES)}"
        )
    validate_teacher(config.teacher, config.distill, chosen["teacher"], names.groups["teacher"])
    validate_loss(config.distill)
    validate_cache_settings(config.cache, config.distill, augment)
    validate_policy(augment)
    validate_detection(config)
    validate_run_name(config)
    validate_normalization(data, config.teacher)
    for low, high in (("scale_min", "scale_max"), ("ratio_min", "ratio_max")):
        if getattr(augment, low) > getattr(augment, high):
            raise UserError(
                f"augment.{low}={getattr(augment, low)} is above "
                f"augment.{high}={getattr(augment, high)}"
            )
    for name in ("mean", "std"):
        if len(getattr(data, name)) != data.in_chans:
            first = f"[{data.mean[0]}]", f"[{data.std[0]}]"
            remedy = (
                f"data.mean={first[0]} data.std={first[1]}"
                if data.in_chans == 1
                else f"data.{name}=[r,g,b]"
            )
            raise UserError(
                f"data.{name} has {len(getattr(data, name))} values for "
                f"data.in_chans={data.in_chans}; type {remedy}"
            )
    _validate_root_is_read(data)
    _validate_split(data)
    if config.cache.dir and data.root:
        images = (expanded(data.root) / split for split in (data.train_split, data.val_split))
        if any(expanded(config.cache.dir).is_relative_to(folder) for folder in images):
            raise UserError(
                f"cache.dir={config.cache.dir} lies among the images of data.root={data.root}; "
                "type another folder"
            )
    if config.optim.weight_decay_end is not None and not config.optim.weight_decay:
        raise UserError(
            f"optim.weight_decay_end={config.optim.weight_decay_end:g} with optim.weight_decay=0: "
            "a decay can change, not begin; type optim.weight_decay=VALUE above 0"
        )
    if config.train.label_loss == "bce" and config.train.focal_gamma:
        raise UserError(
            f"train.focal_gamma={config.train.focal_gamma:g} is of the cross-entropy: type "
            "train.label_loss=cross_entropy or train.focal_gamma=0"
        )
    if data.repeats > 1 and data.balance != "none":
        raise UserError(
            f"data.repeats={data.repeats} and data.balance={data.balance} both say how often an "
            "image is drawn: type data.repeats=1 or data.balance=none"
        )
    if data.repeats > 1 and config.cache.dir:
        raise UserError(
            f"data.repeats={data.repeats} draws an image several times in an epoch, of which "
            "cache.dir holds one output: type data.repeats=1"
        )
    if data.train_sizes[-1] != data.train_size:
        raise UserError(
            f"data.size_schedule ends with {data.train_sizes[-1]}, which is not data.train_size="
            f"{data.train_size}: type data.train_size={data.train_sizes[-1]}"
        )
    for setting in ("cache.dir", "train.cuda_graph"):
        section, name = setting.split(".")
        if data.size_schedule and getattr(getattr(config, section), name):
            raise UserError(
                f"data.size_schedule changes the images' size, which {setting} keeps: leave one of "
                "them out"
            )
    if data.balance != "none" and config.cache.dir:
        raise UserError(
            f"data.balance={data.balance} draws images more than once in an epoch, of which "
            "cache.dir holds one output: type data.balance=none (and train.class_weights=balanced)"
        )
    if not isinstance(model.freeze, str) and config.train.cuda_graph:
        raise UserError(
            "train.cuda_graph=true records one backward, but model.freeze changes what learns: "
            "type train.cuda_graph=false, or one word for model.freeze"
        )
    if not trains:
        return
    processes = ranks.world_size(config.launch.nproc)
    devices = config.launch.devices
    if devices and len(devices) < config.launch.nproc:
        raise UserError(
            f"launch.nproc={config.launch.nproc} needs as many devices, but launch.devices="
            f"{','.join(map(str, devices))} names {len(devices)}"
        )
    micro_batch, _ = batch_split(config, processes)
    if config.train.cuda_graph and (config.train.compile or processes > 1):
        other = "train.compile=true" if config.train.compile else f"a run of {processes} processes"
        raise UserError(
            f"train.cuda_graph=true is not for {other}: graphs are recorded of one process's own "
            "forward and backward; type train.cuda_graph=false"
        )
    if model.source == "ghosttrain":
        validate_sides(model, data, micro_batch * (processes if config.train.sync_bn else 1))


def validate_data_here(data: DataConfig) -> None:
    """Raise UserError where the folder of the images is not given, or not on this machine."""
    if data.name in EMBEDDED_DATA:
        return
    if not data.root:
        variable = " or set IMAGENET_DIR" if data.name == "imagenet" else ""
        raise UserError(f"data={data.name} needs a folder: type data.root=/path{variable}")
    if not expanded(data.root).is_dir():
        raise UserError(f"data.root={data.root}: no such folder")


def _replaced(budget: Layer, before: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """One line per group or value of the budget that is another one than without it."""
    keys = [*budget.groups, *flatten(budget.values)]
    return tuple(
        f"{key}: {_shown(before.get(key))} -> {_shown(now[key])}"
        for key in keys
        if key in now and before.get(key) != now[key]  # not where a stronger choice dropped it
    )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
