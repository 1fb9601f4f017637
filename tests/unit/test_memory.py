"""Freed memory is kept: a large allocation does not come from the system each time."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from ghosttrain.config.schema import DataConfig
from ghosttrain.data import loader
from ghosttrain.data.datasets import build_datasets

PAGES = """
import ctypes, resource, sys
from ghosttrain.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallopt(-3, 128 << 10) if sys.argv[1] != "keep" else None  # glibc's default, kept
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    place = libc.malloc(8 << 20)
    ctypes.memset(place, 1, 8 << 20)
    libc.free(place)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc only")
def test_pages_are_cleared_once() -> None:
    faults = {
        what: int(subprocess.check_output([sys.executable, "-c", PAGES, what], text=True))
        for what in ("keep", "default")
    }
    pages = (8 << 20) // os.sysconf("SC_PAGE_SIZE")
    if faults["default"] < 10 * pages:
        pytest.skip("this system does not count page faults, or clears larger pages")
    assert faults["keep"] < 4 * pages < faults["default"]


def test_the_process_that_decodes_keeps_it(monkeypatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(loader, "keep_freed_memory", lambda: called.append(1))
    train, _ = build_datasets(DataConfig())
    data = DataConfig(workers=0)
    loader.eval_loader(train, data, torch.device("cpu"))
    assert called == [1]
    monkeypatch.setattr(loader.signal, "signal", lambda *_: None)
    loader._prepare_worker(0)
    assert called == [1, 1]


def test_what_is_imported_is_not_looked_through_for_garbage():
    code = (
        "import gc; from ghosttrain.memory import without_collection\n"
        "with without_collection():\n"
        "    assert not gc.isenabled()\n"
        "    import json\n"
        "assert gc.isenabled() and gc.get_freeze_count() == 0\n"
        "try:\n"
        "    with without_collection():\n"
        "        import torch\n"
        "        raise KeyError\n"
        "except KeyError:\n"
        "    pass\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "gc.disable()\n"
        "with without_collection():\n"
        "    pass\n"
        "assert not gc.isenabled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
