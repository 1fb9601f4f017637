"""C++ kernels for the CPU: every *.cpp of this folder, compiled into one library on first use.

Owns compiling and loading. What a kernel computes stands at the top of its file; its caller checks
that device, dtype and layout fit, and has a PyTorch path for when they do not or `load` gives None.

A file includes <torch/library.h> and single ATen headers (<torch/extension.h> takes five times as
long to compile) and registers its own operators:

    TORCH_LIBRARY_FRAGMENT(ghosttrain, m) { m.def("twice(Tensor x) -> Tensor"); }
    TORCH_LIBRARY_IMPL(ghosttrain, CPU, m) { m.impl("twice", &twice); }

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
from pathlib import Path
from types import ModuleType

import torch

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

_COMPILE = (
    "import json, sys; from torch.utils.cpp_extension import load; load(**json.loads(sys.argv[1]))"
)


@functools.cache
def load() -> ModuleType | None:
    """Return `torch.ops.ghosttrain` with the kernels, or None where they cannot be had.

    Compiles on the first call on this machine (about half a minute); afterwards the library is
    opened directly. None with GHOSTTRAIN_NATIVE=0, and, after one warning, where nothing could be
    compiled or loaded.
    """
    if os.environ.get("GHOSTTRAIN_NATIVE") == "0":
        return None
    try:
        torch.ops.load_library(build())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"C++ kernels are off: {one_line(error)[:200]}; the same results come from PyTorch's "
            "own operators, more slowly. Needed are a C++ compiler (apt install g++), ninja (pip "
            f"install ninja) and a writable {_root()} (or TORCH_EXTENSIONS_DIR=FOLDER); "
            "GHOSTTRAIN_NATIVE=0 switches them off without a word",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return torch.ops.ghosttrain


def build() -> Path:
    """Return the shared library for this machine, compiled now if it is not there.

    Any number of processes may call at once: one compiles, in a folder of its own, and the finished
    file is moved into place.

    Raises:
        OSError: the cache folder cannot be written.
        RuntimeError: compiler or ninja is missing, or the compiler failed.
        subprocess.TimeoutExpired: the compiler took longer than `PATIENCE`.
    """
    library = library_path()
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Two builders waste time, they do no harm: one that hangs is not waited for for ever.
        with locked(library.parent, busy=None, patience=PATIENCE):
            if not library.exists():
                _compile(library)
    return library


def library_path() -> Path:
    """Return where the shared library for this machine is, once it was compiled."""
    return _root() / f"ghosttrain_{_key()}" / "ghosttrain.so"


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


def _root() -> Path:
    """Return the folder where torch keeps compiled extensions, found without its slow module."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions")


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


def _compile(library: Path) -> None:
    """Compile in a child process: warnings, PATH and a compiler that hangs stay out of this one."""
    compiler = validate_compiler()
    for left in library.parent.glob("build-*"):  # by a killed process
        if time.time() - left.stat().st_mtime > 2 * PATIENCE:
            shutil.rmtree(left, ignore_errors=True)
    print(f"compiling C++ kernels into {library.parent} (once)", file=sys.stderr, flush=True)
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
        os.replace(Path(folder) / library.name, library)


def _takes(compiler: list[str], flag: str) -> bool:
    command = [*compiler, flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE).returncode == 0
