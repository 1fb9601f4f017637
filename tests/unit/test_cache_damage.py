"""Every kind of damage to a cache is found, and named."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from caches import DRAWS, HEADER, INFO, KEY, SAMPLES, R, content, make

from ghosttrain.distill.cache import Shard, TeacherCache, create, is_cache, open_cache
from ghosttrain.errors import UserError
from ghosttrain.files import read_json, write_json


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def refused(cache: TeacherCache, shard: Shard, expected: str) -> None:
    """A reader names the file, what is wrong and what to type, and the other shards still read."""
    index = cache.samples(shard)[0]
    with pytest.raises(UserError, match=expected) as error:
        cache.read(shard.draw, [index])
    message = str(error.value)
    assert message.startswith(str(cache.path(shard))) and "\n" not in message
    assert f"type python -m ghosttrain cache {cache.folder} --repair" in message
    other = (shard.draw + 1) % DRAWS
    assert torch.equal(cache.read(other, [index])[0], content(other)[index])


@pytest.mark.parametrize("position", [0, 20, 40, 63, 64, 80, 95, 96, 110, 127])
def test_one_flipped_bit_in_the_header_is_found(tmp_path: Path, position: int) -> None:
    cache, shard = make(tmp_path / "cache"), Shard(1, 1)
    flip(cache.path(shard), position)
    expected = (
        "no file of cached outputs" if position < 64 else "another cache or to another place",
        "its checksum is wrong",
    )[position >= 96]
    refused(cache, shard, expected)
    assert cache.missing() == []
    ((found, why),) = cache.damaged()
    assert found == shard and re.search(expected, why)


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
    expected = f"is not whole: {size} bytes instead of {HEADER + 10 * R}"
    assert cache.damaged() == [(shard, expected)]
    refused(cache, shard, expected)


def test_a_shard_that_is_cut_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    """Of a mapped file the system would kill the process."""
    cache, shard = make(tmp_path / "cache"), Shard(0, 1)
    assert torch.equal(cache.read(0, [10, 11]), content(0)[10:12])
    os.truncate(cache.path(shard), HEADER + R + 1)
    assert torch.equal(cache.read(0, [10]), content(0)[10:11])
    with pytest.raises(UserError, match=r"000001\.shard became shorter while it was read: type "):
        cache.read(0, [11])


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
    fields = read_json(path, 10_000) | changes
    write_json(path, {k: v for k, v in fields.items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": 2}, "stored in format 2, this version reads 1"),
        ({"format": None}, "no 'format'"),
        ({"samples": None}, "samples"),
        ({"samples": "many"}, "samples"),
        ({"samples": 10**12}, "samples"),
        ({"samples": 10**10, "draws": 10**5}, "more than 10,000,000 files"),
        ({"codec": "pca:4"}, "cache.codec=pca:4 is no codec"),
        ({"num_classes": 11}, "table 'mean' of"),
        ({"bytes_per_image": 40}, "topk:3 makes 12 bytes an image"),
    ],
)
def test_an_info_that_does_not_fit_is_refused(tmp_path: Path, changes, expected: str) -> None:
    cache = make(tmp_path / "cache")
    change_info(cache.folder, **changes)
    with pytest.raises(UserError, match=expected) as error:
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
    expected = "No such file" if position is None else "its checksum is wrong"
    with pytest.raises(UserError, match=f"tables.safetensors cannot be read .{expected}"):
        open_cache(path.parent)
