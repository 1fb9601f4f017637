"""The comparison of optimizer steps: which rows, and what they say."""

from __future__ import annotations

import pytest
import torch

from ghosttrain.study import bench_optim as module
from ghosttrain.study.bench_optim import bench_optim, describe

SIDES = ["ours", "timm", "timm, no clipping"]


def test_rows_and_table_of_a_small_student() -> None:
    torch.set_num_threads(2)
    rows = bench_optim("ghostnetv3_050", rounds=3, threads=1, device=torch.device("cpu"))
    assert torch.get_num_threads() == 2  # as before
    assert [(row["part"], row["side"]) for row in rows] == [
        (part, side) for part in ("LAMB", "EMA", "both") for side in SIDES
    ]
    for row in rows:
        for clock in ("cpu_ms", "wall_ms"):
            low, median, high = row[clock]
            assert 0 < low <= median <= high
        assert (row["ratio"] == 1) == (row["side"] == "ours")
    about, *_, last = describe(rows).splitlines()
    assert "ghostnetv3_050: 978 tensors, 3.395 M parameters; CPU" in about
    assert ", 1 thread, C++ kernels o" in about
    assert f"torch {torch.__version__}" in about and "timm" in about
    assert last.startswith("| both | timm, no clipping |")
    assert last.endswith(f"| {rows[-1]['ratio']:.2f} |")


def test_quartiles_and_ratios_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Calls come as: ours step, ours average, timm step, timm average, ... in every round.
    calls = iter(range(10_000))

    def timed(call: object, device: torch.device) -> tuple[float, float]:
        round_, index = divmod(next(calls), 6)
        counted = round_ - module.WARM_UP + 1  # 1, 2, ..., 5
        cpu = 1000.0 if counted < 1 else counted * (1 + index)
        return cpu, 2 * cpu

    monkeypatch.setattr(module, "timed", timed)
    rows = {(r["part"], r["side"]): r for r in bench_optim("ghostnetv3_050", rounds=5)}
    assert rows["LAMB", "ours"]["cpu_ms"] == (2, 3, 4)
    assert rows["EMA", "timm"]["wall_ms"] == (16, 24, 32)
    assert rows["both", "ours"]["cpu_ms"] == (6, 9, 12)  # step 1, average 2, in each round
    assert rows["LAMB", "timm"]["ratio"] == 3
    assert rows["both", "timm, no clipping"]["ratio"] == (5 + 6) / (1 + 2)
