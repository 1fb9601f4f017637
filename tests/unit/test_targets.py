"""The folder of stored answers: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ghosttrain.config.errors import UserError
from ghosttrain.distill import targets
from ghosttrain.distill.answer import Answer
from ghosttrain.distill.targets import About, Shard, Store, create, is_store, open_store

SAMPLES, EPOCHS, SIZE, R = 25, 3, 10, 12
HEADER = 128
FINGERPRINT = {
    "teacher": {"a": {"name": "net", "mean": (0.5, 0.5), "weights": "ab" * 32}},
    "images": "cd" * 32,
    "classes": [f"n{i:08d}" for i in range(100)],
}
ABOUT = About(
    fingerprint=FINGERPRINT,
    codec="topk:3",
    num_classes=10,
    widths=(),
    record_bytes=R,
    samples=SAMPLES,
    epochs=EPOCHS,
    shard_size=SIZE,
    notes={"teacher": "net, top-1 80 %"},
)
TABLES = {"mean": torch.full((10,), 0.1)}


def make(folder: Path, fill: bool = True, **changes) -> Store:
    store = create(folder, replace(ABOUT, **changes), TABLES, "seed: 0\n")
    for shard in store.shards() if fill else ():
        store.write(shard, content(shard.draw)[list(store.samples(shard))])
    return store


def content(draw: int) -> Tensor:
    """Return the records (SAMPLES, R) of a draw: no two are alike."""
    generator = torch.Generator().manual_seed(draw)
    return torch.randint(256, (SAMPLES, R), generator=generator, dtype=torch.uint8)


def everything(store: Store) -> list[Tensor]:
    return [store.records(draw, range(store.about.samples)) for draw in range(store.about.epochs)]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def refused(store: Store, shard: Shard, says: str) -> None:
    """A reader names the file, what is wrong and what to type, and the other shards still read."""
    index = store.samples(shard)[0]
    with pytest.raises(UserError, match=says) as error:
        store.records(shard.draw, [index])
    message = str(error.value)
    assert message.startswith(str(store.path(shard))) and "\n" not in message
    assert f"type python -m ghosttrain cache {store.folder} --repair" in message
    other = (shard.draw + 1) % EPOCHS
    assert torch.equal(store.records(other, [index])[0], content(other)[index])


# --- Writing and reading --------------------------------------------------------------------------


def test_what_is_written_is_read_in_any_order(tmp_path: Path) -> None:
    make(tmp_path / "store")
    store = open_store(tmp_path / "store")
    generator = torch.Generator().manual_seed(0)
    for draw in (2, 0, 1, 0):
        for _ in range(3):
            indices = torch.randint(SAMPLES, (40,), generator=generator).tolist()
            records = store.records(draw, indices)
            assert records.dtype == torch.uint8 and records.shape == (40, R)
            assert torch.equal(records, content(draw)[indices])
    assert store.records(0, []).shape == (0, R)
    assert store.missing() == [] and store.damaged() == []


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    files = sorted(str(p.relative_to(store.folder)) for p in store.folder.rglob("*.*"))
    shards = [f"draws/{d:05d}/{n:06d}.targets" for d in range(EPOCHS) for n in range(3)]
    assert files == ["about.json", "config.yaml", *shards, "tables.safetensors"]
    assert (store.folder / "config.yaml").read_text() == "seed: 0\n"
    assert torch.equal(load_file(store.folder / "tables.safetensors")["mean"], TABLES["mean"])
    assert [list(store.samples(Shard(0, n)))[::9] for n in range(3)] == [[0, 9], [10, 19], [20]]
    data = store.path(Shard(1, 2)).read_bytes()
    assert data[:21] == b"ghosttrain targets 1\n" and len(data) == HEADER + 5 * R
    assert data[HEADER:] == content(1)[20:].numpy().tobytes()
    total = sum(store.path(shard).stat().st_size for shard in store.shards())
    assert store.total_bytes() == total


@pytest.mark.parametrize("index", [-1, SAMPLES])
def test_there_is_no_sample_beyond_the_last(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"sample {index} of {SAMPLES}"):
        make(tmp_path / "store").records(0, [0, index])


def test_answers_come_back_through_the_codec(tmp_path: Path) -> None:
    store = make(tmp_path / "store", fill=False)
    logits = torch.randn(SAMPLES, 10, generator=torch.Generator().manual_seed(0))
    store.write(Shard(0, 0), store.codec.encode(Answer(logits))[:10])
    read = open_store(store.folder).to("cpu")
    back = read.decode(read.records(0, [7, 3])).logits
    assert torch.equal(back.topk(3).indices, logits[[7, 3]].topk(3).indices)


@pytest.mark.parametrize("codec", ["features:4", "logits:4", "topk:2"])
def test_a_store_knows_what_it_was_made_with(tmp_path: Path, codec: str) -> None:
    tables = {**TABLES, "weight": torch.rand(10, 8), "bias": torch.rand(10)}
    size = {"features:4": 12, "logits:4": 9, "topk:2": 8}[codec]
    about = replace(ABOUT, codec=codec, widths=(3, 5) if "f" in codec else (), record_bytes=size)
    made = create(tmp_path / "store", about, tables, "")
    read = open_store(tmp_path / "store")
    assert read.about == made.about and read.codec.name == codec
    assert read.about.widths == about.widths and read.about.notes == about.notes
    assert read.codec.tables.keys() == made.codec.tables.keys()
    assert all(torch.equal(read.codec.tables[k], tables[k]) for k in read.codec.tables)


def test_records_of_another_shape_are_not_written(tmp_path: Path) -> None:
    store = make(tmp_path / "store", fill=False)
    for records in (content(0)[:9], content(0)[:10, :-1], content(0)[:10].float()):
        with pytest.raises(ValueError, match=r"takes uint8 \(10, 12\)"):
            store.write(Shard(0, 0), records)
    assert store.missing() == store.shards()


def test_a_checksum_is_verified_once_in_a_process(tmp_path: Path, monkeypatch) -> None:
    store = make(tmp_path / "store")
    read, hashed = open_store(store.folder), []
    sha256 = targets.hashlib.sha256

    def counting(data):
        if isinstance(data, memoryview):
            hashed.append(len(data))
        return sha256(data)

    monkeypatch.setattr(targets.hashlib, "sha256", counting)
    for draw in (0, 0, 1, 0, 1):
        read.records(draw, range(SAMPLES))
    assert sorted(hashed) == sorted(2 * [10 * R, 10 * R, 5 * R])
    assert set(read._open) == {0, 1, 2} and read._draw == 1  # and one draw is open


# --- Other processes ------------------------------------------------------------------------------


def _read_in_child(store: Store, queue) -> None:
    queue.put([records.tolist() for records in everything(store)])


def test_a_spawned_process_reads_it(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    store.records(1, [0, 24])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(store, queue))
    child.start()
    found = queue.get(timeout=600)
    child.join()
    assert found == [content(draw).tolist() for draw in range(EPOCHS)]


def test_no_map_is_sent_to_another_process(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    before = len(pickle.dumps(store))
    store.records(0, range(SAMPLES))
    assert len(pickle.dumps(store)) == before
    assert torch.equal(pickle.loads(pickle.dumps(store.records))(2, [5]), content(2)[5:6])


def test_only_one_job_writes(tmp_path: Path) -> None:
    store = make(tmp_path / "store", fill=False)
    with store.locked():
        with pytest.raises(UserError, match="another process is storing answers in"):
            with open_store(store.folder).locked():
                pass
        store.write(Shard(0, 0), content(0)[:10])
    with store.locked():
        pass


def _write_and_die(store: Store, size: int) -> None:
    """Write a shard and end as by SIGKILL when `size` bytes of it are on disk."""

    def die(handle: int) -> None:
        os.ftruncate(handle, size)
        os._exit(9)

    targets.os.fsync = die
    with store.locked():
        store.write(Shard(0, 1), content(0)[10:20])


@pytest.mark.parametrize("size", [0, 50, HEADER + 30, HEADER + 10 * R])
def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path, size: int) -> None:
    store = make(tmp_path / "store")
    store.path(Shard(0, 1)).unlink()
    store.path(Shard(0, 0)).unlink()
    child = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(store, size))
    child.start()
    child.join()
    assert child.exitcode == 9
    left = [p.name for p in store.path(Shard(0, 1)).parent.iterdir() if p.name.startswith(".")]
    assert left == [".000001.targets.part"]
    again = open_store(store.folder)
    assert again.missing() == [Shard(0, 0), Shard(0, 1)] and again.damaged() == []
    with again.locked():
        for shard in again.missing():
            again.write(shard, content(0)[list(again.samples(shard))])
    assert again.missing() == [] and not list(store.folder.rglob(".*"))
    assert all(torch.equal(x, content(draw)) for draw, x in enumerate(everything(again)))


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    store = make(tmp_path / "store")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(targets.os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*000000.targets: No space left on device"):
        store.write(Shard(0, 0), content(1)[:10])
    monkeypatch.undo()
    assert not list(store.folder.rglob(".*"))
    assert torch.equal(store.records(0, range(SAMPLES)), content(0))


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 20, 40, 63, 64, 80, 95, 96, 110, 127])
def test_one_flipped_bit_in_the_header_is_found(tmp_path: Path, position: int) -> None:
    store, shard = make(tmp_path / "store"), Shard(1, 1)
    flip(store.path(shard), position)
    says = (
        "no file of stored answers" if position < 64 else "another store or to another place",
        "its checksum is wrong",
    )[position >= 96]
    refused(store, shard, says)
    assert store.missing() == []
    ((found, why),) = store.damaged()
    assert found == shard and re.search(says, why)


@pytest.mark.parametrize("position", [HEADER, HEADER + 57, HEADER + 10 * R - 1])
def test_one_flipped_bit_in_the_body_is_found(tmp_path: Path, position: int) -> None:
    store, shard = make(tmp_path / "store"), Shard(2, 0)
    flip(store.path(shard), position)
    assert store.missing() == []
    assert store.damaged() == [(shard, "is damaged: its checksum is wrong")]
    refused(store, shard, "is damaged: its checksum is wrong")


@pytest.mark.parametrize("size", [0, 1, HEADER - 1, HEADER, HEADER + 10 * R - 1])
def test_a_truncated_shard_is_found(tmp_path: Path, size: int) -> None:
    store, shard = make(tmp_path / "store"), Shard(0, 1)
    os.truncate(store.path(shard), size)
    assert store.missing() == [shard]
    says = f"is not whole: {size} bytes instead of {HEADER + 10 * R}"
    assert store.damaged() == [(shard, says)]
    refused(store, shard, says)


def test_a_shard_that_grew_is_found(tmp_path: Path) -> None:
    store, shard = make(tmp_path / "store"), Shard(0, 1)
    with open(store.path(shard), "ab") as file:
        file.write(b"x")
    assert store.missing() == [shard]
    refused(store, shard, "is not whole: 249 bytes instead of 248")


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    store, shard = make(tmp_path / "store"), Shard(0, 2)
    store.path(shard).unlink()
    assert store.missing() == [shard] and store.damaged() == []
    refused(store, shard, "is missing")


@pytest.mark.parametrize("source", [Shard(0, 0), Shard(1, 1)])
def test_a_shard_in_the_place_of_another_is_found(tmp_path: Path, source: Shard) -> None:
    store, shard = make(tmp_path / "store"), Shard(0, 1)
    shutil.copy(store.path(source), store.path(shard))
    assert store.missing() == []
    assert store.damaged() == [(shard, "belongs to another store or to another place in this one")]
    refused(store, shard, "belongs to another store or to another place")


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": {**FINGERPRINT, "images": "ce" * 32}},
        {"codec": "logits:6", "record_bytes": 12},
        {"samples": SAMPLES - 1},
        {"num_classes": 9},
    ],
)
def test_a_shard_of_another_store_is_found(tmp_path: Path, changes) -> None:
    tables = {"mean": torch.full((changes.get("num_classes", 10),), 0.1)}
    other = create(tmp_path / "other", replace(ABOUT, **changes), tables, "")
    other.write(Shard(0, 1), content(0)[10:20])
    store, shard = make(tmp_path / "store"), Shard(0, 1)
    shutil.copy(other.path(shard), store.path(shard))
    refused(store, shard, "belongs to another store")


def test_notes_and_epochs_are_not_part_of_the_identity(tmp_path: Path) -> None:
    other = make(tmp_path / "other", epochs=5, notes={"teacher": "the same, described otherwise"})
    store, shard = make(tmp_path / "store", fill=False), Shard(0, 1)
    store.path(shard).parent.mkdir(parents=True)
    shutil.copy(other.path(shard), store.path(shard))
    assert torch.equal(store.records(0, [12]), content(0)[12:13])


def test_repairing_makes_only_what_is_damaged(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    shards = [Shard(0, 1), Shard(2, 2)]
    flip(store.path(shards[0]), HEADER + 3)
    os.truncate(store.path(shards[1]), 50)
    assert [shard for shard, _ in store.damaged()] == shards
    for shard, _ in store.damaged():
        store.write(shard, content(shard.draw)[list(store.samples(shard))])
    assert store.damaged() == [] and store.missing() == []
    with pytest.raises(UserError):  # a process that saw the damage may go on after the repair
        flip(store.path(shards[0]), HEADER)
        store.records(0, [10])
    flip(store.path(shards[0]), HEADER)
    assert torch.equal(store.records(0, [10]), content(0)[10:11])


def test_a_folder_with_a_space_is_quoted_in_what_to_type(tmp_path: Path) -> None:
    store = make(tmp_path / "my store", fill=False)
    with pytest.raises(UserError, match=r"cache '.*/my store' --repair"):
        store.records(0, [0])


# --- Opening --------------------------------------------------------------------------------------


def test_where_there_is_no_store_it_says_how_to_make_one(tmp_path: Path) -> None:
    assert not is_store(tmp_path / "nowhere") and not is_store(tmp_path)
    with pytest.raises(UserError, match="is no folder: type python -m ghosttrain cache"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no stored answers: type python -m ghosttrain cache"):
        open_store(tmp_path)


def test_a_beginning_without_about_is_no_store_and_is_made_anew(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    (store.folder / "about.json").rename(store.folder / ".about.json.part")
    assert not is_store(store.folder)
    again = make(store.folder, fill=False)
    assert is_store(store.folder) and again.missing() == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "store")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for name in ("store", "photos"):
        before = sorted((tmp_path / name).iterdir())
        with pytest.raises(UserError, match="is not empty: .* type another targets.dir"):
            make(tmp_path / name)
        assert sorted((tmp_path / name).iterdir()) == before


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write stored answers to .*file/store: Not a dir"):
        make(tmp_path / "file" / "store")


def change_about(folder: Path, **changes) -> None:
    path = folder / "about.json"
    fields = json.loads(path.read_text())
    fields.update(changes)
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "stored in format 2, this version reads 1"),
        ({"format": None}, "no 'format'"),
        ({"samples": None}, "samples"),
        ({"samples": "many"}, "samples"),
        ({"codec": "pca:4"}, "targets.codec=pca:4 is no codec"),
        ({"num_classes": 11}, "table 'mean' of"),
        ({"record_bytes": 40}, "topk:3 makes records of 12 bytes"),
    ],
)
def test_an_about_that_does_not_fit_is_refused(tmp_path: Path, changes, says: str) -> None:
    store = make(tmp_path / "store")
    change_about(store.folder, **changes)
    with pytest.raises(UserError, match=says) as error:
        open_store(store.folder)
    assert "another targets.dir" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"format": 1}', "\0\1"])
def test_an_about_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    store = make(tmp_path / "store")
    (store.folder / "about.json").write_text(text)
    with pytest.raises(UserError, match="about.json cannot be read .*: store anew in another"):
        open_store(store.folder)


@pytest.mark.parametrize("position", [0, 20, -1, None])
def test_damaged_tables_are_refused(tmp_path: Path, position: int | None) -> None:
    path = make(tmp_path / "store").folder / "tables.safetensors"
    path.unlink() if position is None else flip(path, position)
    says = "No such file" if position is None else "its checksum is wrong"
    with pytest.raises(UserError, match=f"tables.safetensors cannot be read .{says}"):
        open_store(path.parent)


# --- More draws -----------------------------------------------------------------------------------


def test_a_store_is_given_more_draws(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    more = store.extended(5)
    assert more.about.epochs == 5 and open_store(store.folder).about == more.about
    assert more.missing() == [Shard(d, n) for d in (3, 4) for n in range(3)]
    assert torch.equal(more.records(2, range(SAMPLES)), content(2))
    for shard in more.missing():
        more.write(shard, content(shard.draw)[list(more.samples(shard))])
    assert open_store(store.folder).damaged() == [] and more.missing() == []


@pytest.mark.parametrize("epochs", [1, EPOCHS])
def test_a_store_never_shrinks(tmp_path: Path, epochs: int) -> None:
    store = make(tmp_path / "store", fill=False)
    before = (store.folder / "about.json").read_bytes()
    assert store.extended(epochs).about.epochs == EPOCHS
    assert (store.folder / "about.json").read_bytes() == before


# --- Difference -----------------------------------------------------------------------------------


def test_the_same_fingerprint_has_no_difference(tmp_path: Path) -> None:
    store = make(tmp_path / "store", fill=False)
    assert store.difference(FINGERPRINT) == []
    assert open_store(store.folder).difference(FINGERPRINT) == []


def test_differences_are_named_leaf_by_leaf(tmp_path: Path) -> None:
    store = make(tmp_path / "store", fill=False)
    classes = [f"n{i:08d}" for i in range(100)]
    classes[70] = "dog"
    now = {
        "teacher": {"a": {"name": "", "mean": [0.5, 0.4], "weights": "ab" * 31 + "cd"}},
        "classes": classes,
        "augment": {"seed": 3, "policy": None},
    }
    images, weights = f'"{"cd" * 19}c...', f"...{'ab' * 4}"
    assert store.difference(now) == [
        "augment.policy: stored nothing, now null",
        "augment.seed: stored nothing, now 3",
        'classes: stored ...0069", "n00000070", "n00000071", "n00000..., '
        'now ...0069", "dog", "n00000071", "n00000072", ...',
        f"images: stored {images}, now nothing",
        "teacher.a.mean: stored [0.5, 0.5], now [0.5, 0.4]",
        'teacher.a.name: stored "net", now ""',
        f'teacher.a.weights: stored {weights}ab", now {weights}cd"',
    ]


@pytest.mark.parametrize(
    ("stored", "now"),
    [(1, 1.5), (True, False), ("1", 1), (None, 0), ([], [1]), ({"a": 1}, 1), ({}, {"a": 1})],
)
def test_values_of_any_kind_differ(tmp_path: Path, stored, now) -> None:
    store = make(tmp_path / "store", fill=False, fingerprint={"x": stored})
    assert store.difference({"x": stored}) == []
    (line,) = store.difference({"x": now})[:1]
    was, _, is_now = line.partition(": stored ")[2].partition(", now ")
    assert was and is_now and was != is_now


def test_a_job_that_ends_lets_go_of_the_folder_though_its_workers_live(tmp_path: Path) -> None:
    store = make(tmp_path / "store", fill=False)
    with pytest.raises(KeyboardInterrupt), store.locked():
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        worker.start()
        raise KeyboardInterrupt
    with store.locked():
        pass
    worker.kill()
    worker.join()
