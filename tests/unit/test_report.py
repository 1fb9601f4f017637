"""The table of results: damaged runs and starts without a step do not keep it back."""

from __future__ import annotations

from pathlib import Path

from helpers import some_result

from ghosttrain.config.schema import Config
from ghosttrain.engine.run_files import write_config
from ghosttrain.files import write_json
from ghosttrain.study.report import report


def leave_run(folder: Path, result: dict | None) -> Path:
    folder.mkdir(parents=True)
    write_config(folder, Config())
    write_json(folder / "provenance.json", {})
    if result is not None:
        write_json(folder / "result.json", result)
    return folder


def test_what_is_damaged_is_named_below_the_table_and_starts_are_counted(tmp_path):
    whole = some_result(Config())
    leave_run(tmp_path / "whole", whole)
    torn = leave_run(tmp_path / "torn", whole)
    (torn / "result.json").write_text('{"weights": {')
    unread = leave_run(tmp_path / "unread", whole)
    (unread / "config.yaml").write_text("optim: 3")
    stopped = leave_run(tmp_path / "stopped", None)
    (stopped / "metrics.jsonl").write_text("{}\n")
    assert report([stopped]).splitlines()[2:] == [f"not finished: {stopped}"]
    for number in range(3):
        leave_run(tmp_path / f"start{number}", None)
    lines = report([tmp_path]).splitlines()
    assert "12.50" in lines[2] and "1:01" in lines[2]
    below = sorted(lines[3:])
    assert below[0].startswith(f"damaged: {torn / 'result.json'} is damaged (")
    assert below[1].startswith(f"damaged: {unread / 'config.yaml'} cannot be read (")
    assert below[2:] == [
        "left out: 3 starts of which no step was kept",
        f"not finished: {stopped}",
    ]
