"""Compiling and loading of the C++ kernels, with a source that compiles in a moment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghosttrain import locks, native

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
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, for a source in a folder of its own."""
    cache, sources = tmp_path / "cache", tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(native, "FOLDER", sources)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
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
    assert [path.name for path in cache.glob("*/*")] == ["ghosttrain.so"]


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


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.touch()  # a file where a folder should be
    with pytest.warns(RuntimeWarning, match=f"C\\+\\+ kernels are off: .*{cache}"):
        assert native.load() is None


def test_switched_off_it_is_silent_and_compiles_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHOSTTRAIN_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load() is None
    assert not cache.exists()


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
