"""Distillation through the command line: real teachers and photos, ensembles, cached outputs."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import only_run, raw_weights, stop_after_saves, train_rows

from ghosttrain.engine.checkpoint import read_checkpoint
from ghosttrain.engine.load import load_run


def test_an_imagenet_teacher_teaches_a_student_on_a_folder_of_photos(
    ghosttrain, photos, tmp_path
) -> None:
    outcome = ghosttrain(*photos)
    assert outcome.code == 0, outcome.err
    (line,) = (x for x in outcome.out.splitlines() if x.startswith("teacher:"))
    assert "tf_efficientnet_lite0 (efficientnet-lite), 96 px" in line
    assert "5 of its 1000 classes, by synset" in line
    top1 = float(re.search(r"top-1 ([\d.]+) % on 20 unaugmented", line)[1])
    assert top1 >= 90, line
    rows = train_rows(tmp_path / "runs")
    assert len(rows) == 6
    for row in rows:
        assert row["loss"] == pytest.approx(row["label"] + row["soft_ce"], rel=1e-5)
        assert 0 <= row["agreement"] <= 1
    assert "agreement" in outcome.out


def test_an_ensemble_of_two_sizes_teaches(ghosttrain, photos, tmp_path) -> None:
    photos = [x for x in photos if not x.startswith("teacher")]
    members = [
        "teacher=ensemble",
        "teacher.check_samples=20",
        "teacher.chunk=7",
        "teacher.members.small.name=tf_efficientnet_lite0",
        "teacher.members.small.weights=efficientnet-lite",
        "teacher.members.small.input_size=64",
        "teacher.members.large.name=tf_efficientnet_lite1",
        "teacher.members.large.weights=efficientnet-lite",
        "teacher.members.large.input_size=128",
        "teacher.members.large.weight=2",
    ]
    outcome = ghosttrain(*photos, *members, "train.epochs=1")
    assert outcome.code == 0, outcome.err
    (line,) = (x for x in outcome.out.splitlines() if x.startswith("teacher:"))
    assert (
        "lite0 (efficientnet-lite), 64 px" in line and "lite1 (efficientnet-lite), 128 px" in line
    )
    assert line.count("top-1") == 3 and "averaged as probability" in line


def test_the_features_term_trains_a_projection_and_resumes_exactly(
    ghosttrain, photos, tmp_path, monkeypatch
) -> None:
    features = ["distill.features_weight=[[0,0.5],[1,1]]", "distill.temperature=[[0,1],[1,4]]"]
    whole = ghosttrain(*photos, *features, f"run.root={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    rows = train_rows(tmp_path / "whole")
    for row in rows:
        assert row["loss"] == pytest.approx(
            row["label"] + row["soft_ce"] + row["feature_cosine"], rel=1e-5
        )
    assert rows[0]["feature_cosine"] == pytest.approx(0.5, abs=0.1), (
        "1 - cosine of unrelated features"
    )
    saved = read_checkpoint(only_run(tmp_path / "whole") / "checkpoints" / "last.pt")
    assert saved["projection"]["weight"].shape == (1280, 1280)
    assert not any("project.weight" in key for key in load_run(only_run(tmp_path / "whole"))
                   .state_dict()), "the projection is not deployed"  # fmt: skip

    run = tmp_path / "resumed"
    arguments = [*photos, *features, f"run.root={run}", "train.save_every=1epoch"]
    with monkeypatch.context() as patch:
        stop_after_saves(patch, 1)
        assert ghosttrain(*arguments).code == 130
    assert ghosttrain(*arguments).code == 0
    assert torch.equal(raw_weights(run), raw_weights(tmp_path / "whole"))


@pytest.mark.parametrize("loss", ["kl", "dkd", "dist", "hard", "logit_std"])
def test_every_loss_trains(ghosttrain, photos, tmp_path, loss) -> None:
    outcome = ghosttrain(*photos, f"distill={loss}", "train.max_steps=2")
    assert outcome.code == 0, outcome.err
    for row in train_rows(tmp_path / "runs"):
        assert row["loss"] == pytest.approx(row["label"] + row[loss], rel=1e-5)


def test_mixup_mixes_the_views_of_a_larger_teacher(ghosttrain, photos) -> None:
    outcome = ghosttrain(*photos, "augment=with_mixup", "train.max_steps=2")
    assert outcome.code == 0, outcome.err


def test_a_teacher_that_guesses_is_refused_unless_trusted(ghosttrain, photos, tmp_path) -> None:
    """The digits' teacher on images of ten classes that are no digits."""
    from helpers import make_images

    make_images(tmp_path / "noise", classes=10, train=3, val=1)
    for split in ("train", "val"):
        for label in range(10):
            (tmp_path / "noise" / split / f"class{label}").rename(
                tmp_path / "noise" / split / str(label)
            )
    changed = [f"data.root={tmp_path / 'noise'}", "teacher=digits", "teacher.input_size=64"]
    arguments = [*photos, *changed, "train.global_batch=10", "train.max_steps=1"]
    outcome = ghosttrain(*arguments)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert "no better than" in line and "teacher.trust=true" in line
    assert ghosttrain(*arguments, "teacher.trust=true").code == 0
