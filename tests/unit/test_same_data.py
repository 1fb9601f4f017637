"""What a resumed or finished run says about other data."""

import pytest
from helpers import make_images, refusal

from ghosttrain.config.schema import Config, DataConfig, RunConfig
from ghosttrain.data.datasets import FolderDataset, build_datasets
from ghosttrain.engine.same_data import (
    changes,
    describe_data,
    validate_result,
    validate_same_data,
    without_classes,
)
from ghosttrain.errors import UserError


def data(classes=("cat", "dog"), train=(1437, "t"), held_out=(360, "h")) -> dict:
    halves = {"train": train, "held_out": held_out}
    return {
        key: {"classes": [*classes], "images": n, "digest": f"{digest} {classes}"}
        for key, (n, digest) in halves.items()
    } | {"accepted": []}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (data(), []),
        (data(classes=("dog", "cat")), ["classes differ: their order"]),
        (data(classes=("dog", "zebra")), ["classes differ: 'cat' -> 'zebra'"]),
        (data(classes=("ant", "cat", "dog")), ["classes differ: 2 -> 3, 'ant' is new"]),
        (data(classes=("dog",)), ["classes differ: 2 -> 1, 'cat' is gone"]),
        (
            data(classes=("a", "b", "c", "d")),
            ["classes differ: 2 -> 4, 'cat' is gone, 'dog' is gone and 4 more"],
        ),
        (data(train=(1440, "t")), ["training images: 1,437 -> 1,440"]),
        (data(held_out=(360, "x")), ["file names or labels of the held-out images differ"]),
        (
            data(train=(1437, "x"), held_out=(361, "x")),
            [
                "file names or labels of the training images differ",
                "held-out images: 360 -> 361",
            ],
        ),
        (
            data(classes=("cow", "dog"), train=(3, "t")),
            ["classes differ: 'cat' -> 'cow'", "training images: 1,437 -> 3"],
        ),
    ],
)
def test_every_difference_is_said_once(now, expected):
    assert changes(data(), now) == expected


def test_a_resumed_run_refuses_other_data_or_keeps_a_record():
    saved = {"data": data(), "step": 30, "total_steps": 60}
    assert validate_same_data(saved, data(), "refuse") == data()
    assert validate_same_data(None, data(), "refuse") == data()
    grown = data(train=(1440, "t"))
    with pytest.raises(UserError, match=r"1,437 -> 1,440\): .*data.changed=accept .*run.fresh"):
        validate_same_data(saved, grown, "refuse")
    first = validate_same_data(saved, grown, "accept")
    assert first["accepted"] == ["data changed after step 30: training images: 1,437 -> 1,440"]
    later = {"data": first, "step": 50, "total_steps": 60}
    assert validate_same_data(later, grown, "refuse")["accepted"] == first["accepted"]
    second = validate_same_data(later, data(), "accept")["accepted"]
    assert second == [
        *first["accepted"],
        "data changed after step 50: training images: 1,440 -> 1,437",
    ]


def test_what_cannot_be_accepted_says_why():
    saved = {"data": data(), "step": 30, "total_steps": 60}
    with pytest.raises(UserError, match=r"run.fresh=true \(it cannot .* has 2 outputs\)"):
        validate_same_data(saved, data(classes=("a", "cat", "dog")), "accept")
    done = saved | {"total_steps": 30}
    with pytest.raises(UserError, match="has taken all its steps"):
        validate_same_data(done, data(train=(1440, "t")), "accept")
    assert validate_same_data(done, data(held_out=(361, "h")), "accept")["accepted"]


def test_a_finished_run_refuses_other_data(tmp_path, monkeypatch):
    make_images(tmp_path / "d", classes=2, train=2, val=1)
    data = DataConfig(name="folder", root=str(tmp_path / "d"))
    config = Config(data=data, run=RunConfig(root=str(tmp_path / "runs")))
    result = {"data": without_classes(describe_data(*build_datasets(config.data)))}
    assert "classes" not in result["data"]["train"]
    monkeypatch.setattr(FolderDataset, "open", lambda *_: pytest.fail("it decodes images"))
    assert validate_result(tmp_path, config, result) is None
    for split in ("train", "val"):
        (tmp_path / "d" / split / "class1").rename(tmp_path / "d" / split / "zebra")
    refusal(
        lambda: validate_result(tmp_path, config, result),
        "(class names, file names or labels of the training images differ; ",
    )
    for split in ("train", "val"):
        (tmp_path / "d" / split / "zebra").rename(tmp_path / "d" / split / "class1")
    (tmp_path / "d" / "train" / "class1" / "0.JPEG").unlink()
    refusal(
        lambda: validate_result(tmp_path, config, result),
        "holds a run on other data (training images: 4 -> 3): type run.name=NAME",
    )
    (tmp_path / "d" / "val").rename(tmp_path / "d" / "gone")
    assert "its data cannot be compared" in str(validate_result(tmp_path, config, result))
    assert validate_result(tmp_path, Config(), result) is None  # digits: embedded
