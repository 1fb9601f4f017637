"""The folder of cached outputs: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from caches import DRAWS, HEADER, INFO, KEY, SAMPLES, TABLES, R, content, make
from safetensors.torch import load_file
from torch import Tensor

from ghosttrain import files
from ghosttrain.distill import cache as cache_module
from ghosttrain.distill.cache import Shard, TeacherCache, create, open_cache
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.errors import UserError


def everything(cache: TeacherCache) -> list[Tensor]:
    return [cache.read(draw, range(cache.info.samples)) for draw in range(cache.info.draws)]


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
    digest = cache_module._File.digest

    def counting(file, at):
        hashed.append(file.size() - at)
        return digest(file, at)

    monkeypatch.setattr(cache_module._File, "digest", counting)
    for draw in (0, 0, 1, 0, 1):
        read.read(draw, range(SAMPLES))
    assert sorted(hashed) == sorted(2 * [10 * R, 10 * R, 5 * R])
    assert set(read._open) == {0, 1, 2} and read._draw == 1  # and one draw is open


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
        with pytest.raises(UserError, match=r"process \d+ on .* is storing outputs in"):
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
    assert len(left) == 1 and re.fullmatch(r"\.000001\.shard\.[0-9a-f]{8}\.part", left[0])
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


def test_a_cache_is_given_more_draws(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    extended = cache.extended(5)
    assert extended.info.draws == 5 and open_cache(cache.folder).info == extended.info
    assert extended.missing() == [Shard(d, n) for d in (3, 4) for n in range(3)]
    assert torch.equal(extended.read(2, range(SAMPLES)), content(2))
    for shard in extended.missing():
        extended.write(shard, content(shard.draw)[list(extended.samples(shard))])
    assert open_cache(cache.folder).damaged() == [] and extended.missing() == []


@pytest.mark.parametrize("draws", [1, DRAWS])
def test_a_cache_never_shrinks(tmp_path: Path, draws: int) -> None:
    cache = make(tmp_path / "cache", fill=False)
    before = (cache.folder / "cache.json").read_bytes()
    assert cache.extended(draws).info.draws == DRAWS
    assert (cache.folder / "cache.json").read_bytes() == before


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
