"""The run folder: where it is, who may go on in it, what is read from damaged files, how files are
written."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from helpers import some_result

from ghosttrain.config.identity import MOVED, run_name, run_settings, settings_hash
from ghosttrain.config.schema import Config, OptimConfig, RunConfig
from ghosttrain.engine import folder as folders
from ghosttrain.engine import run_files
from ghosttrain.engine.folder import (
    continued,
    has_begun,
    made_by_other_code,
    opened,
    run_folder,
    validate_settings,
)
from ghosttrain.engine.run_files import (
    damaged_products,
    read_config,
    read_result,
    write_config,
    write_result,
)
from ghosttrain.engine.track import Journal
from ghosttrain.errors import UserError
from ghosttrain.files import read_json, write_json


def config(root: Path, **settings) -> Config:
    return Config(run=RunConfig(root=str(root), **settings))


def begin(folder: Path) -> None:
    """Keep a step there, as a run does."""
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 10}\n')


def test_the_same_settings_give_the_same_folder(tmp_path, monkeypatch):
    first = config(tmp_path)
    assert run_folder(first) == tmp_path / run_name(first)
    assert run_folder(config(tmp_path, name="a/b")) == tmp_path / "a" / "b"
    monkeypatch.chdir(tmp_path)
    assert run_folder(config(Path("here"), name="a")) == tmp_path / "here" / "a"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run_folder(config(Path("~/runs"), name="a")) == tmp_path / "home" / "runs" / "a"


def test_an_opened_folder_holds_settings_and_origin_and_is_locked(tmp_path):
    mine = config(tmp_path, name="a", fresh=True)
    folder = run_folder(mine)
    with opened(mine, notes := []) as now:
        assert now == mine
        assert read_config(folder) == config(tmp_path, name="a")  # fresh is of one command
        made = json.loads((folder / "provenance.json").read_text())
        assert made["code"] == folders.code_hash() and made["versions"]["torch"]
        assert not has_begun(folder) and notes == []
        other = mine.model_copy(update={"seed": 1})
        for again in (config(tmp_path, name="a"), mine, other):
            with pytest.raises(UserError, match=r"process \d+ on .* is training"):
                with opened(again, []):
                    pass
        assert read_config(folder).seed == 0
    with opened(other, notes):  # no step was kept: its name is free, and fresh has nothing to keep
        assert read_config(folder).seed == 1
    assert len(notes) == 1 and "moved to" in notes[0]


def test_a_run_with_other_settings_is_refused_once_a_step_was_kept(tmp_path):
    first = config(tmp_path, name="a")
    others = {
        "seed: 0 -> 1": first.model_copy(update={"seed": 1}),
        "optim.lr: 0.005 -> 0.1": first.model_copy(update={"optim": OptimConfig(lr=0.1)}),
    }
    folder = run_folder(first)
    with opened(first, []):
        pass
    for other in others.values():
        continued(folder, other, [])
    begin(folder)
    continued(folder, first, [])
    neutral = first.model_copy(update={"tracker": first.tracker.model_copy()})
    continued(folder, neutral, [])
    before = (folder / "config.yaml").read_bytes()
    for message, other in others.items():
        with pytest.raises(UserError, match=message), opened(other, []):
            pass
    assert (folder / "config.yaml").read_bytes() == before
    with opened(first, []):  # the refused ones left no lock
        pass


def test_fresh_moves_a_run_to_a_visible_name_and_nothing_else(tmp_path):
    fresh = config(tmp_path, name="a", fresh=True)
    folder = run_folder(fresh)
    (folder / "checkpoints").mkdir(parents=True)  # of a start that was killed
    with opened(fresh, notes := []):
        assert notes == []
    begin(folder)
    (folder / "config.yaml").write_bytes(b"damaged")  # a step was kept: it is a run
    with opened(fresh, notes):
        pass
    (aside,) = tmp_path.glob("a.moved-*")
    assert notes == [f"run.fresh: the earlier run was moved to {aside}"]
    assert MOVED.search(aside.name) and (aside / "metrics.jsonl").is_file()
    for kind, file in (("photos", "1.jpg"), ("project", "config.yaml"), ("runs", "b/config.yaml")):
        (tmp_path / kind / file).parent.mkdir(parents=True)
        (tmp_path / kind / file).write_text("of mine")
        for settings in (config(tmp_path, name=kind, fresh=True), config(tmp_path, name=kind)):
            if settings.run.fresh or file == "config.yaml":
                with pytest.raises(UserError, match="no run's") as refusal, opened(settings, []):
                    pass
                assert "choose another run.name" in str(refusal.value)
        assert (tmp_path / kind / file).read_text() == "of mine"


def test_links_below_the_root_are_not_followed(tmp_path):
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "runs"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("of mine")
    (tmp_path / "real").mkdir()
    root.symlink_to(tmp_path / "real")  # where runs are is the user's to say
    mine = config(root, name="a/b")
    folder = tmp_path / "real" / "a" / "b"
    with opened(mine, []):
        pass
    for link, to in (
        ("a", elsewhere),
        ("a/b", elsewhere),
        ("a/b/checkpoints", elsewhere),
        ("a/b/log.txt", elsewhere / "file"),
        ("a/b/metrics.jsonl", elsewhere / "file"),
        ("a/b/checkpoints/last.pt", elsewhere / "file"),
        ("a/b/result.json", "nowhere"),
    ):
        place = root / link
        kept = place.with_name(place.name + "-kept")
        if place.exists():
            place.rename(kept)
        place.symlink_to(to)
        for settings in (mine, config(root, name="a/b", fresh=True)):
            with pytest.raises(UserError, match=r" is a link \(to .*remove it, or type") as refusal:
                with opened(settings, []):
                    pass
            assert str(refusal.value).startswith(f"{tmp_path / 'real' / link} is a link (to {to})")
        place.unlink()
        if kept.exists():
            kept.rename(place)
    assert [path.name for path in elsewhere.iterdir()] == ["file"]
    (folder / "log.txt").symlink_to(elsewhere / "file")  # planted while it trains
    with pytest.raises(OSError, match="symbolic links"):
        Journal(folder / "log.txt").append("a line")
    assert (elsewhere / "file").read_text() == "of mine"


@pytest.mark.parametrize(
    ("file", "text", "begun"),
    [
        ("metrics.jsonl", "", False),
        ("metrics.jsonl", "{}\n", True),
        ("checkpoints/last.pt", "", True),
        ("checkpoints/.last.pt.part", "x", False),
        ("result.json", "", True),
        ("log.txt", "x", False),
    ],
)
def test_a_run_has_begun_when_a_step_was_kept(tmp_path, file, text, begun):
    (tmp_path / "checkpoints").mkdir()
    assert not has_begun(tmp_path)
    (tmp_path / file).write_text(text)
    assert has_begun(tmp_path) is begun


def damaged(path: Path, **parts: object) -> None:
    """Write a JSON file whose digest is right, with parts of another kind."""
    write_json(path, some_result(Config()) | parts)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "Expecting value"),
        (b'{"weights": {"raw": {"top1"', "Expecting ':'"),
        (b"\xff\xfe\x00", "can't decode"),
        (b"[]", "list indices"),
        (b"{}", "sha256"),
        (b"[" * 100_000, "recursion"),
        (b" " * 1_000_001, "larger than 1.0 MB"),
        ({"weights": {"ema": {"top1": 101.0, "top5": 1.0}}}, "weights.ema.top1: Input should be"),
        ({"steps": 1.5}, "steps: Input should be a valid integer"),
        ({"seconds": float("nan")}, "seconds: Input should be a finite number"),
        ({"files": {"card.md": 3}}, "files.card.md: Input should be a valid string"),
    ],
)
def test_a_damaged_result_is_one_line_that_says_what_to_do(tmp_path, content, expected):
    path = tmp_path / "result.json"
    assert read_result(tmp_path) is None
    path.write_bytes(content) if isinstance(content, bytes) else damaged(path, **content)
    with pytest.raises(UserError) as refusal:
        read_result(tmp_path)
    line = str(refusal.value)
    assert expected in line and "result.json is damaged" in line and "makes it anew" in line
    assert "\n" not in line
    write_json(path, some_result(Config()))
    assert read_result(tmp_path) == some_result(Config())


def signed(text: str) -> bytes:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}{run_files.SIGNED}{digest}\n".encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not as it was written"),
        (b"optim: 3", "not as it was written"),
        (b"\xff\xfe", "can't decode"),
        (signed("optim: 3"), "optim"),
        (signed("- 1"), "Config"),
        (signed("a: ["), "while parsing"),
        (signed("seed: 1\n").replace(b"1\n", b"2\n", 1), "not as it was written"),
        (signed("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"), "it holds an alias"),
        (signed("a: " + "[" * 5000), "recursion"),
        (signed("reparam: {branches: 100000000}"), "branches"),
        (b"#" * 1_000_001, "larger than 1.0 MB"),
    ],
)
def test_damaged_settings_are_one_line_that_says_what_to_type(tmp_path, content, expected):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config.yaml cannot be read \(.*--cfg job") as refusal:
        read_config(tmp_path)
    line = str(refusal.value)
    assert expected in line and "\n" not in line and len(line) < 600
    write_config(tmp_path, Config())
    assert read_config(tmp_path) == Config()
    whole = (tmp_path / "config.yaml").read_bytes()
    for cut in range(0, len(whole), 97):
        (tmp_path / "config.yaml").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not as it was written"):
            read_config(tmp_path)


def test_settings_that_cannot_be_read_stop_no_run(tmp_path):
    """What it is stands in its result and in its checkpoint too."""
    mine = config(tmp_path, name="a")
    with opened(mine, []):
        begin(folder := run_folder(mine))
    (folder / "config.yaml").write_bytes(b"seed: 3")
    with opened(mine, notes := []):
        assert read_config(folder) == mine
    assert len(notes) == 1 and "written anew" in notes[0]
    (folder / "config.yaml").write_bytes(b"")
    write_json(folder / "result.json", some_result(mine))
    continued(folder, mine, [])
    with pytest.raises(UserError, match=r"other settings \(its config.yaml cannot be read\)"):
        continued(folder, mine.model_copy(update={"seed": 1}), [])
    validate_settings(folder, run_settings(mine), mine)
    with pytest.raises(UserError, match="other settings .seed: 1 -> 0"):
        validate_settings(folder, run_settings(mine) | {"seed": 1}, mine)


def test_a_checkpoint_of_a_version_with_fewer_settings_goes_on(tmp_path):
    folder, mine = tmp_path / "run", config(tmp_path)
    before = run_settings(mine)
    for key in ("augment.jitter", "data.repeats", "data.size_schedule", "data.decoder"):
        before.pop(key, None)
    validate_settings(folder, before, mine)
    other = mine.model_copy(update={"augment": mine.augment.model_copy(update={"jitter": 0.3})})
    with pytest.raises(UserError, match="augment.jitter: 0.0 -> 0.3"):
        validate_settings(folder, before, other)


def test_a_finished_run_is_extended_by_more_epochs_only(tmp_path):
    def longer(epochs: int, **others: object) -> Config:
        train = mine.train.model_copy(update={"epochs": epochs, **others})
        return mine.model_copy(update={"train": train})

    mine = config(tmp_path, name="a")
    folder = run_folder(mine)
    with opened(mine, []):
        begin(folder)
        (folder / "checkpoints" / "last.pt").write_bytes(b"")
    refused = "train.epochs: 300 -> 400"
    with pytest.raises(UserError, match=refused), opened(longer(400), []):
        pass  # it is not finished
    write_json(folder / "result.json", some_result(mine))
    for other in (longer(200), longer(400, max_steps=7), longer(400).model_copy(
            update={"seed": 1})):  # fmt: skip
        with pytest.raises(UserError, match="train.epochs: 300 -> "), opened(other, []):
            pass
    assert read_result(folder) is not None
    with opened(longer(400), notes := []) as now:
        assert now.train.extended_at == (300,) and "extended from 300 to 400 epochs" in notes[0]
    assert read_result(folder) is None  # it goes on; what it was before has another name
    assert read_json(folder / "result-300epochs.json", 10_000) == some_result(mine)
    assert read_json(folder / "provenance.json", 10_000)["extended_at_epochs"] == [300]
    with opened(longer(400), notes := []) as now:
        assert now.train.extended_at == (300,) and notes == []
    assert settings_hash(now) != settings_hash(longer(400))
    write_json(folder / "result.json", some_result(now))
    (folder / "config.yaml").write_bytes(b"")
    assert continued(folder, longer(400), []) == now
    validate_settings(folder, run_settings(mine), now)
    with pytest.raises(UserError, match="optim.lr: 9 -> "):
        validate_settings(folder, run_settings(mine) | {"optim.lr": 9}, now)


def test_products_are_compared_with_their_digests(tmp_path):
    for name in ("model.safetensors", "card.md"):
        (tmp_path / name).write_bytes(name.encode())
    write_result(tmp_path, some_result(Config()))
    result = read_result(tmp_path)
    assert result["files"]["card.md"] == hashlib.sha256(b"card.md").hexdigest()
    assert result["files"].keys() == {"model.safetensors", "card.md"}
    assert damaged_products(tmp_path, result) == []
    (tmp_path / "card.md").write_bytes(b"card.me")
    (tmp_path / "model.safetensors").unlink()
    assert damaged_products(tmp_path, result) == ["model.safetensors", "card.md"]


def test_a_damaged_origin_stops_no_run(tmp_path):
    assert made_by_other_code(tmp_path) is None
    path = tmp_path / "provenance.json"
    for content, message in (
        ({"code": "00000000"}, "another version of the code (00000000, now "),
        (b"{", "an unknown version of the code"),
        (b"[1]", "an unknown version of the code"),
        (b"\xff", "an unknown version of the code"),
        ({"code": folders.code_hash()}, None),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else write_json(path, content)
        line = made_by_other_code(tmp_path)
        assert line is None if message is None else message in str(line)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "; make room, then type the same command"),
        (errno.EROFS, "; type run.root=/a/folder/you/may/write"),
        (errno.EIO, "; the disk or the network folder failed"),
    ],
)
def test_a_folder_that_cannot_be_written_says_what_mends_it(
    tmp_path, monkeypatch, number, expected
):
    def fails(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError) as refusal, opened(config(tmp_path, name="a"), []):
        pass
    line = str(refusal.value)
    assert line.startswith(f"cannot write the run folder {tmp_path / 'a'}: ")
    assert expected in line
