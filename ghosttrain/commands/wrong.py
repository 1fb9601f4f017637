"""`wrong RUN`: the held-out images that a run is most certain of and wrong about."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ghosttrain.commands.arguments import (
    Arguments,
    folders_and_overrides,
    one_folder,
    validate_counts,
)
from ghosttrain.terminal import go_on_without

ARGUMENTS = Arguments(
    "wrong",
    "RUN [key=value ...] [options]",
    "Show the held-out images that a run is most certain of and wrong about, most often wrong\n"
    "labels: RUN/wrong.png, and a line for each. data.root may differ from the run's.",
    takes_folders=True,
)
ARGUMENTS.add_argument("--top", metavar="N", type=int, default=20, help="how many (20)")
ARGUMENTS.add_argument("--out", metavar="FILE", help="draw the picture elsewhere")


def run(options: Namespace) -> int:
    """Print and draw them; return 0."""
    from ghosttrain.config.compose import override_saved
    from ghosttrain.engine.run_files import read_config

    validate_counts(top=options.top)
    folders, overrides = folders_and_overrides(options.words)
    folder = one_folder("wrong", folders)
    config = override_saved(read_config(folder), overrides, "eval")

    from ghosttrain.engine.load import held_out_of, load_run
    from ghosttrain.engine.wrong import draw_mistakes, find_mistakes

    held_out, batch = held_out_of(folder, config)
    model = load_run(folder)
    go_on_without()
    mistakes = find_mistakes(model, held_out, config, batch)
    shown = mistakes[: options.top]
    for each in shown:
        print(each.line())
    print(f"{len(mistakes):,} of {len(held_out):,} held-out images are wrong")
    if shown:
        path = Path(options.out) if options.out else folder / "wrong.png"
        draw_mistakes(shown, held_out, config.data, path, str(folder))
        print(path)
    return 0
