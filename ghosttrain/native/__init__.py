"""C++ kernels for the CPU: every *.cpp of this folder, compiled into one library on first use.

Owns compiling and loading. What a kernel computes stands at the top of its file; its caller checks
that device, dtype and layout fit, and has a PyTorch path for when they do not or `load` gives None.

A file includes <torch/library.h> and single ATen headers (<torch/extension.h> takes five times as
long to compile) and registers its own operators:

    TORCH_LIBRARY_FRAGMENT(ghosttrain, m) { m.def("twice(Tensor x) -> Tensor"); }
    TORCH_LIBRARY_IMPL(ghosttrain, CPU, m) { m.impl("twice", &twice); }

A library runs with all rights of this process. It is used only from a folder that nobody but this
user and root can change, and only if it is as it was built: size and SHA-256 stand beside it.

The caller writes `ops = native.load()` once, outside of what torch.compile traces, and then
`ops.twice(x)`. Parallel parts use `at::parallel_for` and give results that do not depend on the
number of threads.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from ghosttrain.errors import UserError
from ghosttrain.files import (
    Damaged,
    changeable_by_others,
    file_digest,
    nearest,
    read_json,
    resolved,
    write_json,
)
from ghosttrain.locks import locked
from ghosttrain.text import one_line

FOLDER = Path(__file__).parent
"""Where the sources lie."""

FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",  # sqrt becomes one instruction; NaN stays NaN
    "-fno-trapping-math",  # selections become vector instructions
    "-fopenmp-simd",
    "-fopenmp",
)
"""Wished for; those that the compiler refuses are left out."""

PATIENCE = 300.0
"""Seconds after which a compiler is stopped, and another process's build no longer waited for."""

LIBRARY = "ghosttrain.so"
RECORD = "ghosttrain.json"
"""Beside the library: its size and its SHA-256."""

_COMPILE = (
    "import json, sys; from torch.utils.cpp_extension import load; load(**json.loads(sys.argv[1]))"
)


@functools.cache
def load() -> ModuleType | None:
    """Return `torch.ops.ghosttrain` with the kernels, or None where they cannot be had.

    Compiles on the first call on this machine (about half a minute); afterwards the library is
    checked and opened directly. None with GHOSTTRAIN_NATIVE=0, and, after one warning, where
    nothing could be compiled or loaded.
    """
    if os.environ.get("GHOSTTRAIN_NATIVE") == "0":
        return None
    try:
        torch.ops.load_library(library_path() or build())
    except (OSError, RuntimeError, UserError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"C++ kernels are off: {one_line(error)[:200]}; the same results come from PyTorch's "
            "own operators, more slowly. Needed are a C++ compiler (apt install g++), ninja (pip "
            f"install ninja) and a {_roots()[0]} (or TORCH_EXTENSIONS_DIR=FOLDER) that you can "
            "write and nobody else; "
            "GHOSTTRAIN_NATIVE=0 switches them off without a word",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return torch.ops.ghosttrain


def build() -> Path:
    """Return the shared library for this machine, compiled now if it is not there, is not as it was
    built, or lies where somebody else could have put it.

    Any number of processes may call at once: one compiles, in a folder of its own, and the finished
    file is moved into place.

    Raises:
        OSError: no folder can be written that nobody else can change; the line names the first.
        RuntimeError: compiler or ninja is missing, or the compiler failed.
        UserError: the disk is full.
        subprocess.TimeoutExpired: the compiler took longer than `PATIENCE`.
    """
    faults: list[str] = []
    for root in _safe_roots(faults):
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if fault := changeable_by_others(root):  # the umask made its parents writable
                faults.append(f"{root} is not safe: {fault}")
            else:
                return _built(root / f"ghosttrain_{_key()}", faults)
        except OSError as error:
            faults.append(_told(error, root))
    raise PermissionError(faults[0])


def library_path() -> Path | None:
    """Return the library that `build` would return at once; None: it would compile one first, or
    fail. Nothing is changed.
    """
    for root in _safe_roots([]):
        folder = root / f"ghosttrain_{_key()}"
        if _fault(folder) is None:
            return folder / LIBRARY
        place = nearest(folder)
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):  # `build` compiles there
            return None
    return None


def validate_compiler() -> list[str]:
    """Return the command of the C++ compiler.

    Raises:
        RuntimeError: it or ninja is missing.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    for tool in (compiler[0], "ninja"):
        if shutil.which(tool, path=_search_path()) is None:
            raise RuntimeError(f"{tool} is not installed")
    return compiler


def _search_path() -> str:
    """Return where programs are looked for: ninja is beside this Python."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def _built(folder: Path, notes: list[str]) -> Path:
    """Return the intact library in `folder`, which lies where nobody else can change anything;
    `notes` are said where it has to be compiled.
    """
    library = folder / LIBRARY
    if _fault(folder) is None:
        return library
    folder.mkdir(mode=0o755, exist_ok=True)
    if changeable_by_others(folder):
        folder.chmod(0o755)
    # Two builders waste time, they do no harm: one that hangs is not waited for for ever.
    with locked(folder, busy=None, patience=PATIENCE):
        fault = _fault(folder)
        if fault is not None:
            if os.path.lexists(library):
                notes = [*notes, f"the one that is there is not used: {fault}"]
            _compile(library, notes)
    return library


def _fault(folder: Path) -> str | None:
    """Return why the library in `folder` must not be loaded, in words; None: it may be."""
    library = folder / LIBRARY
    try:
        for each in (folder, library, folder / RECORD):
            if fault := changeable_by_others(each):
                return fault
        record = read_json(folder / RECORD, largest=1000)
        same_size = library.stat().st_size == record.get("bytes")
        if not same_size or file_digest(library) != record.get("digest"):
            return f"{library} is not as it was built"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, Damaged) as error:
        return f"{folder / RECORD} cannot be read ({one_line(error)})"
    return None


def _safe_roots(faults: list[str]) -> Iterator[Path]:
    """Yield the folders that may hold compiled kernels and that nobody else can change, the best
    place first; of one that is not there yet, this holds for the folder above it. Nothing is
    changed; what is wrong with the others is added to `faults`.
    """
    for root in _roots():
        try:
            root = resolved(root)  # what is checked is what is used, wherever a link leads later
            if fault := changeable_by_others(root, is_made=False):
                faults.append(f"{root} is not safe: {fault}")
            else:
                yield root
        except OSError as error:
            faults.append(_told(error, root))


def _told(error: OSError, root: Path) -> str:
    return f"{error.filename or root}: {error.strerror or error}"


def _roots() -> list[Path]:
    """Return where compiled kernels may be kept, the best place first: where torch keeps extensions
    (found without its slow module), then folders of this user's own.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    first = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    own = Path(tempfile.gettempdir()) / f"ghosttrain-{os.geteuid()}"
    return [first, cache / "ghosttrain", own]


def _key() -> str:
    """Hash everything that decides the binary: a home may be shared by different machines."""
    about = (
        torch.__version__,
        sys.implementation.cache_tag,
        FLAGS,
        os.environ.get("CXX"),
        platform.libc_ver(),
        _cpu(),
    )
    digest = hashlib.sha256(repr(about).encode())
    for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """Return what the processor can do, as far as the system says."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(("flags", "Features")):
                    return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _compile(library: Path, notes: list[str]) -> None:
    """Compile in a child process: warnings, PATH and a compiler that hangs stay out of this one."""
    compiler = validate_compiler()
    for left in library.parent.glob("build-*"):  # by a killed process
        if time.time() - left.stat().st_mtime > 2 * PATIENCE:
            shutil.rmtree(left, ignore_errors=True)
    reasons = "; ".join(["once", *notes])
    print(f"compiling C++ kernels into {library.parent} ({reasons})", file=sys.stderr, flush=True)
    flags = [flag for flag in FLAGS if _takes(compiler, flag)]
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as folder:
        settings = {
            "name": library.stem,
            "sources": [str(source) for source in sorted(FOLDER.glob("*.cpp"))],
            "extra_cflags": flags,
            "extra_ldflags": [flag for flag in flags if flag == "-fopenmp"],
            "build_directory": folder,
            "is_python_module": False,
        }
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE, json.dumps(settings)],
            cwd=folder,
            env=os.environ | {"PATH": _search_path()},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(next((x for x in lines if " error: " in x), lines[-1]))
        built = Path(folder) / library.name
        built.chmod(0o755)
        record = {"bytes": built.stat().st_size, "digest": file_digest(built)}
        os.replace(built, library)
    write_json(library.with_name(RECORD), record)
    library.with_name(RECORD).chmod(0o644)


def _takes(compiler: list[str], flag: str) -> bool:
    command = [*compiler, flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE).returncode == 0
