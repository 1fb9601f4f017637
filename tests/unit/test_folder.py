"""The run folder: where it is, who may go on in it, what is read from damaged files, how files are
written."""

import errno
import json
import os
from pathlib import Path

import pytest
import yaml

from ghosttrain.config.identity import run_name
from ghosttrain.config.schema import Config, OptimConfig, RunConfig
from ghosttrain.engine import folder as folders
from ghosttrain.engine.folder import (
    RESULT_KEYS,
    has_begun,
    made_by_other_code,
    opened,
    read_config,
    read_result,
    run_folder,
    validate_same_run,
)
from ghosttrain.errors import UserError
from ghosttrain.files import write_json


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
    with opened(mine, notes := []) as folder:
        assert read_config(folder) == config(tmp_path, name="a")  # fresh is of one command
        made = json.loads((folder / "provenance.json").read_text())
        assert made["code"] == folders.code_hash() and made["versions"]["torch"]
        assert not has_begun(folder) and notes == []
        other = mine.model_copy(update={"seed": 1})
        for again in (config(tmp_path, name="a"), mine, other):
            with pytest.raises(UserError, match="another process is training"):
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
    with opened(first, []) as folder:
        pass
    for other in others.values():
        validate_same_run(folder, other)
    begin(folder)
    validate_same_run(folder, first)
    neutral = first.model_copy(update={"tracker": first.tracker.model_copy()})
    validate_same_run(folder, neutral)
    before = (folder / "config.yaml").read_bytes()
    for message, other in others.items():
        with pytest.raises(UserError, match=message), opened(other, []):
            pass
    assert (folder / "config.yaml").read_bytes() == before
    with opened(first, []):  # the refused ones left no lock
        pass


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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "Expecting value"),
        (b'{"weights": {"raw": {"top1"', "Expecting ':'"),
        (b"\xff\xfe\x00", "can't decode"),
        (b"[]", "has no attribute"),
        (b"{}", "it lacks best"),
        (json.dumps(dict.fromkeys(RESULT_KEYS - {"data"}, 0)).encode(), "it lacks data"),
    ],
)
def test_a_damaged_result_is_one_line_that_says_what_to_do(tmp_path, content, expected):
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_result(tmp_path)
    line = str(refusal.value)
    assert expected in line and "result.json is damaged" in line and "delete it" in line
    assert "\n" not in line
    write_json(tmp_path / "result.json", dict.fromkeys(RESULT_KEYS, 0))
    assert read_result(tmp_path) == dict.fromkeys(RESULT_KEYS, 0)


@pytest.mark.parametrize("content", [b"", b"a: [", b"optim: 3", b"\xff\xfe", b"- 1"])
def test_damaged_settings_are_one_line_that_says_what_to_type(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config.yaml cannot be read \(.*--cfg job > ") as refusal:
        read_config(tmp_path)
    assert "\n" not in str(refusal.value)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(Config().model_dump(mode="json")))
    assert read_config(tmp_path) == Config()


def test_a_damaged_origin_stops_no_run(tmp_path):
    assert made_by_other_code(tmp_path) is None
    for content, message in (
        (json.dumps({"code": "00000000"}).encode(), "another version of the code (00000000, now "),
        (b"{", "an unknown version of the code"),
        (b"[1]", "an unknown version of the code"),
        (b"\xff", "an unknown version of the code"),
        (json.dumps({"code": folders.code_hash()}).encode(), None),
    ):
        (tmp_path / "provenance.json").write_bytes(content)
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
