"""The table of results: damaged runs and starts without a step do not keep it back."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import some_detection, some_result

from ghosttrain.config.schema import Config
from ghosttrain.engine.rows import row_line
from ghosttrain.engine.run_files import write_config
from ghosttrain.errors import UserError
from ghosttrain.files import write_json
from ghosttrain.study.report import report
from ghosttrain.study.table import markdown


def leave_run(folder: Path, result: dict | None, config: Config | None = None) -> Path:
    folder.mkdir(parents=True)
    write_config(folder, config or Config())
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
    assert "not better than that" in lines[-1]
    below = sorted(lines[3:-1])
    assert below[0].startswith(f"damaged: {torn / 'result.json'} is damaged (")
    assert below[1].startswith(f"damaged: {unread / 'config.yaml'} cannot be read (")
    assert below[2:] == [
        "left out: 3 starts of which no step was kept",
        f"not finished: {stopped}",
    ]


def test_rows_stand_in_the_order_of_their_values_and_classes_and_curves_are_compared(tmp_path):
    recall = {0.1: [90.0, 10.0], 0.02: [80.0, 40.0], 1.5: [70.0, 11.0]}
    for lr, values in recall.items():
        for seed in (0, 1):
            config = Config(seed=seed, optim=Config().optim.model_copy(update={"lr": lr}))
            result = some_result(config)
            result["classes"] = result["classes"] | {"recall": [v + seed for v in values]}
            run = leave_run(tmp_path / f"{lr}-{seed}", result, config)
            rows = [{"kind": "eval", "step": s, "ema_top1": s * lr + seed} for s in (5, 9)]
            (run / "metrics.jsonl").write_text("".join(f"{row_line(row)}\n" for row in rows))
    picture = tmp_path / "curves.png"
    lines = report([tmp_path], ["top1"], classes=True, curves=str(picture)).splitlines()
    assert [line.split("|")[1].strip() for line in (lines[0], *lines[2:5])] == [
        *"row 1 2 3".split()
    ]
    order = [line.split("optim.lr=")[1].split()[0] for line in lines[2:5]]
    assert order == ["0.02", "0.1", "1.5"]
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines[-5:-1]]
    assert table[0] == [
        "recall % of", "images", "row 1", "row 2, less row 1", "row 3, less row 1",
    ]  # fmt: skip
    assert table[2:] == [
        ["b", "2", "40.50", "10.50 (-30.00)", "11.50 (-29.00)"],  # differs most
        ["a", "6", "80.50", "90.50 (+10.00)", "70.50 (-10.00)"],
    ]
    assert lines[-1] == f"curves: {picture}" and picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="must be a folder that you may write"):
        report([tmp_path], curves=str(tmp_path / "nowhere" / "x" / "c.png"))


def test_swept_values_image_size_and_chosen_metrics_are_columns(tmp_path):
    for lr in (0.001, 0.002):
        for seed in (0, 1):
            config = Config(seed=seed, optim=Config().optim.model_copy(update={"lr": lr}))
            leave_run(tmp_path / f"{lr}-{seed}", some_result(config), config)
    head, _, first, second, note = report([tmp_path]).splitlines()[:5]
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    assert cells[:6] == ["recipe", "data", "model", "px", "settings", "seeds"]
    assert "EMA top-5 %" not in cells and "balanced %" in cells
    assert {"optim.lr=0.001", "optim.lr=0.002"} == {
        r.split("|")[5].strip() for r in (first, second)
    }
    assert "2 (0, 1)" in first and " 224 " in first
    where = "none digits ghostnetv3_100 optim.lr=0.001: "
    assert note.startswith(f"{where}note: always 'a' would reach 75.00 %")
    chosen = report([tmp_path], ["ece", "recall:b", "precision:a"]).splitlines()
    assert [c.strip() for c in chosen[0].strip("|").split("|")][6:] == [
        "ECE %", "recall % of b", "precision % of a", "time",
    ]  # fmt: skip
    cells = [cell.strip() for cell in chosen[2].split("|")]
    assert cells[7:9] == ["5.00 ± 0.00", "50.00 ± 0.00"]
    with pytest.raises(UserError, match="'recall:zebra': no run here has this class; .* a, b$"):
        report([tmp_path], ["recall:zebra"])
    with pytest.raises(UserError, match="no finished run here has the metric 'ap'"):
        report([tmp_path], ["ap"])
    with pytest.raises(UserError, match="there is no metric 'top2'.*Did you mean"):
        report([tmp_path], ["top2"])


def test_detectors_are_compared_by_ap_also_beside_classifiers(tmp_path):
    detector = Config().detector.model_copy(update={"name": "ssdlite"})
    for seed, ap in enumerate((10.0, 20.0)):
        config = Config(seed=seed, recipe="boxes", detector=detector)
        run = leave_run(tmp_path / f"boxes{seed}", some_detection(config, ap), config)
        (run / "metrics.jsonl").write_text(row_line({"kind": "eval", "step": 5, "ema_ap": ap}))
    columns = ["ap", "raw_ap", "ap_large", "no_look_ap", "ap:a", "ap:b"]
    picture = tmp_path / "curves.png"
    lines = report([tmp_path], columns, classes=True, curves=str(picture)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]
    assert dict(zip(cells[0], cells[2], strict=True)).items() >= {
        "EMA AP %": "15.00 ± 7.07", "raw AP %": "14.00 ± 7.07", "EMA AP large %": "-",
        "no look AP %": "2.50 ± 0.00", "AP % of a": "15.00 ± 7.07", "AP % of b": "-",
    }.items()  # fmt: skip
    assert cells[3][1:4] == ["AP % of", "boxes", "row 1"] and cells[5][1:4] == ["a", "6", "15.00"]
    assert picture.is_file()
    leave_run(tmp_path / "classes", some_result(Config()), Config())
    both = report([tmp_path], classes=True)
    assert "EMA AP %" in both and "EMA top-1 %" in both
    assert both.count("row 2") == 0  # of a classifier's classes there is no AP


def test_a_bar_in_a_name_makes_no_column_of_a_table():
    head, _, row = markdown([["arm", "n"], ["a|b", "3"]])
    assert row == r"| a\|b | 3 |" and head.count("|") == 3
