"""README and docs: commands compose, files and links exist, what is generated is true."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from helpers import load_script

from ghosttrain.cli import VERBS, find_verb, parse
from ghosttrain.commands.study import ACTIONS
from ghosttrain.config.compose import cells, compose
from ghosttrain.config.hydra_words import split_words
from ghosttrain.config.schema import Config
from ghosttrain.engine.launch import replaced_lines
from ghosttrain.engine.run_files import write_config
from ghosttrain.study.bench import DEFAULTS, composed_words
from ghosttrain.study.studies import load_study, study_cells

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS = list(
    dict.fromkeys(
        line.split(" -m ghosttrain ", 1)[1].removesuffix(" &")
        for text in TEXTS.values()
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if " -m ghosttrain " in line
    )
)


def test_there_are_commands_and_no_placeholders() -> None:
    assert len(COMMANDS) >= 20
    assert not any("@@" in text or "TODO" in text for text in TEXTS.values())
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 150


def finished_run(folder: Path) -> Path:
    write_config(folder, Config())
    return folder


DEPLOY = ("export", "quantize", "latency", "pareto", "publish")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes(command: str, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "bench":
        verb, rest = find_verb(words)
        options = parse(importlib.import_module("ghosttrain.commands.bench").ARGUMENTS, rest)
        part, *_ = options.words
        overrides = [word for word in options.words if "=" in word]
        assert compose(composed_words(part, overrides), trains=False) and part in DEFAULTS
        return
    if words[0] == "cache" and not words[1].startswith("+"):
        assert len(words) == 3 and words[2] in ("--repair", "--inspect")
        return
    if words[0] == "cache":
        compose(words[1:])
        return
    if words[0] == "detect" and words[1:2] in (["eval"], ["show"]):
        assert len(words) == 3
        return
    if words[0] == "detect":
        words = [word.replace("/path", str(tmp_path)) for word in words[1:]]
        words = [word.replace("=RUN", f"={finished_run(tmp_path)}") for word in words]
        named = any(word.startswith("+recipe=") for word in words)
        compose(words if named else ["+recipe=detect_ssdlite", *words])
        return
    if words[:2] == ["eval", "--weights"]:
        compose(words[3:], trains=False)
        return
    if words[0] == "study":
        options = parse(importlib.import_module("ghosttrain.commands.study").ARGUMENTS, words[1:])
        assert options.words[0] in ACTIONS
        if options.words[0] != "list":
            study_cells(load_study(options.words[1]), [*options.words[2:], "seed=0"], None)
        return
    if words[0] == "doctor":
        compose(words[1:], needs_data=False)
        return
    if words[0] == "cost":
        options = parse(importlib.import_module("ghosttrain.commands.cost").ARGUMENTS, words[1:])
        for cell in cells(options.words) if options.multirun else [options.words]:
            compose(cell, needs_data=False)
        return
    if words[0] in ("lr_find", "predict", "report", "data", *DEPLOY):
        verb, rest = find_verb(words)
        options = parse(importlib.import_module(f"ghosttrain.commands.{verb}").ARGUMENTS, rest)
        words = options.words if verb in ("lr_find", "data") else []
        words = [word for word in words if "=" in word]
        compose([word.replace("/path", str(tmp_path)) for word in words], trains=False)
        return
    if words[0] in VERBS:
        assert len([word for word in words if word not in ("--to", "timm")]) == 2
        return
    sweep = "-m" in words
    words = parse(importlib.import_module("ghosttrain.commands.train").ARGUMENTS, words).words
    words = [w.replace("/path", str(tmp_path)) for w in words if w != "-m"]
    words = [w.replace("runs/teacher", str(finished_run(tmp_path))) for w in words]
    words = [re.sub(r"data.root=(/usr/|\$).*", f"data.root={tmp_path}", w) for w in words]
    words, _ = split_words(words, sweep)
    for cell in cells(words) if sweep else [words]:
        compose(cell)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_files_and_links_exist(page: Path) -> None:
    text = TEXTS[page]
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        assert (page.parent / name).is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (page.parent / name).read_text(), re.M)
            assert anchor in [h.lower().replace(" ", "-") for h in headings], target
    for name in re.findall(r"`((?:ghosttrain|tests|conf|recipes|scripts)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).is_file() or "feature_mse" in name, name


def test_what_is_generated_is_what_it_would_be() -> None:
    docs = load_script("docs")
    generated = docs.configuration()
    assert TEXTS[ROOT / "docs" / "configuration.md"] == generated, "type: python scripts/docs.py"
    rows = docs.measured()
    assert len(rows) == 10 and all(low <= ms <= high for _, ms, low, high in rows)


def test_the_output_shown_of_the_main_job_is_its_output() -> None:
    """Its lines that depend on no processor."""
    composed = compose(["+recipe=compact_kd", "model=ghostnetv3_130"])
    shown = TEXTS[ROOT / "docs" / "results.md"].splitlines()
    lines = replaced_lines(composed)
    assert len(lines) == 5 and all(line in shown for line in lines)
    for part in (
        "student: ghostnetv3_130, 10.950 M",
        "length: 220 steps, 10 epochs of 22; warm-up 22",
    ):
        assert any(line.startswith(part) for line in shown)
