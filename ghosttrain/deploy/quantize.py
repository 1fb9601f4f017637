"""Post-training INT8: calibrate, try the file in its runtime, keep the most sensitive layers in
float until the accuracy holds.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import eval_loader
from ghosttrain.data.order import eval_batches
from ghosttrain.deploy.export import (
    HeldOut,
    Wanted,
    about,
    bytes_in,
    converting,
    each_format,
    folder_of,
    line,
    making,
    report_of,
    validate_precision,
)
from ghosttrain.deploy.formats import Format, InFloat, saturates
from ghosttrain.deploy.latency import one_pass
from ghosttrain.deploy.network import Deployed, write_preprocess
from ghosttrain.deploy.parity import Comparison, compare
from ghosttrain.deploy.sensitivity import Sensitivity, int8_share, sensitivities
from ghosttrain.engine.load import held_out_of
from ghosttrain.files import write_json, write_text

BATCH = 32
"""Calibration images at once."""
LOOKED_AT = 64
"""Calibration images by which the sensitivity of each layer is measured."""
STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
"""Numbers of layers that are tried in float, the most sensitive first."""


@dataclass(frozen=True)
class Calibration:
    """What the ranges of activations are taken from."""

    images: int = 256
    seed: int = 0
    """Of the choice among the training images."""


@dataclass(frozen=True)
class Try:
    """One file that was tried."""

    kept: InFloat
    share: float
    """Of the MACs that are INT8, in per cent."""
    drop: float
    """Of top-1 in points, against the fused network in float."""
    bytes: int
    comparison: Comparison


def quantize_run(
    source: Deployed,
    config: Config,
    formats: Sequence[Format],
    wanted: Wanted,
    calibration: Calibration,
    max_drop: float,
    before: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Write INT8 files of a run into RUN/export/<format>_int8; return what their reports say.

    Args:
        source: the network, fused.
        config: its settings, those of the data as they are here.
        formats: what to convert to.
        wanted: how large, how many at once, tried on how many images.
        calibration: which images the ranges are taken from.
        max_drop: points of top-1 that may be lost; layers stay in float until it holds.
        before: the network that was fine-tuned into `source`: what the files are compared with.

    Raises:
        UserError: a format without INT8; images that are not there.
    """
    validate_precision(formats, "int8")
    held_out, batch = held_out_of(source.folder, config)
    size = wanted.size or (config.data.eval_size, config.data.eval_size)
    batches = calibration_inputs(source, config, calibration)
    print(about(source, size), flush=True)
    found = sensitivities(source.network, _first(batches, LOOKED_AT))
    worst = ", ".join(f"{each.layer} {each.error:.1e}" for each in found[:3])
    print(
        f"{len(found)} layers; the most sensitive (share of the squared outputs that INT8 of it "
        f"alone changes): {worst}",
        flush=True,
    )
    images = HeldOut(held_out, config, batch, size, wanted.images)

    def write(made: Format) -> dict[str, Any]:
        return quantize_one(
            source, made, wanted, images, batches, found, calibration, max_drop, before
        )

    return each_format(source, formats, write, lines)


def calibration_inputs(source: Deployed, config: Config, calibration: Calibration) -> list[Tensor]:
    """Return training images of a run as its network takes them, in batches: cropped as held-out
    ones are, nothing random but which.

    Raises:
        UserError: the training images are not there.
    """
    train = build_datasets(config.data)[0]
    draw = np.random.default_rng(calibration.seed)
    count = min(calibration.images, len(train))
    chosen = sorted(draw.choice(len(train), count, replace=False).tolist())
    with eval_loader(train, config.data, torch.device("cpu")) as loader:
        return [
            source.inputs_of(batch.images.contiguous()).contiguous()
            for batch in loader.batches(eval_batches(chosen, BATCH))
        ]


def _first(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return batches with the first `count` images."""
    return list(torch.cat(list(batches))[:count].split(BATCH))


def quantize_one(
    source: Deployed,
    made: Format,
    wanted: Wanted,
    held_out: HeldOut,
    batches: Sequence[Tensor],
    found: Sequence[Sensitivity],
    calibration: Calibration,
    max_drop: float,
    before: nn.Module | None = None,
) -> dict[str, Any]:
    """Try ever fewer layers in INT8 until the accuracy holds, and leave the best file."""
    batch = wanted.batch_of(made)
    tries: list[Try] = []
    with making(folder_of(source.folder, made, "int8")) as folder:
        best: Try | None = None
        for kept in candidates(found):
            scratch = folder / "try"
            scratch.mkdir()
            path = scratch / f"model{made.suffix}"
            with converting(source, made, "int8"):
                assert made.quantize is not None
                made.quantize(source.network, batches, path, kept, batch is None)
            runner, batches_seen = made.load(path, 1), held_out.batches(source)
            seen = compare(before or source.network, runner, batches_seen, batch)
            share = int8_share(found, [*kept.layers])
            tries.append(Try(kept, share, seen.top1 - seen.top1_exported, bytes_in(scratch), seen))
            if best is None or tries[-1].drop < best.drop:
                best = tries[-1]
                for part in scratch.iterdir():
                    part.replace(folder / part.name)
            shutil.rmtree(scratch)
            if best.drop <= max_drop:
                break
        assert best is not None
        path = folder / f"model{made.suffix}"
        report = report_of(source, made, Wanted("int8"), path, [batch, *batches[0].shape[1:]])
        report |= {
            "verified": True,
            "passed": best.drop <= max_drop,
            "comparison": best.comparison.record(),
            "latency_ms": one_pass(path, made.load(path, 1), held_out.size),
            "max_drop": max_drop,
            "drop": best.drop,
            "int8_share": best.share,
            "in_float": {"layers": sorted(best.kept.layers), "rest": best.kept.rest},
            "tries": [
                {"layers": len(t.kept.layers), "rest": t.kept.rest, "share": t.share,
                 "drop": t.drop, "bytes": t.bytes}
                for t in tries
            ],
            "finetuned": before is not None,
            "calibration": {"images": sum(map(len, batches)), "seed": calibration.seed},
            "seven_bits": weight_bits(made) == 7,
        }  # fmt: skip
        write_preprocess(folder, source, held_out.size)
        write_sensitivities(folder, found)
        draw(folder / "int8.png", found, tries, f"{source.config.model.name}, {made.name}")
        write_json(folder / "report.json", report)
    return report


def weight_bits(made: Format) -> int:
    """Return how many bits the weights of an INT8 file have: 7 where this processor would overflow
    with 8 in the runtimes that compute as it does.
    """
    return 7 if saturates() and made.name in ("onnx", "openvino") else 8


def candidates(found: Sequence[Sensitivity]) -> Iterator[InFloat]:
    """Yield what stays in float, from nothing to all: first all that is no layer, then the most
    sensitive layers with it.
    """
    yield InFloat()
    for count in (*(step for step in STEPS if step < len(found)), len(found)):
        yield InFloat(frozenset(each.layer for each in found[:count]), rest=True)


# --- what is left beside the file -----------------------------------------------------------------


def write_sensitivities(folder: Path, found: Sequence[Sensitivity]) -> None:
    """Write the sensitivity of each layer as a table."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["layer", "macs", "error"])
    rows.writerows([each.layer, each.macs, f"{each.error:.6e}"] for each in found)
    write_text(folder / "sensitivity.csv", text.getvalue())


def draw(path: Path, found: Sequence[Sensitivity], tries: Sequence[Try], title: str) -> None:
    """Draw the 20 most sensitive layers, and the drop against the share of MACs in INT8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    worst = found[:20][::-1]
    left.barh([each.layer for each in worst], [each.error for each in worst])
    left.set_xlabel("change of the outputs by INT8 of this layer alone (share of squares)")
    left.tick_params(axis="y", labelsize=7)
    right.plot([each.share for each in tries], [each.drop for each in tries], "o-")
    right.set_xlabel("MACs in INT8 (%)")
    right.set_ylabel("drop of top-1 (points)")
    right.axhline(0, color="grey", linewidth=0.5)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def lines(report: dict[str, Any]) -> list[str]:
    """Return what became of an INT8 file."""
    kept = report["in_float"]
    held = f"{len(kept['layers'])} layers in float" if kept["layers"] else "every layer"
    rest = ", sums and products in float" if kept["rest"] else ""
    bits = "; weights with 7 bits, this processor has no VNNI" if report["seven_bits"] else ""
    since = " since before the fine-tuning" if report["finetuned"] else ""
    said = [
        line(report),
        f"  drop {report['drop']:+.2f} points{since} (at most {report['max_drop']:g} wanted), "
        f"{report['int8_share']:.1f} % of the MACs in INT8 ({held}{rest}), "
        f"{len(report['tries'])} tried, calibrated on {report['calibration']['images']} training "
        f"images{bits}",
    ]
    if not report["passed"]:
        said.append("  MISSED: the drop stays larger than --max-drop with all layers in float")
    return said
