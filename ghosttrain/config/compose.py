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

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from ghosttrain.config.errors import UserError, did_you_mean
from ghosttrain.config.policy import check_policy
from ghosttrain.config.schema import Config

PACKAGE = Path(__file__).resolve().parent.parent


def shipped(folder: str) -> Path:
    """Return `conf` or `recipes`: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def _text_keys() -> set[str]:
    """Dotted names of all settings that hold free text."""
    return {
        f"{section}.{name}"
        for section, group in Config.model_fields.items()
        for name, setting in getattr(group.annotation, "model_fields", {}).items()
        if setting.annotation in (str, str | None)
    }


TEXT_KEYS = _text_keys()


@dataclass(frozen=True)
class Layer:
    """One recipe or budget: which group files it chooses and which values it sets."""

    name: str
    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


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


def compose(overrides: Sequence[str], config_dir: str | None = None) -> Composed:
    """Compose and check one run.

    Args:
        overrides: Hydra overrides without sweeps, such as `+recipe=compact_kd`, `optim.lr=1e-3`.
        config_dir: a folder of the user's own groups (`D/optim/x.yaml`) and recipes
            (`D/recipe/x.yaml`).

    Raises:
        UserError: unknown name, wrong type, missing or contradictory value; the message is one
    line.
    """
    book = _Book(config_dir)
    with book.hydra():
        user = book.parse(overrides)
        user_groups = {
            o.key_or_group: str(o.value()) for o in user if o.key_or_group in book.groups
        }
        bases, ablations = book.recipes(_pick(user, "recipe"))

        chosen = book.default_groups()
        for layer in bases:
            chosen |= layer.groups
        unused = {group for group, choice in chosen.items() if choice == "none"}
        stronger = {g: c for layer in ablations for g, c in layer.groups.items()} | user_groups
        own = [layer.values["budget"] for layer in bases if "budget" in layer.values]
        budget = book.budget(_pick(user, "budget") or (own or [None])[-1], chosen | stronger)
        # A budget picks a smaller teacher; it does not give one to a recipe that has none.
        smaller = {g: c for g, c in budget.groups.items() if g not in unused}
        budget = replace(budget, groups=smaller)
        chosen |= smaller | stronger
        values = _stack((*bases, budget, *ablations), chosen)
        recipe = "+".join(layer.name for layer in (*bases, *ablations)) or "none"
        store = ConfigStore.instance()
        store.store(name="schema", node=Config().model_dump(mode="json"))
        node = OmegaConf.create(values | {"recipe": recipe, "budget": budget.name})
        name = re.sub(r"[^A-Za-z0-9_+]", ".", recipe)
        store.store(group="layers", name=name, node=node, package="_global_")
        passed = [f"{group}={choice}" for group, choice in chosen.items()]
        passed += [f"+layers={name}"]
        passed += [
            o.input_line or ""
            for o in user
            if o.key_or_group not in book.groups and o.key_or_group not in ("recipe", "budget")
        ]
        passed += book.search_path()
        config = _typed(_hydra(passed))
    named = {o.key_or_group for o in user}
    if "optim.lr" in named and "optim.lr_batch" not in named:
        config = _replace(config, "optim", lr_batch=None)  # typed by hand: used as typed
    if user_groups.get("teacher", "none") != "none" and config.distill.name == "none":
        raise UserError(
            f"teacher={user_groups['teacher']} would never be asked, because distill=none; "
            "type distill=soft_ce (or kl) too"
        )
    config = _replace(config, "data", root=_data_root(config))
    _check(config, book)
    replaced = _replaced(bases, budget, ablations, user, config, book.default_groups())
    arguments = (*overrides, *(("--config-dir", config_dir) if config_dir else ()))
    return Composed(config, tuple(replaced), chosen, arguments, tuple(passed))


def cells(overrides: Sequence[str], config_dir: str | None = None) -> list[list[str]]:
    """Expand a sweep (`seed=1,2 model=a,b`) into one list of overrides per run, last key
    fastest.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    book = _Book(config_dir)
    with book.hydra():
        parsed = book.parse(overrides, sweep=True)
        plus = {o.key_or_group for o in parsed if o.is_add()}
        batch = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    return [["+" + o if o.split("=")[0] in plus else o for o in cell] for cell in batch]


def override_run(config: Config, overrides: Sequence[str], allowed: Sequence[str]) -> Config:
    """Return a saved run's settings with a few of them changed.

    Raises:
        UserError: a setting that is not in `allowed`, or a value that does not fit.
    """
    tree = config.model_dump(mode="json")
    parser = OverridesParser.create()
    for text in overrides:
        key, _, _ = text.partition("=")
        if key not in allowed:
            raise UserError(
                f"{key!r} cannot be changed for a run that exists.{did_you_mean(key, allowed)}"
            )
        override = _parse(parser, text)
        if override.is_sweep_override():
            raise UserError(f"{text!r} names several values; give one")
        value = override.value()
        tree = _merged(tree, _unflatten({key: value}))
    return _typed(tree)


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


def batch_split(config: Config, ranks: int) -> tuple[int, int]:
    """Return (micro-batch per rank, accumulation steps) so that micro x accumulation x ranks =
    global_batch.

    Raises:
        UserError: when the three do not divide; the message names batches that do.
    """
    total, micro = config.train.global_batch, config.train.micro_batch
    if total % ranks:
        near = sorted({max(ranks, total // ranks * ranks), (total // ranks + 1) * ranks})
        raise UserError(
            f"train.global_batch={total} does not divide over {ranks} processes; "
            f"type train.global_batch={' or '.join(map(str, near))}"
        )
    share = total // ranks
    micro = micro or share
    if share % micro:
        fits = [m for m in range(1, share + 1) if share % m == 0]
        near = sorted(sorted(fits, key=lambda m: abs(m - (micro or 1)))[:3])
        raise UserError(
            f"train.micro_batch={micro} x {ranks} processes does not divide "
            f"train.global_batch={total}; "
            f"train.micro_batch may be {', '.join(map(str, near))}"
        )
    return micro, share // micro


# --- the book of names: what exists in conf/, recipes/ and the user's own folder ------------------


class _Book:
    """Looks names up in the shipped folders and in the user's `--config-dir`."""

    def __init__(self, config_dir: str | None) -> None:
        self.conf = [shipped("conf")]
        self.recipe_dirs = [shipped("recipes")]
        if config_dir is not None:
            own = Path(config_dir).expanduser().resolve()
            if not own.is_dir():
                raise UserError(f"--config-dir {config_dir}: no such folder")
            self.conf.append(own)
            self.recipe_dirs.append(own / "recipe")
            _refuse_shadows(self.conf)
            _refuse_shadows(self.recipe_dirs)
        self.groups = {
            group.name: sorted(
                {f.stem for root in self.conf for f in (root / group.name).glob("*.yaml")}
            )
            for root in self.conf
            for group in root.iterdir()
            if group.is_dir() and group.name not in ("budget", "recipe")
        }
        self.keys = [*flatten(Config().model_dump(mode="json"))]

    def hydra(self) -> Any:
        GlobalHydra.instance().clear()
        return initialize_config_dir(
            version_base="1.3", config_dir=str(self.conf[0]), job_name="ghosttrain"
        )

    def search_path(self) -> list[str]:
        folders = [_quoted(f"file://{root}") for root in self.conf[1:]]
        return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []

    def default_groups(self) -> dict[str, str]:
        lines = yaml.safe_load((self.conf[0] / "config.yaml").read_text())["defaults"]
        return {k: str(v) for line in lines if isinstance(line, dict) for k, v in line.items()}

    def choices(self, group: str) -> list[str]:
        if group == "recipe":
            return sorted({n for d in self.recipe_dirs for n in _yaml_names(d)})
        if group == "budget":
            return sorted({n for d in self.conf for n in _yaml_names(d / "budget")})
        return self.groups[group]

    def parse(self, overrides: Sequence[str], sweep: bool = False) -> list[Override]:
        """Parse and check names: every key must exist, every group choice too."""
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = []
        for text in overrides:
            if "=" not in text:
                hint = did_you_mean(text, [*self.groups, *self.keys, "recipe", "budget"])
                raise UserError(f"{text!r} is not key=value.{hint}")
            override = _parse(parser, text)
            self._check_name(override, sweep)
            parsed.append(override)
        return parsed

    def _check_name(self, o: Override, sweep: bool) -> None:
        key = o.key_or_group
        if o.is_delete():
            raise UserError(
                f"{o.input_line!r}: settings cannot be deleted; set a value (key=null, group=none)"
            )
        if key in self.groups or key in ("recipe", "budget"):
            listed = list(o.sweep_iterator()) if o.is_sweep_override() else [o.value()]
            names = self.choices(key)
            for choice in listed:
                for name in choice if isinstance(choice, list) and key == "recipe" else [choice]:
                    if not (key == "recipe" and name is None) and str(name) not in names:
                        shown = "null" if name is None else str(name)
                        raise UserError(
                            f"no {key} is called {shown!r}.{did_you_mean(shown, names)}"
                        )
        elif key not in self.keys:
            inside = [k for k in self.keys if k.startswith(key + ".")]
            if inside:
                raise UserError(f"{key!r} is a section: set one of {', '.join(inside[:6])}, ...")
            leaf = [k for k in self.keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
            hint = (
                f" Did you mean {leaf[0]!r}?"
                if leaf
                else did_you_mean(key, [*self.keys, *self.groups])
            )
            raise UserError(f"there is no setting {key!r}.{hint}")
        if o.is_sweep_override() and not sweep:
            raise UserError(
                f"{o.input_line!r} names several values: add -m to run one after the other"
            )

    def recipes(self, choice: Any) -> tuple[list[Layer], list[Layer]]:
        names = choice if isinstance(choice, list) else [choice] if choice else []
        layers = [self._recipe(str(name)) for name in names]
        ablation = [layer.name.startswith("ablation/") for layer in layers]
        return (
            [layer for layer, is_ablation in zip(layers, ablation, strict=True) if not is_ablation],
            [layer for layer, is_ablation in zip(layers, ablation, strict=True) if is_ablation],
        )

    def _recipe(self, name: str) -> Layer:
        path = _find(self.recipe_dirs, name)
        body = _load_yaml(path)
        groups = {}
        for line in body.pop("defaults", []):
            if line == "_self_":
                continue
            key, value = next(iter(line.items())) if isinstance(line, dict) else (str(line), "")
            group = key.removeprefix("override ").lstrip("/")
            if not key.startswith("override ") or group not in self.groups:
                raise UserError(
                    f"{path.name}: a recipe's defaults hold lines 'override /GROUP: CHOICE', not "
                    f"{key!r}"
                )
            if str(value) not in self.groups[group]:
                hint = did_you_mean(str(value), self.groups[group])
                raise UserError(f"{path.name}: no {group} is called {value!r}.{hint}")
            groups[group] = str(value)
        for key in flatten(body):
            if key not in self.keys:
                raise UserError(
                    f"{path.name}: there is no setting {key!r}.{did_you_mean(key, self.keys)}"
                )
        return Layer(name, groups, body)

    def budget(self, choice: Any, chosen: dict[str, str]) -> Layer:
        """Return the named budget, or the one called like the data set, or none.

        `overrides` always count; those under `only_with: {GROUP=CHOICE: [...]}` only with it.
        """
        data = chosen["data"]
        name = str(choice) if choice else data if data in self.choices("budget") else "full"
        body = _load_yaml(_find([d / "budget" for d in self.conf], name))
        lines = list(body.get("overrides", []))
        for condition, more in body.get("only_with", {}).items():
            group, _, wanted = condition.partition("=")
            lines += more if chosen.get(group) == wanted else []
        groups, values = {}, {}
        for override in self.parse(lines):
            key = override.key_or_group
            if key in self.groups:
                groups[key] = str(override.value())
            else:
                values[key] = override.value()
        return Layer(name, groups, _unflatten(values))


def _parse(parser: OverridesParser, text: str) -> Override:
    """Parse `key=value`; a value that is text by the schema is taken as it stands.

    Hydra's grammar alone would refuse `data.root=/tmp/été` and read `run.name=2024` as a number.
    """
    key, _, value = text.partition("=")
    plain = key.lstrip("+")
    try:
        override = parser.parse_override(text)
        if plain not in TEXT_KEYS or override.is_sweep_override():
            return override
        if override.value() is None or isinstance(override.value(), str):
            return override
    except HydraException:
        if plain not in TEXT_KEYS and plain != "recipe":
            raise UserError(f"cannot read {text!r}: write key=value, lists as key=[a,b]") from None
    return parser.parse_override(f"{key}={_quoted(value)}")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _yaml_names(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*.yaml"):
        yield path.relative_to(folder).with_suffix("").as_posix()


def _refuse_shadows(folders: Sequence[Path]) -> None:
    """Refuse a user's file that has the name of a shipped one: it would be unclear which counts."""
    shipped_names, own_names = ({*_yaml_names(folder)} for folder in folders)
    for name in sorted(shipped_names & own_names):
        raise UserError(f"{folders[1] / name}.yaml has the name of a shipped file; give it another")


def _find(folders: Sequence[Path], name: str) -> Path:
    return next(p for d in folders if (p := d / f"{name}.yaml").is_file())


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(OmegaConf.load(path)) or {}  # type: ignore[return-value]
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise UserError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from None


def _pick(user: Sequence[Override], key: str) -> Any:
    values = [o.value() for o in user if o.key_or_group == key]
    return values[-1] if values else None


# --- merging --------------------------------------------------------------------------------------


def _stack(layers: Sequence[Layer], chosen: dict[str, str]) -> dict[str, Any]:
    """Merge the layers' values, without those that belong to a group file no longer chosen."""
    values: dict[str, Any] = {}
    for layer in layers:
        kept = {
            section: value
            for section, value in layer.values.items()
            if layer.groups.get(section, chosen.get(section)) == chosen.get(section)
        }
        values = _merged(values, kept)
    return values


def _merged(weak: dict[str, Any], strong: dict[str, Any]) -> dict[str, Any]:
    out = dict(weak)
    for key, value in strong.items():
        inner = out.get(key)
        both = isinstance(value, dict) and isinstance(inner, dict)
        out[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return out


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def _hydra(overrides: list[str]) -> dict[str, Any]:
    try:
        tree = hydra_compose("config", overrides=overrides)
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        raise UserError(" ".join(str(cause).split())) from None


def _typed(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        given, expected = first["input"], first["msg"].removeprefix("Input should be ")
        hint = ""
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"there is no setting {key!r}.{did_you_mean(key, flatten(tree))}"
            ) from None
        if first["type"] == "literal_error":
            hint = did_you_mean(
                str(given), expected.replace(" or ", ", ").replace("'", "").split(", ")
            )
            hint = hint if hint.startswith(" Did") else ""
        section, _, name = key.partition(".")
        about = _docstring(section, name.split(".")[0])
        if given is None:
            raise UserError(f"{key} is missing: type {key}=...{about}") from None
        raise UserError(f"{key}={given} is not {expected}.{hint}{about}") from None


def _docstring(section: str, name: str) -> str:
    model = Config.model_fields.get(section)
    inner = getattr(model.annotation if model else None, "model_fields", {}).get(name)
    text = " ".join((inner.description or "").split()) if inner is not None else ""
    return f" ({text})" if text else ""


def _replace(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _data_root(config: Config) -> str | None:
    root = config.data.root
    if root is None and config.data.name == "imagenet":
        root = os.environ.get("IMAGENET_DIR") or None
    return str(Path(root).expanduser().resolve()) if root else None


# --- checks across sections -----------------------------------------------------------------------


def _check(config: Config, book: _Book) -> None:
    """Refuse contradictions between settings, each in one line that says what to type."""
    model, data, augment = config.model, config.data, config.augment
    students = [n for n in book.groups["model"] if n != "timm"]
    if model.source == "ghosttrain" and model.name not in students:
        hint = did_you_mean(model.name, students)
        raise UserError(
            f"model.name={model.name} is no student.{hint} A timm model: model=timm model.name=NAME"
        )
    if model.weights and not Path(model.weights).expanduser().is_file():
        raise UserError(f"model.weights={model.weights}: no such file")
    if config.distill.name != "none" and not config.teacher.name:
        raise UserError(
            f"distill={config.distill.name} needs a teacher: type teacher=NAME "
            f"({', '.join(n for n in book.groups['teacher'] if n != 'none')}) or distill=none"
        )
    check_policy(augment)
    for low, high in (("scale_min", "scale_max"), ("ratio_min", "ratio_max")):
        if getattr(augment, low) > getattr(augment, high):
            raise UserError(
                f"augment.{low}={getattr(augment, low)} is above "
                f"augment.{high}={getattr(augment, high)}"
            )
    for name in ("mean", "std"):
        if len(getattr(data, name)) != data.in_chans:
            one = f"[{data.mean[0]}]", f"[{data.std[0]}]"
            how = (
                f"data.mean={one[0]} data.std={one[1]}"
                if data.in_chans == 1
                else f"data.{name}=[r,g,b]"
            )
            raise UserError(
                f"data.{name} has {len(getattr(data, name))} values for "
                f"data.in_chans={data.in_chans}; type {how}"
            )
    if min(data.std) <= 0:
        raise UserError(f"data.std={list(data.std)} must be positive")
    if data.name == "digits" and data.root:
        raise UserError(
            f"data.root={data.root} is not used by the embedded data=digits; "
            "type data=imagenet, data=folder or data=idx with it"
        )
    if data.name != "digits":
        if not data.root:
            also = " or set IMAGENET_DIR" if data.name == "imagenet" else ""
            raise UserError(f"data={data.name} needs a folder: type data.root=/path{also}")
        if not Path(data.root).is_dir():
            raise UserError(f"data.root={data.root}: no such folder")
    batch_split(config, int(os.environ.get("WORLD_SIZE", config.launch.nproc)))


def _replaced(
    bases: Sequence[Layer],
    budget: Layer,
    ablations: Sequence[Layer],
    user: Sequence[Override],
    config: Config,
    defaults: dict[str, str],
) -> list[str]:
    """One line per recipe value that the budget replaced and nothing stronger named."""
    named = {o.key_or_group for o in user}
    for layer in ablations:
        named |= set(layer.groups) | set(flatten(layer.values))
    before_groups = defaults | {}
    before: dict[str, Any] = {}
    for layer in bases:
        before_groups |= layer.groups
        before |= flatten(layer.values)
    final = flatten(config.model_dump(mode="json"))
    schema = flatten(Config().model_dump(mode="json"))
    notes = [
        f"{group}: {before_groups[group]} -> {choice}"
        for group, choice in budget.groups.items()
        if group not in named and before_groups[group] != choice
    ]
    for key, value in flatten(budget.values).items():
        old = before.get(key, schema[key])
        if key not in named and final[key] == value and old != value:
            notes.append(f"{key}: {old} -> {value}")
    return notes
