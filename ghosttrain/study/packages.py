"""Which packages are installed, against what this project's metadata ask for. Imports none of them:
it answers where PyTorch itself cannot be imported.
"""

from __future__ import annotations

import importlib
import platform
import re
import shlex
from importlib import metadata

from packaging.requirements import Requirement

from ghosttrain.files import extra
from ghosttrain.study.findings import State
from ghosttrain.text import one_line
from ghosttrain.version import __version__

SHOWN = ("torch", "torchvision", "timm", "numpy", "pillow")
FOR_DEVELOPERS = ("dev", "docs", "mutate")
"""Extras that no run uses."""
APART = 15
"""torchvision 0.(N + 15) is of the release of torch 2.N (the table of torchvision's README)."""


def look_at_versions() -> tuple[State, str]:
    """Return the versions that matter, whether all that is required is there, and whether torch and
    torchvision are of one release.
    """
    found = {name: _version(name) for name in SHOWN}
    shown = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    text = f"python {platform.python_version()}, ghosttrain {__version__}, {shown}"
    required = [each for each in _requirements() if "extra ==" not in str(each.marker)]
    if missing := [each for each in required if _version(each.name) is None]:
        return "FAIL", f"{text}; missing: {_pip(missing)}"
    torch, torchvision = found["torch"], found["torchvision"]
    if torch and torchvision and not are_of_one_release(torch, torchvision):
        text += "; torch and torchvision are not of one release: pip install -U torch torchvision"
        try:
            importlib.import_module("torchvision")
        except Exception as error:  # operators that this torch does not have: anything is raised
            return "FAIL", f"{text} ({one_line(error)[:80]})"
        return "note", text
    if old := [each for each in required if not _fits(each)]:
        return (
            "note",
            f"{text}; other versions than those this project was tested with: {_pip(old)}",
        )
    return "OK", text


def look_at_extras() -> tuple[State, str]:
    """Return which optional packages are installed, by the names of the extras."""
    extras: dict[str, list[Requirement]] = {}
    for each in _requirements():
        if name := re.search(r"extra == ['\"]([^'\"]+)", str(each.marker)):
            extras.setdefault(name[1], []).append(each)
    names = [name for name in sorted(extras) if name not in FOR_DEVELOPERS]
    there = [name for name in names if all(_version(each.name) for each in extras[name])]
    absent = [name for name in names if name not in there]
    text = f"installed: {', '.join(there) or 'none'}"
    if absent:
        text += f"; not installed: {', '.join(absent)} (pip install {extra('NAME')})"
    return "OK", text


def are_of_one_release(torch: str, torchvision: str) -> bool:
    """Whether these versions belong together; taken to be so where their numbers say nothing."""
    pair = [re.match(rf"{major}\.(\d+)", v) for major, v in ((2, torch), (0, torchvision))]
    if pair[0] is None or pair[1] is None:
        return True
    return int(pair[1][1]) - int(pair[0][1]) == APART


def _requirements() -> list[Requirement]:
    """Return what the installed package asks for, with its extras; nothing where the sources are
    used without an installation.
    """
    try:
        return [Requirement(text) for text in metadata.requires("ghosttrain") or ()]
    except metadata.PackageNotFoundError:
        return []


def _fits(required: Requirement) -> bool:
    return required.specifier.contains(_version(required.name) or "0", prereleases=True)


def _pip(required: list[Requirement]) -> str:
    return shlex.join(["pip", "install", *(f"{each.name}{each.specifier}" for each in required)])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
