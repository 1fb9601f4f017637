"""`report RUN...`: results side by side."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ghosttrain.commands.arguments import Arguments, folders_and_overrides
from ghosttrain.errors import UserError

ARGUMENTS = Arguments(
    "report",
    "RUN ... [report.metrics=top1,balanced,recall:CLASS,...]",
    "Print the results of runs side by side: mean and standard deviation over seeds. A RUN is a\n"
    "run folder, or a folder that holds some. report.metrics names the columns: top1, top5,\n"
    "balanced, macro_f1, ece, loss, raw_top1, fused_top1, recall:CLASS, precision:CLASS; of\n"
    "detectors ap, ap50, ap75, ap_small, ap_medium, ap_large, ar100, raw_ap, fused_ap,\n"
    "no_look_ap, ap:CLASS.",
    takes_folders=True,
)
ARGUMENTS.add_argument(
    "--classes", action="store_true", help="also the recall (of detectors the AP) of each class"
)
ARGUMENTS.add_argument("--curves", metavar="FILE", help="draw their held-out accuracy (PNG)")


def run(options: Namespace) -> int:
    """Print the table; return 0."""
    folders, overrides = folders_and_overrides(options.words)
    metrics: list[str] = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key != "report.metrics":
            raise UserError(f"report takes run folders and report.metrics=A,B, not {text!r}")
        metrics = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
    if not folders:
        raise UserError("report needs run folders: python -m ghosttrain report runs/compact_kd/*")
    from ghosttrain.study.report import report

    print(report([Path(folder) for folder in folders], metrics, options.classes, options.curves))
    return 0
