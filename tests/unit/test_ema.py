"""Weight averaging against closed forms."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from ghosttrain.optim import ema as ema_module
from ghosttrain.optim.ema import Ema, decay_at

pytestmark = pytest.mark.usefixtures("kernel")


def small_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).to(dtype)


def set_all(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(value)


def floats(model: nn.Module) -> list[torch.Tensor]:
    return [t for t in model.state_dict().values() if t.is_floating_point()]


def test_a_constant_decay_for_100_steps() -> None:
    model = small_model()
    set_all(model, 0.0)
    ema = Ema(model, decay=0.9, warmup=False)
    for step in range(1, 101):
        set_all(model, float(step))
        ema.update(model)
        # sum_k (1 - d) d^(n - k) k, summed: n - d (1 - d^n) / (1 - d)
        expected = step - 0.9 * (1 - 0.9**step) / 0.1
        for tensor in floats(ema.model):
            torch.testing.assert_close(
                tensor, torch.full_like(tensor, expected), rtol=0, atol=1e-12
            )
    assert ema.updates == 100


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_updates_equal_float64(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(70, 30, 3), nn.BatchNorm2d(30))
    model = model.to(memory_format=memory_format)
    ema = Ema(model, decay=0.99)
    expected = [t.double() for t in floats(model)]
    for step in range(20):
        decay = decay_at(step, 0.99, True)
        with torch.no_grad():
            for tensor in floats(model):
                tensor.normal_()
        ema.update(model)
        pairs = zip(expected, floats(model), strict=True)
        expected = [decay * average + (1 - decay) * value.double() for average, value in pairs]
    for average, reference in zip(floats(ema.model), expected, strict=True):
        assert (average - reference).norm() <= 3e-7 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_kernel_takes_only_float32(
    dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    multi_tensor = []
    monkeypatch.setattr(ema_module, "_multi_tensor_update", lambda *_: multi_tensor.append(1))
    model = small_model(dtype)
    ema = Ema(model, decay=0.9)
    version = ema.model[0].weight._version
    ema.update(model)
    taken = not multi_tensor
    assert taken == (kernel and dtype == torch.float32)
    assert not taken or ema.model[0].weight._version > version


def test_threads_change_no_bit() -> None:
    def run(threads: int) -> nn.Module:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        ema = Ema(nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 7)), decay=0.9)
        ema.update(nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 7)))
        return ema.model

    for first, other in zip(floats(run(1)), floats(run(3)), strict=True):
        assert torch.equal(first, other)


def test_the_warmup_for_100_steps() -> None:
    # With d_t = (1 + t) / (10 + t), an average that starts at 1 and then sees only zeros is the
    # product of the decays: n! 9! / (n + 9)! = 1 / binomial(n + 9, 9).
    model = small_model()
    set_all(model, 1.0)
    ema = Ema(model, decay=0.9999, warmup=True)
    set_all(model, 0.0)
    expected = 1.0
    for n in range(1, 101):
        ema.update(model)
        expected *= n / (n + 9)
        for tensor in floats(ema.model):
            torch.testing.assert_close(
                tensor, torch.full_like(tensor, expected), rtol=1e-12, atol=0
            )


def test_the_warmup_for_400000_steps() -> None:
    assert decay_at(0, 0.9999, True) == 0.1
    assert decay_at(89_989, 0.9999, True) < 0.9999 == decay_at(89_990, 0.9999, True)
    average, previous = 1.0, 0.0
    for t in range(400_000):
        decay = decay_at(t, 0.9999, True)
        assert previous <= decay <= 0.9999
        average, previous = average * decay, decay
    # 89,990 updates of warm-up leave 1 / binomial(89,999, 9); 310,010 more leave 0.9999^310,010.
    binomial = 1.0
    for k in range(9):
        binomial *= (89_999 - k) / (k + 1)
    assert average == pytest.approx(0.9999**310_010 / binomial, rel=1e-8)


def test_without_warmup_the_decay_is_as_given() -> None:
    assert decay_at(0, 0.9999, False) == 0.9999


def test_decay_zero_copies_bit_for_bit() -> None:
    model = small_model(torch.float32)
    ema = Ema(model, decay=0.0, warmup=True)
    with torch.no_grad():
        for tensor in floats(model):
            tensor.normal_()
    with torch.no_grad():
        ema.model[0].weight.fill_(float("nan"))  # a broken past does not survive a copy
    ema.update(model)
    for average, value in zip(floats(ema.model), floats(model), strict=True):
        assert torch.equal(average, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_buffers_are_copied(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    ema = Ema(model, decay=0.9, warmup=False)
    model[1].num_batches_tracked.fill_(41)
    ema.update(model)
    assert ema.model[1].num_batches_tracked.item() == 41


def test_the_copy_is_frozen_in_eval_mode_and_independent() -> None:
    model = small_model().train()
    ema = Ema(model, decay=0.9)
    assert model.training and not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    before = ema.model[0].weight.clone()
    set_all(model, 7.0)
    assert torch.equal(ema.model[0].weight, before)


def test_a_shared_parameter_is_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    model[1].weight = model[0].weight
    set_all(model, 1.0)
    ema = Ema(model, decay=0.5, warmup=False)
    set_all(model, 0.0)
    ema.update(model)
    assert ema.model[0].weight is ema.model[1].weight
    assert torch.equal(ema.model[0].weight, torch.full((2, 2), 0.5, dtype=torch.float64))


def test_a_replaced_buffer_is_still_found() -> None:
    model = small_model()
    ema = Ema(model, decay=0.5, warmup=False)
    model[1].running_mean = torch.full((4,), 8.0, dtype=torch.float64)
    ema.update(model)
    assert torch.equal(ema.model[1].running_mean, torch.full((4,), 4.0, dtype=torch.float64))


def test_another_model_object_may_be_given() -> None:
    ema = Ema(small_model(), decay=0.5, warmup=False)
    other = small_model()
    set_all(ema.model, 0.0)
    set_all(other, 1.0)
    ema.update(other)
    assert torch.equal(ema.model[0].bias, torch.full((4,), 0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="shorter|longer"):
        ema.update(nn.Linear(2, 2))


def test_state_continues_bit_for_bit() -> None:
    model = small_model()
    straight = Ema(model, decay=0.99)
    for step in range(5):
        set_all(model, float(step))
        straight.update(model)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = Ema(small_model(), decay=0.99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.updates == 5
    for ema in (straight, resumed):
        set_all(model, 11.0)
        ema.update(model)
    for first, other in zip(floats(straight.model), floats(resumed.model), strict=True):
        assert torch.equal(first, other)


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        Ema(small_model(), decay=0.9).load_state_dict(Ema(nn.Linear(2, 2), 0.9).state_dict())


def test_after_a_short_run_nothing_is_left_of_the_start() -> None:
    """100 steps of fine-tuning: the average is of the last tenth or so, not of where it began."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    ema = Ema(model, 0.9999, warmup=True)
    for step in range(100):
        with torch.no_grad():
            model.weight.fill_(0.0 if step < 90 else 1.0)
        ema.update(model)
    assert ema.model.weight.item() == pytest.approx(1 - 0.9**9, abs=0.05)
    only_start = 1.0
    for step in range(100):
        only_start *= decay_at(step, 0.9999, warmup=True)
    assert only_start < 1e-12
