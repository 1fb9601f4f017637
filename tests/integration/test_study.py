"""A declared study: what runs, what is reported, what is said of what is missing."""

import csv
import html
import json
import re
import shlex
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers import make_images, refusal, some_detection, some_result
from scipy import stats

from ghosttrain.config.compose import compose
from ghosttrain.config.identity import typed_hash
from ghosttrain.config.names import Names
from ghosttrain.engine.folder import run_folder
from ghosttrain.engine.identify import settled
from ghosttrain.engine.rows import row_line
from ghosttrain.engine.run_files import write_config, write_result
from ghosttrain.files import read_json, write_json
from ghosttrain.study import sweep
from ghosttrain.study.ledger import COSTS, read_runs
from ghosttrain.study.studies import (
    PREVIOUS,
    controls,
    load_study,
    study_cells,
    study_names,
)
from ghosttrain.study.study_pictures import pareto_front
from ghosttrain.study.study_report import keep_rows, study_report

STUDY = """
about: Does a higher learning rate help?
overrides: [+recipe=baseline, model=shufflenetv2_050, train.epochs=1]
axes:
  rate:
    low: [optim.lr=0.001]
    high: [optim.lr=0.01]
  order:
    once: []
    twice: [train.epochs=2]
control: low + once
seeds: [0, 1, 2]
"""
DETECTORS = """
about: Does a higher learning rate detect better?
overrides: [+recipe=detect_ssdlite, model=mobilenetv2_050]
axes: {rate: {low: [optim.lr=0.1], high: [optim.lr=0.2]}}
control: low
seeds: [0, 1]
metric: ap
"""
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
ARMS = ["low + once", "low + twice", "high + once", "high + twice"]


@pytest.fixture
def folder(tmp_path):
    """Return a user's own folder with the study `rates`."""
    (tmp_path / "own" / "study").mkdir(parents=True)
    (tmp_path / "own" / "study" / "rates.yaml").write_text(STUDY)
    return str(tmp_path / "own")


@pytest.fixture
def launched(monkeypatch):
    """Let every run end at once with a top-1 made of its settings; some fail. Keep what ran."""
    ran, failing = [], set()

    def top1(config):
        jitter = (config.seed * 7 + round(config.optim.lr * 1000) * 3 + config.train.epochs) % 5
        return 50.0 + 3 * config.seed + 200 * config.optim.lr + config.train.epochs + jitter / 10

    def launch(composed, run_everywhere=None):
        config = settled(composed)
        ran.append((config.optim.lr, config.train.epochs, config.seed))
        if ran[-1] in failing:
            return 137
        run = run_folder(config)
        run.mkdir(parents=True)
        write_config(run, config)
        write_json(run / "provenance.json", {"code": "c0de", "started": "today"})
        result = some_result(config)
        result["weights"]["ema"]["top1"] = top1(config)
        result["seconds"] = 60.0 + config.optim.lr * 1000 if config.train.epochs == 1 else 9.0
        result["model"] |= {"macs_fused": 10**6 * int(config.model.name[-3:])}
        write_result(run, result)
        curve = [{"kind": "eval", "step": s, "ema_top1": top1(config) - 9 / s} for s in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("".join(f"{row_line(row)}\n" for row in curve))
        return 0

    monkeypatch.setattr(sweep, "launch", launch)
    return ran, failing, top1


def one_line(outcome):
    """Return the one line of a refusal."""
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    return outcome.err


def table(text):
    """Return arm -> its cells in the last table printed."""
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    return {row[0]: row[1:] for row in rows[-len(ARMS) :]}


def test_what_is_missing_runs_and_the_report_is_right(ghosttrain, folder, launched, tmp_path):
    ran, failing, _ = launched
    where = ["--config-dir", folder, "budget=full", f"run.root={tmp_path / 'runs'}"]
    failing.add((0.01, 1, 1))
    first = ghosttrain("study", "run", "rates", *where)
    assert first.code == 1 and len(ran) == 12
    assert [seed for *_, seed in ran] == [0] * 4 + [1] * 4 + [2] * 4  # whole pairs first
    assert "runs: 12 = 4 arms x 3 seeds (0, 1, 2); 0 finished, 12 to run" in first.out
    assert "length: 18 epochs in all; the time is known when a run has finished" in first.out
    assert "failed: " in first.err and "optim.lr=0.01" in first.err and "exit code 137" in first.err
    assert "- failed (exit code 137): high + once, seed 1" in first.out
    assert table(first.out)["high + once"][0] == "2"

    failing.clear()
    second = ghosttrain("study", "run", "rates", *where)
    assert second.code == 0 and ran[12:] == [(0.01, 1, 1)]
    assert "time: about 1:10, one after another" in second.out  # the other seeds of the arm: 70 s
    report = ghosttrain("study", "report", "rates", *where)
    assert report.code == 0 and report.out in second.out and len(ran) == 13
    assert "# rates: data digits, model shufflenetv2_050, budget full" in report.out

    study = load_study("rates", folder)
    values = {arm: [] for arm in ARMS}
    cells = study_cells(study, where[2:], folder)
    for cell in cells:
        result = json.loads((cell.folder / "result.json").read_text())
        values[cell.arm].append(result["weights"]["ema"]["top1"])
    p = {arm: stats.ttest_rel(values[arm], values["low + once"]).pvalue for arm in ARMS[1:]}
    smallest = min(p, key=p.get)
    shown = table(report.out)
    for arm in ARMS:
        mean, deviation = statistics.mean(values[arm]), statistics.stdev(values[arm])
        assert shown[arm][:2] == ["3", f"{mean:.2f} ± {deviation:.2f}"]
    for arm in ARMS[1:]:
        differences = [a - b for a, b in zip(values[arm], values["low + once"], strict=True)]
        mean, spread = statistics.mean(differences), statistics.stdev(differences)
        half = stats.t.ppf(0.975, 2) * spread / 3**0.5
        assert shown[arm][2:4] == [f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"]
    assert shown[smallest][4] == f"{min(1, 3 * p[smallest]):.3f}"

    power = ghosttrain("study", "power", "rates", "--difference", "0.5", *where)
    assert power.code == 0 and "difference of 0.5 with a chance of 80 %" in power.out
    assert power.out.count("| 3 ") >= 3
    for arm in ARMS[1:]:
        pairs, deviation, most, *_ = table(power.out)[arm]
        assert pairs == "3" and float(most) == pytest.approx(6.28 * float(deviation), abs=0.05)
    by_other = ghosttrain("study", "report", "rates", "--metric", "macro_f1", *where)
    assert "macro F1 %" in by_other.out and "EMA top-1" not in by_other.out
    files = [c.folder / "result.json" for c in cells if c.arm == cell.arm]
    f1 = [json.loads(f.read_text())["weights"]["ema"]["macro_f1"] for f in files]
    assert (
        table(by_other.out)[cell.arm][1]
        == f"{statistics.mean(f1):.2f} ± {statistics.stdev(f1):.2f}"
    )


def test_damaged_and_other_seeds_are_in_no_mean(ghosttrain, folder, launched, tmp_path):
    where = ["--config-dir", folder, "budget=full", f"run.root={tmp_path / 'runs'}"]
    assert ghosttrain("study", "run", "rates", "seed=5,6", *where).code == 0
    assert {seed for *_, seed in launched[0]} == {5, 6}
    cells = study_cells(load_study("rates", folder), ["seed=5,6", *where[2:]], folder)
    file = cells[0].folder / "result.json"
    file.write_bytes(file.read_bytes()[:-40])
    for record in (tmp_path / "runs" / ".sweeps").glob("*/*.json"):  # the file says more than this
        write_json(record, {**read_json(record, 10**6), "exit_code": 1})
    report = ghosttrain("study", "report", "rates", "seed=5,6", *where)
    assert report.code == 0 and table(report.out)["low + once"][0] == "1"
    assert "- damaged: " in report.out and ": low + once, seed 5" in report.out
    assert "Held-out images: 8, one is 12.50 points" in report.out
    assert "largest class would reach 75.00 % top-1." in report.out
    assert "Not better than that: " in report.out and "seed 6 (" in report.out
    assert "p is corrected for all 3 of the study" in report.out
    assert "failed" not in report.out
    assert table(report.out)["high + once"][3] == "1 pair"  # one pair is left
    assert ghosttrain("study", "report", "rates", *where).out.count("- not run: ") == 4


def test_runs_of_a_csv_count_where_their_folders_are_not(ghosttrain, folder, launched, tmp_path):
    where = [
        "--config-dir",
        folder,
        "--out",
        str(tmp_path / "out"),
        f"run.root={tmp_path / 'runs%20'}",
        "budget=full",
        "seed=0,1",
    ]
    launched[1].add((0.01, 1, 1))
    assert ghosttrain("study", "run", "rates", *where).code == 1 and len(launched[0]) == 8
    report = ghosttrain("study", "report", "rates", *where).out
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith(report)
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["effects.png", "learning.png"]  # one model: there is no front to draw
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page.replace("http-eq", "")
    assert page.count("<li>") == 9 and "failed (exit code 137): high + once, seed 1" in page
    links = re.findall(r'href="([^"]+)/"', page)
    assert len(links) == 7
    assert all((tmp_path / "out" / unquote(link)).is_dir() for link in links)
    assert all(html.escape(cell) in page for row in table(report).values() for cell in row)
    assert "not ImageNet" in page and "not ImageNet" in report
    launched[1].clear()
    (tmp_path / "runs%20").rename(tmp_path / "elsewhere")
    report = report.replace("failed (exit code 137)", "not run")  # the sweep's folder is not here
    assert ghosttrain("study", "report", "rates", *where).out == report
    assert ghosttrain("study", "run", "rates", *where).code == 0
    assert launched[0][8:] == [(0.01, 1, 1)]
    file = tmp_path / "out" / "runs.csv"
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert len(rows) == 8 and {row["arm"] for row in rows} == {*ARMS}
    assert {(row["code"], row["started"]) for row in rows} == {("c0de", "today")}
    for row in rows:  # the command of a row is the run that its numbers are of
        assert row["command"].endswith(f" --config-dir {folder}")
        assert (f"# {row['arm']}\n{row['command']}\n" in text) == (row["seed"] == "0")
        *_, words = row["command"].partition("ghosttrain ")
        composed = compose(shlex.split(words)[:-2], folder)
        top1 = launched[2](composed.config)
        assert float(row["top1"]) == top1
        assert row["curve"] == f"1:{top1 - 9:.2f} 2:{top1 - 4.5:.2f} 3:{top1 - 3:.2f}"
    (run, *_) = (tmp_path / "runs%20").rglob("result.json")
    run.write_text("{")
    assert "its row in runs.csv counts: " in ghosttrain("study", "report", "rates", *where).out
    other = ghosttrain("study", "report", "rates", *where[:-1], "seed=7")
    assert other.code == 0 and file.read_text().count("\n") == 9  # other seeds' rows are kept

    whole = file.read_text()
    file.write_text(whole.replace(",0,", ",x,", 1))
    damaged = one_line(ghosttrain("study", "run", "rates", *where))
    assert f"{file}, line 2: damaged" in damaged
    file.write_text("a,b\n1,2\n")
    assert "the column 'arm' is missing" in one_line(ghosttrain("study", "run", "rates", *where))
    file.unlink()
    (tmp_path / "file").write_text("")
    where[3] = str(tmp_path / "file")
    assert "type another --out" in one_line(ghosttrain("study", "report", "rates", *where))


def test_a_study_that_is_stopped_keeps_what_ran(
    ghosttrain, folder, launched, tmp_path, monkeypatch
):
    launch = sweep.launch

    def stopped(composed, run_everywhere=None):
        if len(launched[0]) == 3:
            raise KeyboardInterrupt
        return launch(composed, run_everywhere)

    monkeypatch.setattr(sweep, "launch", stopped)
    words = ["--config-dir", folder, f"run.root={tmp_path / 'runs'}", "budget=full", "seed=0"]
    assert ghosttrain("study", "run", "rates", *words, "--out", tmp_path / "out").code == 130
    kept = read_runs(tmp_path / "out" / "runs.csv").values()
    assert {row["arm"] for row in kept} == {*ARMS[:3]}


@pytest.mark.parametrize("budget", [["budget=full"], []], ids=["full", "small"])
def test_a_row_counts_wherever_its_images_lie(
    ghosttrain, folder, launched, image_folder, tmp_path, budget
):
    """Also where the budget is computed from the number of images."""
    where = ["--config-dir", folder, "--out", tmp_path / "out", "seed=0", *budget]
    where += [f"run.root={tmp_path / 'runs'}", "data=folder"]
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(image_folder, here)
    assert ghosttrain("study", "run", "rates", *where, f"data.root={here}").code == 0
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    here.rename(there)
    again = ghosttrain("study", "run", "rates", *where, f"data.root={there}")
    assert again.code == 0 and "4 finished, 0 to run" in again.out and len(launched[0]) == 4
    rows = (tmp_path / "out" / "runs.csv").read_text()
    # The images are nowhere: what was typed is what runs are known by. A report needs no images.
    report = ghosttrain("study", "report", "rates", *where, f"data.root={here}")
    assert report.code == 0 and table(report.out)["low + once"][0] == "1", report.err
    assert "data folder here" in report.out and "other images" not in report.out
    known = "full" if budget else "not known (its images are not here)"
    assert f"budget {known}, px" in report.out.splitlines()[0]
    # Other images lie there now: their runs count, and the report says so.
    make_images(here, classes=2)
    other = ghosttrain("study", "report", "rates", *where, f"data.root={here}")
    assert "4 runs of runs.csv saw other images" in other.out
    seeds = [word.replace("seed=0", "seed=0,1") for word in map(str, where)]
    mixed = ghosttrain("study", "run", "rates", *seeds, f"data.root={here}")
    said = (
        "- low + once: runs of different images, teachers or other weights under the same paths: "
    )
    assert mixed.code == 0 and f"{said}seed 0 (" in mixed.out and "; seed 1 (" in mixed.out
    assert "different images" not in report.out
    rows = (tmp_path / "out" / "runs.csv").read_text()
    other = ghosttrain("study", "report", "rates", *where, f"data.root={here}")
    assert (tmp_path / "out" / "runs.csv").read_text() == rows
    elsewhere = ghosttrain("study", "report", "rates", *where, f"data.root={tmp_path / 'no'}")
    assert table(elsewhere.out)["low + once"][0] == "0"
    assert "of other settings or seeds than this command: high + once seed 0" in elsewhere.out


def test_a_row_keeps_what_a_later_report_does_not_ask_for(folder, tmp_path):
    words = [f"run.root={tmp_path / 'runs'}", "seed=0"]
    cell, out = study_cells(load_study("rates", folder), words, folder)[0], tmp_path / "out"
    costs = dict.fromkeys(COSTS, 1.0)
    for more in ({"recall:7": 2.0}, {}, {"recall:3": 3.0}):
        keep_rows([replace(cell, numbers={"top1": 50.0, **more, **costs})], out)
    assert read_runs(out / "runs.csv")[cell.key]["recall:7"] == "2.0"
    keep_rows([replace(cell, numbers={"top1": 60.0, **costs})], out)  # another run: nothing of it
    assert "recall:7" not in read_runs(out / "runs.csv")[cell.key]


def test_p_counts_the_comparisons_that_have_not_run(folder, tmp_path):
    study, values = (
        load_study("rates", folder),
        {"low + once": (50, 51, 54), "low + twice": (52, 54, 55)},
    )
    words, costs = [f"run.root={tmp_path / 'runs'}"], dict.fromkeys(COSTS, 1.0)
    cells = [
        replace(cell, numbers={"top1": values[cell.arm][cell.seed], **costs})
        if cell.arm in values
        else cell
        for cell in study_cells(study, words, folder)
    ]
    p = stats.ttest_rel(values["low + twice"], values["low + once"]).pvalue
    assert f"| {min(1, 3 * p):.3f} " in study_report("rates", study, cells)


def test_what_an_arm_is_compared_with(ghosttrain, folder, launched, tmp_path):
    """With the arm of one choice in place of its own; with the arm before it."""
    study = load_study("rates", folder)
    assert controls(study) == dict.fromkeys(ARMS[1:], ARMS[0])
    by_rate = study.model_copy(update={"control": "low"})
    assert controls(by_rate) == {"high + once": "low + once", "high + twice": "low + twice"}
    in_turn = study.model_copy(update={"control": PREVIOUS})
    assert controls(in_turn) == dict(zip(ARMS[1:], ARMS, strict=False))
    assert controls(study.model_copy(update={"control": "low + high"})) == {}
    alike = {axis: {"none": [], "some": ["seed=1"]} for axis in ("branches", "teacher")}
    both = study.model_copy(update={"axes": alike, "control": "none + none"})
    assert {*controls(both)} == {"none + some", "some + none", "some + some"}
    joined = {"parts": {"none": [], "KD + EMA": []}}
    one = study.model_copy(update={"axes": joined, "control": "KD + EMA"})
    assert controls(one) == {"none": "KD + EMA"}

    file = tmp_path / "own" / "study" / "rates.yaml"
    file.write_text(STUDY.replace("control: low + once", "control: previous"))
    words = ["rates", "--config-dir", folder, f"run.root={tmp_path / 'runs'}", "budget=full"]
    done = ghosttrain("study", "run", *words, "seed=0,1", "--out", tmp_path / "o")
    assert done.code == 0 and "Control of an arm: the one before it." in done.out
    shown = table(done.out)
    means = {arm: float(shown[arm][1].split(" ")[0]) for arm in ARMS}
    for arm, before in zip(ARMS[1:], ARMS, strict=False):
        assert float(shown[arm][2]) == pytest.approx(means[arm] - means[before], abs=0.011)
    assert shown[ARMS[0]][2] == "control"
    power = ghosttrain("study", "power", *words, "seed=0,1")
    assert "paired t-test at 5 % / 3 comparisons" in power.out

    (tmp_path / "runs" / "baseline").rename(tmp_path / "gone")  # a row without a later column
    lacking = ghosttrain(
        "study", "report", *words, "seed=0,1", "--out", tmp_path / "o", "--metric", "recall:7"
    )
    assert "- finished, without recall:7: low + once, seed 0, 1" in lacking.out


@pytest.mark.parametrize("name", sorted(p.parent.name for p in RESULTS.glob("*/runs.csv")))
def test_published_runs_are_still_known_by_their_commands(name):
    """Without images, teacher, stored outputs: a changed default or recipe would run them anew."""
    rows = list({id(row): row for row in read_runs(RESULTS / name / "runs.csv").values()}.values())
    for row in (rows[0], rows[-1]):
        words = shlex.split(row["command"])[3:]
        composed = compose(words, needs_data=False, needs_weights=False)
        assert typed_hash(composed.config, composed.arguments) == row["typed"], row["arm"]


def test_the_arms_of_a_policy_find_the_outputs_stored_for_it(tmp_path):
    """A folder of `cache.dir` by settings; a mixed image has no stored output."""
    answers = (
        "cache.dir="
        + str(tmp_path)
        + "/${augment.policy}-${augment.randaugment_ops}-${augment.erasing_prob}"
    )
    words = ["model=mobilenetv2_050", "teacher=efficientnet_lite0", "seed=0", answers]
    words += ["data=idx", "data.root=."]
    cells = study_cells(load_study("augment"), words, None)
    folders = {cell.arm: Path(cell.config.cache.dir or "/none").name for cell in cells}
    assert folders == {
        "none": "none-2-0.25", "crop and flip": "compact-0-0", "+RandAugment": "compact-2-0",
        "+RandomErasing": "compact-2-0.25", "+Mixup": "none", "+CutMix": "none",
        "+Mixup and CutMix": "none",
    }  # fmt: skip


def test_published_values_stand_beside_imagenet_runs_only(ghosttrain, folder, launched, tmp_path):
    (tmp_path / "own" / "study" / "sizes.yaml").write_text("""
about: Which size?
overrides: [+recipe=baseline, train.epochs=1]
axes: {model: {small: [model=ghostnetv3_050], large: [model=ghostnetv3_130]}}
control: small
seeds: [0]
""")
    (tmp_path / "images").mkdir()
    where = ["--config-dir", folder, f"run.root={tmp_path / 'runs'}"]
    imagenet = [*where, "data=imagenet", f"data.root={tmp_path / 'images'}"]
    line = "Published: ghostnetv3_130, 600 epochs: 79.1 % (https://arxiv.org/abs/2404.11202)."
    out = tmp_path / "out"
    assert ghosttrain("study", "run", "sizes", *imagenet, "--out", str(out)).code == 0
    assert (out / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    report = ghosttrain("study", "report", "sizes", *imagenet).out
    assert report.count("Published: ") == 1 and line in report
    assert "not ImageNet" not in report
    beside_one = where[:2] + [*imagenet[2:], "model=ghostnetv3_130", "--out", str(tmp_path / "one")]
    assert ghosttrain("study", "report", "rates", *beside_one, "seed=0").code == 0
    assert not (tmp_path / "one" / "pareto.png").exists()
    assert ghosttrain("study", "run", "rates", *beside_one, "seed=0").code == 0
    assert (tmp_path / "one" / "pareto.png").exists(), "one MACs value, beside a published one"
    for other in (["data.eval_size=256"], ["data=digits"]):
        assert "Published" not in ghosttrain("study", "report", "sizes", *imagenet, *other).out


def test_an_arm_keeps_what_it_says_and_has_nothing_of_what_it_switches_off():
    words = ["model=mobilenetv2_050", "teacher=efficientnet_lite0", "teacher.check_samples=7"]
    words += ["distill.temperature=3", "ema.decay=0.9", "data=idx", "data.root=."]
    arms = {cell.arm: cell.composed.config for cell in
            study_cells(load_study("ladder"), [*words, "seed=0"], None)}  # fmt: skip
    assert [config.teacher.name for config in arms.values()] == [
        None, None, *["tf_efficientnet_lite0"] * 3,
    ]  # fmt: skip
    assert arms["baseline"].teacher.check_samples == 512 and arms["+KD"].teacher.check_samples == 7
    assert [c.distill.temperature for c in arms.values()] == [1, 1, 3, 3, 3]
    assert [c.ema.decay for c in arms.values()] == [0, 0, 0, 0.9, 0.9]


def test_the_front_is_what_no_other_arm_beats():
    points = {"a": (3.0, 70.0), "b": (1.0, 60.0), "c": (2.0, 59.0), "d": (3.0, 69.0)}
    assert pareto_front(points) == ["b", "a"]
    losses = {"a": (3.0, -0.9), "b": (1.0, -0.4), "c": (2.0, -1.2)}  # lower is better: less 0
    assert pareto_front(losses) == ["b"]
    beaten = {
        one
        for one, (macs, value) in points.items()
        for other, (cost, best) in points.items()
        if one != other and cost <= macs and best >= value
    }
    assert beaten == {"c", "d"}


def test_detectors_are_compared_by_ap(ghosttrain, folder, monkeypatch, tmp_path):
    (tmp_path / "own" / "study" / "boxes.yaml").write_text(DETECTORS)
    asked = []

    def launch(composed, run_everywhere=None):
        config = settled(composed)
        run = run_folder(config)
        run.mkdir(parents=True)
        write_config(run, config)
        asked.append(config)
        write_result(run, some_detection(config, 10 + config.seed + 5 * (config.optim.lr > 0.1)))
        row = {"kind": "eval", "step": 1, "ema_ap": 3.0}
        (run / "metrics.jsonl").write_text(row_line(row) + "\n")
        return 0

    monkeypatch.setattr(sweep, "launch", launch)
    where = ["--config-dir", folder, f"run.root={tmp_path / 'runs'}", "--out", str(tmp_path / "o")]
    done = ghosttrain("study", "run", "boxes", *where)
    assert done.code == 0 and len(asked) == 4, done.err
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in done.out.splitlines()]
    shown = {row[0]: row for row in rows if len(row) > 5}
    assert shown["arm"][2] == "EMA AP %" and shown["arm"][6] == "EMA AP50 %"
    assert shown["low"][2] == "10.50 ± 0.71" and shown["high"][2:4] == ["15.50 ± 0.71", "+5.00"]
    assert shown["high"][6] == "31.00 ± 1.41"
    assert "ignores the picture reaches 2.50 % AP." in done.out
    assert "These are not COCO runs" in done.out and "ImageNet" not in done.out
    (row, *_) = csv.DictReader((tmp_path / "o" / "runs.csv").read_text().splitlines())
    assert (row["ap"], row["no_look_ap"], row["curve"]) == ("10", "2.5", "1:3.00")
    other = DETECTORS.replace("metric: ap", "metric: top1")
    (tmp_path / "own" / "study" / "boxes.yaml").write_text(other)
    refused = one_line(ghosttrain("study", "report", "boxes", *where))
    assert "arm 'low' detects" in refused and "write metric: ap" in refused


@pytest.mark.parametrize("name", study_names(Names(None)))
def test_every_shipped_study_composes_and_its_arms_differ(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for weights in ("digits_baseline", "digits_compact_kd"):  # of detect_transfer
        (tmp_path / "runs" / weights).mkdir(parents=True)
    study = load_study(name)
    words = [] if "model" in study.axes else ["model=mobilenetv2_050"]
    words += [f"data.root={tmp_path}"] if "data=imagenet" in study.overrides else []
    cells = study_cells(study, [*words, "seed=0"], None)
    assert len({cell.folder for cell in cells}) == len(cells) > 1
    assert study.about.endswith("?")


def test_refusals(ghosttrain, folder, tmp_path):
    def line(*words):
        return one_line(ghosttrain("study", *words))

    assert "type study run, report, power or list" in line()
    assert "type study run, report, power or list" in line("rnu", "ladder")
    assert "there is no study 'lader'" in line("run", "lader")
    assert "Did you mean 'ladder'?" in line("report", "lader")
    assert "study run needs one name" in line("run")
    assert "whole numbers, such as seed=0,1,2" in line("run", "ladder", "seed=a")
    assert "a seed stands twice" in line("run", "ladder", "seed=1,1")
    assert "are the same run" in line("run", "ladder", "ema=none")
    assert "arm 'baseline': " in line("run", "ladder", "optim.rl=1")
    assert "--difference 'x' is no number" in line("power", "ladder", "--difference", "x")
    for number in ("0", "nan", "inf"):
        assert "give a number above 0" in line("power", "ladder", "--difference", number)
    assert "have one folder" in line("run", "ladder", "run.name=x")
    (tmp_path / "taken").write_text("")
    taken = ["seed=0", "--out", str(tmp_path / "taken")]
    assert "cannot write" in line("run", "ladder", f"run.root={tmp_path / 'runs'}", *taken)
    assert "Did you mean 'balanced'?" in line("report", "ladder", "--metric", "balance")
    assert "type --metric top1" in line("report", "ladder", "--metric", "ap")
    assert line("report", "ladder", "--metric", "acc").count("macro_f1") == 1
    assert "--out is empty" in line("report", "ladder", "--out", "")
    assert "study list takes no other words, not 'ladder'" in line("list", "ladder")
    assert "a seed stands twice" in line("run", "ladder", "++seed=1,1")
    runs = f"run.root={tmp_path / 'runs'}"
    assert "no arm has two finished seeds" in line("power", "ladder", "seed=0", runs)
    assert "no launcher of this name" in line(
        "run", "ladder", "seed=0", runs, "hydra/launcher=nowhere"
    )
    file = tmp_path / "own" / "study" / "rates.yaml"
    for old, new, said in (
        ("control: low + once", "control: lo", "the control 'lo' is no arm"),
        ("seeds: [0, 1, 2]", "seeds: [0, 0]", "a seed stands twice"),
        ("seeds: [0, 1, 2]", "seeds: []", "seeds"),
        ("seeds:", "sedes:", "seeds: Field required; a study says about, axes, control and seeds"),
        ("    once: []", "    once: [seed=3]", "'seed=3': the seeds of a study stand below seeds"),
        ("    high:", "    low:", "found duplicate key low"),
        ("control:", "extra: 1\ncontrol:", "extra"),
        ("axes:", "axes: [", "not readable YAML"),
        ("seeds:", "metric: top2\nseeds:", "there is no metric 'top2'"),
    ):
        file.write_text(STUDY.replace(old, new))
        assert said in refusal(lambda: load_study("rates", folder))
    in_turn = STUDY.replace("control: low + once", "control: previous")
    file.write_text(in_turn.replace("once:", "previous:"))
    assert "give the choice another" in refusal(lambda: load_study("rates", folder))
    file.with_name("folder.yaml").mkdir()
    assert "there is no study 'folder'" in line("run", "folder", "--config-dir", folder)
    file.with_name("ladder.yaml").write_text(STUDY)
    assert "ladder" in line("run", "ladder", "--config-dir", folder)


def test_list_names_every_study(ghosttrain, folder):
    outcome = ghosttrain("study", "list", "--config-dir", folder)
    assert outcome.code == 0
    for name in study_names(Names(folder)):
        assert f"| {name} " in outcome.out


@pytest.mark.parametrize("name", ["ladder", "leave_one_out", "distill_loss", "students", "reparam"])
def test_one_cache_and_one_teacher_serve_a_study_with_an_arm_that_has_none(name: str) -> None:
    words = ["teacher=digits", "cache.dir=answers", "seed=0"]
    words += ["model=mobilenetv2_050"] * (name != "students")
    cells = study_cells(load_study(name), words, None)
    taught = [cell for cell in cells if "distill=none" not in " ".join(cell.words)]
    assert taught and len(cells) >= 5
