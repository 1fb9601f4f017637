"""Compiling and loading of the C++ kernels, with a source that compiles in a moment."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghosttrain import locks, native
from ghosttrain.files import changeable_by_others, write_json

LOAD = """
import ctypes, sys
from pathlib import Path
from ghosttrain import locks, native

native.FOLDER = Path(sys.argv[1])
assert native.load() is not None
assert "torch.utils.cpp_extension" not in sys.modules  # slow, and only the compiler needs it
print(ctypes.CDLL(str(native.build())).answer())
"""


@pytest.fixture(autouse=True)
def _forget_what_was_loaded() -> Iterator[None]:
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.fixture
def public() -> Iterator[Path]:
    """An empty folder that everybody may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="ghosttrain-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def cache(public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that everybody may enter, for a source in a folder of its own."""
    cache, sources = public / "cache", tmp_path / "sources"
    cache.mkdir()
    sources.mkdir()
    (sources / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(native, "FOLDER", sources)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GHOSTTRAIN_NATIVE", raising=False)
    return cache


def start_loading() -> subprocess.Popen[str]:
    """Load the kernels in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(native.FOLDER)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return what a process wrote to stderr; it must have loaded the library."""
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (0, "42\n"), err
    return err


def test_of_two_processes_at_once_one_compiles(cache: Path) -> None:
    messages = [finish(process) for process in [start_loading(), start_loading()]]
    assert sum("compiling" in message for message in messages) == 1
    assert sorted(path.name for path in cache.glob("*/*")) == ["ghosttrain.json", "ghosttrain.so"]


def test_a_killed_build_stops_nobody(cache: Path) -> None:
    killed = start_loading()
    while not list(cache.glob("*/build-*")):
        time.sleep(0.02)
        assert killed.poll() is None
    killed.kill()
    killed.communicate()
    (left,) = cache.glob("*/build-*")
    (left / "lock").touch()  # of torch's own loader
    assert "compiling" in finish(start_loading())
    assert left.exists()  # perhaps still written to; but not for ever:
    os.utime(left, (0, 0))
    next(cache.glob("*/ghosttrain.so")).unlink()
    native.build()
    assert not left.exists()


def test_a_holder_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls) -> float:
            return cls.now

        @classmethod
        def sleep(cls, seconds: float) -> None:
            cls.now += seconds

    monkeypatch.setattr(locks, "time", Clock)
    with locks.locked(tmp_path, "busy"):
        with locks.locked(tmp_path, busy=None, patience=native.PATIENCE):
            assert native.PATIENCE <= Clock.now < native.PATIENCE + 1


def test_without_a_compiler_it_says_so_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.warns(RuntimeWarning, match=r"no-such-compiler is not installed.*g\+\+") as record:
        assert native.load() is None
        assert native.load() is None
    assert len(record) == 1 and "\n" not in str(record[0].message)


def test_a_compiler_error_is_named(cache: Path) -> None:
    (native.FOLDER / "broken.cpp").write_text("int broken( { return 1; }\n")
    with pytest.warns(RuntimeWarning, match=r"C\+\+ kernels are off: .*broken.cpp.* error: "):
        assert native.load() is None
    assert not list(cache.glob("*/*"))


def test_a_cache_that_cannot_be_written_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.rmdir()
    cache.touch()  # a file where a folder should be
    monkeypatch.setattr(native, "_roots", lambda: [cache])
    with pytest.warns(RuntimeWarning, match=f"C\\+\\+ kernels are off: .*{cache}"):
        assert native.load() is None


def test_switched_off_it_is_silent_and_compiles_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHOSTTRAIN_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load() is None
    assert not list(cache.iterdir())


def test_another_machine_or_source_gets_another_library(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [native._key()]
    (native.FOLDER / "answer.cpp").write_text('extern "C" int answer() { return 43; }\n')
    keys.append(native._key())
    (native.FOLDER / "common.h").write_text("// a header\n")
    keys.append(native._key())
    monkeypatch.setattr(native, "_cpu", lambda: "flags: sse2")
    keys.append(native._key())
    monkeypatch.setattr(native, "FLAGS", ("-O0",))
    keys.append(native._key())
    monkeypatch.setenv("CXX", "clang++")
    keys.append(native._key())
    monkeypatch.setattr("torch.__version__", "0.1")
    keys.append(native._key())
    assert len(set(keys)) == len(keys)
    assert native._key() == keys[-1]


# --- who else may change the library ------------------------------------------------------------

PLANTED = """
#include <cstdlib>
extern "C" int answer() { return 13; }
struct Planted { Planted() { std::abort(); } };
static Planted planted;  // runs when the library is mapped
"""
STRANGER = 65_533


def planted(folder: Path) -> bytes:
    """Compile a library that ends its process as soon as it is opened."""
    source, library = folder / "planted.cpp", folder / "planted.so"
    source.write_text(PLANTED)
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, source], check=True)
    return library.read_bytes()


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_planted_library_is_not_opened_and_a_good_one_takes_its_place(
    cache: Path, tmp_path: Path
) -> None:
    library = native.build()
    library.write_bytes(planted(tmp_path))
    message = finish(start_loading())
    assert f"the one that is there is not used: {library} is not as it was built" in message
    assert message.count("\n") == 1 and native._fault(library.parent) is None


def test_a_library_is_used_only_as_it_was_built_and_if_nobody_else_can_change_it(
    cache: Path, tmp_path: Path
) -> None:
    library = native.build()
    folder, record = library.parent, library.with_name(native.RECORD)
    whole, recorded = library.read_bytes(), record.read_bytes()
    assert [mode_of(each) & 0o022 for each in (cache, folder, library, record)] == [0] * 4
    (tmp_path / "elsewhere.so").write_bytes(whole)

    def link() -> None:
        library.unlink()
        library.symlink_to(tmp_path / "elsewhere.so")

    changes = [
        (lambda: library.write_bytes(whole[: len(whole) // 2]), "is not as it was built"),
        (lambda: library.write_bytes(whole[:-1] + b"?"), "is not as it was built"),
        (link, f"{library} is a link"),
        (record.unlink, f"{record} is missing"),
        (lambda: record.write_bytes(recorded[:-20]), "char"),
        (lambda: record.write_bytes(b"[]"), "list indices"),
        (lambda: write_json(record, {}), "is not as it was built"),
        (lambda: library.chmod(0o775), f"others may write {library} (mode 775)"),
        (lambda: record.chmod(0o666), f"others may write {record} (mode 666)"),
        (lambda: folder.chmod(0o777), f"others may write {folder} (mode 777)"),
    ]
    if os.geteuid() == 0:  # only root gives files to others
        stranger = f"{{}} belongs to another user (number {STRANGER})"
        changes += [
            (lambda x=x: os.chown(x, STRANGER, -1), stranger.format(x)) for x in (library, record)
        ]
    for change, reason in changes:
        assert native._fault(folder) is None
        change()
        assert reason in str(native._fault(folder))
        folder.chmod(0o755)
        for path, content in ((library, whole), (record, recorded)):
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            path.chmod(0o644)


def test_a_cache_that_others_can_change_is_left_for_a_folder_of_ones_own(
    cache: Path, public: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fallback = public / "own"
    monkeypatch.setattr(native, "_roots", lambda: [cache, fallback])
    native.build()
    cache.chmod(0o777)  # the folder above it is enough to put another one in its place
    capsys.readouterr()
    assert native.build().parents[1] == fallback and mode_of(fallback) == 0o700
    assert f"{cache} is not safe: others may write {cache} (mode 777)" in capsys.readouterr().err
    native.build()
    assert capsys.readouterr().err == ""
    fallback.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=f"off: {cache} is not safe: others may write") as seen:
        assert native.load() is None
    assert len(seen) == 1 and "\n" not in str(seen[0].message)


def test_who_can_change_a_file_is_told_by_owners_and_modes(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = public / "home"
    file = home / "file"
    home.mkdir()
    file.touch(mode=0o644)
    assert changeable_by_others(file) is None
    (public / "link").symlink_to(home)
    assert changeable_by_others(public / "link" / "file") is None
    (public / "link to file").symlink_to(file)
    assert "is a link" in str(changeable_by_others(public / "link to file"))
    public.chmod(0o1777)  # as /tmp: nobody replaces what is not theirs
    assert changeable_by_others(file) is None
    assert "others may write" in str(changeable_by_others(public))
    public.chmod(0o777)
    assert changeable_by_others(file) == f"others may write {public} (mode 777)"
    public.chmod(0o700)  # nobody else comes to what is below it
    file.chmod(0o666)
    assert changeable_by_others(file) is None
    lstat, owner = Path.lstat, STRANGER

    def of_another(path: Path) -> os.stat_result:
        about = lstat(path)
        return os.stat_result((*about[:4], owner, *about[5:])) if path == home else about

    monkeypatch.setattr(Path, "lstat", of_another)
    assert f"{home} belongs to another user" in str(changeable_by_others(file))
    owner = 0  # root
    assert changeable_by_others(file) is None


def test_where_the_library_is_looked_for_is_where_it_would_be_built(
    cache: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks whether there is one changes nothing, and loads nothing from another folder."""
    first, own = public / "not" / "made", public / "own"
    monkeypatch.setattr(native, "_roots", lambda: [cache])
    library = native.build()
    monkeypatch.setattr(native, "_roots", lambda: [first, cache])
    assert native.library_path() is None and not first.parent.exists()
    monkeypatch.setattr(native, "_roots", lambda: [cache, own])
    assert native.library_path() == library
    cache.chmod(0o777)
    assert native.library_path() is None and not own.exists()
    cache.chmod(0o755)
    public.chmod(0o777)  # somebody else may make the first one
    monkeypatch.setattr(native, "_roots", lambda: [first, cache])
    assert native.library_path() is None and not first.parent.exists()
