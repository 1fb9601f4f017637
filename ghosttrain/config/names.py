"""What can be named on a command line: groups, recipes, budgets and settings, and where they lie.

Owns the shipped folders and the user's own (`--config-dir`), reads recipes and budgets as `Layer`s,
and parses overrides: every key and every choice must exist. It does not merge (compose.py).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghosttrain.config.hydra_words import sweeper_of
from ghosttrain.config.identity import field_of, flatten, unflatten
from ghosttrain.config.schema import Config, MemberConfig
from ghosttrain.config.small import LIMIT, computed, training_images
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import extra, resolved, shipped
from ghosttrain.text import listed

MEMBERS = "teacher.members"
KEYS = tuple(key for key in flatten(Config().model_dump(mode="json")) if key != MEMBERS)
"""Dotted names of all settings, but for those of an ensemble's members: the user names those."""
NAME_A_MEMBER = (
    f"name each network of an ensemble and set what it is: type {MEMBERS}.a.name=MODEL "
    f"{MEMBERS}.a.weights=hub (a: a name of your choice)"
)
EXTRAS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "optuna": "optuna"}
"""Plugins of Hydra whose package is called otherwise, or needs other versions -> the extra that
brings them.
"""


@dataclass(frozen=True)
class Layer:
    """One recipe or budget: which group files it chooses and which values it sets."""

    name: str
    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, str] = field(default_factory=dict)
    """What `-m` does: settings of Hydra's sweeper and launcher, and the values to search."""


@dataclass(frozen=True)
class Cells:
    """A sweep: what is the same in every run, and what Hydra's sweeper chooses values of."""

    words: tuple[str, ...]
    """The command line; empty where a sweeper chooses."""
    swept: tuple[str, ...]
    """What Hydra gets: `++seed=1,2`. Its configuration knows no settings: `++` adds one."""
    names: dict[str, tuple[int, str]]
    """Hydra's name of a setting -> its place in `words`, and its own name."""
    listed: list[list[str]] | None
    """The words of every run, the last setting fastest; None where a search chooses."""
    corners: list[list[str]]
    """The words of two runs: the first values of all settings, and the last."""
    lines: list[list[str]]
    """Whole command lines, of which Hydra gets the numbers; none where it gets settings."""


def merged(weak: dict[str, Any], strong: dict[str, Any]) -> dict[str, Any]:
    """Return `weak` with the values of `strong` over it, section by section."""
    out = dict(weak)
    for key, value in strong.items():
        inner = out.get(key)
        both = isinstance(value, dict) and isinstance(inner, dict)
        out[key] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return out


def stacked(layers: Sequence[Layer], chosen: Mapping[str, str]) -> dict[str, Any]:
    """Merge the layers' values, without those that belong to a group file no longer chosen."""
    values: dict[str, Any] = {}
    for layer in layers:
        kept = {
            section: value
            for section, value in layer.values.items()
            if layer.groups.get(section, chosen.get(section)) == chosen.get(section)
        }
        values = merged(values, kept)
    return values


def merged_layer(name: str, layers: Sequence[Layer]) -> Layer:
    """Return several layers, the strongest last, as one."""
    groups = {group: choice for layer in layers for group, choice in layer.groups.items()}
    sweep = {key: text for layer in layers for key, text in layer.sweep.items()}
    return Layer(name, groups, stacked(layers, groups), sweep)


class Names:
    """Looks names up in the shipped folders and in the user's `--config-dir`."""

    def __init__(self, config_dir: str | None) -> None:
        self.conf = [shipped("conf")]
        self.recipe_dirs = [shipped("recipes")]
        if config_dir is not None:
            folder = resolved(config_dir)
            if not folder.is_dir():
                raise UserError(f"--config-dir {config_dir}: no such folder")
            self.conf.append(folder)
            self.recipe_dirs.append(folder / "recipe")
            _validate_no_shadows(self.conf)
            _validate_no_shadows(self.recipe_dirs)
        self.groups = {
            group.name: sorted(
                {f.stem for root in self.conf for f in (root / group.name).glob("*.yaml")}
            )
            for root in self.conf
            for group in root.iterdir()
            if group.is_dir() and group.name not in ("budget", "recipe", "study")
        }

    def hydra(self) -> Any:
        """Return the context in which Hydra finds the shipped groups."""
        GlobalHydra.instance().clear()
        return initialize_config_dir(
            version_base="1.3", config_dir=str(self.conf[0]), job_name="ghosttrain"
        )

    def search_path(self) -> list[str]:
        """Return the override that lets Hydra find the user's groups too."""
        folders = [quoted(f"file://{root}") for root in self.conf[1:]]
        return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []

    def default_groups(self) -> dict[str, str]:
        """Return the file that conf/config.yaml chooses in each group."""
        lines = yaml.safe_load((self.conf[0] / "config.yaml").read_text(encoding="utf-8"))[
            "defaults"
        ]
        return {k: str(v) for line in lines if isinstance(line, dict) for k, v in line.items()}

    def choices(self, group: str) -> list[str]:
        """Return the names there are in a group, among the recipes or the budgets."""
        if group == "recipe":
            return sorted({n for d in self.recipe_dirs for n in _yaml_names(d)})
        if group == "budget":
            return sorted({n for d in self.conf for n in _yaml_names(d / "budget")})
        return self.groups[group]

    def parse(
        self, overrides: Sequence[str], sweep: bool = False, search: bool = False
    ) -> list[Override]:
        """Parse and check names: every key must exist, every group choice too.

        A dictionary of an ensemble's members becomes one override for each of their settings.
        `sweep`: a value may be several; `search`: or a range without steps.
        """
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = []
        for text in map(_with_list, overrides):
            if "=" not in text and not text.startswith("~"):
                hint = did_you_mean(text, [*self.groups, *KEYS, "recipe", "budget"])
                raise UserError(f"{text!r} is not key=value.{hint}")
            for single in _spread(parser, text):
                override = self._listed(parser, parse_override(parser, single), search)
                self._validate_name(override, sweep)
                parsed.append(override)
        return parsed

    def cells(self, overrides: Sequence[str], hydra_words: Sequence[str] = ()) -> Cells:
        """Return the runs of a sweep.

        Raises:
            UserError: as `parse`; a range without steps where no sweeper searches; a sweeper or
                launcher that is not installed.
        """
        with self.hydra():
            for word in hydra_words:
                _validate_plugin(word)
            search = sweeper_of(hydra_words) != "basic"
            parser = OverridesParser.create()
            words, swept, names, values = [], [], {}, []
            for place, o in enumerate(self.parse(overrides, sweep=True, search=search)):
                typed, _, text = (o.input_line or "").partition("=")
                if not o.is_sweep_override():
                    words.append(o.input_line or "")
                    values.append([words[-1]])
                    continue
                words.append("")
                if isinstance(o.value(), IntervalSweep):
                    texts = [str(o.value().start), str(o.value().end)]  # type: ignore[union-attr]
                else:
                    texts = list(o.sweep_string_iterator())
                if text.startswith("glob("):
                    text = f"choice({','.join(texts)})"
                values.append([f"{typed}={value}" for value in texts])
                name = o.key_or_group
                try:
                    parser.parse_override(f"++{name}={text}")
                except HydraException:  # a member called `2b`, say
                    name = f"setting_{place}"
                names[name] = place, typed
                swept.append(f"++{name}={text}")
            listed = None if search else [list(cell) for cell in itertools.product(*values)]
            corners = [[texts[end] for texts in values] for end in (0, -1)]
            return Cells(tuple(words), tuple(swept), names, listed, corners, [])

    def sweep_words(
        self, overrides: Sequence[str], hydra_words: Sequence[str]
    ) -> tuple[list[str], list[str]]:
        """Return the words of a sweep and those that its recipe brings; a word that was
        typed replaces the recipe's.

        Args:
            overrides: of the runs.
            hydra_words: overrides of Hydra's launcher, sweeper and sweep folder.

        Raises:
            UserError: as `parse`; several recipes, one of which says how to sweep.
        """
        with self.hydra():
            parsed = self.parse(overrides, sweep=True, search=True)
            typed = {o.key_or_group for o in parsed}
            typed.update(word.lstrip("+").partition("=")[0] for word in hydra_words)
            brought: dict[str, str] = {}
            for o in parsed:
                if o.key_or_group == "recipe" and not o.is_sweep_override():
                    brought = merged_layer("recipes", self.recipes(o.value())).sweep
                elif o.key_or_group == "recipe":
                    for name in map(str, o.sweep_iterator()):
                        if name in self.choices("recipe") and self._recipe(name).sweep:
                            raise UserError(
                                f"{o.input_line!r}: {name} says how to sweep; type it alone"
                            )
        sweeper = sweeper_of(hydra_words) if "hydra/sweeper" in typed else None
        if sweeper not in (None, brought.get("hydra/sweeper")):  # another one has other settings
            brought = {k: v for k, v in brought.items() if not k.startswith("hydra.sweeper.")}
        words = [f"{key}={text}" for key, text in brought.items() if key not in typed]
        theirs = [word for word in words if word.startswith(("hydra.", "hydra/"))]
        ours = [word for word in words if word not in theirs]
        return [*overrides, *ours], [*theirs, *hydra_words]

    def lines(self, lines: list[list[str]], hydra_words: Sequence[str] = ()) -> Cells:
        """Return the runs of a sweep over whole command lines.

        Raises:
            UserError: a launcher that is not installed.
        """
        with self.hydra():
            for word in hydra_words:
                _validate_plugin(word)
        numbers = f"++line={','.join(map(str, range(len(lines))))}"
        return Cells(("",), (numbers,), {"line": (0, "line")}, lines, [lines[0], lines[-1]], lines)

    def _listed(self, parser: OverridesParser, o: Override, search: bool) -> Override:
        """Turn `model=glob(ghost*)` into `model=choice(...)` of the names that match; refuse a
        sweep without a list of values, unless a sweeper searches.
        """
        key, value, text = o.key_or_group, o.value(), o.input_line
        if isinstance(value, IntervalSweep) and search:
            return o
        if isinstance(value, IntervalSweep):
            raise UserError(
                f"{text!r} is a range without steps, for a search (hydra/sweeper=optuna); -m runs "
                f"listed values: type {key}=A,B or {key}=range(A,B,STEP)"
            )
        if isinstance(value, RangeSweep) and not value.step:
            raise UserError(f"{text!r}: a step of 0 never ends")
        if not isinstance(value, Glob):
            if o.is_sweep_override() and next(iter(o.sweep_iterator()), o) is o:
                raise UserError(f"{text!r} names no value")
            return o
        if key not in (*self.groups, "recipe", "budget"):
            raise UserError(
                f"{text!r}: glob() matches the files of a group; {key} has none: list its values"
            )
        names = value.filter(self.choices(key))
        if not names:
            hint = did_you_mean(" ".join(value.include), self.choices(key))
            raise UserError(f"{text!r}: no {key} matches.{hint}")
        listed = ",".join(quoted(name) for name in names)
        return replace(
            parser.parse_override(f"{key}=choice({listed})"), type=o.type, input_line=text
        )

    def _validate_name(self, o: Override, sweep: bool) -> None:
        key = o.key_or_group
        if not key:
            raise UserError(f"{o.input_line!r}: there is no name before the '='")
        if o.package is not None:
            raise UserError(
                f"{o.input_line!r}: a group has its one place in the settings; type "
                f"{key}={(o.input_line or '').partition('=')[2]}"
            )
        if o.is_delete():
            raise UserError(
                f"{(o.input_line or '').removesuffix('=')!r}: settings cannot be deleted; set a "
                "value (key=null, group=none)"
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
        elif _above_settings(key) and not o.is_sweep_override():
            raise UserError(f"{o.input_line!r}: {NAME_A_MEMBER}")
        else:
            self._validate_key(key)
        if o.is_sweep_override() and not sweep:
            raise UserError(
                f"{o.input_line!r} names several values: give one; train -m runs one after the "
                "other, cost -m says what they cost"
            )

    def _validate_key(self, key: str) -> None:
        if _is_setting(key) or _above_settings(key):
            return
        inside = [k for k in KEYS if k.startswith(key + ".")]
        if inside:
            raise UserError(f"{key!r} is a section: set one of {listed(inside, most=6)}")
        last = key.rpartition(".")[2]
        leaf = [k for k in KEYS if k.rpartition(".")[2] == last and key.count(".") < 2]
        hint = (
            f" Did you mean {leaf[0]!r}?"
            if leaf
            else did_you_mean(key, [*settings_near(key), *self.groups])
        )
        raise UserError(f"there is no setting {key!r}.{hint}")

    def recipe_file(self, name: str) -> Path:
        """Return where a recipe is written."""
        return _find(self.recipe_dirs, name)

    def recipes(self, choice: Any) -> list[Layer]:
        """Return the layers of `recipe=NAME` or `recipe=[A,B]`."""
        names = choice if isinstance(choice, list) else [choice] if choice else []
        return [self._recipe(str(name)) for name in names]

    def _recipe(self, name: str, above: tuple[str, ...] = ()) -> Layer:
        """Return a recipe with what it is built on: `/recipe/NAME` lines of its defaults.

        As in Hydra, files count in the order of the list, the recipe's own values where `_self_`
        stands, at the end without it; its package header says below which section they lie.
        `above`: the recipes that lead to this one.
        """
        if name in above:
            raise UserError(
                f"recipes build on each other in a circle: {' -> '.join((*above, name))}"
            )
        path = self.recipe_file(name)
        body = load_yaml(path)
        lines = body.pop("defaults", [])
        if not isinstance(lines, list):
            raise UserError(
                f"{path.name}: write a recipe's defaults as a list, a line '- override /GROUP: "
                f"CHOICE' or '- /recipe/NAME' each, not {lines!r}"
            )
        sweep = _recipe_sweep(path, body.pop("hydra", {}))
        own = Layer(name, {}, self._recipe_values(path, body), sweep)
        layers = []
        for line in lines if "_self_" in lines else [*lines, "_self_"]:
            if line == "_self_":
                layers.append(own)
            elif isinstance(line, str) and line.startswith("/recipe/"):
                base = line.removeprefix("/recipe/")
                if base not in self.choices("recipe"):
                    hint = did_you_mean(base, self.choices("recipe"))
                    raise UserError(f"{path.name}: no recipe is called {base!r}.{hint}")
                layers.append(self._recipe(base, (*above, name)))
            elif plugin := _recipe_plugin(line):
                own.sweep.update(plugin)
            else:
                own.groups.update([self._recipe_group(path, line)])
        return merged_layer(name, layers)

    def _recipe_values(self, path: Path, body: dict[str, Any]) -> dict[str, Any]:
        """Return the values of a recipe's file, below the package of its header."""
        head = re.match(r"(?:\s*#.*\n)*?\s*#\s*@package\s+(\S+)", path.read_text(encoding="utf-8"))
        package = head[1] if head and head[1] != "_global_" else ""
        values = unflatten({package: body}) if package and body else body
        for key in flatten(values):
            try:
                self._validate_key(key)
            except UserError as error:
                raise UserError(f"{path.name}: {error}") from None
        return values

    def _recipe_group(self, path: Path, line: Any) -> tuple[str, str]:
        """Return group and choice of a line `override /GROUP: CHOICE`."""
        key, value = str(line), ""
        if isinstance(line, dict) and len(line) == 1:
            key, value = next((str(k), v) for k, v in line.items())
        group = key.removeprefix("override ").lstrip("/")
        if not key.startswith("override ") or group not in self.groups:
            raise UserError(
                f"{path.name}: a recipe's defaults hold lines 'override /GROUP: CHOICE', "
                f"'/recipe/NAME' and '_self_', not {key!r}"
            )
        if str(value) not in self.groups[group]:
            hint = did_you_mean(str(value), self.groups[group])
            raise UserError(f"{path.name}: no {group} is called {value!r}.{hint}")
        return group, str(value)

    def budget(self, choice: Any, chosen: dict[str, str], settings: Mapping[str, Any]) -> Layer:
        """Return the named budget, or the one called like the data set, or `small` for few images,
        or none.

        `overrides` always count; those under `only_with: {GROUP=CHOICE: [...]}` only with it. They
        may name values that are computed from the number of images (`small.computed`).

        Args:
            choice: the name that was typed, or None.
            chosen: group -> file.
            settings: what was composed without a budget.
        """
        data = chosen["data"]
        images = training_images(settings["data"]) if choice in (None, "small") else None
        found = "small" if images is not None and images < LIMIT else "full"
        name = str(choice) if choice else data if data in self.choices("budget") else found
        if name not in self.choices("budget"):  # a recipe may name one too
            raise UserError(
                f"no budget is called {name!r}.{did_you_mean(name, self.choices('budget'))}"
            )
        body = load_yaml(_find([d / "budget" for d in self.conf], name))
        values_of: dict[str, str] = {}
        if name == "small":
            if images is None:
                raise UserError(
                    f"budget=small counts the images of data=folder and data=table, not of data="
                    f"{data}: type budget=full"
                )
            pretrained = settings["model"]["weights"] is not None
            seen = body["images_seen_pretrained" if pretrained else "images_seen"]
            values_of = computed(images, seen)
        lines = list(body.get("overrides", []))
        for condition, conditional in body.get("only_with", {}).items():
            group, _, wanted = condition.partition("=")
            lines += conditional if chosen.get(group) == wanted else []
        groups, values = {}, {}
        for override in self.parse([line.format(**values_of) for line in lines]):
            key = override.key_or_group
            if key in self.groups:
                groups[key] = str(override.value())
            else:
                values[key] = override.value()
        return Layer(name, groups, unflatten(values))


def _recipe_sweep(path: Path, section: Any) -> dict[str, str]:
    """Return the section `hydra:` of a recipe: name -> text, as they would be typed. As in Hydra,
    `sweeper.params` holds the values of a sweep.
    """
    flat = flatten(section) if isinstance(section, dict) else {"": section}
    params = "sweeper.params."
    for key in flat:
        if not key.startswith(("sweeper.", "launcher.")):
            raise UserError(
                f"{path.name}: below hydra: a recipe has sweeper: and launcher:, not {key!r}"
            )
    return {
        key.removeprefix(params) if key.startswith(params) else f"hydra.{key}": str(value)
        if key.startswith(params)
        else json.dumps(value)
        for key, value in flat.items()
    }


def _recipe_plugin(line: Any) -> dict[str, str]:
    """Return the choice of a line `override /hydra/sweeper: NAME` (or launcher), else nothing."""
    if not (isinstance(line, dict) and len(line) == 1):
        return {}
    key, name = next(iter(line.items()))
    plugin = re.fullmatch(r"override /(hydra/(launcher|sweeper|sweeper/sampler))", str(key))
    return {plugin[1]: str(name)} if plugin else {}


def _validate_plugin(word: str) -> None:
    """Refuse a launcher or sweeper of Hydra that is not installed."""
    key, _, name = word.partition("=")
    if key not in ("hydra/launcher", "hydra/sweeper"):
        return
    there = GlobalHydra.instance().config_loader().get_group_options(key)
    if name not in there:
        kind = key.removeprefix("hydra/")
        package = f" (pip install hydra-{name}-{kind})" if name.isidentifier() else ""
        if name in EXTRAS:
            package = f" (pip install {extra(EXTRAS[name])})"
        raise UserError(
            f"{word!r}: no {kind} of this name is installed; there is {', '.join(there)}{package}"
        )


def settings_near(key: str) -> list[str]:
    """Return the names of all settings; those of an ensemble's member by the name in `key`."""
    parts = key.split(".")
    member = parts[2] if key.startswith(f"{MEMBERS}.") else parts[-2] if len(parts) > 2 else "a"
    return [*KEYS, *(f"{MEMBERS}.{member}.{name}" for name in MemberConfig.model_fields)]


def parse_override(parser: OverridesParser, text: str) -> Override:
    """Parse `key=value`; a value that is text by the schema is taken as it stands.

    Hydra's grammar alone would refuse `data.root=/tmp/été` and read `run.name=2024` as a number.
    """
    key, _, value = text.partition("=")
    plain = key.lstrip("+")
    member = plain.startswith(f"{MEMBERS}.")
    if member:
        key = "member"  # the grammar knows no key with a part such as `2b`
    try:
        override = parser.parse_override(f"{key}={value}")
        if _is_text(plain) and not override.is_sweep_override():
            if not (override.value() is None or isinstance(override.value(), str)):
                override = parser.parse_override(f"{key}={quoted(value)}")
    except HydraException:
        if not _is_text(plain) and plain != "recipe":
            raise UserError(f"cannot read {text!r}: write key=value, lists as key=[a,b]") from None
        override = parser.parse_override(f"{key}={quoted(value)}")
    return replace(override, key_or_group=plain, input_line=text) if member else override


def _spread(parser: OverridesParser, text: str) -> list[str]:
    """Turn `teacher.members={a: {weight: 2}}` into `teacher.members.a.weight=2`."""
    key, _, value = text.partition("=")
    if not _above_settings(key.lstrip("+")):
        return [text]
    tree = None
    try:
        override = parser.parse_override(f"members={value}")
        tree = None if override.is_sweep_override() else override.value()
    except HydraException:
        with suppress(yaml.YAMLError):  # YAML takes paths that Hydra's grammar does not
            tree = yaml.safe_load(value)
    if not isinstance(tree, dict):
        return [text]
    return [
        f"{leaf}={quoted(v) if isinstance(v, str) else 'null' if v is None else v}"
        for leaf, v in flatten({key: tree}).items()
    ]


def _with_list(text: str) -> str:
    """Turn `launch.devices=0,1` into `launch.devices=[0,1]`: of this setting no sweep is made."""
    key, _, value = text.partition("=")
    if key.lstrip("+") != "launch.devices" or value.startswith(("[", "null")):
        return text
    return f"{key}=[{value}]"


def _is_text(key: str) -> bool:
    found = field_of(key)
    return "." in key and found is not None and found.annotation in (str, str | None)


def _is_setting(key: str) -> bool:
    return key in KEYS or (key.startswith(f"{MEMBERS}.") and field_of(key) is not None)


def _above_settings(key: str) -> bool:
    """Whether `key` is `teacher.members` or `teacher.members.ANY`."""
    return key == MEMBERS or (key.startswith(f"{MEMBERS}.") and key.count(".") == 2)


def quoted(text: str) -> str:
    """Return a text as Hydra's grammar reads it whatever it holds."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _yaml_names(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*.yaml"):
        if path.is_file():
            yield path.relative_to(folder).with_suffix("").as_posix()


def _validate_no_shadows(folders: Sequence[Path]) -> None:
    """Refuse a user's file that has the name of a shipped one: it would be unclear which counts."""
    shipped_names, own_names = ({*_yaml_names(folder)} for folder in folders)
    for name in sorted(shipped_names & own_names):
        raise UserError(f"{folders[1] / name}.yaml has the name of a shipped file; give it another")


def _find(folders: Sequence[Path], name: str) -> Path:
    return next(p for d in folders if (p := d / f"{name}.yaml").is_file())


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a file of settings, as Hydra reads it: no name may stand in it twice.

    Raises:
        UserError: it is no YAML, or no mapping.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path)) or {}
        if not isinstance(tree, dict):
            raise UserError(f"{path}: a file of settings holds 'name: value', not a list")
        return tree  # type: ignore[return-value]
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from None
