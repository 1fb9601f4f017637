"""`--help`: verbs, groups with their choices, recipes, settings and options, in a tenth of a
second.

Reads file names and the text of schema.py instead of importing it: pydantic and Hydra alone would
cost half a second.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

from ghosttrain.config.errors import UserError
from ghosttrain.config.paths import PACKAGE, expanded, shipped

_HEAD = """\
ghosttrain: trains compact, re-parameterized vision networks with a distillation teacher.

usage: python -m ghosttrain [VERB] [key=value ...] [options]

  python -m ghosttrain +recipe=compact_kd model=ghostnetv3_130        the embedded digits
  python -m ghosttrain +recipe=compact_kd data=imagenet data.root=D   ImageNet
  torchrun --nproc_per_node=8 -m ghosttrain +recipe=compact_kd ...    on 8 devices
  python -m ghosttrain -m +recipe=compact_kd,baseline seed=1,2,3      every combination

verbs
  train             the default; the same command again resumes, or shows a finished run's result
  eval RUN          evaluate a run again, exactly; data.root= and launch.nproc= may differ
  fuse RUN          write RUN/model.fused.safetensors, the inference model (--out FILE: elsewhere;
                    --to timm or torchvision: weights for their network of the same name)
  report RUN...     results side by side: mean and standard deviation over seeds
  cache             store the teacher's outputs once (cache.dir=D cache.draws=E); --dry-run
                    only measures; cache D --repair, cache D --inspect
  bench step        time and memory of a training step by forward (model= batch= size= rounds=
                    threads= device= forwards= input_stride=)
  bench optim       time of LAMB and EMA against timm's (model= rounds= threads= device=)
  bench distill     cost of an epoch with stored targets against none and a live teacher (model=
                    teacher= codec= images= batch= size= rounds= threads= device=)
  GHOSTTRAIN_NATIVE=0 in the environment switches the C++ kernels off

options
  -m, --multirun    sweep over comma-separated values; finished runs are not repeated
  --cfg job         print the composed settings and stop (hydra, all: Hydra's own)
  --info defaults   where they come from (also: defaults-tree, config, searchpath, plugins)
  --config-dir D    your own groups (D/optim/x.yaml) and recipes (D/recipe/x.yaml); with --help
                    they are listed
  --dry-run         cache: measure the codecs, the size on disk and the time, and store nothing
  --repair          cache D: make damaged or missing files of the cache again
  --inspect         cache D: draw a few stored crops with what the teacher says of them
  --version         print the version
"""


def help_text(config_dir: str | None = None) -> str:
    """Return the help: head, groups, recipes and every setting with its default.

    Args:
        config_dir: the user's own folder: its groups and recipes are listed with the shipped ones.

    Raises:
        UserError: no such folder.
    """
    conf, recipes = [shipped("conf")], [shipped("recipes")]
    if config_dir is not None:
        own = expanded(config_dir)
        if not own.is_dir():
            raise UserError(f"--config-dir {config_dir}: no such folder")
        conf.append(own)
        recipes.append(own / "recipe")
    parts = [_HEAD, "groups (GROUP=CHOICE; * is the default)"]
    chosen = dict(_default_choices(conf[0] / "config.yaml"))
    groups = {p.name for root in conf for p in root.iterdir() if p.is_dir()} - {"recipe"}
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
    parts += ["", "What each setting means, its unit and bounds: ghosttrain/config/schema.py"]
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
        if (kind := ast.unparse(section.annotation)) in classes:
            settings = _fields(classes, kind)
            found[ast.unparse(section.target)] = [_name_and_default(f) for f in settings]
    own = [f for f in _fields(classes, "Config") if ast.unparse(f.target) == "seed"]
    return found | {"": [_name_and_default(f) for f in own]}


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
