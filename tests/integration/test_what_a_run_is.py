"""Data and weights tell runs apart by what they are, not by where they lie."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from helpers import make_images, only_run
from test_mistakes import refused

from ghosttrain.config.compose import compose
from ghosttrain.config.identity import settings_hash
from ghosttrain.engine import identify
from ghosttrain.engine.identify import data_listing, identified
from ghosttrain.errors import UserError


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    return [
        "+recipe=compact_kd", "model=mobilenetv2_050", "reparam=none", "teacher=none",
        "distill=none", "data=folder", "data.train_size=32", "data.eval_size=32",
        "data.workers=0", "train.global_batch=16", "train.max_steps=1", "train.epochs=1",
        f"run.root={tmp_path / 'runs'}",
    ]  # fmt: skip


def folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.rglob("result.json"))


def test_data_are_the_same_wherever_they_lie_and_others_at_the_same_path(
    ghosttrain, small, tmp_path
):
    one, two, moved = (tmp_path / name for name in ("one", "two", "moved"))
    make_images(one, classes=3)
    make_images(two, classes=3, train=17)
    assert ghosttrain(*small, f"data.root={one}").code == 0
    assert ghosttrain(*small, f"data.root={two}").code == 0
    assert len(folders(tmp_path)) == 2  # other data, another run
    one.rename(moved)
    again = ghosttrain(*small, f"data.root={moved}")
    assert again.code == 0 and again.out.startswith("finished: ")
    assert ghosttrain(*small, f"data.root={moved}", "seed=1").code == 0
    assert len(folders(tmp_path)) == 3
    os.symlink(moved, one)  # another node sees them here
    assert ghosttrain(*small, f"data.root={one}", "seed=2").code == 0
    table = ghosttrain("report", tmp_path / "runs").out
    assert "| 3 (0, 1, 2) |" in table and "data.root" not in table


def test_other_images_of_equal_number_are_refused_by_name(ghosttrain, small, tmp_path):
    images = tmp_path / "one"
    make_images(images, classes=3)
    words = [*small, f"data.root={images}"]
    assert ghosttrain(*words).code == 0
    run = only_run(tmp_path / "runs")
    first = images / "train" / "class0" / "0.JPEG"
    first.rename(first.with_name("other.JPEG"))
    expected = "holds a run on other data (class names, file names or labels of the training images"
    refused(ghosttrain(*words), str(run), expected, "run.name=NAME")
    (run / "result.json").unlink()  # one that has not ended
    refused(ghosttrain(*words), "began with other data (file names or labels of the training")
    assert ghosttrain(*words, "run.name=b").code == 0


def test_weights_are_their_file(small, tmp_path):
    def hash_of(*words: str) -> str:
        digits = ["data=digits", f"run.root={tmp_path}", *words]
        return settings_hash(identified(compose([*small[:5], *digits]).config))

    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    a.write_bytes(b"weights")
    shutil.copy(a, b)
    assert hash_of(f"model.weights={a}") == hash_of(f"model.weights={b}") != hash_of()
    b.write_bytes(b"others")
    assert hash_of(f"model.weights={a}") != hash_of(f"model.weights={b}")
    teacher = ["teacher=digits", "distill=kl"]
    names = [hash_of(*teacher, f"teacher.weights={path}") for path in (a, b, "digits")]
    assert len(set(names)) == 3
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(a, run / "model.safetensors")
    assert hash_of(f"model.weights={a}") == hash_of(f"model.weights={run}")
    os.utime(b, (time.time() - 100,) * 2)
    before = hash_of(*teacher, f"teacher.weights={b}")
    b.unlink()  # the file of a teacher whose student is trained is known from before
    assert hash_of(*teacher, f"teacher.weights={b}") == before


def test_a_listing_holds_as_long_as_no_folder_has_changed(small, tmp_path, monkeypatch):
    images = tmp_path / "d"
    make_images(images, classes=2)
    (images / "train" / "class0" / "deep").mkdir()
    config = compose([*small, f"data.root={images}"]).config
    real, listed = identify.build_datasets, []

    def build(data: object) -> object:
        listed.append(data)
        return real(data)

    monkeypatch.setattr(identify, "build_datasets", build)
    first = data_listing(config)
    assert data_listing(config) == first and len(listed) == 2  # too young to be relied on
    for path in (images, *images.rglob("*")):
        os.utime(path, (time.time() - 100,) * 2)
    assert data_listing(config) == data_listing(config) == first and len(listed) == 3
    shutil.copy(images / "train" / "class0" / "0.JPEG", images / "train" / "class0" / "deep")
    assert data_listing(config)["digest"] != first["digest"] and len(listed) == 4
    shutil.rmtree(images / "val")
    with pytest.raises(UserError, match="there is no folder 'val'"):  # something is there
        identify.build_datasets(config.data)
    for path in (tmp_path / "runs" / ".listed").glob("*.json"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="there is no folder 'val'"):  # what was kept is damaged
        data_listing(config)
