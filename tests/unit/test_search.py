"""What a search does with its trials: those that fail, that others run, that were left behind."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import refusal, some_result
from numpy.random import RandomState

from ghosttrain.config import names as names_module
from ghosttrain.config.compose import Composed, compose
from ghosttrain.config.names import Names
from ghosttrain.engine.folder import run_folder
from ghosttrain.files import write_json
from ghosttrain.locks import locked
from ghosttrain.study import search, sweep

ROOT = Path(__file__).resolve().parents[2]
SEARCH = ["-m", "+recipe=tune_lr", "hydra.sweeper.n_trials=3"]


@pytest.fixture
def trials(monkeypatch) -> Callable[..., list[tuple[float, float, int]]]:
    """Let each trial do what a function of its number says: its top-1, an exit code below 0, or an
    exception; keep learning rate, weight decay and seed of each.
    """
    pytest.importorskip("optuna")
    ran: list[tuple[float, float, int]] = []

    def answer(outcome):
        ran.clear()

        def launch(composed: Composed, run_everywhere: object = None) -> int:
            config = composed.config
            ran.append((config.optim.lr, config.optim.weight_decay, config.seed))
            value = outcome(len(ran) - 1)
            if isinstance(value, BaseException):
                raise value
            if value < 0:
                return int(-value)
            folder = run_folder(config)
            folder.mkdir(parents=True, exist_ok=True)
            whole = some_result(config)
            tops = whole["weights"]["ema"] | {"top1": value}
            write_json(folder / "result.json", whole | {"weights": {"raw": tops, "ema": tops}})
            return 0

        monkeypatch.setattr(sweep, "launch", launch)
        return ran

    return answer


def study_of(root: Path):
    import optuna

    path = str(root / ".sweeps" / "optuna.db").replace("{", "{{").replace("}", "}}")
    storage = f"sqlite:///{path}"
    (summary,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(summary.study_name, storage)


def states(root: Path) -> list[str]:
    return [trial.state.name for trial in study_of(root).trials]


def test_the_same_command_runs_what_is_lacking_and_confirms(trials, ghosttrain, tmp_path):
    root = tmp_path / "it's {x} $été"
    words = [*SEARCH, f"run.root={root}"]
    ran = trials(lambda number: [50.0, 70.0, 60.0][number])
    first = ghosttrain(*words)
    assert first.code == 0, first.err
    assert len({*ran}) == 3 and all(1e-3 <= lr <= 0.1 and seed == 0 for lr, _, seed in ran)
    assert ran[0][0] == pytest.approx(10 ** (2 * RandomState(0).uniform() - 3))  # seeded
    drawn = list(ran)
    rows = [line.split("|")[1:3] for line in first.out.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row] for row in rows[1:]] == [
        ["1", "70.00"], ["2", "60.00"], ["0", "50.00"],
    ]  # fmt: skip
    assert f"optim.lr={drawn[1][0]} optim.weight_decay={drawn[1][1]}" in first.out
    assert "the best of 3 is optimistic" in first.out and "--confirm 3" in first.out

    ran = trials(lambda number: [64.0, 66.0][number])
    confirmed = ghosttrain(*words, "--confirm", "2")
    assert confirmed.code == 0, confirmed.err
    assert ran == [(*drawn[1][:2], 1), (*drawn[1][:2], 2)]  # nothing but new seeds of the best
    assert "searched:  70.00 % EMA top-1 with seed 0, the best of 3" in confirmed.out
    assert "confirmed: 65.00 ± 1.41 % with 2 new seeds (1, 2)" in confirmed.out
    assert states(root) == ["COMPLETE"] * 3


def test_a_trial_that_fails_poisons_nothing(trials, ghosttrain, tmp_path):
    words = [*SEARCH, f"run.root={tmp_path}"]
    trials(lambda number: [RuntimeError("a bug"), math.nan, -137][number])
    outcome = ghosttrain(*words, "hydra.sweeper.n_jobs=3")
    assert outcome.code == 1 and states(tmp_path) == ["FAIL"] * 3
    assert "0 trials complete, 3 failed" in outcome.out and "3 trials lacking" in outcome.out
    failed = [line for line in outcome.err.splitlines() if line.startswith("ghosttrain: failed: ")]
    assert len(failed) == 2 and failed[1].endswith("(exit code 137)")
    ran = trials(lambda number: 40.0)
    assert ghosttrain(*words, "hydra.sweeper.n_trials=1").code == 0
    assert len(ran) == 1 and states(tmp_path)[3:] == ["COMPLETE"]


def test_a_search_ends_where_more_fail_than_may(trials, ghosttrain, tmp_path):
    ran = trials(lambda number: -1)
    outcome = ghosttrain(
        *SEARCH, "hydra.sweeper.max_failure_rate=0", f"run.root={tmp_path}", "--confirm", "1"
    )
    assert outcome.code == 1 and len(ran) == 1
    assert "1 of 1 trial failed, more than hydra.sweeper.max_failure_rate=0" in outcome.out
    assert "no trial is complete" in outcome.out


def test_ctrl_c_ends_the_search_and_the_next_takes_its_trial_up(trials, ghosttrain, tmp_path):
    words = [*SEARCH, "hydra.sweeper.n_trials=2", f"run.root={tmp_path}"]
    ran = trials(lambda number: [50.0, KeyboardInterrupt()][number])
    assert ghosttrain(*words).code == 130 and states(tmp_path) == ["COMPLETE", "FAIL", "WAITING"]
    left = ran[1]
    ran = trials(lambda number: [KeyboardInterrupt(), 1.0][number])
    assert ghosttrain(*words).code == 130 and ran == [left]  # twice, then its values are given up
    assert ghosttrain(*words).code == 0 and left not in ran[1:] and len(ran) == 2
    assert states(tmp_path) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]


def test_the_trial_of_another_sweep_counts_as_long_as_it_is_there(trials, ghosttrain, tmp_path):
    words = [*SEARCH, "hydra.sweeper.n_trials=5", f"run.root={tmp_path}"]
    ran = trials(lambda number: 50.0)
    assert ghosttrain(*words, "hydra.sweeper.n_trials=1").code == 0 and len(ran) == 1
    study = study_of(tmp_path)
    other, here = tmp_path / ".sweeps" / "other", socket.gethostname()
    other.mkdir()
    values = {}
    for owner in (f"{here}/other", "elsewhere/no-such-folder", f"{here}/no-such-folder", None):
        trial = study.ask()
        values[owner] = trial.suggest_float("++optim.lr", 1e-3, 0.1, log=True)
        trial.suggest_float("++optim.weight_decay", 1e-3, 0.3, log=True)
        if owner is not None:
            trial.set_user_attr("++owner", owner)
    with locked(other, "busy"):
        outcome = ghosttrain(*words, "--confirm", "1")
    # there: with a lock; on a host with other folders; asked for just now. Gone: the third.
    assert "1 of 5 trials complete, 3 running elsewhere, 1 to run" in outcome.out
    assert outcome.code == 1 and [lr for lr, *_ in ran[1:]] == [values[f"{here}/no-such-folder"]]
    assert "--confirm: 3 trials still running" in outcome.out
    assert ghosttrain(*words).code == 0  # the lock is gone
    assert ran[2][0] == values[f"{here}/other"] and len(ran) == 3
    assert [trial.user_attrs.get("++owner") for trial in study_of(tmp_path).trials
            if trial.state.name == "RUNNING"] == ["elsewhere/no-such-folder", None]  # fmt: skip


def test_a_mistake_is_one_line(trials, ghosttrain, tmp_path):
    ran = trials(lambda number: 50.0)
    root = f"run.root={tmp_path}"
    overrides, hydra_words = Names(None).sweep_words([SEARCH[1], root], [])
    cells = Names(None).cells(overrides, hydra_words)
    composed = sweep.compose_cells(cells, overrides, None)
    for word, message in (
        ("hydra.sweeper.direction=minimize", "as large as possible; leave it out"),
        ("hydra.sweeper.storage=null", "storage=null would forget the trials"),
        ("hydra.sweeper.storage=sqlite:////no/such/x.db", "x.db: cannot be opened"),
        ("hydra.sweeper.storage=nonsense", "storage=nonsense: cannot be opened"),
        ("hydra.sweeper.n_trials=0", "n_trials=0: give a whole number above 0"),
        ("hydra.sweeper.n_trials=x", "n_trials"),
        ("hydra.sweeper.n_trial=3", "n_trial"),
    ):
        refusal(lambda word=word: search._opened(cells, composed, [*hydra_words, word]), message)
    for words, message in (
        (["optim.lr=0.01", "optim.weight_decay=0"], "a search needs what to choose"),
        (["optim.lr=interval(-1,0)"], "optim.lr=-1"),
        (["--confirm", "0"], "--confirm 0: give a whole number of 1 or more"),
    ):
        outcome = ghosttrain(*SEARCH, root, *words)
        assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err
    assert not ran


def test_only_a_search_can_be_confirmed(ghosttrain):
    for words in (["seed=1"], ["-m", "seed=1,2"], ["-m", "+recipe=tune_lr", "hydra/sweeper=basic"]):
        outcome = ghosttrain(*words, "--confirm", "2")
        assert outcome.code == 2 and outcome.err.count("\n") == 1
        assert "--confirm 2 runs the best trial of a search again" in outcome.err


def test_the_extra_that_is_missing_is_named(monkeypatch):
    words, theirs = Names(None).sweep_words(["+recipe=tune_lr"], [])
    assert sorted(theirs) == ["hydra.sweeper.n_trials=20", "hydra/sweeper=optuna"]

    class Loader:
        def get_group_options(self, group: str) -> list[str]:
            return ["basic"]

    class Global:
        def config_loader(self) -> Loader:
            return Loader()

    monkeypatch.setattr(names_module.GlobalHydra, "instance", Global)
    refusal(
        lambda: names_module._validate_plugin("hydra/sweeper=optuna"),
        "no sweeper of this name is installed", "[optuna]')",
    )  # fmt: skip


def test_a_recipe_says_how_to_sweep_and_the_command_line_wins(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "defaults: [/recipe/tune_lr, override /hydra/launcher: joblib, "
        "override /hydra/sweeper/sampler: random, _self_]\n"
        "hydra:\n  launcher: {n_jobs: 2}\n  sweeper:\n    study_name: a b\n"
        "    params: {optim.lr: 'interval(1,2)', seed: 7}\n"
    )
    names = Names(str(tmp_path))
    ours, theirs = names.sweep_words(
        ["+recipe=mine", "optim.weight_decay=0"], ["hydra.sweeper.n_trials=5"]
    )
    assert ours == ["+recipe=mine", "optim.weight_decay=0", "optim.lr=interval(1,2)", "seed=7"]
    assert sorted(theirs) == [
        "hydra.launcher.n_jobs=2", "hydra.sweeper.n_trials=5", 'hydra.sweeper.study_name="a b"',
        "hydra/launcher=joblib", "hydra/sweeper/sampler=random", "hydra/sweeper=optuna",
    ]  # fmt: skip
    ours, theirs = names.sweep_words(["+recipe=tune_lr"], ["hydra/sweeper=basic"])
    assert theirs == ["hydra/sweeper=basic"] and len(ours) == 3
    refusal(
        lambda: names.sweep_words(["+recipe=baseline,tune_lr"], []),
        "'+recipe=baseline,tune_lr': tune_lr says how to sweep; type it alone",
    )
    assert compose(["+recipe=tune_lr"]).config.model.name == "shufflenetv2_050"  # without -m: a run
    (tmp_path / "recipe" / "mine.yaml").write_text("hydra: {run: {dir: x}}")
    refusal(lambda: compose(["+recipe=mine"], str(tmp_path)), "mine.yaml: below hydra: ", "run.dir")


def test_the_sweep_of_weights_and_biases_is_the_recipes(tmp_path):
    """Its metric is one that a run logs, and what `wandb agent` would type composes."""
    text = (ROOT / "docs" / "tune_lr.wandb.yaml").read_text()
    file = yaml.safe_load(text)
    recipe = yaml.safe_load((ROOT / "recipes" / "tune_lr.yaml").read_text())
    searched = recipe["hydra"]["sweeper"]["params"]
    assert file["parameters"].keys() == searched.keys()
    for key, values in file["parameters"].items():
        assert f"interval({values['min']}, {values['max']})" in searched[key]
    assert file["metric"] == {"name": "eval/ema_top1", "goal": "maximize"}
    assert file["run_cap"] == recipe["hydra"]["sweeper"]["n_trials"]
    start, program, *words, last = file["command"]
    assert (start, program, words[0]) == ("python", "-m", "ghosttrain") and "args_no_hyph" in last
    for end in ("min", "max"):
        typed = [f"{key}={values[end]}" for key, values in file["parameters"].items()]
        config = compose([*words[1:], *typed]).config
        assert config.optim.lr == file["parameters"]["optim.lr"][end]
        assert (config.recipe, config.tracker.wandb) == ("tune_lr", "online")
