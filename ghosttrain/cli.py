"""The command line: a table of verbs, a short help, one-line errors. `train` is the default verb.

Nothing heavy is imported before the verb is known: `--help` takes a tenth of a second, a typo in a
setting half a second, and torch is imported only by a command that is going to use it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ghosttrain.config.errors import UserError, did_you_mean, mistake
from ghosttrain.terminal import Output, go_on_without, lasting_output, reason


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
    """Run a verb; return the exit code: 0, 1 (a run of a sweep failed), 2 (a mistake of the user,
    or what was asked for could not be printed), 130 (Ctrl-C).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    with lasting_output():
        return _main(args) or _unprinted()


def _main(args: list[str]) -> int:
    verb = "train"
    try:
        verb, options = parse(args)
        return VERBS[verb](options)
    except (UserError, OSError) as error:
        said, rank = mistake(error), os.environ.get("RANK", "0")
        if said is None:
            raise
        where = f" (rank {rank})" if rank != "0" else ""
        print(f"ghosttrain: error{where}: {said}", file=sys.stderr)
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


def _unprinted() -> int:
    """Return 2, with a line, when printing was all that was asked for and failed; else 0.

    A closed pipe is no failure: `report | head` has read what it wanted.
    """
    out = sys.stdout
    if not isinstance(out, Output) or out.leaves_more:
        return 0
    out.flush()
    if out.failure is None or isinstance(out.failure, BrokenPipeError):
        return 0
    print(f"ghosttrain: error: {out.name}: {reason(out.failure)}", file=sys.stderr)
    return 2


def _lost_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because the process at its other end is gone."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed by peer"))


def _train(options: Options) -> int:
    """Train (or finish, or show) one run; with -m one run after another."""
    from ghosttrain.config.compose import compose

    if options.folders:
        if options.folders[0].startswith("~"):
            raise UserError(
                f"{options.folders[0]!r}: settings cannot be deleted; set a value (key=null, "
                "group=none)"
            )
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
        from ghosttrain.engine.classification import CLASSIFICATION
        from ghosttrain.engine.train import train

        go_on_without()
        train(CLASSIFICATION, None, [])  # the settings come from rank 0
        return 0
    composed = compose(options.overrides, options.config_dir)
    if options.cfg:
        import yaml

        print(yaml.safe_dump(composed.config.model_dump(mode="json"), sort_keys=False), end="")
        return 0
    from ghosttrain.engine.launch import launch

    return launch(composed)


def _cache(options: Options) -> int:
    """Store the teacher's outputs: of composed settings, or of a cache with its own settings."""
    from ghosttrain.engine.launch import cache_outputs

    if len(options.folders) > 1:
        raise UserError(f"cache takes one folder, not also {options.folders[1]!r}")
    what = {name: getattr(options, name) for name in ("dry_run", "repair", "inspect")}
    if sum(what.values()) > 1:
        raise UserError("choose one of --dry-run, --repair and --inspect")
    folder = Path(options.folders[0]) if options.folders else None
    if not (options.dry_run or options.inspect):
        go_on_without()
    return cache_outputs(folder, options.overrides, options.config_dir, what)


def _eval(options: Options) -> int:
    """Evaluate a finished or unfinished run again, exactly."""
    from ghosttrain.engine.reevaluate import evaluate_run

    return evaluate_run(_one_folder("eval", options), options.overrides)


def _fuse(options: Options) -> int:
    """Write the inference model of a run."""
    from ghosttrain.engine.load import fuse_run

    if options.overrides:
        raise UserError(
            f"fuse takes a run folder, --out FILE and --to LIBRARY, not {options.overrides[0]!r}"
        )
    go_on_without()
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


def _help(options: Options) -> int:
    """Print verbs, groups, recipes, settings and options, those of `--config-dir` too."""
    from ghosttrain.help import help_text

    print(help_text(options.config_dir))
    return 0


def _version(_: Options) -> int:
    """Print the version."""
    from ghosttrain import __version__

    print(f"ghosttrain {__version__}")
    return 0


VERBS: dict[str, Callable[[Options], int]] = {
    "train": _train,
    "cache": _cache,
    "eval": _eval,
    "fuse": _fuse,
    "report": _report,
    "bench": _bench,
    "help": _help,
    "version": _version,
}
SWITCHES = {
    "-h": "help",
    "--help": "help",
    "--version": "version",
    "-m": "multirun",
    "--multirun": "multirun",
    "--dry-run": "dry_run",
    "--repair": "repair",
    "--inspect": "inspect",
}
WITH_VALUE = {
    "-c": "cfg",
    "--cfg": "cfg",
    "--info": "info",
    "-cd": "config_dir",
    "--config-dir": "config_dir",
    "--out": "out",
    "--to": "to",
}
ALLOWED = {
    "train": {"multirun", "cfg", "info", "config_dir"},
    "cache": {"config_dir", "dry_run", "repair", "inspect"},
    "fuse": {"out", "to"},
    "help": {"config_dir"},
}
"""Verb -> the options that belong to it."""
TAKE_FOLDERS = {"cache", "eval", "fuse", "report"}


def parse(args: list[str]) -> tuple[str, Options]:
    """Split a command line into its verb and the rest.

    The verb is the first word that is one: it may stand anywhere between the `key=value`. Of a verb
    that takes folders, a word with `=` is one if it exists, or if no setting has a name like it.

    Raises:
        UserError: an unknown option, one without its value, one of another verb; two verbs.
    """
    found: dict[str, str | bool] = {}
    overrides, words = [], []
    rest = iter(args)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        if arg in SWITCHES:
            found[SWITCHES[arg]] = True
        elif flag in WITH_VALUE:
            name = WITH_VALUE[flag]
            given = value if equals else next(rest, None)
            if not given:
                raise UserError(f"{flag} needs a value: {flag} {_EXAMPLE[name]}")
            found[name] = given
        elif arg.startswith("-"):
            options = [o for o in (*SWITCHES, *WITH_VALUE) if o.startswith("--")]
            raise UserError(f"unknown option {flag!r}.{did_you_mean(flag, options)}")
        elif equals:
            overrides.append(arg)
        else:
            words.append(arg)
    if found.pop("help", False) or "help" in words:
        return "help", Options([], [], config_dir=found.get("config_dir"))  # type: ignore[arg-type]
    if found.pop("version", False):
        return "version", Options([], [])
    verb = next((word for word in words if word in VERBS), None)
    if verb is not None:
        words.remove(verb)
    for word in words:
        if word in VERBS and not (verb in TAKE_FOLDERS and Path(word).exists()):
            raise UserError(f"two verbs, {verb!r} and {word!r}: type one")
    verb = verb or "train"
    if verb in TAKE_FOLDERS:
        groups = verb == "cache"  # the name of a group may hold a /
        paths = [
            word
            for word in overrides
            if Path(word).exists() or ("/" in word.partition("=")[0] and not groups)
        ]
        overrides = [word for word in overrides if word not in paths]
        words += paths
    if found.get("cfg") not in (None, "job", "hydra", "all"):
        raise UserError(f"--cfg {found['cfg']}: choose job, hydra or all")
    for name in sorted(set(found) - ALLOWED.get(verb, set())):
        raise UserError(
            f"--{name.replace('_', '-')} does not belong to {verb}; see python -m ghosttrain --help"
        )
    return verb, Options(overrides, words, **found)  # type: ignore[arg-type]


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
