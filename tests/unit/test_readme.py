"""Every command of the README composes, every file it shows exists, no placeholder is left."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from ghosttrain.cli import VERBS, find_verb, parse
from ghosttrain.config.compose import cells, compose
from ghosttrain.study.bench import DEFAULTS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [
    line.split(" -m ghosttrain ", 1)[1]
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if " -m ghosttrain " in line
]


def test_there_are_commands_and_no_placeholders():
    assert len(COMMANDS) >= 8
    assert "@@" not in README and "TODO" not in README


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command, tmp_path):
    words = shlex.split(command, comments=True)
    if words[0] == "bench":
        verb, rest = find_verb(words)
        options = parse(importlib.import_module("ghosttrain.commands.bench").ARGUMENTS, rest)
        compose([word for word in options.words if "=" in word], trains=False)
        assert options.words[0] in DEFAULTS
        return
    if words[0] == "cache" and not words[1].startswith("+"):
        assert len(words) == 3 and words[2] in ("--repair", "--inspect")
        return
    if words[0] == "cache":
        compose(words[1:])
        return
    if words[0] in VERBS:
        assert len([word for word in words if word not in ("--to", "timm")]) == 2
        return
    sweep = "-m" in words
    words = [w.replace("/path", str(tmp_path)) for w in words if w != "-m"]
    words = [re.sub(r"data.root=/usr/.*", f"data.root={tmp_path}", w) for w in words]
    for cell in cells(words) if sweep else [words]:
        compose(cell)


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(ghosttrain/[\w/]+\.py|recipes/[\w/]+\.yaml)`", README):
        assert (ROOT / name).is_file(), name
