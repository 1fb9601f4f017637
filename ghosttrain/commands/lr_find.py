"""`lr_find`: a short run in which the learning rate rises, its picture, and which rate to take."""

from __future__ import annotations

from argparse import Namespace

from ghosttrain.commands.arguments import Arguments, validate_counts, with_config_dir
from ghosttrain.errors import UserError
from ghosttrain.terminal import go_on_without

ARGUMENTS = with_config_dir(
    Arguments(
        "lr_find",
        "[+recipe=NAME] [key=value ...] [--steps N]",
        "Train a few steps of the same command with a learning rate that rises from nearly 0:\n"
        "runs/lr_find-DATE.png shows the loss; the rate where it falls fastest is suggested.",
    )
)
ARGUMENTS.add_argument("--steps", metavar="N", type=int, default=100, help="optimizer steps (100)")


def run(options: Namespace) -> int:
    """Run the test; return 0."""
    from ghosttrain.config.hydra_words import split_words

    words, _ = split_words(options.words, multirun=False)
    if not words:
        raise UserError(
            "name what to train: python -m ghosttrain lr_find +recipe=finetune data=folder "
            "data.root=/path data.split=0.2"
        )
    validate_counts(steps=options.steps)
    go_on_without()
    from ghosttrain.study.lr_find import lr_find

    lr_find(words, options.steps, options.config_dir)
    return 0
