"""`export RUN --to FORMAT`: the inference model of a run as a file for a device, proven to answer
as it does.
"""

from __future__ import annotations

from argparse import Namespace

from ghosttrain.commands.arguments import (
    Arguments,
    folders_and_overrides,
    one_folder,
    parsed_size,
    validate_counts,
)
from ghosttrain.deploy.formats import FORMATS, PRECISIONS
from ghosttrain.errors import UserError
from ghosttrain.terminal import go_on_without

ARGUMENTS = Arguments(
    "export",
    "RUN --to FORMAT,... [key=value ...] [options]",
    "Convert the fused network of a finished run, run the file in its own runtime on the held-out\n"
    "images and compare it with PyTorch. A file that answers differently is kept as *.rejected,\n"
    "and the exit code is 1. Settings that eval may change may differ (data.root=).\n\n"
    "formats:\n" + "\n".join(f"  {name:<14}{about}" for name, about in FORMATS.items()),
    takes_folders=True,
)
ARGUMENTS.add_argument("--to", metavar="FORMAT,...", help="what to write; several with commas")
ARGUMENTS.add_argument(
    "--precision", choices=PRECISIONS, default="fp32",
    help="fp32 (the default); fp16; int8 (as the verb quantize)",
)  # fmt: skip
ARGUMENTS.add_argument(
    "--include-preprocess", action="store_true",
    help="the file takes uint8 pixels (B, H, W, C) and gives probabilities",
)  # fmt: skip
ARGUMENTS.add_argument(
    "--nms", action="store_true",
    help="of a detector: the file gives boxes, scores, labels of one image (onnx); without it the"
    " outputs of every anchor",
)  # fmt: skip
ARGUMENTS.add_argument("--size", metavar="S|HxW", help="of the images (the run's data.eval_size)")
ARGUMENTS.add_argument(
    "--batch", metavar="B", type=int,
    help="images at once (any number where the format knows it, else 1)",
)  # fmt: skip
ARGUMENTS.add_argument(
    "--images", metavar="N", type=int, help="try it on so many held-out images (all)"
)


def run(options: Namespace) -> int:
    """Write the files; return 0, or 1 where one of them was rejected."""
    folders, overrides = folders_and_overrides(options.words)
    folder = one_folder("export", folders)
    names = [name for name in (options.to or "").split(",") if name]
    if not names:
        raise UserError(f"export needs --to FORMAT: {', '.join(FORMATS)}; several with commas")
    size = parsed_size(options.size)
    given = {"batch": options.batch, "images": options.images}
    validate_counts(**{name: count for name, count in given.items() if count is not None})
    from ghosttrain.deploy.formats import find, known

    for name in names:
        if options.nms and not known(name).nms:
            raise UserError(
                f"--nms does not exist for {name}: type --to onnx, or leave --nms out and make "
                "boxes of the outputs (docs/detection.md)"
            )
    formats = [find(name) for name in dict.fromkeys(names)]

    from ghosttrain.config.compose import override_saved
    from ghosttrain.deploy.export import Wanted, export_run, validate_detector
    from ghosttrain.deploy.network import deployed, validate_classifier

    source = deployed(folder, options.include_preprocess)
    config = override_saved(source.config, overrides, "eval")
    go_on_without()
    wanted = Wanted(options.precision, size, options.batch, options.images, options.nms)
    if options.precision == "int8":
        from ghosttrain.deploy.quantize import Calibration, quantize_run

        validate_classifier(source.folder, config, "--precision int8")
        validate_detector(source, wanted)
        if size:
            raise UserError("--size is not for --precision int8: its ranges are those of the run's")
        reports = quantize_run(source, config, formats, wanted, Calibration(), max_drop=1.0)
    else:
        reports = export_run(source, config, formats, wanted)
    return int(any(report["passed"] is False for report in reports))
