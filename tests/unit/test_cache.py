"""The folder of cached outputs: what is written is read, and nothing else is taken for it."""

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

from ghosttrain import files
from ghosttrain.distill import cache as cache_module
from ghosttrain.distill.cache import CacheInfo, Shard, TeacherCache, create, is_cache, open_cache
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.errors import UserError

SAMPLES, DRAWS, SIZE, R = 25, 3, 10, 12
HEADER = 128
KEY = {
    "teacher": {"a": {"name": "net", "mean": (0.5, 0.5), "weights": "ab" * 32}},
    "images": "cd" * 32,
    "classes": [f"n{i:08d}" for i in range(100)],
}
INFO = CacheInfo(
    key=KEY,
    codec="topk:3",
    num_classes=10,
    widths=(),
    bytes_per_image=R,
    samples=SAMPLES,
    draws=DRAWS,
    shard_size=SIZE,
    notes={"teacher": "net, top-1 80 %"},
)
TABLES = {"mean": torch.full((10,), 0.1)}


def make(folder: Path, fill: bool = True, **changes) -> TeacherCache:
    cache = create(folder, replace(INFO, **changes), TABLES, "seed: 0\n")
    for shard in cache.shards() if fill else ():
        cache.write(shard, content(shard.draw)[list(cache.samples(shard))])
    return cache


def content(draw: int) -> Tensor:
    """Return the cached (SAMPLES, R) of a draw: no two are alike."""
    generator = torch.Generator().manual_seed(draw)
    return torch.randint(256, (SAMPLES, R), generator=generator, dtype=torch.uint8)


def everything(cache: TeacherCache) -> list[Tensor]:
    return [cache.read(draw, range(cache.info.samples)) for draw in range(cache.info.draws)]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def refused(cache: TeacherCache, shard: Shard, says: str) -> None:
    """A reader names the file, what is wrong and what to type, and the other shards still read."""
    index = cache.samples(shard)[0]
    with pytest.raises(UserError, match=says) as error:
        cache.read(shard.draw, [index])
    message = str(error.value)
    assert message.startswith(str(cache.path(shard))) and "\n" not in message
    assert f"type python -m ghosttrain cache {cache.folder} --repair" in message
    other = (shard.draw + 1) % DRAWS
    assert torch.equal(cache.read(other, [index])[0], content(other)[index])


# --- Writing and reading --------------------------------------------------------------------------


def test_what_is_written_is_read_in_any_order(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    generator = torch.Generator().manual_seed(0)
    for draw in (2, 0, 1, 0):
        for _ in range(3):
            indices = torch.randint(SAMPLES, (40,), generator=generator).tolist()
            cached = cache.read(draw, indices)
            assert cached.dtype == torch.uint8 and cached.shape == (40, R)
            assert torch.equal(cached, content(draw)[indices])
    assert cache.read(0, []).shape == (0, R)
    assert cache.missing() == [] and cache.damaged() == []


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    files = sorted(str(p.relative_to(cache.folder)) for p in cache.folder.rglob("*.*"))
    shards = [f"draws/{d:05d}/{n:06d}.shard" for d in range(DRAWS) for n in range(3)]
    assert files == ["cache.json", "config.yaml", *shards, "tables.safetensors"]
    assert (cache.folder / "config.yaml").read_text() == "seed: 0\n"
    assert torch.equal(load_file(cache.folder / "tables.safetensors")["mean"], TABLES["mean"])
    assert [list(cache.samples(Shard(0, n)))[::9] for n in range(3)] == [[0, 9], [10, 19], [20]]
    data = cache.path(Shard(1, 2)).read_bytes()
    assert data[:19] == b"ghosttrain cache 1\n" and len(data) == HEADER + 5 * R
    assert data[HEADER:] == content(1)[20:].numpy().tobytes()
    total = sum(cache.path(shard).stat().st_size for shard in cache.shards())
    assert cache.total_bytes() == total


@pytest.mark.parametrize("index", [-1, SAMPLES])
def test_there_is_no_sample_beyond_the_last(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"sample {index} of {SAMPLES}"):
        make(tmp_path / "cache").read(0, [0, index])


def test_outputs_come_back_through_the_codec(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", fill=False)
    logits = torch.randn(SAMPLES, 10, generator=torch.Generator().manual_seed(0))
    cache.write(Shard(0, 0), cache.codec.encode(TeacherOutput(logits))[:10])
    read = open_cache(cache.folder).to("cpu")
    back = read.decode(read.read(0, [7, 3])).logits
    assert torch.equal(back.topk(3).indices, logits[[7, 3]].topk(3).indices)


@pytest.mark.parametrize("codec", ["features:4", "logits:4", "topk:2"])
def test_a_cache_knows_what_it_was_made_with(tmp_path: Path, codec: str) -> None:
    tables = {**TABLES, "weight": torch.rand(10, 8), "bias": torch.rand(10)}
    size = {"features:4": 12, "logits:4": 9, "topk:2": 8}[codec]
    info = replace(INFO, codec=codec, widths=(3, 5) if "f" in codec else (), bytes_per_image=size)
    made = create(tmp_path / "cache", info, tables, "")
    read = open_cache(tmp_path / "cache")
    assert read.info == made.info and read.codec.name == codec
    assert read.info.widths == info.widths and read.info.notes == info.notes
    assert read.codec.tables.keys() == made.codec.tables.keys()
    assert all(torch.equal(read.codec.tables[k], tables[k]) for k in read.codec.tables)


def test_records_of_another_shape_are_not_written(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", fill=False)
    for cached in (content(0)[:9], content(0)[:10, :-1], content(0)[:10].float()):
        with pytest.raises(ValueError, match=r"takes uint8 \(10, 12\)"):
            cache.write(Shard(0, 0), cached)
    assert cache.missing() == cache.shards()


def test_a_checksum_is_verified_once_in_a_process(tmp_path: Path, monkeypatch) -> None:
    cache = make(tmp_path / "cache")
    read, hashed = open_cache(cache.folder), []
    sha256 = cache_module.hashlib.sha256

    def counting(data):
        if isinstance(data, memoryview):
            hashed.append(len(data))
        return sha256(data)

    monkeypatch.setattr(cache_module.hashlib, "sha256", counting)
    for draw in (0, 0, 1, 0, 1):
        read.read(draw, range(SAMPLES))
    assert sorted(hashed) == sorted(2 * [10 * R, 10 * R, 5 * R])
    assert set(read._open) == {0, 1, 2} and read._draw == 1  # and one draw is open


# --- Other processes ------------------------------------------------------------------------------


def _read_in_child(cache: TeacherCache, queue) -> None:
    queue.put([cached.tolist() for cached in everything(cache)])


def test_a_spawned_process_reads_it(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    cache.read(1, [0, 24])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(cache, queue))
    child.start()
    found = queue.get(timeout=600)
    child.join()
    assert found == [content(draw).tolist() for draw in range(DRAWS)]


def test_no_map_is_sent_to_another_process(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    before = len(pickle.dumps(cache))
    cache.read(0, range(SAMPLES))
    assert len(pickle.dumps(cache)) == before
    assert torch.equal(pickle.loads(pickle.dumps(cache.read))(2, [5]), content(2)[5:6])


def test_only_one_job_writes(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", fill=False)
    with cache.locked():
        with pytest.raises(UserError, match="another process is storing outputs in"):
            with open_cache(cache.folder).locked():
                pass
        cache.write(Shard(0, 0), content(0)[:10])
    with cache.locked():
        pass


def _write_and_die(cache: TeacherCache, size: int) -> None:
    """Write a shard and end as by SIGKILL when `size` bytes of it are on disk."""

    def die(handle: int) -> None:
        os.ftruncate(handle, size)
        os._exit(9)

    files.os.fsync = die
    with cache.locked():
        cache.write(Shard(0, 1), content(0)[10:20])


@pytest.mark.parametrize("size", [0, 50, HEADER + 30, HEADER + 10 * R])
def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path, size: int) -> None:
    cache = make(tmp_path / "cache")
    cache.path(Shard(0, 1)).unlink()
    cache.path(Shard(0, 0)).unlink()
    child = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(cache, size))
    child.start()
    child.join()
    assert child.exitcode == 9
    left = [p.name for p in cache.path(Shard(0, 1)).parent.iterdir() if p.name.startswith(".")]
    assert left == [".000001.shard.part"]
    again = open_cache(cache.folder)
    assert again.missing() == [Shard(0, 0), Shard(0, 1)] and again.damaged() == []
    with again.locked():
        for shard in again.missing():
            again.write(shard, content(0)[list(again.samples(shard))])
    assert again.missing() == [] and not list(cache.folder.rglob(".*"))
    assert all(torch.equal(x, content(draw)) for draw, x in enumerate(everything(again)))


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    cache = make(tmp_path / "cache")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        UserError, match="cannot write .*000000.shard .No space left on dev.*; make room"
    ):
        cache.write(Shard(0, 0), content(1)[:10])
    monkeypatch.undo()
    assert not list(cache.folder.rglob(".*"))
    assert torch.equal(cache.read(0, range(SAMPLES)), content(0))


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 20, 40, 63, 64, 80, 95, 96, 110, 127])
def test_one_flipped_bit_in_the_header_is_found(tmp_path: Path, position: int) -> None:
    cache, shard = make(tmp_path / "cache"), Shard(1, 1)
    flip(cache.path(shard), position)
    says = (
        "no file of cached outputs" if position < 64 else "another cache or to another place",
        "its checksum is wrong",
    )[position >= 96]
    refused(cache, shard, says)
    assert cache.missing() == []
    ((found, why),) = cache.damaged()
    assert found == shard and re.search(says, why)


@pytest.mark.parametrize("position", [HEADER, HEADER + 57, HEADER + 10 * R - 1])
def test_one_flipped_bit_in_the_body_is_found(tmp_path: Path, position: int) -> None:
    cache, shard = make(tmp_path / "cache"), Shard(2, 0)
    flip(cache.path(shard), position)
    assert cache.missing() == []
    assert cache.damaged() == [(shard, "is damaged: its checksum is wrong")]
    refused(cache, shard, "is damaged: its checksum is wrong")


@pytest.mark.parametrize("size", [0, 1, HEADER - 1, HEADER, HEADER + 10 * R - 1])
def test_a_truncated_shard_is_found(tmp_path: Path, size: int) -> None:
    cache, shard = make(tmp_path / "cache"), Shard(0, 1)
    os.truncate(cache.path(shard), size)
    assert cache.missing() == [shard]
    says = f"is not whole: {size} bytes instead of {HEADER + 10 * R}"
    assert cache.damaged() == [(shard, says)]
    refused(cache, shard, says)


def test_a_shard_that_grew_is_found(tmp_path: Path) -> None:
    cache, shard = make(tmp_path / "cache"), Shard(0, 1)
    with open(cache.path(shard), "ab") as file:
        file.write(b"x")
    assert cache.missing() == [shard]
    refused(cache, shard, "is not whole: 249 bytes instead of 248")


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    cache, shard = make(tmp_path / "cache"), Shard(0, 2)
    cache.path(shard).unlink()
    assert cache.missing() == [shard] and cache.damaged() == []
    refused(cache, shard, "is missing")


@pytest.mark.parametrize("source", [Shard(0, 0), Shard(1, 1)])
def test_a_shard_in_the_place_of_another_is_found(tmp_path: Path, source: Shard) -> None:
    cache, shard = make(tmp_path / "cache"), Shard(0, 1)
    shutil.copy(cache.path(source), cache.path(shard))
    assert cache.missing() == []
    assert cache.damaged() == [(shard, "belongs to another cache or to another place in this one")]
    refused(cache, shard, "belongs to another cache or to another place")


@pytest.mark.parametrize(
    "changes",
    [
        {"key": {**KEY, "images": "ce" * 32}},
        {"codec": "logits:6", "bytes_per_image": 12},
        {"samples": SAMPLES - 1},
        {"num_classes": 9},
    ],
)
def test_a_shard_of_another_cache_is_found(tmp_path: Path, changes) -> None:
    tables = {"mean": torch.full((changes.get("num_classes", 10),), 0.1)}
    other = create(tmp_path / "other", replace(INFO, **changes), tables, "")
    other.write(Shard(0, 1), content(0)[10:20])
    cache, shard = make(tmp_path / "cache"), Shard(0, 1)
    shutil.copy(other.path(shard), cache.path(shard))
    refused(cache, shard, "belongs to another cache")


def test_notes_and_draws_are_not_part_of_the_identity(tmp_path: Path) -> None:
    other = make(tmp_path / "other", draws=5, notes={"teacher": "the same, described otherwise"})
    cache, shard = make(tmp_path / "cache", fill=False), Shard(0, 1)
    cache.path(shard).parent.mkdir(parents=True)
    shutil.copy(other.path(shard), cache.path(shard))
    assert torch.equal(cache.read(0, [12]), content(0)[12:13])


def test_repairing_makes_only_what_is_damaged(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    shards = [Shard(0, 1), Shard(2, 2)]
    flip(cache.path(shards[0]), HEADER + 3)
    os.truncate(cache.path(shards[1]), 50)
    assert [shard for shard, _ in cache.damaged()] == shards
    for shard, _ in cache.damaged():
        cache.write(shard, content(shard.draw)[list(cache.samples(shard))])
    assert cache.damaged() == [] and cache.missing() == []
    with pytest.raises(UserError):  # a process that saw the damage may go on after the repair
        flip(cache.path(shards[0]), HEADER)
        cache.read(0, [10])
    flip(cache.path(shards[0]), HEADER)
    assert torch.equal(cache.read(0, [10]), content(0)[10:11])


def test_a_folder_with_a_space_is_quoted_in_what_to_type(tmp_path: Path) -> None:
    cache = make(tmp_path / "my cache", fill=False)
    with pytest.raises(UserError, match=r"cache '.*/my cache' --repair"):
        cache.read(0, [0])


# --- Opening --------------------------------------------------------------------------------------


def test_where_there_is_no_cache_it_says_how_to_make_one(tmp_path: Path) -> None:
    assert not is_cache(tmp_path / "nowhere") and not is_cache(tmp_path)
    with pytest.raises(UserError, match="is no folder: type python -m ghosttrain cache"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no cached outputs: type python -m ghosttrain cache"):
        open_cache(tmp_path)


def test_a_beginning_without_about_is_no_cache_and_is_made_anew(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    (cache.folder / "cache.json").rename(cache.folder / ".cache.json.part")
    assert not is_cache(cache.folder)
    again = make(cache.folder, fill=False)
    assert is_cache(cache.folder) and again.missing() == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for name in ("cache", "photos"):
        before = sorted((tmp_path / name).iterdir())
        with pytest.raises(UserError, match="is not empty: .* type another cache.dir"):
            make(tmp_path / name)
        assert sorted((tmp_path / name).iterdir()) == before


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write cached outputs to .*file/cache: Not a dir"):
        make(tmp_path / "file" / "cache")


def change_info(folder: Path, **changes) -> None:
    path = folder / "cache.json"
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
        ({"codec": "pca:4"}, "cache.codec=pca:4 is no codec"),
        ({"num_classes": 11}, "table 'mean' of"),
        ({"bytes_per_image": 40}, "topk:3 makes 12 bytes an image"),
    ],
)
def test_an_info_that_does_not_fit_is_refused(tmp_path: Path, changes, says: str) -> None:
    cache = make(tmp_path / "cache")
    change_info(cache.folder, **changes)
    with pytest.raises(UserError, match=says) as error:
        open_cache(cache.folder)
    assert "another cache.dir" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"format": 1}', "\0\1"])
def test_an_info_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    cache = make(tmp_path / "cache")
    (cache.folder / "cache.json").write_text(text)
    with pytest.raises(UserError, match="cache.json cannot be read .*: store anew in another"):
        open_cache(cache.folder)


@pytest.mark.parametrize("position", [0, 20, -1, None])
def test_damaged_tables_are_refused(tmp_path: Path, position: int | None) -> None:
    path = make(tmp_path / "cache").folder / "tables.safetensors"
    path.unlink() if position is None else flip(path, position)
    says = "No such file" if position is None else "its checksum is wrong"
    with pytest.raises(UserError, match=f"tables.safetensors cannot be read .{says}"):
        open_cache(path.parent)


# --- More draws -----------------------------------------------------------------------------------


def test_a_cache_is_given_more_draws(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    more = cache.extended(5)
    assert more.info.draws == 5 and open_cache(cache.folder).info == more.info
    assert more.missing() == [Shard(d, n) for d in (3, 4) for n in range(3)]
    assert torch.equal(more.read(2, range(SAMPLES)), content(2))
    for shard in more.missing():
        more.write(shard, content(shard.draw)[list(more.samples(shard))])
    assert open_cache(cache.folder).damaged() == [] and more.missing() == []


@pytest.mark.parametrize("draws", [1, DRAWS])
def test_a_cache_never_shrinks(tmp_path: Path, draws: int) -> None:
    cache = make(tmp_path / "cache", fill=False)
    before = (cache.folder / "cache.json").read_bytes()
    assert cache.extended(draws).info.draws == DRAWS
    assert (cache.folder / "cache.json").read_bytes() == before


# --- Difference -----------------------------------------------------------------------------------


def test_the_same_key_has_no_difference(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", fill=False)
    assert cache.difference(KEY) == []
    assert open_cache(cache.folder).difference(KEY) == []


def test_differences_are_named_leaf_by_leaf(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", fill=False)
    classes = [f"n{i:08d}" for i in range(100)]
    classes[70] = "dog"
    now = {
        "teacher": {"a": {"name": "", "mean": [0.5, 0.4], "weights": "ab" * 31 + "cd"}},
        "classes": classes,
        "augment": {"seed": 3, "policy": None},
    }
    images, weights = f'"{"cd" * 19}c...', f"...{'ab' * 4}"
    assert cache.difference(now) == [
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
    cache = make(tmp_path / "cache", fill=False, key={"x": stored})
    assert cache.difference({"x": stored}) == []
    (line,) = cache.difference({"x": now})[:1]
    was, _, is_now = line.partition(": stored ")[2].partition(", now ")
    assert was and is_now and was != is_now


def test_a_job_that_ends_lets_go_of_the_folder_though_its_workers_live(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", fill=False)
    with pytest.raises(KeyboardInterrupt), cache.locked():
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        worker.start()
        raise KeyboardInterrupt
    with cache.locked():
        pass
    worker.kill()
    worker.join()
