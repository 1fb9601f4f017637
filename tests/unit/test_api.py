"""The package as a library gives what the command line gives, with the same errors."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import ghosttrain
from ghosttrain.engine.run_files import read_provenance


def test_a_run_is_that_of_the_command(request, tiny, tmp_path: Path) -> None:
    command = request.getfixturevalue("ghosttrain")
    words = [*tiny, "train.max_steps=2"]
    folder = ghosttrain.train(ghosttrain.compose(words))
    assert (folder / "result.json").is_file() and folder.is_relative_to(tmp_path)
    shown = command(*words)  # the same run: finished
    assert shown.code == 0 and f"finished: {folder}" in shown.out
    assert ghosttrain.train(ghosttrain.compose(words)) == folder
    made = read_provenance(folder)
    assert made["command"] == shlex.join(["python", "-m", "ghosttrain", *words])
    without = ghosttrain.compose(words).model_copy(update={"seed": 5})
    assert read_provenance(ghosttrain.train(without))["command"] is None
    model = ghosttrain.load_run(folder)
    assert ghosttrain.fuse(model.eval()) is not model


def test_errors_are_those_of_the_command() -> None:
    with pytest.raises(
        ghosttrain.UserError, match=r"there is no setting 'optim.lrr'. Did you mean"
    ):
        ghosttrain.compose(["optim.lrr=1"])
    for words, expected in (
        (["hydra.run.dir=x"], "is Hydra's own and does nothing here"),
        (["~optim"], "'~optim': settings cannot be deleted"),
        (["seed=1,2"], "names several values: give one"),
        ("seed=1", r"give a list of words, \['seed=1'\]"),
    ):
        with pytest.raises(ghosttrain.UserError, match=expected):
            ghosttrain.compose(words)
    config = ghosttrain.compose(["+recipe=baseline", "launch.nproc=2"])
    with pytest.raises(ghosttrain.UserError, match=r"launch.nproc=2: train\(\) trains in this"):
        ghosttrain.train(config)
    with pytest.raises(AttributeError):
        _ = ghosttrain.absent
