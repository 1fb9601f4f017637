"""docs/hydra.md: what Hydra documents works, or one line says what to type; and completion."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (?P<feature>.+?) \| `(?P<words>.+?)` \| (?P<outcome>.+?) \|$", re.M)
ROWS = [match.groupdict() for match in ROW.finditer((ROOT / "docs" / "hydra.md").read_text())]


@pytest.mark.parametrize("row", ROWS, ids=[row["words"] for row in ROWS])
def test_a_row_of_the_page_holds(ghosttrain, monkeypatch, row):
    if "joblib" in row["words"] and importlib.util.find_spec("joblib") is None:
        pytest.skip("no joblib here")
    if "submitit" in row["words"] and importlib.util.find_spec("submitit") is None:
        pytest.skip("no submitit here")
    monkeypatch.chdir(ROOT)
    words = shlex.split(row["words"])
    cfg = not {"--cfg", "--info", "-sc"} & {*words}
    outcome = ghosttrain(*words, *(["-c", "job"] if cfg else []))
    if row["outcome"] == "works":
        assert outcome.code == 0 and outcome.out, outcome.err
    else:
        line = outcome.err.strip()
        assert outcome.code == 2 and line.endswith(row["outcome"]) and "\n" not in line, line


def test_the_page_has_its_rows():
    assert len(ROWS) == sum("| `" in line for line in _lines()) >= 55


def _lines() -> list[str]:
    return (ROOT / "docs" / "hydra.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("word", "candidates"),
    [
        ("model=ghostnetv3_1", ["ghostnetv3_100", "ghostnetv3_130", "ghostnetv3_160"]),
        ("optim.lr", ["optim.lr=", "optim.lr_batch="]),
        ("+recipe=compact", ["compact_kd"]),
        ("train.precision=", ["auto", "fp32", "bf16"]),
        ("train.compile=t", ["true"]),
        ("seed=1,", []),
        ("--cf", ["--cfg"]),
        (
            "ca",
            [
                "cache",
                "cache.dir=",
                "cache.digest=",
                "cache.draws=",
                "cache.codec=",
                "cache.shard_size=",
            ],
        ),
    ],
)
def test_words_are_completed(ghosttrain, word, candidates):
    outcome = ghosttrain("-sc", f"query={word}")
    assert outcome.out.split() == candidates


def test_a_shell_that_is_not_known_is_refused(ghosttrain):
    outcome = ghosttrain("-sc", "install=fish")
    assert outcome.code == 2 and outcome.err.endswith("type -sc install=bash or -sc install=zsh\n")
