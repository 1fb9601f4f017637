"""The command line: a table of verbs, a short help, one-line errors. `train` is the default verb.

Nothing heavy is imported before the verb is known: `--help` takes a tenth of a second, a typo in a
setting half a second, and torch is imported only by a command that is going to use it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ghosttrain.config.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Options:
    """What stands on the command line besides `key=value`."""

    overrides: list[str]
    folders: list[str]
    config_dir: str | None = None
    multirun: bool = False
    cfg: str | None = None
    info: str | None = None
    out: str | None = None
    to: str | None = None
    dry_run: bool = False
    repair: bool = False
    inspect: bool = False


def main(argv: list[str] | None = None) -> int:
    """Run a verb; return the exit code: 0, 1 (a run of a sweep failed), 2 (a mistake of the user),
    130 (Ctrl-C).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help", "help") for a in args):
        from ghosttrain.help import help_text

        with suppress(BrokenPipeError):  # `--help | head` closes the pipe early
            print(help_text(), flush=True)
            return 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if "--version" in args:
        from ghosttrain import __version__

        print(f"ghosttrain {__version__}")
        return 0
    verb = args.pop(0) if args and args[0] in VERBS else "train"
    try:
        return VERBS[verb](_options(verb, args))
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = f" (rank {rank})" if rank != "0" else ""
        print(f"ghosttrain: error{where}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"ghosttrain: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not _lost_a_peer(error):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"ghosttrain: rank {rank} stops because another rank did", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nghosttrain: interrupted; the same command goes on from the last finished "
            + ("file" if verb == "cache" else "epoch"),
            file=sys.stderr,
        )
        return 130


def _lost_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because the process at its other end is gone."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed by peer"))


def _train(options: Options) -> int:
    """Train (or finish, or show) one run; with -m one run after another."""
    from ghosttrain.config.compose import compose

    if options.folders:
        known = did_you_mean(options.folders[0], VERBS)
        raise UserError(f"{options.folders[0]!r} is neither a verb nor key=value.{known}")
    if options.info or options.cfg in ("hydra", "all"):
        return _ask_hydra(options)
    if options.multirun:
        if "WORLD_SIZE" in os.environ:
            raise UserError("a sweep starts its own processes: launch.nproc=N in place of torchrun")
        if options.cfg:
            from ghosttrain.config.compose import cells

            for cell in cells(options.overrides, options.config_dir):
                print(f"# {' '.join(cell)}")
                _train(replace(options, overrides=cell, multirun=False))
            return 0
        from ghosttrain.study.sweep import sweep

        return sweep(options.overrides, options.config_dir)
    if int(os.environ.get("RANK", "0")) > 0:
        from ghosttrain.engine.train import train

        train(None, [])  # the settings come from rank 0
        return 0
    composed = compose(options.overrides, options.config_dir)
    if options.cfg:
        import yaml

        print(yaml.safe_dump(composed.config.model_dump(mode="json"), sort_keys=False), end="")
        return 0
    from ghosttrain.engine.launch import launch

    return launch(composed)


def _cache(options: Options) -> int:
    """Store the teacher's answers: of composed settings, or of a store with its own settings."""
    from ghosttrain.engine.launch import store_answers

    if len(options.folders) > 1:
        raise UserError(f"cache takes one folder, not also {options.folders[1]!r}")
    what = {name: getattr(options, name) for name in ("dry_run", "repair", "inspect")}
    if sum(what.values()) > 1:
        raise UserError("choose one of --dry-run, --repair and --inspect")
    folder = Path(options.folders[0]) if options.folders else None
    return store_answers(folder, options.overrides, options.config_dir, what)


def _eval(options: Options) -> int:
    """Evaluate a finished or unfinished run again, exactly."""
    from ghosttrain.engine.reevaluate import evaluate_run

    return evaluate_run(_one_folder("eval", options), options.overrides)


def _fuse(options: Options) -> int:
    """Write the inference model of a run."""
    from ghosttrain.engine.checkpoint import fuse_run

    if options.overrides:
        raise UserError(
            f"fuse takes a run folder, --out FILE and --to LIBRARY, not {options.overrides[0]!r}"
        )
    fuse_run(_one_folder("fuse", options), options.out, options.to)
    return 0


def _bench(options: Options) -> int:
    """Time training steps or optimizer steps on this machine."""
    from ghosttrain.study.bench import bench

    print(bench(options.folders, options.overrides))
    return 0


def _report(options: Options) -> int:
    """Print the results of runs side by side."""
    from ghosttrain.study.report import report

    if options.overrides:
        raise UserError(f"report takes run folders, not {options.overrides[0]!r}")
    if not options.folders:
        raise UserError("report needs run folders: python -m ghosttrain report runs/compact_kd/*")
    print(report([Path(f) for f in options.folders]))
    return 0


VERBS: dict[str, Callable[[Options], int]] = {
    "train": _train,
    "cache": _cache,
    "eval": _eval,
    "fuse": _fuse,
    "report": _report,
    "bench": _bench,
}
FLAGS = (
    "--help", "--version", "--multirun", "--cfg", "--info", "--config-dir", "--out", "--to",
    "--dry-run", "--repair", "--inspect",
)  # fmt: skip


def _options(verb: str, args: list[str]) -> Options:
    """Split the arguments into key=value, folders and flags; refuse unknown flags."""
    found: dict[str, str | bool] = {}
    overrides, folders = [], []
    rest = iter(args)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        if arg in ("-m", "--multirun"):
            found["multirun"] = True
        elif arg in ("--dry-run", "--repair", "--inspect"):
            found[arg.lstrip("-").replace("-", "_")] = True
        elif flag in ("--cfg", "--info", "--config-dir", "--out", "--to", "-c", "-cd"):
            name = {"-c": "cfg", "-cd": "config_dir"}.get(flag, flag.lstrip("-").replace("-", "_"))
            given = value if equals else next(rest, None)
            if not given:
                raise UserError(f"{flag} needs a value: {flag} {_EXAMPLE[name]}")
            found[name] = given
        elif arg.startswith("-"):
            raise UserError(f"unknown option {flag!r}.{did_you_mean(flag, FLAGS)}")
        elif equals:
            overrides.append(arg)
        else:
            folders.append(arg)
    if found.get("cfg") not in (None, "job", "hydra", "all"):
        raise UserError(f"--cfg {found['cfg']}: choose job, hydra or all")
    known = {
        "train": {"multirun", "cfg", "info", "config_dir"},
        "cache": {"config_dir", "dry_run", "repair", "inspect"},
        "fuse": {"out", "to"},
    }
    allowed = known.get(verb, set())
    for name in set(found) - allowed:
        raise UserError(
            f"--{name.replace('_', '-')} does not belong to {verb}; see python -m ghosttrain --help"
        )
    return Options(overrides, folders, **found)  # type: ignore[arg-type]


_EXAMPLE = {"cfg": "job", "info": "defaults", "config_dir": "FOLDER", "out": "FILE", "to": "timm"}


def _one_folder(verb: str, options: Options) -> Path:
    if len(options.folders) != 1:
        raise UserError(
            f"{verb} needs one run folder: python -m ghosttrain {verb} runs/compact_kd/NAME"
        )
    return Path(options.folders[0])


def _ask_hydra(options: Options) -> int:
    """Let Hydra itself answer --info and --cfg hydra|all about this composition."""
    import logging

    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from ghosttrain.config.compose import compose
    from ghosttrain.config.paths import shipped

    composed = compose(options.overrides, options.config_dir)
    GlobalHydra.instance().clear()
    flag = ["--info", options.info] if options.info else ["--cfg", options.cfg or "all"]
    program, sys.argv = sys.argv, ["ghosttrain", *composed.hydra_overrides, *[str(f) for f in flag]]
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="config")(
            lambda _: None
        )()
    finally:
        sys.argv = program
        root.handlers[:] = handlers  # Hydra's would go on writing to this call's stderr
        root.setLevel(level)
    return 0
