from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import paint, refused_data
from PIL import Image

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import build_datasets, digits, folder

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize("name", ["..", "../train", "/etc", "", "a/../b", "~", "train\0"])
def test_a_split_is_a_name_below_the_folder_of_the_data(root, idx, name):
    for kind, where in (("folder", root), ("idx", idx[0])):
        for half in ("train", "val"):
            settings = DataConfig(name=kind, root=str(where), **{f"{half}_split": name})
            refused_data(settings, f"data.{half}_split={name!r} ", "type ")


def test_digits_are_all_of_scikit_learns_and_split_by_a_rule():
    from sklearn.datasets import load_digits

    train, val = build_datasets(DataConfig(name="digits"))
    assert (len(train), len(val)) == (1437, 360)
    original = load_digits()
    held_out = [  # every fifth of the row of digits sorted by class
        i
        for n, i in enumerate(i for k in range(10) for i in np.flatnonzero(original.target == k))
        if n % 5 == 0
    ]
    assert val.labels.tolist() == original.target[sorted(held_out)].tolist()
    assert train.labels.tolist() == np.delete(original.target, held_out).tolist()
    for dataset, chosen in (
        (val, original.images[sorted(held_out)]),
        (train, np.delete(original.images, held_out, 0)),
    ):
        small = dataset.images.reshape(-1, 8, 8, 8, 8).mean((2, 4)) * (16 / 255)
        alike = [
            np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(small, chosen, strict=True)
        ]
        assert min(alike) > 0.97  # the very images, enlarged


def test_digits_are_read_without_scikit_learn_and_are_its_own():
    from sklearn.datasets import load_digits

    levels, labels = digits.load_levels()
    original = load_digits()
    assert levels.dtype == original.images.dtype and np.array_equal(levels, original.images)
    assert labels.dtype == np.int64 and np.array_equal(labels, original.target)


@pytest.mark.parametrize("missing", ["package", "file"])
def test_digits_that_are_not_there(monkeypatch, missing):
    if missing == "package":
        monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(digits, "FILE", "gone.csv.gz")
    expected = "is missing: type pip install --force-reinstall scikit-learn"
    refused_data(DataConfig(name="digits"), expected)


def test_a_fifth_of_every_digit_is_held_out():
    train, val = build_datasets(DataConfig(name="digits"))
    shares = np.bincount(val.labels) / (np.bincount(val.labels) + np.bincount(train.labels))
    assert np.abs(shares - 0.2).max() < 0.006
    assert train.classes == val.classes == [str(k) for k in range(10)]


@pytest.mark.parametrize(("in_chans", "mode"), [(3, "RGB"), (1, "L")])
def test_digits_load_at_64(in_chans, mode):
    train, _ = build_datasets(DataConfig(name="digits", in_chans=in_chans))
    image = train.load(5)
    assert (image.mode, image.size) == (mode, (64, 64))
    assert (np.asarray(image).reshape(64, 64, -1) == train.images[5][..., None]).all()
    assert train.describe() == "digits, train: 1,437 images, 10 classes"


def test_statistics_in_the_configuration_are_those_of_the_training_digits():
    settings = DataConfig.model_validate(yaml.safe_load((CONF / "digits.yaml").read_text()))
    pixels = build_datasets(settings)[0].images / 255
    assert settings.mean == pytest.approx([pixels.mean()] * 3, abs=6e-5)
    assert settings.std == pytest.approx([pixels.std()] * 3, abs=6e-5)


@pytest.mark.parametrize("name", ["digits", "folder", "imagenet", "idx"])
def test_every_configuration_is_valid_and_complete(name):
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert DataConfig.model_validate(settings).name == name


def test_folder_reads_images_of_sorted_classes_in_sorted_order(root):
    for name in ("9.PNG", "10.jpg", "a.WebP", "é.bmp", "b.Jpeg"):
        paint(root / "train" / "Ant" / name, (7, 7, 7))
    for name in ("notes.txt", ".hidden.jpg", "._0.JPEG", "jpeg"):
        (root / "train" / "Ant" / name).write_text("no image")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "README.jpg").write_text("not in a class folder")
    (root / "train" / "cat" / "deeper.jpg").mkdir()
    train, val = build_datasets(DataConfig(name="folder", root=str(root)))
    assert train.classes == val.classes == ["Ant", "bird", "cat"]
    names = sorted(
        ["0.JPEG", "1.JPEG", "2.JPEG", "9.PNG", "10.jpg", "a.WebP", "é.bmp", "b.Jpeg"],
        key=os.fsencode,
    )
    assert [os.fsdecode(name) for name in train.names[:8]] == names
    assert train.labels.tolist() == [0] * 8 + [1] * 3 + [2] * 3
    assert train.labels.dtype == np.int64
    assert [train.load(i).getpixel((0, 0)) for i in (0, 8, 13)] == [(1, 0, 0), (0, 0, 0), (2, 2, 0)]
    assert train.describe() == f"{root}/train: 14 images, 3 classes"
    assert len(val) == 3


def test_folder_loads_grey_and_survives_pickling(root):
    train, _ = build_datasets(DataConfig(name="folder", root=str(root), in_chans=1))
    again = pickle.loads(pickle.dumps(train))
    assert again.load(4).mode == "L"
    assert (again.labels == train.labels).all()


def test_names_that_are_no_text_are_read(root):
    name = os.path.join(os.fsencode(root), b"train", b"cat", b"\xff\xfe.jpg")
    with open(name, "wb") as file:
        Image.new("RGB", (4, 4), (9, 9, 9)).save(file, format="PNG")
    train, _ = build_datasets(DataConfig(name="folder", root=str(root)))
    assert train.load(len(train) - 1).getpixel((0, 0)) == (9, 9, 9)


def test_links_to_folders_and_files_count(root):
    (root / "elsewhere").mkdir()
    paint(root / "elsewhere" / "x.png", (5, 5, 5))
    (root / "train" / "dog").symlink_to(root / "elsewhere")
    (root / "val" / "dog").mkdir()
    (root / "val" / "dog" / "y.png").symlink_to(root / "elsewhere" / "x.png")
    train, val = build_datasets(DataConfig(name="folder", root=str(root)))
    assert len(train) == 10 and val.load(3).getpixel((0, 0)) == (5, 5, 5)


def test_other_names_of_the_splits(root):
    (root / "val").rename(root / "test")
    refused_data(
        DataConfig(name="folder", root=str(root)), "no folder 'val'", "data.val_split=NAME", "test"
    )
    _, val = build_datasets(DataConfig(name="folder", root=str(root), val_split="test"))
    assert len(val) == 3


@pytest.mark.parametrize("name", ["folder", "imagenet", "idx"])
def test_a_root_that_is_unset_or_missing_says_what_to_type(tmp_path, name):
    refused_data(DataConfig(name=name), f"data={name}", "type data.root=/path", "train")
    refused_data(DataConfig(name=name, root=str(tmp_path / "gone")), "gone", "type data.root=/path")
    (tmp_path / "file").touch()
    refused_data(DataConfig(name=name, root=str(tmp_path / "file")), "is no folder")


def test_the_home_folder_is_expanded(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    train, _ = build_datasets(DataConfig(name="folder", root=f"~/{root.name}"))
    assert len(train) == 9


def test_splits_must_hold_class_folders_with_images(root, tmp_path):
    (root / "val" / "cat" / "0.JPEG").rename(root / "val" / "cat" / "0.txt")
    refused_data(
        DataConfig(name="folder", root=str(root)),
        "no images in the class folder",
        str(root / "val" / "cat"),
    )
    (root / "flat").mkdir()
    paint(root / "flat" / "0.jpg")
    refused_data(
        DataConfig(name="folder", root=str(root), val_split="flat"),
        "no class folders",
        str(root / "flat"),
    )


def test_classes_of_both_splits_must_agree(root):
    (root / "val" / "cat").rename(root / "val" / "dog")
    for k in range(5):
        paint(root / "train" / f"extra{k}" / "0.jpg")
    refused_data(
        DataConfig(name="folder", root=str(root)),
        str(root / "val"),
        str(root / "train"),
        "lacks 'cat', 'extra0', 'extra1' and 3 more",
        "adds 'dog'",
    )


def test_imagenet_is_a_folder_of_1000_classes(root, monkeypatch):
    refused_data(
        DataConfig(name="imagenet", root=str(root)),
        "3 class folders",
        "1,000",
        f"data=folder data.root={root}",
    )
    monkeypatch.setattr(folder, "IMAGENET_CLASSES", 3)
    train, _ = build_datasets(DataConfig(name="imagenet", root=str(root)))
    assert len(train) == 9
