"""Which distillation losses there are, what each compares and which settings it has.

A loss is one function in `ghosttrain/distill/losses.py`: its positional parameters are what it
compares, its keyword-only ones are its settings. This reads them from the text of that file, so
that the composer knows them and torch is not imported.
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any, NamedTuple

from ghosttrain.files import PACKAGE

SOURCE = PACKAGE / "distill" / "losses.py"


class Signature(NamedTuple):
    """One loss."""

    inputs: tuple[str, ...]
    """Of `LossInputs`: student_BK, teacher_BK, student_BF, teacher_BF, labels_B, temperature."""
    settings: dict[str, float]
    """Name -> default."""
    about: str
    """First line of its docstring."""

    @property
    def compares_features(self) -> bool:
        """Whether it needs the pooled features of student and teacher."""
        return "student_BF" in self.inputs or "teacher_BF" in self.inputs


class Term(NamedTuple):
    """One distillation loss of a run, and its weight or the schedule of it."""

    name: str
    weight: Any


@cache
def signatures() -> dict[str, Signature]:
    """Return every loss by its name, in the order of the file."""
    functions = (
        node
        for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(mark, ast.Name) and mark.id == "loss" for mark in node.decorator_list)
    )
    found = {}
    for function in functions:
        arguments = function.args
        defaults = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        found[function.name] = Signature(
            tuple(argument.arg for argument in arguments.args),
            {argument.arg: float(ast.literal_eval(value)) for argument, value in defaults if value},
            (ast.get_docstring(function) or "").partition("\n")[0],
        )
    return found


def setting_names() -> dict[str, str]:
    """Return the settings of all losses, each with a text that says whose they are."""
    owners: dict[str, list[str]] = {}
    for name, signature in signatures().items():
        for setting, default in signature.settings.items():
            owners.setdefault(setting, []).append(
                f"{name} (default {default:g}): {signature.about}"
            )
    return {setting: " ".join(texts) for setting, texts in owners.items()}


def terms(distill: Any) -> list[Term]:
    """Return the distillation losses of a run (`DistillConfig`); none with `distill=none`."""
    if distill.name == "none":
        return []
    added = [Term("feature_cosine", distill.features_weight)] if distill.features_weight else []
    return [Term(distill.name, distill.weight), *added]


def compares_features(distill: Any) -> bool:
    """Whether a loss of the run needs pooled features."""
    return any(signatures()[term.name].compares_features for term in terms(distill))


def settings_of(distill: Any, name: str) -> dict[str, float]:
    """Return the settings of a loss: those that are set, else its defaults."""
    given = {key: getattr(distill, key) for key in signatures()[name].settings}
    defaults = signatures()[name].settings
    return {key: defaults[key] if value is None else value for key, value in given.items()}
