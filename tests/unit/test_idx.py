"""IDX files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import refusal, refused_data, write_idx

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import build_datasets, notes_on
from ghosttrain.data.datasets import idx as idx_files


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
    refused_data(
        idx_data(idx[0], val_split="t1k"),
        "no t1k-images-idx3-ubyte[.gz]",
        "data.val_split=",
        "Did you mean 't10k'",
    )


def test_an_idx_file_that_is_a_fifo_is_named(idx):
    root, _ = idx
    path = next(root.glob("train-labels*"))
    path.unlink()
    os.mkfifo(path)
    refused_data(idx_data(root), f"{path} is a FIFO, a device or a socket, not a file: put the IDX")


def test_idx_refuses_other_files(idx):
    root, _ = idx
    path = next(root.glob("train-labels*"))
    path.write_bytes(next(root.glob("train-images*")).read_bytes())
    refused_data(
        idx_data(root),
        str(path),
        "no IDX file of unsigned bytes in 1 dimensions",
        "00000803, not 00000801",
    )
    path.write_bytes(b"")
    refused_data(idx_data(root), str(path))


def test_idx_refuses_counts_that_differ(idx):
    root, images = idx
    path = next(root.glob("train-labels*"))
    path.unlink()
    write_idx(root, "other", images, np.arange(11), path.suffix == ".gz")
    next(root.glob("other-labels*")).rename(path)
    refused_data(idx_data(root), "12 images", "11 labels")


def test_idx_refuses_unknown_labels_and_no_images(idx):
    root, images = idx
    write_idx(root, "val", images[:2], np.array([1, 9]))
    refused_data(idx_data(root, val_split="val"), "val-images-idx3-ubyte has labels", "lacks: 9")
    write_idx(root, "none", images[:0], np.arange(0))
    refused_data(idx_data(root, val_split="none"), "none-images-idx3-ubyte holds no images")


def test_idx_of_one_class_or_unreadable_is_refused(tmp_path, monkeypatch):
    write_idx(tmp_path, "train", np.zeros((2, 3, 3)), np.full(2, 7))
    data = idx_data(tmp_path, val_split="train")
    refused_data(data, "train-images-idx3-ubyte has one class, '7'", "nothing to tell apart")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused_data(data, "(Permission denied)", "chmod +r")


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
    refused_data(idx_data(root), str(path))


def test_idx_refuses_trailing_bytes(tmp_path):
    write_idx(tmp_path, "train", np.zeros((2, 3, 3)), np.arange(2))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes() + b"x")
    refused_data(idx_data(tmp_path, val_split="train"), "(2, 3, 3) promises 18 bytes, it holds 19")


def test_idx_refuses_a_gz_that_is_none(tmp_path):
    write_idx(tmp_path, "train", np.zeros((2, 3, 3)), np.arange(2))
    path = tmp_path / "train-images-idx3-ubyte"
    path.rename(tmp_path / "train-images-idx3-ubyte.gz")
    refused_data(idx_data(tmp_path, val_split="train"), "cannot read", "fetch it again")


READ = gzip.GzipFile.read


def test_a_gz_is_not_unpacked_beyond_what_its_header_promises(tmp_path, monkeypatch):
    """A few kB may stand for gigabytes."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    asked = []
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n: asked.append(n) or READ(self, n))
    for sizes, most in (((2, 2, 2), 8), ((2**32 - 1,) * 3, 1032 * 10_000)):
        head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in sizes)
        path.write_bytes(gzip.compress(head + bytes(5_000_000)))
        refusal(lambda: idx_files._read_idx(path, 3), "is damaged", "promises")
        assert asked.pop() <= most + 1 and asked.pop() == 16


def test_idx_refuses_a_gz_with_damage_inside(tmp_path):
    write_idx(
        tmp_path, "train", np.random.default_rng(0).integers(0, 4, (20, 9, 9)), np.arange(20), True
    )
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for at in range(12, len(whole), 37):
        path.write_bytes(whole[:at] + bytes(255 - b for b in whole[at : at + 8]) + whole[at + 8 :])
        refused_data(idx_data(tmp_path, val_split="train"), f"{path} ", ": fetch it again")
