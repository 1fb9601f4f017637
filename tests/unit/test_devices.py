"""`launch.devices`: who has which device, with made-up numbers. The ranks are shell scripts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import refusal, refused_settings

from ghosttrain import ranks, threads
from ghosttrain.config.compose import cells, compose
from ghosttrain.engine import devices
from ghosttrain.engine.devices import taken
from ghosttrain.engine.distributed import pick_device
from ghosttrain.engine.spawn import spawn


@pytest.fixture(autouse=True)
def tokens(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return devices._folder()


def test_all_or_none_are_taken_and_whoever_waits_says_so_once(monkeypatch, capsys):
    first, second = ExitStack(), ExitStack()
    assert [*first.enter_context(taken([0, 1, 2], 2))] == [0, 1]
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        with taken([2], 1):  # whoever waits for two holds not one of them
            pass
        if len(naps) == 2:
            first.close()

    monkeypatch.setattr(devices.time, "sleep", sleep)
    assert [*second.enter_context(taken([0, 1, 2], 2))] == [0, 1] and len(naps) == 2
    assert capsys.readouterr().out == "waiting for 2 of the devices 0, 1, 2: other runs have them\n"
    second.close()
    with taken([2, 0], 2):  # all of them are free again
        pass


def test_each_rank_sees_the_devices_of_its_run_and_a_killed_run_frees_them(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\ncd {tmp_path}\nprintenv CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER "
        "GHOSTTRAIN_RUNS_AT_ONCE WORLD_SIZE >seen$RANK\n[ $1$RANK != -m1 ] || kill -9 $$"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with taken([4], 1):
        assert spawn((), 2, (4, 5, 6, 7)) == 137
    for rank in (0, 1):
        assert (tmp_path / f"seen{rank}").read_text().split() == ["5,6", "PCI_BUS_ID", "2", "2"]
    assert spawn((), 1, (4, 5, 6, 7)) == 0
    assert (tmp_path / "seen0").read_text().split() == ["4", "PCI_BUS_ID", "4", "1"]
    assert len(devices._free(devices._folder(), (4, 5, 6, 7), 4)) == 4


def test_a_device_is_kept_while_a_rank_of_a_killed_run_is_left(tmp_path, tokens):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 600")
    script.chmod(0o755)
    code = (
        f"import sys, tempfile; tempfile.tempdir = {tempfile.tempdir!r}\n"
        f"from ghosttrain.engine.spawn import spawn\nsys.executable = {str(script)!r}\n"
        "spawn((), 1, (0,))"
    )
    run = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert run.poll() is None
    run.kill()
    run.wait()
    assert not devices._free(tokens, (0,), 1)
    os.kill(int((tmp_path / "pid").read_text()), 9)
    while not devices._free(tokens, (0,), 1):
        pass


def test_cores_are_divided_among_the_runs_that_fit(monkeypatch):
    monkeypatch.setattr(threads, "_bound_to", lambda: set(range(16)))
    monkeypatch.setattr(threads, "_group_limit", lambda: float("inf"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GHOSTTRAIN_RUNS_AT_ONCE", "2")
    assert threads.cores() == 4
    # The run beside it keeps its own half busy: this one has its share all the same.
    assert threads.threads_for(threads._left_by(8), most=4) == 4
    assert threads.threads_for(threads._left_by(14), most=4) == 1


def test_devices_are_a_list_in_every_command(monkeypatch):
    given = ["launch.devices=0,2", "launch.nproc=2"]
    assert compose(given).config.launch.devices == (0, 2)
    assert compose(["launch.devices=3"]).config.launch.devices == (3,)
    assert [cell[-1] for cell in cells([*given, "seed=1,2"])] == ["seed=1", "seed=2"]
    for bad, word in (("0,0", "[0, 0]"), ("0,-1", "[0, -1]"), ("a", "['a']")):
        assert f"launch.devices={word} is not different" in refused_settings(
            f"launch.devices={bad}"
        )
    assert "names 2" in refused_settings("launch.devices=0,1", "launch.nproc=3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    refusal(lambda: taken([1, 3], 1).__enter__(), "launch.devices=3: CUDA_VISIBLE_DEVICES=1,2 of")


def test_devices_that_are_not_there_are_no_reason_to_train_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    env = ranks.environment(0, 1, "", mine=[77], runs_at_once=1)
    monkeypatch.setattr(os, "environ", env)
    refusal(lambda: pick_device("auto"), "launch.devices gave this run 77", "launch.device=cpu")
    assert pick_device("cpu").type == "cpu"


def test_a_folder_of_somebody_else_holds_no_tokens(tokens):
    tokens.parent.chmod(0o777)
    refusal(devices._folder, "not a folder of yours alone")
