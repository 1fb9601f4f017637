"""LAMB against timm's, a float64 reference, and itself after saving, re-layout and chunking.

Every test runs twice: with the C++ kernel and without.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from timm.optim import Lamb as TimmLamb
from torch import Tensor, nn

from ghosttrain.optim import lamb
from ghosttrain.optim.lamb import Lamb

pytestmark = pytest.mark.usefixtures("kernel")

DECAYED = [(8, 3, 3, 3), (16, 8), (5, 1, 3, 3), (1, 1), (3,)]
PLAIN = [(16,), (1,), (), (7,)]


def make_groups(dtype: torch.dtype = torch.float64) -> list[dict]:
    """Return a decayed and a plain group; the last parameter of each starts at zero."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for shapes, weight_decay in ((DECAYED, 0.05), (PLAIN, 0.0)):
        params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        params[-1].zero_()
        groups.append({"params": [nn.Parameter(p) for p in params], "weight_decay": weight_decay})
    return groups


def params_of(groups: list[dict]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def give_grads(groups: list[dict], step: int, with_gaps: bool = True) -> None:
    """Give reproducible gradients of different sizes; with gaps, some are missing or zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params_of(groups)):
        grad = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 4 - 2)
        p.grad = grad.to(p.dtype)
        if with_gaps and (step + i) % 5 == 0:
            p.grad = None
        elif with_gaps and (step + i) % 7 == 0:
            p.grad.zero_()


def assert_same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, **tolerance) -> None:
    pairs = zip(params_of(ours.param_groups), params_of(theirs.param_groups), strict=True)
    for p, q in pairs:
        torch.testing.assert_close(p, q, **tolerance)
        for key in ("exp_avg", "exp_avg_sq"):
            if q in theirs.state:
                torch.testing.assert_close(ours.state[p][key], theirs.state[q][key], **tolerance)


@pytest.mark.parametrize("always_adapt", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [
        (torch.float64, 1e-11, 1e-13),
        (torch.float32, 1e-4, 1e-6),
        (torch.bfloat16, 5e-2, 2e-2),
    ],
)
def test_25_steps_equal_timms(
    dtype: torch.dtype, rtol: float, atol: float, always_adapt: bool
) -> None:
    settings = {"betas": (0.8, 0.95), "eps": 1e-5, "always_adapt": always_adapt}
    ours = Lamb(make_groups(dtype), lr=0.02, **settings)
    theirs = TimmLamb(make_groups(dtype), lr=0.02, max_grad_norm=None, **settings)
    for step in range(25):
        for optimizer in (ours, theirs):
            give_grads(optimizer.param_groups, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + step)
            optimizer.step()
        assert_same(ours, theirs, rtol=rtol, atol=atol)


def reference_steps(
    p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, m and v after a step for each gradient: the rule, in float64."""
    beta1, beta2, eps = 0.9, 0.999, 1e-6
    p = p.double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        u = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps) + wd * p
        ratio = p.norm() / u.norm() if adapt else 1.0
        p = p - lr * ratio * u
    return p, m, v


@pytest.mark.parametrize("wd", [0.05, 0.0])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1025, 200_003])
def test_float32_steps_equal_the_rule_in_float64(size: int, wd: float, kernel: bool) -> None:
    tolerance = 3e-7 if kernel else 3e-6  # PyTorch sums the squares of a norm in float32
    generator = torch.Generator().manual_seed(size)
    start = torch.randn(size, generator=generator)
    grads = [torch.randn(size, generator=generator) * 10.0 ** (t - 3) for t in range(4)]
    p = nn.Parameter(start.clone())
    optimizer = Lamb([p], lr=0.5, weight_decay=wd)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    expected = reference_steps(start, grads, 0.5, wd, adapt=wd > 0)
    state = optimizer.state[p]
    results = (p.detach(), state["exp_avg"], state["exp_avg_sq"])
    for result, reference in zip(results, expected, strict=True):
        assert (result - reference).norm() <= tolerance * reference.norm()


def test_the_kernel_takes_only_what_fits(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    multi_tensor = []
    monkeypatch.setattr(lamb, "_multi_tensor_update", lambda *_: multi_tensor.append(1))
    dense = torch.ones(4, 3, 2, 2)
    cases = {
        "float32": (dense, dense, True),
        "channels_last": (dense.to(memory_format=torch.channels_last), dense, True),
        "float64": (dense.double(), dense.double(), False),
        "bfloat16": (dense.bfloat16(), dense.bfloat16(), False),
    }
    for name, (weight, grad, fits) in cases.items():
        multi_tensor.clear()
        p = nn.Parameter(weight.clone())
        p.grad = grad.clone()
        version = p._version
        Lamb([p], lr=0.1).step()
        taken = not multi_tensor
        assert taken == (kernel and fits), name
        assert not taken or p._version > version, name  # autograd must notice the change


def test_threads_change_no_bit() -> None:
    def run(threads: int) -> Lamb:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(n, generator=generator) for n in (40_000, 3, 70_001, 1, 9_000)]
        optimizer = Lamb([nn.Parameter(p) for p in params], lr=0.1)
        for _ in range(3):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return optimizer

    assert_same(run(1), run(3), rtol=0, atol=0)


def test_nan_stays_in_its_tensor() -> None:
    params = [nn.Parameter(torch.ones(100)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(100)
    params[1].grad[7] = float("nan")
    Lamb(params, lr=0.1).step()
    assert [bool(p.isfinite().all()) for p in params] == [True, False, True]
    assert params[1][7].isnan()


def test_a_step_by_hand() -> None:
    p, g, lr, wd = torch.tensor([3.0, 4.0]), torch.tensor([0.5, -0.25]), 0.1, 0.5
    decayed, plain = nn.Parameter(p.clone()), nn.Parameter(p.clone())
    decayed.grad, plain.grad = g.clone(), g.clone()
    groups = [{"params": [decayed], "weight_decay": wd}, {"params": [plain], "weight_decay": 0.0}]
    Lamb(groups, lr=lr, eps=1e-12).step()
    update = g.sign() + wd * p  # at the first step Adam's update is the sign of the gradient
    expected = p - lr * 5.0 / update.norm() * update
    torch.testing.assert_close(decayed.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain.detach(), p - lr * g.sign(), rtol=1e-6, atol=0)


def test_ratio_is_one_where_a_norm_is_zero() -> None:
    zero, still = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    zero.grad, still.grad = torch.ones(2), torch.zeros(2)
    Lamb([{"params": [zero], "weight_decay": 0.5}], lr=0.1, eps=1e-12).step()
    torch.testing.assert_close(zero.detach(), torch.full((2,), -0.1))
    Lamb([still], lr=0.1, weight_decay=0.0, always_adapt=True).step()
    assert torch.equal(still.detach(), torch.ones(2))


def test_parameters_without_gradients_stay() -> None:
    groups = make_groups()
    before = [p.detach().clone() for p in params_of(groups)]
    optimizer = Lamb(groups)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params_of(groups), before, strict=True))
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]  # as timm counts
    assert not optimizer.state


def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> torch.optim.Optimizer:
    for step in range(first, last):
        give_grads(optimizer.param_groups, step)
        optimizer.step()
    return optimizer


def through_a_file(optimizer: Lamb, groups: list[dict]) -> Lamb:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = Lamb(groups)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed


def copied_weights(groups: list[dict]) -> list[dict]:
    fresh = make_groups()
    for p, q in zip(params_of(fresh), params_of(groups), strict=True):
        p.data.copy_(q.data)
    return fresh


@pytest.mark.parametrize(
    "resume",
    [
        lambda optimizer: through_a_file(optimizer, copied_weights(optimizer.param_groups)),
        lambda optimizer: copy.deepcopy(optimizer),
    ],
    ids=["saved", "copied"],
)
def test_it_continues_bit_for_bit(resume: Callable[[Lamb], Lamb]) -> None:
    straight = steps(Lamb(make_groups(), lr=0.02), 0, 10)
    resumed = resume(steps(Lamb(make_groups(), lr=0.02), 0, 5))  # type: ignore[arg-type]
    assert_same(steps(resumed, 5, 10), straight, rtol=0, atol=0)


def test_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steps(Lamb(make_groups()), 0, 6)
    monkeypatch.setattr(lamb, "_CHUNK_CPU", 20)  # smaller than the largest parameter
    assert_same(steps(Lamb(make_groups()), 0, 6), whole, rtol=0, atol=0)


def test_dtypes_may_be_mixed_in_a_group() -> None:
    mixed = [
        nn.Parameter(torch.ones(3, dtype=dtype))
        for dtype in (torch.float32, torch.float64, torch.float64, torch.bfloat16)
    ]
    for p in mixed:
        p.grad = torch.full_like(p, 0.5)
    Lamb(mixed, lr=0.1, weight_decay=0.1).step()
    for p in mixed:
        torch.testing.assert_close(p.double(), mixed[1].double(), rtol=1e-2, atol=0)


def conv_run(memory_formats: list[torch.memory_format]) -> tuple[Tensor, Lamb]:
    """Take a step in each memory format; gradients come contiguous, as some wrappers give them."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = Lamb([p], lr=0.1)
    for memory_format in memory_formats:
        p.data = p.data.to(memory_format=memory_format)
        p.grad = torch.randn(8, 4, 3, 3)
        optimizer.step()
    return p.detach(), optimizer


def test_memory_formats_change_no_result() -> None:
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    expected, _ = conv_run([nchw] * 4)
    for formats in ([nhwc] * 4, [nchw, nhwc, nhwc, nchw]):
        p, optimizer = conv_run(formats)
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)
        (state,) = optimizer.state.values()
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == p.stride()


def test_scattered_memory_is_refused() -> None:
    p = nn.Parameter(torch.zeros(4, 6)[:, ::2])
    p.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match="densely"):
        Lamb([p]).step()


def test_gradients_are_left_alone_and_the_closure_runs_once() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = Lamb([p], lr=0.1)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0  # type: ignore[arg-type, union-attr]
    assert calls == [1]
    assert p.grad is not None and p.grad.item() == 4.0


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"lr": float("nan")}, {"eps": -1e-6}, {"weight_decay": -0.1}, {"betas": (1, 0)}],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Lamb([nn.Parameter(torch.zeros(1))], **settings)
