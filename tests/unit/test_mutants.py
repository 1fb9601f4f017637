"""The list of scripts/mutate must not rot: every text it breaks stands in its file, once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mutate():
    return load_script("mutate")


def test_every_text_stands_once_and_is_broken(mutate, tmp_path, monkeypatch) -> None:
    mutants = mutate.listed()  # ends the process where a text is not there
    assert len(mutants) == len({mutant.name for mutant in mutants}) >= 40
    for mutant in mutants:
        assert mutant.code != (ROOT / mutant.file).read_text(), mutant.name

    file = tmp_path / "mutants.yaml"
    text = {"ghosttrain/optim/ema.py": {"two": ["self.updates", "x"], "none": ["absent", "x"]}}
    for name, count in (("two", 5), ("none", 0)):
        only = {"ghosttrain/optim/ema.py": {name: text["ghosttrain/optim/ema.py"][name]}}
        file.write_text(yaml.safe_dump({"mutants": only}))
        monkeypatch.setattr(mutate, "LIST", file)
        with pytest.raises(SystemExit, match=f"{name}: this text stands {count} times"):
            mutate.listed()


def test_the_tests_that_guard_exist(mutate) -> None:
    settings = yaml.safe_load(mutate.LIST.read_text())
    for file, tests in settings["guard"].items():
        assert file == "always" or (ROOT / file).is_file()
        for test in tests:
            path, _, name = test.partition("::")
            text = (ROOT / path).read_text()
            assert not name or f"def {name.partition('[')[0]}(" in text, test


def test_the_table_tells_of_mutants_of_the_list(mutate) -> None:
    names = {mutant.name for mutant in mutate.listed()}
    in_table = {name for name in mutate.read_table() if not name.startswith("drawn:")}
    assert in_table and in_table <= names
