from __future__ import annotations

import gzip
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import count_calls, refusal
from PIL import Image

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import ArrayDataset, FolderDataset, build_datasets, folder, notes_on
from ghosttrain.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"


def refused(data, *parts):
    refusal(lambda: build_datasets(data), *parts)


# --- digits -----------------------------------------------------------------------------------


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


# --- folders ----------------------------------------------------------------------------------


def paint(path, color=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", (8, 6), color).save(file, format="PNG")


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for k, label in enumerate(("bird", "Ant", "cat")):
            for n in range(3 if split == "train" else 1):
                paint(tmp_path / split / label / f"{n}.JPEG", (k, n, 0))
    return tmp_path


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
    refused(
        DataConfig(name="folder", root=str(root)), "no folder 'val'", "data.val_split=NAME", "test"
    )
    _, val = build_datasets(DataConfig(name="folder", root=str(root), val_split="test"))
    assert len(val) == 3


@pytest.mark.parametrize("name", ["folder", "imagenet", "idx"])
def test_a_root_that_is_unset_or_missing_says_what_to_type(tmp_path, name):
    refused(DataConfig(name=name), f"data={name}", "type data.root=/path", "train")
    refused(DataConfig(name=name, root=str(tmp_path / "gone")), "gone", "type data.root=/path")
    (tmp_path / "file").touch()
    refused(DataConfig(name=name, root=str(tmp_path / "file")), "is no folder")


def test_the_home_folder_is_expanded(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    train, _ = build_datasets(DataConfig(name="folder", root=f"~/{root.name}"))
    assert len(train) == 9


def test_splits_must_hold_class_folders_with_images(root, tmp_path):
    (root / "val" / "cat" / "0.JPEG").rename(root / "val" / "cat" / "0.txt")
    refused(
        DataConfig(name="folder", root=str(root)),
        "no images in the class folder",
        str(root / "val" / "cat"),
    )
    (root / "flat").mkdir()
    paint(root / "flat" / "0.jpg")
    refused(
        DataConfig(name="folder", root=str(root), val_split="flat"),
        "no class folders",
        str(root / "flat"),
    )


def test_classes_of_both_splits_must_agree(root):
    (root / "val" / "cat").rename(root / "val" / "dog")
    for k in range(5):
        paint(root / "train" / f"extra{k}" / "0.jpg")
    refused(
        DataConfig(name="folder", root=str(root)),
        str(root / "val"),
        str(root / "train"),
        "lacks 'cat', 'extra0', 'extra1' and 3 more",
        "adds 'dog'",
    )


def test_imagenet_is_a_folder_of_1000_classes(root, monkeypatch):
    refused(
        DataConfig(name="imagenet", root=str(root)),
        "3 class folders",
        "1,000",
        f"data=folder data.root={root}",
    )
    monkeypatch.setattr(folder, "IMAGENET_CLASSES", 3)
    train, _ = build_datasets(DataConfig(name="imagenet", root=str(root)))
    assert len(train) == 9


# --- IDX --------------------------------------------------------------------------------------


def write_idx(folder, prefix, images, labels, zipped=False):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        raw = (
            bytes([0, 0, 8, array.ndim])
            + np.array(array.shape, ">u4").tobytes()
            + array.astype(np.uint8).tobytes()
        )
        path = folder / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.fixture(params=[False, True], ids=["plain", "gz"])
def idx(request, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 7, 5)), np.arange(12) % 4 + 1
    write_idx(tmp_path, "train", images, labels, request.param)
    write_idx(tmp_path, "t10k", images[:3] // 2, labels[:3], request.param)
    return tmp_path, images


def idx_data(root, **kwargs):
    return DataConfig(name="idx", root=str(root), **({"val_split": "t10k"} | kwargs))


def test_idx_reads_images_and_labels(idx):
    root, images = idx
    train, val = build_datasets(idx_data(root))
    assert (len(train), len(val)) == (12, 3)
    assert train.classes == ["1", "2", "3", "4"]  # the values that occur
    assert train.labels.tolist() == [0, 1, 2, 3] * 3 and train.labels.dtype == np.int64
    assert (train.load(7).mode, train.load(7).size) == ("RGB", (5, 7))
    assert (np.asarray(train.load(7)) == images[7][..., None]).all()
    assert (
        np.asarray(build_datasets(idx_data(root, in_chans=1))[1].load(2)) == images[2] // 2
    ).all()


def test_idx_names_prefixes_that_exist(idx):
    refused(
        idx_data(idx[0], val_split="t1k"),
        "no t1k-images-idx3-ubyte[.gz]",
        "data.val_split=",
        "Did you mean 't10k'",
    )


def test_idx_refuses_other_files(idx):
    root, _ = idx
    path = next(root.glob("train-labels*"))
    path.write_bytes(next(root.glob("train-images*")).read_bytes())
    refused(
        idx_data(root),
        str(path),
        "no IDX file of unsigned bytes in 1 dimensions",
        "00000803, not 00000801",
    )
    path.write_bytes(b"")
    refused(idx_data(root), str(path))


def test_idx_refuses_counts_that_differ(idx):
    root, images = idx
    path = next(root.glob("train-labels*"))
    path.unlink()
    write_idx(root, "other", images, np.arange(11), path.suffix == ".gz")
    next(root.glob("other-labels*")).rename(path)
    refused(idx_data(root), "12 images", "11 labels")


def test_idx_refuses_unknown_labels_and_no_images(idx):
    root, images = idx
    write_idx(root, "val", images[:2], np.array([1, 9]))
    refused(idx_data(root, val_split="val"), "val-images-idx3-ubyte has labels", "lacks: 9")
    write_idx(root, "none", images[:0], np.arange(0))
    refused(idx_data(root, val_split="none"), "none-images-idx3-ubyte holds no images")


def test_idx_of_one_class_or_unreadable_is_refused(tmp_path, monkeypatch):
    write_idx(tmp_path, "train", np.zeros((2, 3, 3)), np.full(2, 7))
    data = idx_data(tmp_path, val_split="train")
    refused(data, "train-images-idx3-ubyte has one class, '7'", "nothing to tell apart")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(data, "(Permission denied)", "chmod +r")


def test_idx_of_black_or_faint_images_is_said(tmp_path):
    images = np.zeros((6, 5, 5))
    images[1:, 2, 2] = 1
    write_idx(tmp_path, "train", images, np.arange(6))
    train, _ = build_datasets(idx_data(tmp_path, val_split="train"))
    assert "brightest pixel of 6 images looked at" in notes_on(train)[0]
    assert (
        "1 of 6 images looked at" in notes_on(train)[1] and "(first: image 0)" in notes_on(train)[1]
    )


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("keep", [-1, 18, 9, 6, 3])
def test_idx_refuses_truncated_files(idx, kind, keep):
    root, _ = idx
    path = next(root.glob(f"train-{kind}*"))
    path.write_bytes(path.read_bytes()[:keep])
    refused(idx_data(root), str(path))


def test_idx_refuses_trailing_bytes(tmp_path):
    write_idx(tmp_path, "train", np.zeros((2, 3, 3)), np.arange(2))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes() + b"x")
    refused(idx_data(tmp_path, val_split="train"), "(2, 3, 3) promises 18 bytes, it holds 19")


def test_idx_refuses_a_gz_that_is_none(tmp_path):
    write_idx(tmp_path, "train", np.zeros((2, 3, 3)), np.arange(2))
    path = tmp_path / "train-images-idx3-ubyte"
    path.rename(tmp_path / "train-images-idx3-ubyte.gz")
    refused(idx_data(tmp_path, val_split="train"), "cannot read", "fetch it again")


def test_idx_refuses_a_gz_with_damage_inside(tmp_path):
    write_idx(
        tmp_path, "train", np.random.default_rng(0).integers(0, 4, (20, 9, 9)), np.arange(20), True
    )
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for at in range(12, len(whole), 37):
        path.write_bytes(whole[:at] + bytes(255 - b for b in whole[at : at + 8]) + whole[at + 8 :])
        refused(idx_data(tmp_path, val_split="train"), f"cannot read {path} (", "fetch it again")


# --- digest -----------------------------------------------------------------------------------


def digest_of(root):
    return build_datasets(DataConfig(name="folder", root=str(root)))[0].content_digest()


def test_the_digest_does_not_depend_on_where_the_folder_lies(root, tmp_path_factory):
    first = digest_of(root)
    assert len(first) == 64 and int(first, 16) >= 0
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.copytree(root, elsewhere)
    assert digest_of(elsewhere) == first
    (root / "train").rename(root / "other")
    split = build_datasets(DataConfig(name="folder", root=str(root), train_split="other"))[0]
    assert split.content_digest() == first
    shutil.rmtree(root / "val" / "cat")  # only the training images are in it
    (root / "val" / "cat").mkdir()
    paint(root / "val" / "cat" / "new.png")
    (root / "other").rename(root / "train")
    assert digest_of(root) == first


def rename_class(train):
    (train / "cat").rename(train / "dog")
    (train.parent / "val" / "cat").rename(train.parent / "val" / "dog")


CHANGES = {
    "a file was renamed": lambda train: (train / "cat" / "2.JPEG").rename(train / "cat" / "7.JPEG"),
    "a file was added": lambda train: paint(train / "cat" / "3.JPEG"),
    "a file was removed": lambda train: (train / "cat" / "2.JPEG").unlink(),
    "a file has another label": lambda train: (train / "bird" / "2.JPEG").rename(
        train / "Ant" / "3.JPEG"
    ),
    "a class was renamed": rename_class,
    "an image was resized": lambda train: (
        Image.open(train / "bird" / "1.JPEG").resize((4, 3)).save(train / "bird" / "1.JPEG")
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_tells_other_images(root, change):
    first = digest_of(root)
    CHANGES[change](root / "train")
    assert digest_of(root) != first


def test_the_digest_reads_evenly_spaced_files_the_first_and_the_last_among_them(root, monkeypatch):
    train, _ = build_datasets(DataConfig(name="folder", root=str(root)))
    read = []
    monkeypatch.setattr(folder, "read_file", lambda path: read.append(Path(path).name) or b"")
    monkeypatch.setattr(folder, "DIGEST_FILES", 64)
    n = 1000
    names = np.array([f"{i:04}.jpg".encode() for i in range(n)])
    FolderDataset("here", ["a"], np.zeros(n, np.int64), 3, names).content_digest()
    chosen = np.array([int(name[:4]) for name in read])
    assert len(chosen) == 64 and chosen[0] == 0 and chosen[-1] == n - 1
    assert set(np.diff(chosen)) <= {15, 16}
    read.clear()
    train.content_digest()
    assert read == [f"{i}.JPEG" for _ in range(3) for i in range(3)]  # all of a small set


def test_the_digest_names_a_file_that_is_gone(root):
    train, _ = build_datasets(DataConfig(name="folder", root=str(root)))
    (root / "train" / "cat" / "2.JPEG").unlink()
    with pytest.raises(UserError, match=r"cat/2\.JPEG \(No such file"):
        train.content_digest()


def test_the_digest_of_arrays_tells_classes_labels_shapes_and_every_pixel():
    images, labels = np.zeros((6, 4, 2), np.uint8), np.arange(6) % 2

    def digest(source="x", classes=("0", "1"), labels=labels, in_chans=3, images=images):
        return ArrayDataset(source, list(classes), labels, in_chans, images).content_digest()

    pixel, label = images.copy(), labels.copy()
    pixel[5, 3, 1] = 1
    label[5] = 0
    assert digest() == digest(source="elsewhere", in_chans=1, labels=labels.astype(np.int32))
    assert digest(images=np.asfortranarray(pixel)) == digest(images=pixel)
    others = [
        digest(classes=("01", "")),
        digest(classes=("1", "0")),
        digest(labels=label),
        digest(images=pixel),
        digest(images=images.reshape(6, 2, 4)),
    ]
    assert len({digest(), *others}) == 6


def test_the_digest_handles_names_all_at_once(monkeypatch):
    """A million names take a tenth of a second: it opens a few files, but calls nothing by name."""
    monkeypatch.setattr(folder, "read_file", lambda path: b"")

    def calls(n: int) -> int:
        names = np.array([b"n01440764_%d.JPEG" % i for i in range(n)])
        labels = np.arange(n) * 10 // n
        dataset = FolderDataset("here", [f"n{k:08}" for k in range(10)], labels, 3, names)
        return count_calls(dataset.content_digest)

    assert calls(100_000) - calls(50_000) < 25_000
