"""What the course of a run teaches for the next one, in a line each. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghosttrain.config.schema import Config
from ghosttrain.engine.metrics import WORDS, judged_by
from ghosttrain.engine.run_files import read_result
from ghosttrain.errors import UserError
from ghosttrain.files import expanded

LEAST = 6
"""Evaluations from which a course is judged."""
SMALL, SMALLEST, SIDE = 500e6, 50e6, 160
"""MACs after fusing below which a network is small, and very small, at images of this side or more:
below it, MACs say little of capacity."""
RISE = 1.1
"""Held-out loss as a share of its lowest, from which it has risen."""


def advice(
    config: Config, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any], per_epoch: int
) -> list[str]:
    """Return notes on a finished run.

    Args:
        config: its settings.
        rows: of its metrics.
        result: what `result.json` holds.
        per_epoch: optimizer steps of an epoch.
    """
    held = [row for row in rows if row["kind"] == "eval" and "ema_loss" in row]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    found = [_overfit(held, losses, per_epoch), _too_short(held, result), _teacher(config, result)]
    found += _small(config, result)
    return [line for line in found if line]


def _overfit(
    held: Sequence[Mapping[str, Any]], losses: Sequence[float], per_epoch: int
) -> str | None:
    if len(held) < LEAST or len(losses) < LEAST:
        return None
    best = min(held, key=lambda row: row["ema_loss"])
    last, early = held[-1], statistics.mean(losses[: len(losses) // 2])
    late = statistics.mean(losses[-max(len(losses) // 5, 1) :])
    if best["step"] > 0.8 * last["step"] or last["ema_loss"] < RISE * best["ema_loss"]:
        return None
    if late >= early:
        return None
    return (
        f"note: the held-out loss was lowest after epoch {best['step'] // per_epoch} "
        f"({best['ema_loss']:.3f}) and rose to {last['ema_loss']:.3f} while the training loss "
        "fell: the network learns its images by heart; fewer train.epochs, a larger "
        "optim.weight_decay or more augmentation may help"
    )


def _too_short(held: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str | None:
    if len(held) < LEAST:
        return None
    tops = [row["ema_top1"] for row in held]
    fifth = max(len(tops) // 5, 1)
    before, after = statistics.mean(tops[-2 * fifth : -fifth]), statistics.mean(tops[-fifth:])
    share, n = after / 100, sum(result["classes"]["images"])
    error = 100 * math.sqrt(max(share * (1 - share), 0) / max(n, 1))
    still_falling = held[-1]["ema_loss"] == min(row["ema_loss"] for row in held)
    if after - before <= max(error, 0.5) or not still_falling:
        return None
    return (
        f"note: the run was still getting better at its end (held-out top-1 {before:.2f} -> "
        f"{after:.2f} % in its last fifth): more train.epochs may help"
    )


def _teacher(config: Config, result: Mapping[str, Any]) -> str | None:
    """Compare with the run that taught, where it was evaluated on the same images."""
    weights = config.teacher.weights
    if config.distill.name == "none" or weights is None:
        return None
    folder: Path = expanded(weights)
    try:
        taught = read_result(folder if folder.is_dir() else folder.parent)
    except (UserError, OSError):
        return None
    same = taught and taught["data"]["held_out"]["digest"] == result["data"]["held_out"]["digest"]
    if not taught or not same:
        return None
    key = judged_by(config)
    student, teacher = (each["weights"]["ema"][key] for each in (result, taught))
    line = f"on the same images its teacher reaches {teacher:.2f} % {WORDS[key]}"
    if teacher >= student:
        return line
    return (
        f"note: {line}, less than this network: it may hold it back; try a smaller distill.weight, "
        "or a better teacher"
    )


def _small(config: Config, result: Mapping[str, Any]) -> list[str]:
    """Say what others found for networks of this size."""
    macs, size = result["model"]["macs_fused"], result["model"]["eval_size"]
    if size < SIDE:
        return []
    found = []
    if macs < SMALL and max(config.augment.mixup_alpha, config.augment.cutmix_alpha) > 0.2:
        found.append(
            f"advice: this network has {macs / 1e6:.0f} M MACs; below 500 M, Mixup and CutMix are "
            "left out or weak in GhostNetV3 (arXiv 2404.11202) and in MobileNetV4's and FastViT's "
            "published settings: augment=compact, or augment.mixup_alpha=0.2 augment.cutmix_alpha=0"
        )
    if macs < SMALLEST and config.distill.name != "none":
        found.append(
            f"advice: this network has {macs / 1e6:.0f} M MACs; the smallest may lose from a "
            "teacher (MobileNetV2 0.25x in apple/ml-dr: 55.4 % without, 55.1 % with): compare with "
            "teacher=none distill=none"
        )
    return found
