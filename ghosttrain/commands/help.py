"""`help`, `--help`: verbs, groups with their choices, recipes and settings; one verb; one section.

The general help reads file names and the text of schema.py instead of importing it: pydantic and
Hydra alone would cost half a second.
"""

from __future__ import annotations

import ast
import importlib
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any

from ghosttrain.commands.arguments import Arguments, with_config_dir
from ghosttrain.config.losses import setting_names
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import PACKAGE, expanded, shipped

ARGUMENTS = with_config_dir(
    Arguments(
        "help",
        "[VERB | SECTION | SECTION.SETTING]",
        "Without a word: verbs, groups, recipes and settings. Of a verb: its options. Of a\n"
        "section of settings (optim, teacher, ...): type, default, bounds and meaning of each.",
    )
)
VERB_NAMES = (
    "train", "eval", "detect", "fuse", "export", "quantize", "latency", "pareto", "publish",
    "predict", "wrong", "report", "study", "recipes", "cost", "doctor", "lr_find", "data", "cache",
    "bench", "version",
)  # fmt: skip
ALSO_SECTIONS = ("train", "cache", "data")
"""Verbs that a section of settings is called like: their help shows both."""

_HEAD = """\
ghosttrain: trains compact, re-parameterized vision networks with a distillation teacher.

usage: python -m ghosttrain [VERB] [key=value ...] [options]

  python -m ghosttrain +recipe=compact_kd model=ghostnetv3_130        the embedded digits
  python -m ghosttrain +recipe=compact_kd data=imagenet data.root=D   ImageNet
  torchrun --nproc_per_node=8 -m ghosttrain +recipe=compact_kd ...    on 8 devices
  python -m ghosttrain -m +recipe=compact_kd,baseline seed=1,2,3      every combination

verbs (python -m ghosttrain VERB --help: all about one)
  train             the default; the same command again resumes, or shows a finished run's result
  eval RUN          evaluate a run again, exactly; data.root= and launch.nproc= may differ
                    (eval --weights FILE model= data=: weights that belong to no run)
  detect            train a detector on a student (SSDLite, RetinaNet); detect eval|show RUN
  fuse RUN          write RUN/model.fused.safetensors, the inference model (--out FILE: elsewhere;
                    --to timm or torchvision: weights for their network of the same name)
  export RUN --to F a file for a device (onnx, litert, executorch, openvino, coreml, ncnn,
                    torch_export), run and compared with PyTorch on the held-out images
  quantize RUN      the same in INT8; layers stay in float until the accuracy holds
  latency RUN|MODEL|FILE  measured time of one pass, in PyTorch and in devices' runtimes
  pareto [RUN...]   accuracy against MACs, parameters and measured latency: students and timm's
  publish RUN       a folder that timm loads (--to-folder D), also uploaded (--to-hub NAME)
  predict RUN IMG.. classify images and folders of them (--csv, --json, --picture FILE)
  wrong RUN         the held-out images it is most certain of and wrong about: wrong.png
  report RUN...     results side by side: mean and standard deviation over seeds
                    (report.metrics=top1,balanced,ece,recall:CLASS: the columns)
  study run NAME    run what is missing of a declared comparison and report it (study report,
                    study power, study list)
  recipes           all recipes: what for, what they reach, what they cost
  cost              what a run, or with -m a sweep, will cost: steps, multiplications, disk,
                    memory, hours on 1 to 64 devices (--measure, --images-per-second X)
  doctor            whether a run could start here: packages, devices, disk, data, teacher, run
                    folder, a line each, with what to type
  lr_find           a short run in which the learning rate rises: a picture, and which to take
  data show         some training images under several draws of the augmentation; data stats:
                    sizes, formats, classes, mean and std; data check: reads each image once,
                    names damaged ones, duplicates, and held-out images that are trained on
  cache             store the teacher's outputs once (cache.dir=D cache.draws=E); --dry-run only
                    measures; cache D --repair, cache D --inspect
  bench             time and memory: bench step, optim, data, distill
  help SECTION      what each setting of a section means, its bounds: help optim, help optim.lr

options of train
  -m, --multirun    sweep over comma-separated values; finished runs are not repeated
  --confirm K       after a search (-m +recipe=tune_lr): run its best trial with K new seeds
  --cfg job         print the composed settings and stop (hydra, all: Hydra's own)
  --info defaults   where they come from (also: defaults-tree, config, searchpath, plugins)
  --config-dir D    your own groups (D/optim/x.yaml) and recipes (D/recipe/x.yaml); with --help
                    they are listed
  --version         print the version

GHOSTTRAIN_NATIVE=0 in the environment switches the C++ kernels off.
"""


def run(options: Namespace) -> int:
    """Print the general help, or that of one word; return 0."""
    if len(options.words) > 1:
        raise UserError(f"help takes one word: {options.words[0]!r} or {options.words[1]!r}")
    word = options.words[0] if options.words else None
    if word is None or "=" in word:
        print(help_text(options.config_dir))
        return 0
    parts = []
    if word in VERB_NAMES:
        arguments = importlib.import_module(f"ghosttrain.commands.{word}").ARGUMENTS
        parts.append(arguments.format_help().rstrip())
    if word not in VERB_NAMES or word in ALSO_SECTIONS:
        parts.append(section_text(word, options.config_dir))
    print("\n\n".join(parts))
    return 0


def section_text(word: str, config_dir: str | None = None) -> str:
    """Return the help on a section of settings (`optim`) or on one setting (`optim.lr`).

    Raises:
        UserError: there is none of this name.
    """
    from ghosttrain.config.schema import Config, Section

    section, _, setting = word.partition(".")
    sections: dict[str, Any] = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    kind = sections.get(section)
    if kind is None:
        hint = did_you_mean(section, [*sections, *VERB_NAMES], limit=30)
        raise UserError(f"there is no help on {word!r}.{hint}")
    if setting and setting not in kind.model_fields:
        hint = did_you_mean(setting, kind.model_fields, limit=30)
        raise UserError(f"{section} has no setting {setting!r}.{hint}")
    about = f"{section}: {' '.join((kind.__doc__ or '').split())}"
    lines = [] if setting else [*textwrap.wrap(about, 96), ""]
    for name, field in kind.model_fields.items():
        if setting in ("", name):
            lines += _explained(f"{section}.{name}", field)
    choices = [] if setting else _choices(section, config_dir)
    return "\n".join([*lines, *choices]).rstrip()


def _explained(key: str, field: Any) -> list[str]:
    """Return what a setting takes, its default, and what it means."""
    default = field.get_default(call_default_factory=True)
    shown = str(default).lower() if isinstance(default, bool) else default
    shown = "null" if shown is None else shown
    text = " ".join((field.description or "").split())
    meaning = textwrap.wrap(text, 90, initial_indent="      ", subsequent_indent="      ")
    uses = (field.json_schema_extra or {}).get("may_change", ())
    verbs = [use for use in uses if use != "run"]
    marks = [f"      {' and '.join(verbs)} may change it."] if verbs else []
    return [f"  {key}={str(shown).replace(' ', '')}   {_kind(field)}", *meaning, *marks]


def _kind(field: Any) -> str:
    """Say in words what values a setting takes."""
    import types
    from typing import Literal, Union, get_args, get_origin

    annotation, words = field.annotation, []
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    for part in parts or (annotation,):
        origin = get_origin(part)
        if origin is Literal:
            words.append("one of " + ", ".join(map(str, get_args(part))))
        elif origin is tuple:
            item = get_args(part)[0]
            nested = "[share of the run, number]" if get_origin(item) is tuple else None
            words.append(f"list of {nested or {str: 'texts'}.get(item, 'numbers')}")
        elif origin is dict:
            words.append("names of your choice, each with settings of its own")
        elif part is not type(None):
            words.append(names.get(part, getattr(part, "__name__", str(part))))
    if type(None) in parts:
        words.append("null")
    bounds = {"ge": "{} or more", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    limits = [
        text.format(f"{getattr(rule, name):,}" if abs(getattr(rule, name)) > 999 else
                    f"{getattr(rule, name):g}")
        for rule in field.metadata
        for name, text in bounds.items()
        if getattr(rule, name, None) is not None
    ]  # fmt: skip
    return ", ".join([" or ".join(words), *limits])


def _choices(group: str, config_dir: str | None) -> list[str]:
    """Return the files of a group with what their first line says; none if it is no group."""
    roots = [shipped("conf"), *([expanded(config_dir)] if config_dir else [])]
    files = sorted(path for root in roots for path in (root / group).glob("*.yaml"))
    default = dict(_default_choices(roots[0] / "config.yaml")).get(group)
    lines = ["", f"files of the group ({group}=NAME; * is the default)"] if files else []
    for path in files:
        first = path.read_text("utf-8").splitlines()[:1]
        note = first[0].lstrip("# ") if first and first[0].startswith("#") else ""
        name = path.stem + "*" * (path.stem == default)
        lines.append(f"  {name:<20} {textwrap.shorten(note, 74, placeholder=' ...')}".rstrip())
    return lines


def help_text(config_dir: str | None = None) -> str:
    """Return the help: head, groups, recipes and every setting with its default.

    Args:
        config_dir: the user's own folder: its groups and recipes are listed with the shipped ones.

    Raises:
        UserError: no such folder.
    """
    conf, recipes = [shipped("conf")], [shipped("recipes")]
    if config_dir is not None:
        folder = expanded(config_dir)
        if not folder.is_dir():
            raise UserError(f"--config-dir {config_dir}: no such folder")
        conf.append(folder)
        recipes.append(folder / "recipe")
    parts = [_HEAD, "groups (GROUP=CHOICE; * is the default)"]
    chosen = dict(_default_choices(conf[0] / "config.yaml"))
    groups = {p.name for root in conf for p in root.iterdir() if p.is_dir()} - {"recipe", "study"}
    for group in sorted(groups):
        names = {f.stem for root in conf for f in (root / group).glob("*.yaml")}
        starred = [name + "*" * (chosen.get(group) == name) for name in sorted(names)]
        if starred:  # a folder without settings is no group
            parts.append(_row(group, " ".join(starred)))
    names = {
        f.relative_to(root).with_suffix("").as_posix()
        for root in recipes
        for f in root.rglob("*.yaml")
    }
    parts += ["", "recipes (+recipe=NAME, stacked: '+recipe=[compact_kd,ablation/no_ema]')"]
    parts += [
        _row("", " ".join(sorted(names))),
        "",
        "settings (section.name=value; defaults before groups and recipes)",
    ]
    for section, settings in _settings().items():
        parts.append(
            _row(section or "(top)", " ".join(f"{name}={value}" for name, value in settings))
        )
    parts += ["", "What each setting means and its bounds: python -m ghosttrain help SECTION"]
    return "\n".join(parts)


def _row(name: str, text: str) -> str:
    return textwrap.fill(
        f"  {name:<10}{text}", 98, subsequent_indent=" " * 12, break_on_hyphens=False
    )


def _default_choices(path: Path) -> list[tuple[str, str]]:
    lines = (line.split("#")[0].strip(" -\n") for line in path.read_text("utf-8").splitlines())
    return [(k, v.strip()) for k, _, v in (line.partition(":") for line in lines) if v.strip()]


def _settings() -> dict[str, list[tuple[str, str]]]:
    """Section -> (name, default) of every setting, from the source of schema.py."""
    tree = ast.parse((PACKAGE / "config" / "schema.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found: dict[str, list[tuple[str, str]]] = {}
    for section in _fields(classes, "Config"):
        kind = ast.unparse(section.annotation)
        kind = "_DistillSection" if kind == "DistillConfig" else kind  # made of it and the losses
        if kind in classes:
            settings = _fields(classes, kind)
            found[ast.unparse(section.target)] = [_name_and_default(f) for f in settings]
    found["distill"] += [(name, "null") for name in setting_names()]
    top = [f for f in _fields(classes, "Config") if ast.unparse(f.target) == "seed"]
    return found | {"": [_name_and_default(f) for f in top]}


def _fields(classes: dict[str, ast.ClassDef], name: str) -> list[ast.AnnAssign]:
    """Return the fields of a class, those of its base classes in the same file first."""
    node = classes[name]
    bases = [b.id for b in node.bases if isinstance(b, ast.Name) and b.id in classes]
    inherited = [field for base in bases for field in _fields(classes, base)]
    return inherited + [field for field in node.body if isinstance(field, ast.AnnAssign)]


def _name_and_default(field: ast.AnnAssign) -> tuple[str, str]:
    return ast.unparse(field.target), _default(field.value)


def _default(value: ast.expr | None) -> str:
    first = value.args[0] if isinstance(value, ast.Call) else value
    text = ast.unparse(first) if first is not None else "?"
    return {"None": "null", "True": "true", "False": "false"}.get(
        text, text.strip("'").replace(" ", "")
    )
