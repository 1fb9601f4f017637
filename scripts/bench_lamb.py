"""Time a step of LAMB against timm's on GhostNetV3 1.3x: sides alternating, medians.

    python scripts/bench_lamb.py [--rounds 30] [--threads 1]

Two comparisons: timm as it comes (it clips the global norm at 1.0) and with that switched off.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from timm.optim import Lamb as TimmLamb
from torch.optim import Optimizer

from ghosttrain.optim.groups import param_groups
from ghosttrain.optim.lamb import Lamb


def bench_lamb(rounds: int = 30, model_name: str = "ghostnetv3_130") -> dict[str, float]:
    """Return the median milliseconds of a step of each side."""

    def groups() -> list[dict]:
        torch.manual_seed(0)
        model = timm.create_model(model_name)
        for p in model.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
        return param_groups(model, 0.05)

    sides: dict[str, Optimizer] = {
        "timm as it comes": TimmLamb(groups(), lr=1e-3),
        "timm, no clipping": TimmLamb(groups(), lr=1e-3, max_grad_norm=None),
        "ours": Lamb(groups(), lr=1e-3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 2):  # the first two make the state and warm up
        for name, optimizer in sides.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values[2:]) for name, values in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = bench_lamb(args.rounds)
    for name, ms in times.items():
        print(f"{name:18s} {ms:6.1f} ms, {ms / times['ours']:.2f} x ours")
