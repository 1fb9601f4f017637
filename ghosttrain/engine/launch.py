"""From a command to running processes: `launch` of a run, `store_answers` of the verb `cache`.
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
from pathlib import Path

from ghosttrain.config.compose import Composed, compose, override_run
from ghosttrain.config.errors import UserError
from ghosttrain.config.schema import Launch
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

STORE_MAY_CHANGE = (
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
"""Settings of a store that may differ when it is repaired or looked at."""


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
    if alone and config.launch.nproc > 1:
        return spawn(composed.arguments, config.launch.nproc)
    notes = [f"  {line}" for line in composed.replaced]
    if notes:
        why = f"the budget {config.budget!r} of data={config.data.name} replaces values"
        notes.insert(0, f"{why} of the recipe (budget=full leaves them):")
    with opened(config, notes):
        from ghosttrain.engine.train import train

        train(config, notes)
    return 0


def store_answers(
    folder: Path | None, overrides: Sequence[str], config_dir: str | None, what: dict[str, bool]
) -> int:
    """Run the verb `cache`; return the exit code.

    Args:
        folder: a store: its own settings count. None: settings are composed from `overrides`.
        overrides: `key=value`; for a store that exists, only where things are and how they run.
        config_dir: the user's own groups and recipes.
        what: `dry_run`, `repair`, `inspect`.

    Raises:
        UserError: no store there, no teacher, no `targets.dir`.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        from ghosttrain.engine.cache import cache

        cache(None, **what)  # the settings come from rank 0
        return 0
    if folder is None and not overrides and (what["repair"] or what["inspect"]):
        flag = "--repair" if what["repair"] else "--inspect"
        raise UserError(f"name the folder of stored answers: python -m ghosttrain cache D {flag}")
    if folder is not None:
        if not (folder / "about.json").is_file():
            raise UserError(
                f"{folder} is no store of answers: it has no about.json; python -m ghosttrain cache"
                f" +recipe=NAME targets.dir={folder} targets.epochs=N makes one"
            )
        saved = read_config(folder).model_copy(update={"launch": Launch()})
        config = override_run(saved, overrides, STORE_MAY_CHANGE, "store")
        targets = config.targets.model_copy(update={"dir": str(folder.expanduser().resolve())})
        config = config.model_copy(update={"targets": targets})
    else:
        config = compose(overrides, config_dir, trains=False).config
        if config.distill.name == "none":
            raise UserError("cache stores a teacher's answers: type distill=soft_ce teacher=NAME")
        if config.targets.dir is None:
            raise UserError("cache needs a folder: type targets.dir=/path/to/store")
    if config.launch.nproc > 1 and "WORLD_SIZE" not in os.environ:
        flags = [f"--{name.replace('_', '-')}" for name, on in what.items() if on]
        named = [str(folder)] if folder is not None else []
        own = ["--config-dir", config_dir] if config_dir else []
        return spawn(("cache", *named, *overrides, *flags, *own), config.launch.nproc)
    from ghosttrain.engine.cache import cache

    cache(config, **what)
    return 0


def spawn(arguments: tuple[str, ...], nproc: int) -> int:
    """Run `python -m ghosttrain ARGUMENTS` as ranks 0..nproc-1; return the first failing rank's
    exit code, else 0.

    Rank 0 writes to this terminal. Another rank's error output is shown when that rank failed and
    rank 0 did not.
    """
    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as scratch:
        processes, errors = [], []
        for rank in range(nproc):
            env = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "GHOSTTRAIN_RENDEZVOUS": f"file://{scratch}/store",
            }
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
            quiet = open(Path(scratch) / f"rank{rank}", "w+") if rank else None
            errors.append(quiet)
            command = [sys.executable, "-m", "ghosttrain", *arguments]
            processes.append(subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet))
        try:
            codes = _wait(processes)
        except KeyboardInterrupt:
            time.sleep(1)  # a Ctrl-C in the terminal has reached every rank; `kill -INT` has not
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            codes = _wait(processes)
        # A mistake of the user (2) on one rank breaks the others' connections: show the mistake.
        failed = next((r for r, code in enumerate(codes) if code == 2), None)
        if failed is None:
            failed = next((r for r, code in enumerate(codes) if code), None)
        if failed is not None and (quiet := errors[failed]) is not None:
            quiet.seek(0)
            sys.stderr.write(quiet.read())
        for quiet in errors:
            if quiet is not None:
                quiet.close()
    return 0 if failed is None else max(codes[failed], 1)


def _wait(processes: list[subprocess.Popen[bytes]], grace: float = 3.0) -> list[int]:
    """Wait for all; once one has failed the others get `grace` seconds to end by themselves."""
    failed_at = None
    while any(p.poll() is None for p in processes):
        if failed_at is None and any(p.poll() for p in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > grace:
            for p in processes:
                if p.poll() is None:
                    p.send_signal(
                        signal.SIGTERM
                        if time.monotonic() - failed_at < 3 * grace
                        else signal.SIGKILL
                    )
        time.sleep(0.05)
    return [p.wait() for p in processes]
