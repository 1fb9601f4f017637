"""What a sweep does with a cell that fails, and with Ctrl-C."""

import errno

import pytest

from ghosttrain.errors import BUSY, Busy
from ghosttrain.study import sweep
from ghosttrain.study.sweep import _new_folder
from ghosttrain.terminal import only_lines_of


@pytest.fixture
def cells(monkeypatch):
    """Let each cell do what the list says: raise, or return an exit code; keep the seeds run."""
    seeds: list[int] = []

    def answer(*outcomes):
        left = iter(outcomes)

        def launch(composed, run_everywhere=None):
            seeds.append(composed.config.seed)
            outcome = next(left)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(sweep, "launch", launch)
        return seeds

    return answer


def test_ctrl_c_ends_the_sweep(cells, ghosttrain, tmp_path):
    seeds = cells(0, KeyboardInterrupt(), 0)
    outcome = ghosttrain("-m", "seed=1,2,3", f"run.root={tmp_path}")
    assert outcome.code == 130 and seeds == [1, 2]
    assert outcome.err.strip().startswith("ghosttrain: interrupted; the same command goes on")


def test_a_cell_that_fails_is_named_and_the_others_run(cells, ghosttrain, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "last.pt")
    seeds = cells(137, full, RuntimeError("a bug"), 2)  # 137: killed by signal 9
    outcome = ghosttrain("-m", "seed=range(2,6)", f"run.root={tmp_path}")
    assert outcome.code == 1 and seeds == [2, 3, 4, 5]
    assert "ghosttrain: error: last.pt: No space left on device; make room" in outcome.err
    assert outcome.err.count("Traceback") == 1 and "RuntimeError: a bug" in outcome.err
    failed = [line for line in outcome.err.splitlines() if "failed: " in line]
    for line, (seed, code) in zip(failed, ((2, 137), (3, 2), (4, 1), (5, 2)), strict=True):
        assert f"seed={seed} " in line and line.endswith(f"(exit code {code})")


def test_nothing_starts_before_every_cell_is_checked(cells, ghosttrain, tmp_path):
    seeds = cells()
    outcome = ghosttrain("-m", "seed=1,2", "train.epochs=1,0", f"run.root={tmp_path}")
    assert outcome.code == 2 and "train.epochs=0" in outcome.err and not seeds
    assert outcome.err.startswith("ghosttrain: error: seed=1 train.epochs=0: train.epochs=0 is")


def test_a_cell_that_a_glob_brought_can_be_left_out(cells, ghosttrain, tmp_path):
    seeds = cells()
    outcome = ghosttrain("-m", "model=glob(*m*)", f"run.root={tmp_path}")
    assert outcome.code == 2 and "error: model=timm: model.name is missing" in outcome.err
    assert outcome.err.endswith("to leave it out: 'model=glob(*m*,exclude=timm)'\n") and not seeds
    alone = ghosttrain("-m", "seed=1", "train.epochs=0")  # one cell: nothing tells it apart
    assert alone.err.startswith("ghosttrain: error: train.epochs=0 is")


def test_two_sweeps_of_the_same_second_have_two_folders(tmp_path):
    first, second, third = (_new_folder(tmp_path / ".sweeps" / "2026-01-01") for _ in range(3))
    assert [p.name for p in (first, second, third)] == [
        "2026-01-01",
        "2026-01-01.2",
        "2026-01-01.3",
    ]


def test_a_run_of_another_process_is_neither_finished_nor_failed(cells, ghosttrain, tmp_path):
    """It says so itself, or the ranks that it starts end with the exit code that says so."""
    seeds = cells(Busy("process 4711 on gpu07 has it"), BUSY, 0)
    words = [f"run.root={tmp_path}", "run.name=it"]
    outcome = ghosttrain("-m", *words, "seed=1,2")
    assert outcome.code == 0 and seeds == [1, 2]
    assert outcome.out.count("=== running elsewhere\n") == 2
    assert outcome.err.splitlines() == [
        "ghosttrain: error: process 4711 on gpu07 has it",
        *(f"ghosttrain: running elsewhere: {' '.join(words)} seed={seed}" for seed in (1, 2)),
    ]


def test_cells_that_run_at_once_show_only_lines_of_their_own(cells, ghosttrain, tmp_path, capsys):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    cells(2, 2)
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "model=ghostnetv3_050"]
    outcome = ghosttrain("-m", *words, "seed=1,2", "optim.lr=1", f"run.root={tmp_path}")
    assert outcome.code == 1
    lines = [line for line in outcome.out.splitlines() if line.startswith(("[1", "[2"))]
    assert lines == [f"[{seed}/2] seed={seed}: failed (exit code 2)" for seed in (1, 2)]
    with only_lines_of("[1/2] seed=1:"):
        print("epoch 1/2", "[1/2] seed=1: epoch 1/2", sep="\n")
        print("[2/2] seed=2: epoch 1/2")
    assert capsys.readouterr().out == "[1/2] seed=1: epoch 1/2\n"
