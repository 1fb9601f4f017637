"""`cache`: store the teacher's outputs, by composed settings or those of a cache."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ghosttrain import ranks
from ghosttrain.commands.arguments import Arguments, folders_and_overrides, with_config_dir
from ghosttrain.errors import UserError
from ghosttrain.terminal import go_on_without

if TYPE_CHECKING:
    from ghosttrain.config.schema import Config

ARGUMENTS = with_config_dir(
    Arguments(
        "cache",
        "+recipe=NAME cache.dir=FOLDER [key=value ...] | FOLDER [options]",
        "Store the teacher's outputs for cache.draws draws of every training image. A command\n"
        "that was stopped goes on where it was. With FOLDER alone, the settings are those of that\n"
        "cache.",
        takes_folders=True,
    )
)
for _option, _help in {
    "--dry-run": "measure the codecs, the size on disk and the time, and store nothing",
    "--repair": "make damaged or missing files of the cache again",
    "--inspect": "draw a few stored crops with what the teacher says of them",
}.items():
    ARGUMENTS.add_argument(_option, action="store_true", help=_help)


def run(options: Namespace) -> int:
    """Fill, measure, repair or draw a cache; return the exit code."""
    folders, overrides = folders_and_overrides(options.words, groups=True)
    if len(folders) > 1:
        raise UserError(f"cache takes one folder, not also {folders[1]!r}")
    what = {name: getattr(options, name) for name in ("dry_run", "repair", "inspect")}
    if sum(what.values()) > 1:
        raise UserError("choose one of --dry-run, --repair and --inspect")
    if not (options.dry_run or options.inspect):
        go_on_without()
    if ranks.rank() > 0:
        config = None  # it comes from rank 0
    else:
        if not folders and not overrides and (options.repair or options.inspect):
            flag = "--repair" if options.repair else "--inspect"
            raise UserError(
                f"name the folder of cached outputs: python -m ghosttrain cache D {flag}"
            )
        config = _settings(folders, overrides, options.config_dir)
        if ranks.must_spawn(config.launch.nproc, config.launch.devices):
            from ghosttrain.engine.spawn import spawn

            flags = [f"--{name.replace('_', '-')}" for name, is_on in what.items() if is_on]
            own_dir = ["--config-dir", options.config_dir] if options.config_dir else []
            words = ("cache", *options.words, *flags, *own_dir)
            return spawn(words, config.launch.nproc, config.launch.devices)
    from ghosttrain.engine.cache_writer import fill_cache
    from ghosttrain.engine.stop import ending_at_once

    with ending_at_once():
        fill_cache(config, **what)
    return 0


def _settings(folders: list[str], overrides: list[str], config_dir: str | None) -> Config:
    """Return the settings of a cache that exists, or composed ones.

    Raises:
        UserError: no cache there; no teacher, no `cache.dir`.
    """
    from ghosttrain.config.compose import compose, override_saved
    from ghosttrain.config.schema import LaunchConfig
    from ghosttrain.engine.identify import with_view_of_weights
    from ghosttrain.engine.run_files import read_config, without_remedy
    from ghosttrain.files import resolved

    if not folders:
        composed = compose(overrides, config_dir, trains=False)
        config = with_view_of_weights(composed.config, composed.free)
        if config.distill.name == "none":
            raise UserError("cache stores a teacher's outputs: type distill=soft_ce teacher=NAME")
        if config.cache.dir is None:
            raise UserError("cache needs a folder: type cache.dir=/path/to/cache")
        return config
    folder = Path(folders[0])
    if not (folder / "cache.json").is_file():
        raise UserError(
            f"{folder} is no cache: it has no cache.json; python -m ghosttrain cache"
            f" +recipe=NAME cache.dir={folder} cache.draws=N makes one"
        )
    try:
        saved = read_config(folder).model_copy(update={"launch": LaunchConfig()})
    except UserError as error:
        raise UserError(
            f"{without_remedy(error)}: type the settings that it was stored with, and "
            f"cache.dir={folder}, in place of the folder"
        ) from None
    config = override_saved(saved, overrides, "cache")
    cache = config.cache.model_copy(update={"dir": str(resolved(folder))})
    return config.model_copy(update={"cache": cache})
