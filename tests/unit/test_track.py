"""What a run notes: means of the losses, rows of metrics, and places that fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import only_run
from torch import tensor

import ghosttrain
from ghosttrain.config.compose import compose
from ghosttrain.config.schema import Config, TrainConfig
from ghosttrain.engine import distributed, track
from ghosttrain.engine.plan import Plan, make_plan
from ghosttrain.engine.rows import read_metrics, read_rows, row_line
from ghosttrain.engine.track import (
    Journal,
    Meter,
    Tracker,
    describe,
)
from ghosttrain.errors import UserError

ROW = {"loss": 1.25, "label": 1.0, "kl": 0.25, "lr": 0.00123, "images_per_second": 540.4}


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


def taken(meter: Meter, losses: dict[str, torch.Tensor], images: int) -> None:
    """Add a step of one micro-batch, which passed."""
    meter.add(losses, images)
    meter.end_step(tensor(True))


def test_a_meter_gives_means_of_the_losses_and_images_a_second(clock):
    meter = Meter()
    for loss, kl in ((1.0, 0.5), (2.0, 0.25), (4.5, 0.0)):
        taken(meter, {"loss": tensor(loss, requires_grad=True), "kl": tensor(kl)}, images=8)
    clock.now += 4
    assert meter.read() == {"loss": 2.5, "kl": 0.25, "images_per_second": 6.0}
    taken(meter, {"loss": tensor(7.0), "kl": tensor(1.0)}, images=3)  # nothing is left of the first
    clock.now += 2
    assert meter.read() == {"loss": 7.0, "kl": 1.0, "images_per_second": 1.5}


def test_a_meter_counts_nothing_of_a_step_that_was_left_out(clock):
    """A step of two micro-batches, the second of them broken, beside a good one; then none."""
    meter = Meter()
    taken(meter, {"loss": tensor(3.0)}, images=4)
    for loss in (1.0, float("nan")):
        meter.add({"loss": tensor(loss)}, images=4)
    meter.end_step(tensor(False))
    saved = meter.state()
    assert (saved["count"], saved["sums"]) == (1, {"loss": tensor(3.0)})
    clock.now += 4
    assert meter.read() == {"loss": 3.0, "images_per_second": 3.0}
    clock.now += 4
    meter.add({"loss": tensor(float("inf"))}, images=4)
    meter.end_step(tensor(False))
    assert meter.read() == {}


def test_a_meter_goes_on_where_that_of_a_stopped_run_was(clock):
    meter = Meter()
    taken(meter, {"loss": tensor(3.0)}, images=6)
    clock.now += 2
    saved = meter.state()
    clock.now += 50
    meter = Meter()
    meter.restore([saved], torch.device("cpu"))
    meter.start()
    taken(meter, {"loss": tensor(1.0)}, images=4)
    clock.now += 3
    assert meter.read() == {"loss": 2.0, "images_per_second": 2.0}
    other = {**saved, "sums": {"loss": tensor(5.0)}}  # of another rank, of two; now there is one
    meter.restore([saved, other], torch.device("cpu"))
    meter.start()
    assert meter.read()["loss"] == 4.0


def test_a_meter_keeps_sums_of_half_precision_and_no_graph():
    meter = Meter()
    weight = tensor(1.0, requires_grad=True)
    for _ in range(3):
        taken(meter, {"loss": (weight * 2).to(torch.bfloat16)}, images=1)
    assert not meter.sums["loss"].requires_grad
    assert meter.read()["loss"] == 2.0


def test_a_meter_gives_the_mean_over_ranks(monkeypatch, clock):
    """Two ranks of three passes each: the other's sums come through `all_sum`."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_sum", lambda sums: sums + tensor([9.0, 3.0]))
    meter = Meter()
    for loss in (1.0, 2.0, 3.0):
        taken(meter, {"loss": tensor(loss), "kl": tensor(1.0)}, images=16)
    clock.now += 1
    assert meter.read() == {"loss": 2.5, "kl": 1.0, "images_per_second": 48.0}


def plan_of(total: int) -> Plan:
    """A plan of one epoch: only its end is evaluated."""
    train = {"global_batch": 1, "max_steps": total, "epochs": 1}
    return make_plan(Config(train=TrainConfig(**train)), total + 1, ranks=1)


def started(folder: Path, *, step: int = 0, total: int = 100, **tracker) -> Tracker:
    config = Config()
    config = config.model_copy(update={"tracker": config.tracker.model_copy(update=tracker)})
    return Tracker(config, plan_of(total), step, folder)


def test_rows_and_lines_are_in_the_folder_as_soon_as_they_are_written(tmp_path, capsys):
    with started(tmp_path) as tracker:
        tracker.say("a line")
        tracker.log("train", 10, ROW)
        tracker.log("eval", 10, {"ema_top1": 50.0})
        assert read_metrics(tmp_path) == [
            {"kind": "train", "step": 10, **ROW},
            {"kind": "eval", "step": 10, "ema_top1": 50.0},
        ]
        assert (tmp_path / "log.txt").read_text() == capsys.readouterr().out == "a line\n"


def test_other_ranks_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Tracker(Config(), plan_of(100), 0, None) as tracker:
        tracker.say("a line")
        tracker.log("train", 10, ROW)
        tracker.draw_curves("title")
        assert tracker.eta(10) == "?" and tracker.about() == []
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_resumed_run_forgets_the_rows_of_steps_that_run_again(tmp_path, capsys):
    with started(tmp_path) as tracker:
        for step in (10, 20, 30):
            tracker.log("train", step, ROW)
        tracker.log("eval", 30, {"ema_top1": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut short by a kill
    with started(tmp_path, step=20) as tracker:
        assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]
        tracker.log("train", 30, ROW)
        tracker.log("eval", 30, {"ema_top1": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30, 30]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4
    assert "are lost" not in capsys.readouterr().out
    started(tmp_path, step=50)
    assert "metrics.jsonl: the rows after step 30 to step 50 are lost" in capsys.readouterr().out
    started(tmp_path, step=30, total=30)  # the evaluation of its last step runs again
    assert [row["kind"] for row in read_metrics(tmp_path)] == ["train"] * 3


def test_lines_that_are_no_rows_are_left_out(tmp_path, capsys):
    assert read_metrics(tmp_path) == []
    row = {"kind": "train", "step": 1, "loss": 0.1}
    line = f"{row_line(row)}\n".encode()
    flipped = line.replace(b"0.1", b"0.3")
    lines = line + b"\n12\n\xff\x00\n" + flipped + line + b'{"kind": "tr'
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    assert read_rows(tmp_path) == ([row] * 2, 4)
    (tmp_path / "metrics.jsonl").write_bytes(line + b'{"kind": "tr')  # cut short by a kill
    assert read_rows(tmp_path) == ([row], 0) and read_metrics(tmp_path) == [row]
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    with started(tmp_path, step=1) as tracker:
        tracker.say("so far")
    assert "metrics.jsonl: 4 damaged rows left out" in capsys.readouterr().out


def test_a_row_in_words():
    assert describe(ROW) == "loss 1.250 (label 1.000 + kl 0.250)  lr 1.23e-03  540 images/s"
    alone = {"loss": 1.25, "label": 1.25, "lr": 0.5, "images_per_second": 2.0}
    assert describe(alone) == "loss 1.250  lr 5.00e-01  2 images/s"
    assert "  agreement 71 %  lr" in describe({**ROW, "agreement": 0.706})
    assert "agreement 0.7" not in describe({**ROW, "agreement": 0.706})


def test_the_time_left_counts_from_where_this_process_started(tmp_path, clock):
    tracker = started(tmp_path, step=40, total=100)
    assert tracker.eta(40) == "?"
    clock.now += 30  # 10 steps in 30 seconds: 50 more take 150
    assert tracker.eta(50) == "2:30"
    clock.now += 7200 - 30
    assert tracker.eta(60) == "4:00:00"
    assert tracker.eta(100) == "0:00"


# --- places that fail -----------------------------------------------------------------------------


def test_a_journal_keeps_what_it_could_not_write(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "log.txt"
    journal = Journal(path)
    for line in ("one", "two"):
        with pytest.raises(FileNotFoundError):
            journal.append(line)
    path.parent.mkdir()
    journal.append("three")
    assert path.read_text() == "one\ntwo\nthree\n" and not journal.unwritten

    class FullAfter3:
        """A disk with room for 3 bytes."""

        def __init__(self, *_, **__):
            self.room = 3

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            data, self.room = data[: self.room], 0
            path.write_bytes(path.read_bytes() + data)
            return len(data)

    with monkeypatch.context() as patch:
        patch.setattr(track, "open", FullAfter3, raising=False)
        with pytest.raises(OSError, match="No space"):
            journal.append("fourth")
    journal.append("fifth")
    assert path.read_text() == "one\ntwo\nthree\nfourth\nfifth\n"


def test_files_that_cannot_be_written_are_said_once_and_made_up_for(tmp_path, capsys):
    for name in ("log.txt", "metrics.jsonl"):
        (tmp_path / name).mkdir()
    with started(tmp_path) as tracker:
        for step in (10, 20):
            tracker.say(f"step {step}")
            tracker.log("train", step, ROW)
        assert capsys.readouterr().out.splitlines() == [
            "step 10",
            "log.txt cannot be written (Is a directory); its lines are kept and tried again",
            "metrics.jsonl cannot be written (Is a directory); its rows are kept and tried again",
            "step 20",
        ]
        for name in ("log.txt", "metrics.jsonl"):
            (tmp_path / name).rmdir()
        tracker.log("train", 30, ROW)
        tracker.say("step 30")
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    assert [
        line
        for line in (tmp_path / "log.txt").read_text().splitlines()
        if re.fullmatch(r"step \d+", line)
    ] == ["step 10", "step 20", "step 30"]


def test_rows_of_steps_that_run_again_are_dropped_once_there_is_room(tmp_path, capsys, monkeypatch):
    with started(tmp_path) as tracker:
        for step in (10, 20):
            tracker.log("train", step, ROW)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(track, "write_text", full)
        tracker = started(tmp_path, step=10)
        tracker.log("train", 20, ROW)
        assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]
        assert capsys.readouterr().out.count("its rows are kept and tried again") == 1
    tracker.log("train", 30, ROW)
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]


def test_rows_that_are_lost_in_the_end_are_counted(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    with started(tmp_path) as tracker:
        for step in (10, 20):
            tracker.log("train", step, ROW)
        tracker.draw_curves("without rows")
    assert "metrics.jsonl and the curves lack 2 rows" in capsys.readouterr().out
    assert (tmp_path / "curves.png").is_file()


class FakeService:
    """Weights & Biases or a TensorBoard writer that works for one step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def log(self, values, step):
        self.seen.append(step)
        if len(self.seen) > 1:
            raise ConnectionError("the service is gone\nand its socket too")

    def add_scalar(self, name, value, step):
        self.log({}, step)

    def finish(self):
        raise AssertionError("it was switched off")

    close = finish


@pytest.mark.parametrize(
    ("attribute", "name"), [("wandb", "Weights & Biases"), ("tensorboard", "TensorBoard")]
)
def test_a_service_that_fails_is_switched_off_with_one_line(tmp_path, capsys, attribute, name):
    service = FakeService()
    with started(tmp_path) as tracker:
        setattr(tracker, attribute, service)
        for step in (10, 20, 30):
            tracker.log("train", step, {"loss": 1.0})
    assert service.seen == [10, 20]
    assert capsys.readouterr().out == (
        f"{name} cannot be written (the service is gone and its socket too); the run goes on "
        "without it\n"
    )
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.parametrize("title", ["$\\broken^$", "猫 Straße caf\udce9"])
def test_curves_of_any_name(tmp_path, title):
    with started(tmp_path) as tracker:
        tracker.log("train", 10, ROW)
        tracker.log("eval", 10, {"ema_top1": 1.0, "raw_top1": 2.0})
        tracker.draw_curves(title)
        assert not tracker.failed
    assert (tmp_path / "curves.png").stat().st_size > 1000


# --- Weights & Biases -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "environment", "mode"),
    [
        ("off", {"WANDB_MODE": "online"}, "off"),
        ("off", {"WANDB_MODE": "nonsense"}, "off"),
        ("online", {}, "online"),
        ("online", {"WANDB_MODE": ""}, "online"),
        ("online", {"WANDB_MODE": "offline"}, "offline"),
        ("online", {"WANDB_MODE": "dryrun"}, "offline"),
        ("online", {"WANDB_MODE": "disabled"}, "off"),
        ("online", {"WANDB_DISABLED": "true"}, "off"),
        ("online", {"WANDB_DISABLED": "false"}, "online"),
        ("offline", {"WANDB_MODE": "online"}, "offline"),
        ("offline", {"WANDB_MODE": "disabled"}, "off"),
    ],
)
def test_the_environment_takes_away_from_the_setting(monkeypatch, setting, environment, mode):
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = Config.model_validate({"tracker": {"wandb": setting}})
    assert track.wandb_mode(config) == mode


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE=onlin.*online, offline or disabled"):
        track.wandb_mode(Config.model_validate({"tracker": {"wandb": "online"}}))


def test_the_project_of_the_environment_counts_where_none_is_set(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert track.wandb_project(Config()) == "theirs"
    assert track.wandb_project(compose(["tracker.project=mine"]).config) == "mine"
    monkeypatch.delenv("WANDB_PROJECT")
    assert track.wandb_project(Config()) == "ghosttrain"


def test_the_head_of_a_run_says_what_tracks_it(ghosttrain, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    outcome = ghosttrain(*tiny, "train.max_steps=1", "tracker=wandb", "tracker.tensorboard=true")
    assert outcome.code == 0, outcome.err
    assert (
        "tracking: Weights & Biases offline (tracker.wandb=online; the environment's WANDB_ "
        "variables win), project ghosttrain, TensorBoard\n"
    ) in outcome.out
    run = only_run(tmp_path / "runs")
    assert list(run.rglob("*.wandb")) and list(run.rglob("events.out.tfevents.*"))


def test_a_service_that_does_not_start_is_refused_at_first_and_left_out_of_a_run_that_goes_on(
    tmp_path, monkeypatch, capsys
):
    def unreachable(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(track, "_wandb", unreachable)
    with pytest.raises(UserError, match=r"did not start \(no route\); type tracker.wandb=offline"):
        started(tmp_path, wandb="online")
    with started(tmp_path, step=10, wandb="online") as tracker:
        tracker.log("train", 20, ROW)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 20
    assert "Weights & Biases cannot be written (no route)" in capsys.readouterr().out


def test_weights_and_biases_gets_group_tags_table_and_weights(tiny, tmp_path, monkeypatch):
    """A group, a job type, tags, the final table, and the weights where they are asked for."""
    import wandb

    given: dict = {"artifacts": []}

    class Run:
        summary: dict = {}

        def log(self, values, step):
            pass

        def log_artifact(self, path, type):
            given["artifacts"].append((path.name, type))

        def finish(self):
            pass

    def init(**settings):
        given["init"] = settings
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    words = [*tiny, "train.max_steps=1", "tracker=wandb", "tracker.group=mine"]
    for artifacts in ("false", "true"):
        root = tmp_path / artifacts
        config = compose([*words, f"tracker.artifacts={artifacts}", f"run.root={root}"]).config
        folder = ghosttrain.train(config)
        assert given["init"]["group"] == "mine" and given["init"]["job_type"] == "train"
        assert given["init"]["tags"] == ["compact_kd", "shufflenetv2_050", "folder"]
        assert given["init"]["config"]["optim"]["lr"] == config.optim.lr
        result = json.loads((folder / "result.json").read_text())
        assert Run.summary["ema/top1"] == result["weights"]["ema"]["top1"]
        expected = [("model.safetensors", "model")] if artifacts == "true" else []
        assert given["artifacts"] == expected
        assert re.fullmatch("[0-9a-f]{8}", given["init"]["id"])
    monkeypatch.setenv("WANDB_RUN_ID", "of_the_agent")  # as `wandb agent` starts the command
    config = compose([*words, "seed=7", f"run.root={tmp_path / 'agent'}"]).config
    ghosttrain.train(config)
    assert given["init"]["id"] == "of_the_agent"


def kill_wandb() -> None:
    """Kill Weights & Biases' own process, a child of this one."""
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGKILL)
            return
    raise AssertionError("there is none")


def test_the_process_of_wandb_dies(tmp_path):
    """In a process of its own, whose end is looked at too."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
import test_track
with test_track.started(Path({str(tmp_path)!r}), wandb="offline") as tracker:
    tracker.log("train", 10, test_track.ROW)
    test_track.kill_wandb()
    for step in range(20, 10_000, 10):
        tracker.log("train", step, test_track.ROW)
        if tracker.wandb is None:
            break
"""
    environment = {**os.environ, "WANDB_SILENT": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment, timeout=300)  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "Weights & Biases cannot be written" in done.stdout
    assert "the run goes on without it" in done.stdout


def test_tensorboard_of_a_run_that_goes_on_has_every_step_once(ghosttrain, tiny, tmp_path):
    """Killed with rows behind its checkpoint, which is evaluated again where an epoch had ended."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for saved in (2, 3):  # of 6 steps, 3 an epoch
        words = [*tiny, "tracker.tensorboard=true", "tracker.log_every=1",
                 f"train.save_every={saved}steps", f"run.root={tmp_path / str(saved)}"]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 4)
            assert ghosttrain(*words).code == 130
        assert ghosttrain(*words).code == 0
        run = only_run(tmp_path / str(saved))
        events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
        for kind in ("train/loss", "eval/ema_top1"):
            group, name = kind.split("/")
            rows = [row for row in read_metrics(run) if row["kind"] == group]
            found = [(event.step, event.value) for event in events.Scalars(kind)]
            assert found == [(row["step"], pytest.approx(row[name])) for row in rows], (kind, saved)


def interrupt_after(patch, steps: int) -> None:
    """Interrupt a run in the look for signals or the evaluation after this step, unsaved."""
    log, rows = Tracker.log, []

    def logging(tracker, kind, step, row):
        log(tracker, kind, step, row)
        if kind == "train":
            rows.append(step)
        if len(rows) == steps:
            raise KeyboardInterrupt

    patch.setattr(Tracker, "log", logging)
