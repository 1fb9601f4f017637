"""Accuracy against cost: MACs, parameters, and the latency measured on this machine."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ghosttrain.config.students import STUDENTS
from ghosttrain.deploy.latency import IN_PYTORCH, converted, file_side, measure, network_side
from ghosttrain.deploy.latency_of import network_for, networks_of
from ghosttrain.deploy.network import validate_classifier
from ghosttrain.engine.run_files import read_config, read_result
from ghosttrain.errors import UserError
from ghosttrain.files import write_text
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.study.published import PUBLISHED

TIMM = (
    "lcnet_050", "lcnet_100", "mobilenetv3_small_100", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "mobileone_s0", "repghostnet_100", "tinynet_c", "starnet_s1",
    "repvit_m0_9", "fastvit_t8", "efficientvit_b0", "edgenext_xx_small", "tf_efficientnet_lite0",
)  # fmt: skip
"""Compact networks of timm that stand beside the students."""


@dataclass(frozen=True)
class Point:
    """One network."""

    model: str
    where: str
    """A run's data set, the source of a published value, or "" without an accuracy."""
    top1: float | None
    px: int
    parameters: int
    """Fused."""
    macs: int
    """Fused, of one image."""
    latency_ms: float
    """Median of a pass of one image on one thread."""


def pareto(
    words: Sequence[str], models: Sequence[str] | None, size: int, backend: str, rounds: int
) -> list[Point]:
    """Return runs, students and compact networks of timm, with accuracy where it is known.

    Args:
        words: run folders; each at its own size and with its own classes.
        models: names, ours or timm's; None: all students and `TIMM`.
        size: pixels of networks that belong to no run.
        backend: what times them (`latency.BACKENDS`).
        rounds: passes that count; all networks take turns.

    Raises:
        UserError: an unfinished run, an unknown model.
    """
    points, sides = [], {}
    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
        names = list(models) if models is not None else [*STUDENTS, *TIMM]
        for number, word in enumerate([*words, *names]):
            model, where, top1 = _accuracy(word, word in words)
            networks = networks_of(word, None if word in words else (size, size))
            images = torch.randn(1, networks.channels, *networks.size)
            if backend in IN_PYTORCH:
                sides[word] = network_side(network_for(networks, backend), images)
            else:
                scratch = Path(folder) / str(number)
                scratch.mkdir()
                path = converted(network_for(networks, backend), backend, images, scratch)
                sides[word] = file_side(path, images.numpy())
            px = networks.size[0]
            macs = count_macs(networks.fused, px, networks.channels)
            points.append(Point(model, where, top1, px, count_params(networks.fused), macs, 0.0))
        times = measure(sides, [1], rounds)
    medians = {each.backend: each.median for each in times}
    found = [
        replace(point, latency_ms=medians[word])
        for point, word in zip(points, [*words, *names], strict=True)
    ]
    known = _published(found, size)
    replaced = {point.model for point in known}
    return [p for p in found if p.where or p.model not in replaced] + known


def _accuracy(word: str, is_run: bool) -> tuple[str, str, float | None]:
    if not is_run:
        return word, "", None
    folder = Path(word)
    config, result = read_config(folder), read_result(folder)
    validate_classifier(folder, config, "pareto")
    if result is None:
        raise UserError(f"{folder} is not finished: it has no accuracy yet")
    top1 = float(result["weights"][result["headline"]]["top1"])
    return config.model.name, f"{config.data.name}: {folder}", top1


def _published(found: Sequence[Point], size: int) -> list[Point]:
    """Return published values of networks that were measured at the size they are published for."""
    if size != 224:
        return []
    measured = {point.model: point for point in found if not point.where}
    return [
        replace(measured[each.model], where=f"ImageNet, {each.how}: {each.source}", top1=each.top1)
        for each in PUBLISHED
        if each.model in measured
    ]


# --- words, file, picture -------------------------------------------------------------------------


def table(points: Sequence[Point]) -> list[str]:
    """Return the networks as lines, the fastest first."""
    width = max(len(each.model) for each in points)
    lines = [f"{'':{width}}  ms     M MACs  M param.  px  top-1 %"]
    for each in sorted(points, key=lambda p: p.latency_ms):
        top1 = "" if each.top1 is None else f"{each.top1:.2f}  {each.where}"
        lines.append(
            f"{each.model:{width}} {each.latency_ms:6.2f} {each.macs / 1e6:8.1f} "
            f"{each.parameters / 1e6:8.2f} {each.px:4}  {top1}".rstrip()
        )
    return lines


def write_csv(path: Path, points: Sequence[Point]) -> None:
    """Write the networks as a table."""
    text = io.StringIO()
    rows = csv.DictWriter(text, [*asdict(points[0])], lineterminator="\n")
    rows.writeheader()
    rows.writerows(asdict(each) for each in points)
    write_text(path, text.getvalue())


def front(points: Sequence[Point], cost: str) -> list[Point]:
    """Return the networks that no other one beats in accuracy at the same or a lower cost, the
    cheapest first. Only networks with an accuracy count.
    """
    kept: list[Point] = []
    known = [point for point in points if point.top1 is not None]
    for point in sorted(known, key=lambda p: (getattr(p, cost), -(p.top1 or 0))):
        if not kept or (point.top1 or 0) > (kept[-1].top1 or 0):
            kept.append(point)
    return kept


def draw(path: Path, points: Sequence[Point], backend: str) -> None:
    """Draw accuracy against MACs, parameters and latency, or where none is known latency against
    MACs.
    """
    from matplotlib.figure import Figure

    known = [point for point in points if point.top1 is not None]
    costs = {
        "macs": ("M MACs", 1e6),
        "parameters": ("M parameters", 1e6),
        "latency_ms": (f"ms a pass ({backend})", 1.0),
    }
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (cost, (name, unit)) in zip(axes, costs.items(), strict=True):
        if not known and cost == "latency_ms":
            continue
        shown = known or list(points)
        height = "top1" if known else "latency_ms"
        named = set()
        for point in shown:
            x, y = getattr(point, cost) / unit, getattr(point, height)
            axis.plot([x], [y], "o", color="tab:blue")
            if (point.model, x) in named:
                continue  # two published values of one network: names over each other
            named.add((point.model, x))
            axis.annotate(
                point.model, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
        if known:
            line = front(points, cost)
            axis.step(
                [getattr(p, cost) / unit for p in line],
                [p.top1 for p in line],
                where="post",
                color="grey",
            )
        axis.set_xlabel(name)
        axis.set_ylabel("top-1 %" if known else costs["latency_ms"][0])
    figure.savefig(path, dpi=110)
