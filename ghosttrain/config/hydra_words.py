"""Words of a command line that are settings of Hydra itself, such as `hydra/launcher=joblib`.

Those of a sweep (its launcher, its sweeper, its folder) are passed to Hydra. All others would do
nothing here and are refused; the message says what this project has in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

from ghosttrain.errors import UserError

PASSED = (
    *("hydra.launcher.", "hydra.sweeper.", "hydra.sweep."),
    *("hydra/launcher=", "hydra/sweeper=", "hydra/sweeper/sampler="),
)
"""Beginnings of the words that Hydra gets; they mean something in a sweep."""
INSTEAD = {
    "hydra.run": "the folder of a run is run.root=FOLDER run.name=NAME",
    "hydra.runtime": "the folder of a run is run.root=FOLDER run.name=NAME",
    "hydra.output_subdir": "the settings of a run are config.yaml in its folder",
    "hydra/output": "the folder of a run is run.root=FOLDER run.name=NAME",
    "hydra.job": "the name of a run is run.name=NAME; it stays in the folder where it is started",
    "hydra.verbose": "how often it prints is tracker.log_every=STEPS; log.txt is in its folder",
    "hydra/job_logging": "how often it prints is tracker.log_every=STEPS",
    "hydra/hydra_logging": "how often it prints is tracker.log_every=STEPS",
    "hydra.searchpath": "your own groups and recipes are --config-dir FOLDER",
    "hydra.mode": "a sweep is -m",
    "hydra.callbacks": "what a run did is in result.json and metrics.jsonl of its folder",
    "hydra/callbacks": "what a run did is in result.json and metrics.jsonl of its folder",
    "hydra.help": "help is python -m ghosttrain --help",
    "hydra/help": "help is python -m ghosttrain --help",
}
"""Setting or group of Hydra -> this project's own way."""


def sweeper_of(hydra_words: Sequence[str]) -> str:
    """Return the name of the sweeper that these words choose; `basic` where they choose none."""
    return _chosen(hydra_words, "hydra/sweeper")


def launcher_of(hydra_words: Sequence[str]) -> str:
    """Return the name of the launcher that these words choose; `basic` where they choose none."""
    return _chosen(hydra_words, "hydra/launcher")


def _chosen(hydra_words: Sequence[str], group: str) -> str:
    pairs = (word.lstrip("+").partition("=") for word in hydra_words)
    return ["basic", *(name for key, _, name in pairs if key == group)][-1]


def split_words(words: Sequence[str], multirun: bool) -> tuple[list[str], list[str]]:
    """Split a command line into this project's words and those that Hydra gets.

    Raises:
        UserError: a setting of Hydra that does nothing here, with what to type instead.
    """
    ours = [word for word in words if not word.lstrip("+").startswith(("hydra.", "hydra/"))]
    theirs = [word for word in words if word not in ours]
    for word in theirs:
        key = word.lstrip("+").partition("=")[0]
        if key == "hydra.mode" and word.endswith("=MULTIRUN") and multirun:
            continue
        if key.startswith("hydra.sweeper.params"):
            raise UserError(f"{word!r}: type the values with the setting itself, such as seed=1,2")
        if not word.lstrip("+").startswith(PASSED):
            near = [
                name for name in INSTEAD if key == name or key.startswith((f"{name}.", f"{name}/"))
            ]
            way = INSTEAD[max(near, key=len)] if near else "see python -m ghosttrain help"
            raise UserError(f"{word!r} is Hydra's own and does nothing here: {way}")
        if not multirun:
            raise UserError(f"{word!r} is for a sweep, which is train -m")
    return ours, [word for word in theirs if word.lstrip("+").startswith(PASSED)]
