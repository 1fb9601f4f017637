"""The table of results: damaged runs and starts without a step do not keep it back."""

import json
from pathlib import Path

import yaml

from ghosttrain.config.schema import Config
from ghosttrain.engine.folder import RESULT_KEYS
from ghosttrain.study.report import report


def leave_run(folder: Path, result: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(Config().model_dump(mode="json")))
    (folder / "provenance.json").write_text("{}")
    if result is not None:
        (folder / "result.json").write_text(result)
    return folder


def test_what_is_damaged_is_named_below_the_table_and_starts_are_counted(tmp_path):
    tops = {name: {"top1": 12.5, "top5": 50.0} for name in ("raw", "ema")}
    whole = dict.fromkeys(RESULT_KEYS, 0) | {"weights": tops, "seconds": 61.0}
    leave_run(tmp_path / "whole", json.dumps(whole))
    torn = leave_run(tmp_path / "torn", '{"weights": {')
    unread = leave_run(tmp_path / "unread", json.dumps(whole))
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
