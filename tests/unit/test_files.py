"""Files are written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from ghosttrain import files
from ghosttrain.errors import UserError
from ghosttrain.files import replacing, write_json, write_text


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"half")
        raise KeyError
    with replacing(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_text() == "old"
        file.write(b"w")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os if name == "fsync" else Path, name, full)
            with pytest.raises(UserError, match="cannot write .*x.json .No space left.*room"):
                write_json(path, {"x": 1})
        assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    absent = r"cannot write .*absent/x.json .No such file.*absent must be a folder that you may"
    with pytest.raises(UserError, match=absent):
        write_text(tmp_path / "absent" / "x.json", "")


def test_a_file_is_written_into_no_other(tmp_path, monkeypatch):
    """Not even where the name of the temporary one was guessed: a link is not followed."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0")
    other, part = tmp_path / "other", tmp_path / ".x.json.0.part"
    other.write_text("kept")
    for make in (lambda: part.symlink_to(other), lambda: os.link(other, part)):
        make()
        with pytest.raises(UserError, match="cannot write .*x.json .File exists"):
            write_json(tmp_path / "x.json", {"x": 1})
        assert other.read_text() == "kept" and not (tmp_path / "x.json").exists()
        part.unlink(missing_ok=True)
