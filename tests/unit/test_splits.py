"""Held-out images of one folder or table: shares, groups, folds, near-duplicates, and what is
refused.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import build_datasets, unusual_notes
from ghosttrain.data.datasets.duplicates import near_duplicates
from ghosttrain.data.datasets.splitting import held_out_mask
from ghosttrain.errors import UserError

COUNTS = {"ant": 20, "bee": 11, "cow": 5}


def paint(path: Path, seed: int) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC)
    image.save(path)
    return image


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for k, (name, count) in enumerate(COUNTS.items()):
        for number in range(count):
            paint(root / name / f"object{number // 2}-{number}.png", 100 * k + number)
    return root


def halves(root: Path, **settings) -> tuple[list[str], list[str]]:
    data = DataConfig(name="folder", root=str(root), **settings)
    return tuple([each.relative_path(i) for i in range(len(each))] for each in build_datasets(data))


def count(names: list[str]) -> list[int]:
    return [sum(name.startswith(label) for name in names) for label in COUNTS]


def test_a_share_of_every_class_is_held_out_whatever_else_is_there(root, tmp_path) -> None:
    train, held = halves(root, split=0.2)
    assert count(held) == [4, 2, 1] and sorted(train + held) == sorted({*train, *held})
    assert len(train + held) == sum(COUNTS.values())
    assert halves(root, split=0.2) == (train, held)
    assert halves(root, split=0.2, split_seed=1)[1] != held
    for name in [*train, *held]:  # the same names elsewhere, and more: most stay where they are
        paint(tmp_path / name, 0)
    paint(tmp_path / "ant" / "another.png", 1)
    assert len(set(halves(tmp_path, split=0.2)[1]) & set(held)) >= len(held) - 1


def test_folds_are_equal_parts_and_every_image_is_held_out_once(root) -> None:
    parts = [halves(root, fold=k, folds=4)[1] for k in range(4)]
    assert sorted(sum(parts, [])) == sorted(sum(halves(root, split=0.5), []))
    assert [len(part) for part in parts] == [9] * 4
    for part in parts:
        assert all(
            n // 4 <= m <= -(-n // 4) for m, n in zip(count(part), COUNTS.values(), strict=True)
        )


def test_groups_and_near_duplicates_stay_in_one_half(root, tmp_path) -> None:
    train, held = halves(root, split=0.3, group_by=r"(\w+/object\d+)-")
    objects = [{name.partition("-")[0] for name in half} for half in (train, held)]
    assert not objects[0] & objects[1]
    assert count(held) == pytest.approx([6, 3.3, 1.5], abs=1)
    for seed in range(8):
        image = paint(tmp_path / "ant" / f"{seed}.png", seed)
        paint(tmp_path / "bee" / f"{seed}.png", 50 + seed)
        for copy in range(3):  # smaller, recompressed, brighter
            changed = image.resize((40 + copy, 40)).filter(ImageFilter.GaussianBlur(0.5))
            changed = changed.point(lambda v: min(255, int(v * 1.05)))
            changed.save(tmp_path / "ant" / f"{seed}-copy{copy}.jpg", quality=80)
    data = DataConfig(name="folder", root=str(tmp_path), split=0.25, near_duplicates="together")
    both = build_datasets(data)
    names = [[each.relative_path(i) for i in range(len(each))] for each in both]
    pictures = [{Path(name).stem.partition("-")[0] for name in half if "ant" in name}
                for half in names]  # fmt: skip
    assert not pictures[0] & pictures[1] and abs(count(names[1])[0] - 8) <= 2
    pairs = near_duplicates(*build_datasets(data.model_copy(update={"near_duplicates": "ignore"})))
    # Three copies of each of eight, of which blur may hide one; and none of the others.
    assert 22 <= len(pairs) <= 24


@pytest.mark.parametrize("half", ["train", "val"])
def test_a_class_with_one_image_is_named_and_may_be_left_out_of_validation(root, half) -> None:
    names = [b"a/1", b"a/2", b"a/3", b"b/1"]
    labels = np.array([0, 0, 0, 1])
    data = DataConfig(split=0.34 if half == "val" else 0.6)
    with pytest.raises(UserError, match=r"leaves 'b' \(1 images in 1 groups\) without a"):
        held_out_mask(data, names, labels, ["a", "b"])
    subset = data.model_copy(update={"val_classes": "subset"})
    held = held_out_mask(subset, names, labels, ["a", "b"])
    assert not held[3] and 1 <= held[:3].sum() <= 2


def test_a_folder_whose_validation_lacks_a_class(tmp_path) -> None:
    for place in ("train/a", "train/b", "val/b"):
        paint(tmp_path / place / "1.png", 1)
    with pytest.raises(UserError, match=r"lacks 'a'; type data.val_classes=subset"):
        halves(tmp_path)
    train, held = halves(tmp_path, val_classes="subset")
    assert (train, held) == (["a/1.png", "b/1.png"], ["b/1.png"])
    with pytest.raises(UserError, match=r"holds train/ and val/: it is split already"):
        halves(tmp_path, split=0.2)


def write_table(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        if path.suffix == ".jsonl":
            file.write("\n".join(map(json.dumps, rows)))
        else:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_table_is_split_by_its_column_or_here(root, tmp_path, suffix) -> None:
    rows = [
        {"file": str(path.relative_to(root)), "kind": path.parent.name,
         "half": ("val", "train", "train", "test")[place % 4], "size": 3}
        for place, path in enumerate(sorted(root.rglob("*.png")))
    ]  # fmt: skip
    table = write_table(tmp_path / f"images{suffix}", rows)
    words = [f"data.table={table}", f"data.root={root}", "data.path_column=file",
             "data.label_column=kind", "+recipe=baseline", "data=table"]  # fmt: skip
    data = compose([*words, "data.split_column=half"]).config.data
    train, held = build_datasets(data)
    assert [held.relative_path(i) for i in range(len(held))] == [
        row["file"] for row in rows if row["half"] == "val"
    ]
    assert [train.classes[k] for k in train.labels] == [
        row["kind"] for row in rows if row["half"] == "train"
    ]
    assert train.left_out == (f"left out of {table}: rows of 'test' 9",)
    train.load(3), held.load(0)
    data = compose([*words, "data.split=0.2"]).config.data
    assert len(build_datasets(data)[1]) == 7


def test_what_is_wrong_with_a_table_is_said_in_one_line(root, tmp_path) -> None:
    good = {"path": "ant/object0-0.png", "label": "ant", "split": "train"}
    other = {"path": "bee/object0-0.png", "label": "bee", "split": "val"}

    def refused(rows: list[dict], message: str, **settings) -> None:
        table = write_table(tmp_path / "table.csv", rows)
        settings = {"split_column": "split", **settings}
        data = DataConfig(name="table", root=str(root), table=str(table), **settings)
        with pytest.raises(UserError, match=message):
            build_datasets(data)

    gone = [{**good, "path": f"ant/{n}.png"} for n in range(5)]
    refused([*gone, good], r"5 files that are not below .* \(of 6; first: ant/0.png, ant/1.png, "
            r"ant/2.png and 2 more\): type data.root=FOLDER")  # fmt: skip
    refused([good, {**other, "label": ""}], r"1 rows lack a path or label \(rows 3\)")
    refused([good, good], "1 files more than once")
    refused([good], "there is no column 'kind'; type data.label_column=NAME", label_column="kind")
    refused([good, other], "no training image of 'bee'")
    refused([good, {**other, "split": "train"}], r"no row has 'val' in column 'split'")
    refused([good, {**good, "path": other["path"], "label": "bee"},
             {**other, "path": "bee/object0-1.png"}], "no held-out image of 'ant'")  # fmt: skip
    (tmp_path / "ragged.csv").write_text("path,label\na.png,b,c\n")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "latin.csv").write_bytes("path,label\nß.png,b\n".encode("latin-1"))
    for name, message in (("ragged.csv", "row 2: 3 fields, but the header names 2"),
                          ("list.jsonl", "row 1: not an object"),
                          ("latin.csv", "not text in UTF-8")):  # fmt: skip
        data = DataConfig(name="table", root=str(root), table=str(tmp_path / name), split=0.5)
        with pytest.raises(UserError, match=message):
            build_datasets(data)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.split=0.2"], "data.split=0.2 is for data=folder and data=table, not for"),
        (["data=folder", "data.root=.", "data.split=1.5"], "data.split=1.5 is not less than 1"),
        (["data=folder", "data.root=.", "data.split=0.2", "data.fold=0"], "both hold images out"),
        (["data=folder", "data.root=.", "data.fold=5"], "data.fold=5 of data.folds=5: they count"),
        (["data=folder", "data.root=.", "data.group_by=x"], "type data.split=0.2 too"),
        (["data=folder", "data.root=.", "data.split=0.2", "data.group_by=("], "no regular expres"),
        (["data=folder", "data.root=.", "data.table=x"], "data.table=.* is for data=table"),
        (["data=table"], "data=table needs its file: type data.table=FILE.csv"),
        (["data=table", "data.table=none.csv"], "none.csv: no such file"),
        (["data=table", "data.table=docs"], "docs: a folder, not a file"),
        (["data=table", "data.table=/dev/zero"], "/dev/zero: a FIFO, a device or a socket, not a"),
        (["data=table", "data.table=pyproject.toml"], "say what is held out: type data.split=0.2"),
    ],
)
def test_settings_that_contradict_each_other(words, message, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UserError, match=message):
        compose(["+recipe=baseline", *words])


def test_an_expression_that_tells_no_objects_apart_is_refused(root) -> None:
    for pattern, message in (("zebra", "matches no file name"), ("(obj)", "finds 'obj' in every")):
        with pytest.raises(UserError, match=message):
            halves(root, split=0.2, group_by=pattern)


def test_a_run_keeps_its_split_and_folds_are_one_row(root, tmp_path, ghosttrain) -> None:
    words = ["+recipe=baseline", "model=mobilenetv2_050", "data=folder", f"data.root={root}",
             "data.train_size=32", "data.eval_size=32", "data.workers=0", "train.global_batch=8",
             "train.max_steps=2", "launch.device=cpu", f"run.root={tmp_path / 'runs'}",
             "data.folds=3"]  # fmt: skip
    done = ghosttrain("-m", *words, "data.fold=0,1,2")
    assert done.code == 0, done.err
    assert "ant 13" in done.out or "ant 14" in done.out
    runs = sorted((tmp_path / "runs" / "baseline").glob("*"))
    held = []
    for run in runs:
        rows = list(csv.DictReader((run / "split.csv").read_text().splitlines()))
        held += [row["path"] for row in rows if row["split"] == "val"]
        assert len(rows) == sum(COUNTS.values())
    assert len(runs) == 3 and len(held) == len(set(held)) == sum(COUNTS.values())
    table = ghosttrain("report", tmp_path / "runs").out
    assert "3 (0; folds 0, 1, 2)" in table and len(table.splitlines()) <= 4
    again = ghosttrain(
        *[w for w in words if w[:10] != "data.folds" and w != "data=folder"], "data=table",
        f"data.table={runs[0] / 'split.csv'}", "data.split_column=split",
    )  # fmt: skip
    assert again.code == 0, again.err


def test_unusual_images_are_pointed_out(root, tmp_path) -> None:
    data = DataConfig(name="folder", root=str(root), split=0.2, train_size=64)
    assert [note.split(":")[1] for note in unusual_notes(data, build_datasets(data)[0])] == [
        " few images of ant 16, bee 9, cow 4"
    ]
    for name in "ab":
        for number in range(25):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("L", (70, 28), 10 * number).save(tmp_path / name / f"{number}.png")
    data = data.model_copy(update={"root": str(tmp_path)})
    grey, small, wide = unusual_notes(data, build_datasets(data)[0])
    assert "data.in_chans=1" in grey
    assert "about 28 px high or wide, and are enlarged to 64" in small
    assert "about 2.5 times as long" in wide
