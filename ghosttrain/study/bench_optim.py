"""`bench optim`: a step of LAMB and of the weight average against timm's `Lamb` and `ModelEmaV3`.

Every side has its own model, gradients and state, and the same parameter groups.
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

from ghosttrain.config.schema import Config
from ghosttrain.engine.summary import device_name
from ghosttrain.models.cost import count_params
from ghosttrain.models.create import create_model
from ghosttrain.optim.ema import Ema
from ghosttrain.optim.groups import param_groups
from ghosttrain.optim.lamb import Lamb
from ghosttrain.study.harness import Side, Time, quartiles, take_turns, timed
from ghosttrain.study.table import markdown

PARTS = ("LAMB", "EMA", "both")
OURS = "ours"
WARM_UP = 2


def bench_optim(config: Config, rounds: int, threads: int, device: torch.device) -> str:
    """Return a table: LAMB, EMA and both, of ours, timm's, and timm's without clipping."""
    name = config.model.name
    models = [create_model(name).to(device) for _ in range(3)]
    unclipped = partial(TimmLamb, max_grad_norm=None)
    sides = {
        OURS: side(models[0], device, Lamb, lambda model: Ema(model, decay=0.9999)),
        "timm": side(models[1], device, TimmLamb, ModelEmaV3),
        "timm, no clipping": side(models[2], device, unclipped, ModelEmaV3),
    }
    times = take_turns(sides, rounds, WARM_UP, threads)
    table = [["part", "side", "CPU ms", "wall ms", "times ours"]]
    for part in PARTS:
        for key in sides:
            time = times[key, part]
            ratio = time.ratio(times[OURS, part], device)
            row = [part, key, quartiles(time.cpu).text(1), quartiles(time.wall).text(1)]
            table.append([*row, f"{ratio:.2f}"])
    tensors = len(list(models[0].parameters()))
    return "\n".join(
        [
            f"{name}: {tensors} tensors, {count_params(models[0]) / 1e6:.3f} M parameters; "
            f"{device_name(device)}, torch {torch.__version__}, timm {timm.__version__}",
            f"median of {rounds} rounds (lower to upper quartile), sides taking turns",
            "",
            *markdown(table),
        ]
    )


def side(
    model: nn.Module,
    device: torch.device,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    make_average: Callable[[nn.Module], Any],
) -> Side:
    """Return the steps of an optimizer on made-up gradients, and the updates of an average."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    optimizer = make_optimizer(param_groups(model, weight_decay=0.05))
    average = make_average(model)

    def call(number: int) -> dict[str, Time]:
        lamb = timed(optimizer.step, device)
        ema = timed(lambda: average.update(model), device)
        return dict(zip(PARTS, (lamb, ema, lamb + ema), strict=True))

    return call
