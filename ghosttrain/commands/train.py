"""`train`, the default verb: train, finish or show one run; with -m one run after another."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from ghosttrain import ranks
from ghosttrain.commands.arguments import Arguments, validate_counts, with_config_dir
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.memory import without_collection

ARGUMENTS = with_config_dir(
    Arguments(
        "train",
        "[+recipe=NAME] [key=value ...] [options]",
        "Train a run. The same command finds the same run folder: an unfinished run is resumed,\n"
        "of a finished one the result is shown. `train` may be left out.",
    )
)
ARGUMENTS.add_argument(
    "-m", "--multirun", action="store_true",
    help="sweep over comma-separated values; finished runs are not repeated",
)  # fmt: skip
ARGUMENTS.add_argument(
    "--confirm", type=int, metavar="SEEDS",
    help="after a search (hydra/sweeper=optuna): run its best trial with this many new seeds",
)  # fmt: skip
ARGUMENTS.add_argument(
    "-c", "--cfg", choices=("job", "hydra", "all"),
    help="print the composed settings and stop (hydra, all: Hydra's own)",
)  # fmt: skip
ARGUMENTS.add_argument("-p", "--package", metavar="SECTION", help="with --cfg: of this section")
ARGUMENTS.add_argument("--resolve", action="store_true", help="with --cfg job: they always are")
ARGUMENTS.add_argument(
    "--info", choices=("defaults", "defaults-tree", "config", "searchpath", "plugins", "all"),
    help="where the settings come from: Hydra's own answer",
)  # fmt: skip
ARGUMENTS.add_argument(
    "-sc", "--shell-completion", metavar="install=SHELL",
    help='complete names: eval "$(ghosttrain -sc install=bash)", or zsh',
)  # fmt: skip


def run(options: Namespace) -> int:
    """Train, sweep, or print settings; return the exit code."""
    with without_collection():
        from ghosttrain.config.compose import cells, compose
        from ghosttrain.config.hydra_words import split_words, sweeper_of
        from ghosttrain.config.names import Names

    if options.shell_completion:
        from ghosttrain.commands.completion import complete

        return complete(options.shell_completion, ARGUMENTS._option_string_actions)
    overrides, hydra_words = split_words(options.words, options.multirun)
    if options.multirun:
        overrides, hydra_words = Names(options.config_dir).sweep_words(overrides, hydra_words)
    if options.confirm is not None:
        validate_counts(confirm=options.confirm)
        if sweeper_of(hydra_words) != "optuna":
            raise UserError(
                f"--confirm {options.confirm} runs the best trial of a search again: add -m and "
                "+recipe=tune_lr, or hydra/sweeper=optuna with optim.lr=interval(A,B)"
            )
    if not options.words and not (options.info or options.cfg):
        raise UserError(
            "name what to train: python -m ghosttrain +recipe=compact_kd model=ghostnetv3_130 (the "
            "main job, on embedded digits); python -m ghosttrain --help lists the rest"
        )
    if options.cfg is None and (options.package or options.resolve):
        given = f"--package {options.package}" if options.package else "--resolve"
        raise UserError(f"{given} is for --cfg, which prints settings: add -c job")
    if options.info or options.cfg in ("hydra", "all"):
        if options.multirun:
            given = f"--info {options.info}" if options.info else f"--cfg {options.cfg}"
            raise UserError(f"{given} is about one run: leave -m and the lists of values out")
        return _ask_hydra(overrides, options)
    if options.multirun and options.cfg:
        for cell in cells(overrides, options.config_dir, hydra_words):
            print(f"# {' '.join(cell)}")
            _print_settings(cell, options)
        return 0
    if options.multirun:
        from ghosttrain.study.sweep import on_all_ranks, sweep

        if sweeper_of(hydra_words) == "optuna":
            from ghosttrain.study.search import search

            return on_all_ranks(
                lambda: search(overrides, hydra_words, options.config_dir, options.confirm)
            )

        return on_all_ranks(lambda: sweep(overrides, hydra_words, options.config_dir))
    if options.cfg:
        return 0 if ranks.rank() else _print_settings(overrides, options)
    if ranks.rank() > 0:
        from ghosttrain.engine.launch import follow

        follow()
        return 0
    from ghosttrain.engine.launch import launch, others_told

    with others_told():
        with without_collection():
            composed = compose(overrides, options.config_dir)
        return launch(composed)


def _print_settings(overrides: list[str], options: Namespace) -> int:
    """Print the settings as a run has them, or a section of them (`--package`)."""
    import yaml

    from ghosttrain.config.compose import compose

    settings = compose(overrides, options.config_dir).config.model_dump(mode="json")
    for part in (options.package or "").split("."):
        if part and (not isinstance(settings, dict) or part not in settings):
            raise UserError(
                f"--package {options.package}: there is no such section.{_near(part, settings)}"
            )
        settings = settings[part] if part else settings
    print(yaml.safe_dump(settings, sort_keys=False), end="")
    return 0


def _near(name: str, settings: Any) -> str:
    return did_you_mean(name, settings) if isinstance(settings, dict) else ""


def _ask_hydra(overrides: list[str], options: Namespace) -> int:
    """Let Hydra itself answer --info and --cfg hydra|all about this composition."""
    import logging

    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from ghosttrain.config.compose import compose
    from ghosttrain.files import shipped

    composed = compose(overrides, options.config_dir)
    GlobalHydra.instance().clear()
    flag = ["--info", options.info] if options.info else ["--cfg", options.cfg]
    program, sys.argv = sys.argv, ["ghosttrain", *composed.hydra_overrides, *flag]
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
