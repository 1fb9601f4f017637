"""From a command to running processes: `launch` of a run, `cache_outputs` of the verb `cache`.
Imports no torch: a finished run answers at once.

One process trains in place. `launch.nproc=N` starts N copies of the same command with torchrun's
environment variables, rendezvous through a file, and ends all of them when one fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from ghosttrain.config.compose import Composed, compose, override_run
from ghosttrain.config.errors import UserError
from ghosttrain.config.paths import expanded
from ghosttrain.config.schema import LaunchConfig
from ghosttrain.engine.folder import (
    check_same_run,
    made_by_other_code,
    opened,
    read_config,
    read_result,
    result_lines,
    run_folder,
)
from ghosttrain.engine.same_data import note_on_result
from ghosttrain.terminal import go_on_without

CACHE_MAY_CHANGE = (
    "data.root",
    "data.max_pixels",
    "data.workers",
    "launch.nproc",
    "launch.device",
    "teacher.check_samples",
    "teacher.chunk",
    "teacher.compile",
    "teacher.members.*.weights",
    "teacher.weights",
    "train.eval_batch",
)
"""Settings of a cache that may differ when it is repaired or looked at."""
GRACE = 3.0
"""Seconds in which ranks may end by themselves when another one has failed."""
PATIENCE = 10.0
"""Seconds in which ranks that were asked to end may do so."""


def launch(composed: Composed) -> int:
    """Train, finish or show this run; return the exit code."""
    config = composed.config
    alone = "WORLD_SIZE" not in os.environ
    folder = run_folder(config)
    result = None if config.run.fresh else read_result(folder)
    if result is not None:
        check_same_run(folder, config)
        print(f"finished: {folder}")
        said = (made_by_other_code(folder), note_on_result(config, result))
        print("\n".join([*filter(None, said), *result_lines(result)]))
        if not alone:
            from ghosttrain.engine import distributed

            distributed.start()
            distributed.broadcast(None)  # tells the other ranks that there is nothing to do
            distributed.stop()
        return 0
    go_on_without()
    if alone and config.launch.nproc > 1:
        return spawn(composed.arguments, config.launch.nproc)
    notes = [f"  {line}" for line in composed.replaced]
    if notes:
        why = f"the budget {config.budget!r} of data={config.data.name} replaces values"
        notes.insert(0, f"{why} of the recipe (budget=full leaves them):")
    with opened(config, notes):
        from ghosttrain.engine.classification import CLASSIFICATION
        from ghosttrain.engine.train import train

        train(CLASSIFICATION, config, notes)
    return 0


def cache_outputs(
    folder: Path | None, overrides: Sequence[str], config_dir: str | None, what: dict[str, bool]
) -> int:
    """Run the verb `cache`; return the exit code.

    Args:
        folder: a cache: its own settings count. None: settings are composed from `overrides`.
        overrides: `key=value`; for a cache that exists, only where things are and how they run.
        config_dir: the user's own groups and recipes.
        what: `dry_run`, `repair`, `inspect`.

    Raises:
        UserError: no cache there, no teacher, no `cache.dir`.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        from ghosttrain.engine.cache_writer import fill_cache

        fill_cache(None, **what)  # the settings come from rank 0
        return 0
    if folder is None and not overrides and (what["repair"] or what["inspect"]):
        flag = "--repair" if what["repair"] else "--inspect"
        raise UserError(f"name the folder of cached outputs: python -m ghosttrain cache D {flag}")
    if folder is not None:
        if not (folder / "cache.json").is_file():
            raise UserError(
                f"{folder} is no cache: it has no cache.json; python -m ghosttrain cache"
                f" +recipe=NAME cache.dir={folder} cache.draws=N makes one"
            )
        saved = read_config(folder).model_copy(update={"launch": LaunchConfig()})
        config = override_run(saved, overrides, CACHE_MAY_CHANGE, "cache")
        cache = config.cache.model_copy(update={"dir": str(expanded(folder).resolve())})
        config = config.model_copy(update={"cache": cache})
    else:
        config = compose(overrides, config_dir, trains=False).config
        if config.distill.name == "none":
            raise UserError("cache stores a teacher's outputs: type distill=soft_ce teacher=NAME")
        if config.cache.dir is None:
            raise UserError("cache needs a folder: type cache.dir=/path/to/cache")
    if config.launch.nproc > 1 and "WORLD_SIZE" not in os.environ:
        flags = [f"--{name.replace('_', '-')}" for name, on in what.items() if on]
        named = [str(folder)] if folder is not None else []
        own = ["--config-dir", config_dir] if config_dir else []
        return spawn(("cache", *named, *overrides, *flags, *own), config.launch.nproc)
    from ghosttrain.engine.cache_writer import fill_cache

    fill_cache(config, **what)
    return 0


def spawn(arguments: tuple[str, ...], nproc: int) -> int:
    """Run `python -m ghosttrain ARGUMENTS` as ranks 0..nproc-1; return the exit code of the rank
    that failed, else 0.

    Rank 0 writes to this terminal. Another rank's error output is shown when that rank failed and
    rank 0 did not. The ranks hold Ctrl-C back: this process alone decides, and ends them.

    Raises:
        KeyboardInterrupt: Ctrl-C; all ranks have ended.
        SystemExit: SIGTERM (exit code 143); all ranks have ended.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ghosttrain-")))
        errors = [
            stack.enter_context(open(scratch / f"rank{r}", "w+", errors="replace"))
            for r in range(nproc)
        ]
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _terminated))
        try:
            # A blocked signal stays blocked in the processes that are started meanwhile.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                for rank in range(nproc):
                    quiet = errors[rank] if rank else None
                    processes.append(_start(arguments, rank, nproc, scratch, quiet))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            codes = _wait(processes)
        finally:
            _end(processes)
        failed = [rank for rank, code in codes.items() if code]
        if not failed:
            return 0
        # A mistake of the user (2), or a rank that was killed, breaks the others' connections.
        cause = min(failed, key=lambda rank: (codes[rank] != 2, codes[rank] >= 0, rank))
        errors[cause].seek(0)
        sys.stderr.write(errors[cause].read())
        if codes[cause] < 0:
            number = -codes[cause]
            print(f"ghosttrain: rank {cause} was killed by signal {number}", file=sys.stderr)
            return 128 + number
        return codes[cause]


def _start(
    arguments: tuple[str, ...], rank: int, nproc: int, scratch: Path, quiet: IO[str] | None
) -> subprocess.Popen[bytes]:
    """Start one rank; `quiet` takes its output."""
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GHOSTTRAIN_RENDEZVOUS": f"file://{scratch}/cache",
        "GHOSTTRAIN_PARENT": str(os.getpid()),
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    command = [sys.executable, "-m", "ghosttrain", *arguments]
    return subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet)


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _wait(processes: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait for all; once one has failed the others get `GRACE` seconds to end by themselves.

    Returns rank -> exit code of those that did.
    """
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        time.sleep(0.05)
    until = time.monotonic() + GRACE
    while any(p.poll() is None for p in processes) and time.monotonic() < until:
        time.sleep(0.05)
    return {rank: p.returncode for rank, p in enumerate(processes) if p.poll() is not None}


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask those that still run to end; kill those that do not, or all at a second Ctrl-C."""
    try:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + PATIENCE
        while any(p.poll() is None for p in processes) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
