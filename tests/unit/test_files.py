"""Files are written whole or not at all."""

import errno
import os
import socket
from pathlib import Path

import pytest

from ghosttrain import files
from ghosttrain.errors import UserError, mistake
from ghosttrain.files import (
    file_digest,
    no_file,
    no_folder,
    open_file,
    read_limited,
    replacing,
    resolved,
    utf8_name,
    write_json,
    write_text,
)


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


def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"content")

    def named(path: Path) -> None:
        with utf8_name(path):
            pass

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "fifo", tmp_path / "socket", Path("/dev/zero")):
            for read in (open_file, file_digest, named, lambda path: read_limited(path, 10)):
                with pytest.raises(OSError, match="it is a FIFO, a device or a socket") as error:
                    read(path)
                assert error.value.filename == str(path)
                line = f"{path}: it is a FIFO, a device or a socket, not a file; put a file"
                assert str(mistake(error.value)).startswith(line)
            assert no_file(path) == "a FIFO, a device or a socket, not a file"
            assert no_folder(path) == "a FIFO, a device or a socket, not a folder"
    with open_file(tmp_path / "file") as file:
        assert file.read() == b"content"
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none")
    assert no_file(tmp_path / "none") == "no such file" and no_file(tmp_path).startswith("a folder")
    assert no_folder(tmp_path) == "" and no_folder(tmp_path / "file") == "a file, not a folder"


def test_links_in_a_circle_lead_nowhere(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert resolved(tmp_path / "a" / "x").name == "x"
    assert no_folder(tmp_path / "a") == "a link that leads nowhere"
    assert no_file(tmp_path / "a") == "no such file"
