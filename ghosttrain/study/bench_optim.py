"""`bench optim`: a step of LAMB and of the weight average against timm's `Lamb` and `ModelEmaV3`.

Every side has its own model, gradients and state, and the same parameter groups. Sides take turns
within a round, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.optim import Lamb as TimmLamb
from timm.utils import ModelEmaV3
from torch import nn

from ghosttrain.engine.summary import device_name
from ghosttrain.models.create import create_model
from ghosttrain.optim.ema import Ema
from ghosttrain.optim.groups import param_groups
from ghosttrain.optim.lamb import Lamb
from ghosttrain.study.timing import quartiles, timed

Row = dict[str, Any]

PARTS = ("LAMB", "EMA", "both")
OURS = "ours"
WARM_UP = 2
"""Rounds before the first that counts: they make the state and compile the kernels."""


def bench_optim(
    model_name: str = "ghostnetv3_130",
    rounds: int = 30,
    threads: int = 1,
    device: torch.device | None = None,
) -> list[Row]:
    """Return a row for LAMB, EMA and both together, of ours, timm's, and timm's without clipping.

    A row names `part` and `side`; `cpu_ms` and `wall_ms` are (lower quartile, median, upper
    quartile) of CPU time of the process and of elapsed time; `ratio` is the median over that of
    ours, in CPU time on a CPU and in elapsed time elsewhere. What all rows share (model, tensors,
    device, versions) stands in each.
    """
    device = device or torch.device("cpu")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sides = {
            OURS: _side(model_name, device, Lamb, lambda model: Ema(model, decay=0.9999)),
            "timm": _side(model_name, device, TimmLamb, ModelEmaV3),
            "timm, no clipping": _side(
                model_name, device, partial(TimmLamb, max_grad_norm=None), ModelEmaV3
            ),
        }
        times: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for round_ in range(WARM_UP + rounds):
            for side, (_, step, average) in sides.items():
                lamb, ema = timed(step, device), timed(average, device)
                if round_ >= WARM_UP:
                    both = (lamb[0] + ema[0], lamb[1] + ema[1])
                    for part, pair in zip(PARTS, (lamb, ema, both), strict=True):
                        times.setdefault((part, side), []).append(pair)
        about = _about(model_name, sides[OURS][0], rounds, device)
    finally:
        torch.set_num_threads(threads_before)

    rows: list[Row] = []
    clock = "cpu_ms" if device.type == "cpu" else "wall_ms"
    for part in PARTS:
        for side in sides:
            cpu, wall = zip(*times[part, side], strict=True)
            row: Row = {
                "part": part,
                "side": side,
                "cpu_ms": quartiles(cpu),
                "wall_ms": quartiles(wall),
            }
            ours = next((r for r in rows if r["part"] == part), row)
            rows.append(row | {"ratio": row[clock][1] / ours[clock][1]} | about)
    return rows


def describe(rows: list[Row]) -> str:
    """Return the rows as a Markdown table below a line that says what was measured, and on what."""
    about = rows[0]
    lines = [
        f"{about['model']}: {about['tensors']} tensors, {about['parameters'] / 1e6:.3f} M "
        f"parameters; {about['device']}, {about['versions']}",
        f"median of {about['rounds']} rounds (lower to upper quartile), sides taking turns",
        "",
        "| part | side | CPU ms | wall ms | times ours |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cpu, wall = (
            f"{median:.1f} ({low:.1f} to {high:.1f})"
            for low, median, high in (row["cpu_ms"], row["wall_ms"])
        )
        lines.append(f"| {row['part']} | {row['side']} | {cpu} | {wall} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def _side(
    model_name: str,
    device: torch.device,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    make_average: Callable[[nn.Module], Any],
) -> tuple[nn.Module, Callable[[], Any], Callable[[], Any]]:
    """Return a model with gradients, its optimizer's step, and the update of its average."""
    torch.manual_seed(0)
    model = create_model(model_name).to(device)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    optimizer = make_optimizer(param_groups(model, weight_decay=0.05))
    average = make_average(model)
    return model, optimizer.step, lambda: average.update(model)


def _about(model_name: str, model: nn.Module, rounds: int, device: torch.device) -> Row:
    return {
        "model": model_name,
        "tensors": len(list(model.parameters())),
        "parameters": sum(p.numel() for p in model.parameters()),
        "rounds": rounds,
        "device": device_name(device),
        "versions": f"torch {torch.__version__}, timm {timm.__version__}",
    }
