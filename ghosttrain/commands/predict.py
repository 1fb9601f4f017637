"""`predict RUN IMAGE...`: classify images by the network of a run."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghosttrain.commands.arguments import Arguments, validate_counts
from ghosttrain.config.schema import DataConfig
from ghosttrain.errors import UserError
from ghosttrain.terminal import go_on_without
from ghosttrain.text import printable

if TYPE_CHECKING:
    from ghosttrain.engine.weights_file import WeightsKind

ARGUMENTS = Arguments(
    "predict",
    "RUN|FILE IMAGE|FOLDER ... [options]",
    "Classify images, and all images of folders, by the network of a run, or by a file that\n"
    "export wrote, in its own runtime: the best classes of each with their probabilities. An\n"
    "image that cannot be decoded is named; the others go on.",
    takes_folders=True,
)
ARGUMENTS.add_argument("--top", metavar="K", type=int, default=5, help="classes for each image (5)")
ARGUMENTS.add_argument("--batch", metavar="B", type=int, default=64, help="images at once (64)")
ARGUMENTS.add_argument("--csv", metavar="FILE", help="write them as a table")
ARGUMENTS.add_argument("--json", metavar="FILE", help="write them as JSON")
ARGUMENTS.add_argument("--picture", metavar="FILE", help="draw the first 40 with their class")
ARGUMENTS.add_argument(
    "--weights", choices=("ema", "raw", "fused"),
    help="which of the run's weights (fused, of a timm model ema)",
)  # fmt: skip


def run(options: Namespace) -> int:
    """Print, and write, what the images show; return 1 where one could not be decoded."""
    folder, *words = options.words or [""]
    if not folder or not words:
        raise UserError(
            "predict needs a run and images: python -m ghosttrain predict "
            "runs/finetune/NAME photo.jpg folder"
        )
    validate_counts(top=options.top, batch=options.batch)
    from ghosttrain.engine.predict import image_files, predict_files

    load, data = _model(Path(folder), options.weights)
    files = image_files(words)
    go_on_without()
    model = load()
    failed: list[str] = []
    found = predict_files(model, files, options.top, options.batch, failed.append)
    for path, best in found:
        shown = ", ".join(f"{name} {100 * p:.1f} %" for name, p in best)
        print(printable(f"{path}: {shown}"))
    for line in failed:
        print(f"ghosttrain: error: {line}", file=sys.stderr)
    _write(options, found, data)
    return int(bool(failed))


def _model(path: Path, weights: WeightsKind | None) -> tuple[Callable[[], Any], DataConfig]:
    """Return what loads the network of a run, or what runs an exported file, and how it takes
    images.
    """
    from ghosttrain.deploy.formats import is_file
    from ghosttrain.engine.load import load_run
    from ghosttrain.engine.run_files import read_config
    from ghosttrain.engine.student import has_fused_form

    if is_file(path):
        from ghosttrain.deploy.runtime import ExportedModel

        if weights:
            raise UserError(f"--weights is for a run; {path} is a file with weights of its own")
        exported = ExportedModel(path)
        return lambda: exported, exported.data
    config = read_config(path)
    kind: WeightsKind = weights or ("fused" if has_fused_form(config) else "ema")
    return partial(load_run, path, kind), config.data


def _write(
    options: Namespace, found: list[tuple[Path, list[tuple[str, float]]]], data: DataConfig
) -> None:
    import csv
    import io
    import json

    from ghosttrain.engine.gallery import draw_gallery
    from ghosttrain.engine.predict import opened
    from ghosttrain.files import write_text

    if options.csv:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        most = max((len(best) for _, best in found), default=0)
        rows.writerow(
            ["path", *(f"{word}_{k + 1}" for k in range(most) for word in ("class", "probability"))]
        )
        for path, best in found:
            cells = [x for name, p in best for x in (name, f"{p:.6f}")]
            rows.writerow([printable(str(path)), *cells])
        write_text(Path(options.csv), text.getvalue())
    if options.json:
        records = [
            {"path": printable(str(path)),
             "predictions": [{"class": name, "probability": p} for name, p in best]}
            for path, best in found
        ]  # fmt: skip
        write_text(Path(options.json), json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    if options.picture:
        shown = [
            (
                partial(opened, path, data.max_pixels),
                f"{path.name}\n{best[0][0]} {100 * best[0][1]:.1f} %",
            )
            for path, best in found
        ]
        draw_gallery(shown, data, Path(options.picture), options.words[0])
