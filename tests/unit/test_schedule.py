"""Learning rates against closed forms; no torch is needed to compute them."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from ghosttrain.config.schema import OptimConfig, ScheduleConfig
from ghosttrain.optim.schedule import lr_at, scaled_lr, set_lr, set_weight_decay, weight_decay_at

COSINE = ScheduleConfig(name="cosine", warmup_lr_ratio=0.1, min_lr_ratio=0.01)
CONSTANT = ScheduleConfig(name="constant", warmup_lr_ratio=0.1)


def curve(total: int, warmup: int, cfg: ScheduleConfig = COSINE, peak: float = 2.0) -> list[float]:
    return [lr_at(step, total, warmup, peak, cfg) for step in range(total)]


def test_cosine_with_warmup_step_by_step() -> None:
    lrs = curve(total=101, warmup=20)
    warmup = [2.0 * (0.1 + 0.9 * step / 20) for step in range(20)]
    # 2 a + 2 (1 - a) cos^2(x / 2): another form of the same half cosine
    decay = [2.0 * (0.01 + 0.99 * math.cos(math.pi * k / 160) ** 2) for k in range(81)]
    assert lrs == pytest.approx(warmup + decay, rel=1e-12)


def test_landmarks_are_exact() -> None:
    lrs = curve(total=101, warmup=20)
    assert lrs[0] == 0.2
    assert lrs[20] == 2.0
    assert lrs[60] == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert lrs[100] == 0.02
    assert max(lrs) == 2.0
    assert sorted(lrs[:21]) == lrs[:21] and sorted(lrs[20:], reverse=True) == lrs[20:]


def test_constant_stays_at_the_peak() -> None:
    assert curve(6, 2, CONSTANT) == pytest.approx([0.2, 1.1, 2.0, 2.0, 2.0, 2.0])


def test_step_is_torchs_multi_step_after_the_warmup() -> None:
    step = ScheduleConfig(name="step", warmup_lr_ratio=0.1, milestones=(0.3, 0.5, 0.9))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [12, 20, 36], gamma=0.1)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert curve(40, 5, step)[:5] == curve(40, 5, CONSTANT)[:5]
    assert curve(40, 5, step)[5:] == pytest.approx(expected[5:], rel=1e-12)
    assert curve(1, 0, step) == [2.0]


def test_weight_decay_falls_by_half_a_cosine_on_decayed_groups_only() -> None:
    cfg = OptimConfig(weight_decay=0.4, weight_decay_end=0.1)
    values = [weight_decay_at(step, 21, cfg) for step in range(21)]
    assert values[0] == pytest.approx(0.4) and values[-1] == pytest.approx(0.1)
    # a + (b - a) cos^2(x / 2): another form of the same half cosine
    expected = [0.1 + 0.3 * math.cos(math.pi * k / 40) ** 2 for k in range(21)]
    assert values == pytest.approx(expected, rel=1e-12)
    assert weight_decay_at(500, 21, cfg) == pytest.approx(0.1)
    assert weight_decay_at(7, 21, OptimConfig(weight_decay=0.4)) == 0.4
    groups = [{"params": [torch.zeros(1)], "weight_decay": decay} for decay in (0.4, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_weight_decay(optimizer, 0.2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


def test_no_warmup_starts_at_the_peak() -> None:
    assert curve(3, 0) == pytest.approx([2.0, 2.0 * (0.01 + 0.99 / 2), 0.02])


@pytest.mark.parametrize("warmup", [4, 5, 6, 1000])
def test_a_warmup_as_long_as_the_run_ends_at_the_peak(warmup: int) -> None:
    assert curve(5, warmup) == pytest.approx([0.2, 0.65, 1.1, 1.55, 2.0])


@pytest.mark.parametrize("cfg", [COSINE, CONSTANT])
@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_a_single_step_is_at_the_peak(cfg: ScheduleConfig, warmup: int) -> None:
    assert curve(1, warmup, cfg) == [2.0]


def test_two_steps() -> None:
    assert curve(2, 0) == [2.0, 0.02]
    assert curve(2, 1) == [0.2, 2.0]


def test_after_the_last_step_the_rate_stays() -> None:
    assert lr_at(500, 10, 2, 2.0, COSINE) == 0.02


@pytest.mark.parametrize(("name", "power"), [("lamb", 0.5), ("adamw", 0.5), ("sgd", 1.0)])
def test_scaling_with_the_batch(name: str, power: float) -> None:
    cfg = OptimConfig(name=name, lr=0.3, lr_batch=512)  # type: ignore[arg-type]
    assert scaled_lr(cfg, 512) == 0.3
    assert scaled_lr(cfg, 2048) == pytest.approx(0.3 * 4**power, rel=1e-14)
    assert scaled_lr(cfg, 64) == pytest.approx(0.3 / 8**power, rel=1e-14)


def test_without_a_reference_batch_nothing_is_scaled() -> None:
    assert scaled_lr(OptimConfig(lr=0.3, lr_batch=None), 7) == 0.3


def test_set_lr_reaches_every_group() -> None:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=1.0)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_it_needs_no_torch() -> None:
    code = "import ghosttrain.optim.schedule, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
