"""Which process is a rank, by the variables that torchrun, Slurm and submitit set."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from ghosttrain import ranks
from ghosttrain.engine import distributed
from ghosttrain.study.submitted import jobs_of

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_GTIDS": "0", "SLURM_JOB_NODELIST": "gpu[07-08]"}  # fmt: skip
"""What a batch script of four tasks on two nodes has."""
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
                "SLURM_LOCALID": "1", "SLURM_GTIDS": "2,3",
                "SLURM_STEP_NODELIST": "gpu[07-08]"}  # fmt: skip
"""What the last of its tasks has, started by srun."""
LOCAL = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
         "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "99"}  # fmt: skip


@pytest.fixture
def variables(monkeypatch):
    """Set these variables, and none other of torchrun, Slurm or submitit."""

    def choose(*groups: dict[str, str], **others: str) -> None:
        for name in [*os.environ]:
            if name.startswith(("SLURM_", "SUBMITIT_", "MASTER_", "RANK", "WORLD", "LOCAL_")):
                monkeypatch.delenv(name)
        for group in (*groups, others):
            for name, value in group.items():
                monkeypatch.setenv(name, value)

    return choose


def place() -> tuple[int, int, int, int]:
    return ranks.rank(), ranks.local_rank(), ranks.world_size(), ranks.local_world_size()


def test_a_task_of_srun_is_a_rank(variables):
    variables(STEP)
    assert place() == (3, 1, 4, 2) and ranks.is_launched() and ranks.is_on_its_own()
    assert not ranks.must_spawn(8)
    variables(STEP, WORLD_SIZE="4")  # a script may export it, without RANK
    assert place() == (3, 1, 4, 2)


@pytest.mark.parametrize(
    "given",
    [
        {},
        BATCH,
        STEP | {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc
        STEP | {"SLURM_STEP_ID": "4294967291"},  # a batch script
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        LOCAL | {"SUBMITIT_LOCAL_NTASKS": "1"},
    ],
)
def test_a_process_that_is_alone_is_no_rank(variables, given):
    variables(given)
    assert not ranks.is_launched() and ranks.rank() == 0 and ranks.world_size(5) == 5
    assert ranks.must_spawn(2) and ranks.rendezvous() is None and not ranks.is_on_its_own()


def test_torchrun_within_srun_counts(variables):
    variables(STEP, RANK="1", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1")
    assert place() == (1, 0, 2, 1)
    assert ranks.rendezvous() is None and not ranks.is_on_its_own()


def test_tasks_of_a_local_job_of_submitit_are_ranks(variables):
    variables(LOCAL)
    assert place() == (1, 1, 2, 2) and ranks.is_on_its_own()
    assert ranks.rendezvous().startswith("tcp://127.0.0.1:")


def test_tasks_meet_on_the_first_machine_of_their_step(variables):
    places = set()
    for other in ({}, {"SLURM_JOB_ID": "8"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}):
        variables(STEP, other)
        host, _, port = ranks.rendezvous().removeprefix("tcp://").partition(":")
        assert host == "gpu07" and 10_000 <= int(port) < 30_000
        places.add(port)
    assert len(places) == 4  # steps that run, or just ran, at the same place do not meet
    variables(STEP, MASTER_ADDR="login", MASTER_PORT="1234")
    assert ranks.rendezvous() == "tcp://login:1234"


def test_cores_are_shared_unless_slurm_bound_them(variables, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for given, count in (({}, 1), (STEP, 2), (STEP | {"SLURM_CPUS_PER_TASK": "2"}, 2)):
        variables(given)
        assert ranks.processes_sharing_cores() == count
    variables(STEP, SLURM_CPUS_PER_TASK="3")
    assert ranks.processes_sharing_cores() == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("gpu[07-09,12],cpu3", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]node[04-05]", "rack1node04"),
        ("a.b-c,d", "a.b-c"),
    ],
)
def test_the_first_of_a_list_of_machines(nodes, first):
    assert ranks.first_host(nodes) == first


def test_a_task_that_sees_one_gpu_takes_it(variables, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    for seen, index in ((1, 0), (2, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        variables(STEP)
        assert distributed.pick_device("auto") == torch.device("cuda", index)


def test_the_others_are_told_that_rank_0_failed(variables, monkeypatch, ghosttrain, tmp_path):
    told: list[bool] = []
    monkeypatch.setattr(distributed, "call_off", lambda: told.append(True))
    variables(STEP, SLURM_PROCID="0", SLURM_LOCALID="0")
    words = ["seed=1", f"run.root={tmp_path}"]
    outcome = ghosttrain(*words, "optim.lrr=1")
    assert outcome.code == 2 and "optim.lr'?" in outcome.err and told == [True]
    outcome = ghosttrain(*words, "launch.nproc=2")
    assert outcome.code == 2 and told == [True, True]
    assert "launch.nproc=2, but 4 tasks of one job run this command" in outcome.err
    assert "--ntasks-per-node=N" in outcome.err and not [*tmp_path.iterdir()]
    variables()
    assert ghosttrain(*words, "optim.lrr=1").code == 2 and told == [True, True]


def test_settings_are_printed_once(variables, ghosttrain):
    variables(STEP)
    outcome = ghosttrain("seed=1", "-c", "job")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_a_job_that_is_lost_is_one_failed_cell(monkeypatch, capsys):
    core = pytest.importorskip("submitit.core.core")
    errors = pytest.importorskip("submitit.core.utils")

    def lost(job):
        raise errors.UncompletedJobError("no result")

    monkeypatch.setattr(core.Job, "results", lost)
    with jobs_of(["hydra/launcher=submitit_local"]):
        job = SimpleNamespace(job_id="7_1", state="TIMEOUT", paths=SimpleNamespace(stderr="7.err"))
        (outcome,) = core.Job.results(job)
    assert outcome.return_value is None  # as of every cell that failed: NaN ends a search
    assert "job 7_1 ended without a result (state TIMEOUT); what it wrote: 7.err" in (
        capsys.readouterr().err
    )
    assert core.Job.results is lost


def test_launchers_of_submitit_say_what_is_missing(ghosttrain, monkeypatch, tmp_path):
    words = ["-m", "seed=1,2", "hydra/launcher=submitit_slurm", f"run.root={tmp_path}"]
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = ghosttrain(*words)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    try:
        import hydra_plugins.hydra_submitit_launcher  # noqa: F401
    except ModuleNotFoundError:
        assert "pip install '" in outcome.err and outcome.err.endswith("[slurm]')\n")
    else:
        assert "there is no sbatch here" in outcome.err
    assert not [*tmp_path.iterdir()]
