"""Stacked and collapsed training against the branches themselves: values, gradients, statistics."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ghosttrain import native
from ghosttrain.config.schema import ReparamConfig
from ghosttrain.models import depthwise
from ghosttrain.models.collapse import choose_forward
from ghosttrain.models.create import create_model
from ghosttrain.models.depthwise import reference
from ghosttrain.models.ops import is_channels_last
from ghosttrain.models.reparam import RepConv2d, using_forward
from ghosttrain.models.sync_bn import SyncBatchNorm2d, synchronize

FORWARDS = ("stacked", "collapsed")
LAYERS = {  # in, out, kernel, stride, groups
    "pointwise": (6, 6, 1, 1, 1),
    "expansion": (6, 14, 1, 1, 1),
    "projection": (24, 8, 1, 1, 1),
    # Of 8 channels: of others, oneDNN's AVX2 kernel for the gradient of the weight writes past its
    # end (torch 2.14.1: on 8x8 maps MALLOC_CHECK_=3 stops a plain nn.Conv2d(6, 6, 1, 2) as well).
    "pointwise, stride 2": (8, 8, 1, 2, 1),
    "depthwise 3": (12, 12, 3, 1, 12),
    "depthwise 3, stride 2": (12, 12, 3, 2, 12),
    "depthwise 5": (16, 16, 5, 1, 16),
    "depthwise 5, stride 2": (10, 10, 5, 2, 10),
    "stem": (3, 8, 3, 2, 1),
    "grouped": (6, 6, 3, 1, 2),
}
FORMS = [(3, True, True), (2, False, True), (1, True, False), (3, False, False)]
# Batch 1 and 2; odd sides; 33 channels or rows of 7 leave a vector partly empty.
SHAPES = [(2, 9, 7), (1, 5, 5), (2, 8, 8)]

Results = dict[str, Tensor]


def layer(kind: str, form: tuple[int, bool, bool] = FORMS[0], seed: int = 0) -> RepConv2d:
    torch.manual_seed(seed)
    branches, scale, identity = form
    settings = ReparamConfig(branches=branches, scale=scale, identity=identity, forward="branches")
    rep = RepConv2d(*LAYERS[kind], reparam=settings)
    for bn in rep.norms():
        nn.init.uniform_(bn.weight, -0.5, 1.5)
        nn.init.normal_(bn.bias)
        nn.init.normal_(bn.running_mean)
    return rep


def images(*shape: int, mean: float = 1.0, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) + mean * torch.randn(shape[1], 1, 1, generator=g)


def step(rep: nn.Module, x: Tensor, dy: Tensor, how: str) -> Results:
    """Everything one training step by one forward leaves behind, and the output in evaluation."""
    rep, x = copy.deepcopy(rep), x.detach().clone().requires_grad_()
    with using_forward(rep, how):
        y = rep(x)
        y.backward(dy)
        grads = {f"d {name}": p.grad for name, p in rep.named_parameters()}
        buffers = {name: b.clone() for name, b in rep.named_buffers()}
        return {"y": y.detach(), "dx": x.grad, **grads, **buffers, "eval": rep.eval()(x).detach()}


def outputs_gradient(rep: RepConv2d, x: Tensor) -> Tensor:
    conv = rep.branches[0].conv
    shape = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, 1, conv.groups).shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.5
    return dy.to(x.dtype).contiguous(
        memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format
    )


def scale_of(key: str, reference: Results) -> float:
    """What an error of `key` is relative to: its size, or for gradients of kernels the largest.

    A kernel before a batch norm has hardly any gradient along itself, a 1x1 depthwise one none at
    all but for eps: its own size would be no measure.
    """
    keys = [k for k in reference if k.startswith("d ")] if key.startswith("d ") else [key]
    return max(reference[k].double().norm().item() for k in keys)


def error(given: Results, reference: Results, key: str) -> float:
    difference = (given[key].double() - reference[key].double()).norm().item()
    return difference / (scale_of(key, reference) + 1e-300)


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_float64_steps_equal_those_of_the_branches(kind, channels_last):
    for form, shape, how in itertools.product(FORMS, SHAPES, FORWARDS):
        rep = layer(kind, form).double()
        x = images(shape[0], LAYERS[kind][0], *shape[1:]).double()
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        dy = outputs_gradient(rep, x)
        expected, given = step(rep, x, dy, "branches"), step(rep, x, dy, how)
        assert given.keys() == expected.keys()
        for key in expected:
            assert given[key].dtype == expected[key].dtype
            assert error(given, expected, key) <= 1e-12, (how, form, shape, key)


@pytest.mark.parametrize("kind", LAYERS)
def test_float32_steps_are_as_good_as_those_of_the_branches(kind):
    # These are the C++ kernels where they exist, which know float32 only; 33 channels fill no
    # vector, 64 are cut into chunks of whole vectors.
    for form, shape, how in itertools.product(FORMS, SHAPES, FORWARDS):
        rep = layer(kind, form)
        x = images(shape[0], LAYERS[kind][0], *shape[1:])
        x = x.to(memory_format=torch.channels_last)
        dy = outputs_gradient(rep, x)
        expected = step(copy.deepcopy(rep).double(), x.double(), dy.double(), "branches")
        given = step(rep, x, dy, how)
        for key in expected:
            assert error(given, expected, key) <= 2e-6, (how, form, shape, key)


@pytest.mark.parametrize("shape", [(2, 33, 13, 15), (1, 64, 7, 7), (3, 480, 7, 7), (2, 20, 28, 3)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_the_kernels_equal_their_definition(shape, kernel, stride):
    if native.load() is None:
        pytest.skip("no C++ compiler here")
    g = torch.Generator().manual_seed(0)
    x = images(*shape).to(memory_format=torch.channels_last)
    C = shape[1]
    w, shift = torch.randn(3, kernel, kernel, C, generator=g), x.mean((0, 2, 3))
    abc, tap_abc = torch.randn(3, 3, C, generator=g), torch.randn(3, C, generator=g)
    side = [-(-s // stride) for s in shape[2:]]
    dy = torch.randn(shape[0], C, *side, generator=g).to(memory_format=torch.channels_last)
    calls = {
        "stats": (depthwise.depthwise_stats, (x, w, shift), (stride,)),
        "reduce": (depthwise.depthwise_reduce, (x, dy, shift), (kernel, stride)),
        "grads": (depthwise.depthwise_grads, (x, dy, w, shift, abc, tap_abc), (stride,)),
    }
    for name, (function, tensors, numbers) in calls.items():
        assert depthwise.kernels_for(x, kernel) is not reference
        given = function(*tensors, *numbers)
        expected = function(*(t.double() for t in tensors), *numbers)  # float64: PyTorch's form
        pairs = zip(given, expected, strict=True) if name == "grads" else [(given, expected)]
        for one_given, one_expected in pairs:
            difference = (one_given.double() - one_expected).norm() / one_expected.norm()
            assert difference <= 3e-7, name


def test_results_do_not_depend_on_the_number_of_threads():
    rep = layer("depthwise 3")
    x = images(5, 12, 9, 7).to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(step(rep, x, dy, "collapsed"))
    finally:
        torch.set_num_threads(before)
    # dx and statistics come from the kernels; PyTorch's own mean and convolution may differ.
    assert torch.allclose(runs[0]["dx"], runs[1]["dx"], rtol=0, atol=1e-6)
    w = torch.randn(3, 3, 3, 12)
    sums = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        sums.append(depthwise.depthwise_stats(x, w, torch.zeros(12), 1))
    torch.set_num_threads(before)
    assert torch.equal(*sums)


# --- batch norm's settings ------------------------------------------------------------------------


@pytest.mark.parametrize("how", FORWARDS)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_momentum_and_cumulative_average(how, momentum):
    rep = layer("depthwise 3").double()
    for bn in rep.norms():
        bn.momentum = momentum
    other = copy.deepcopy(rep)
    with using_forward(rep, how), using_forward(other, "branches"):
        for seed in range(3):
            x = images(2, 12, 5, 6, seed=seed).double()
            rep(x), other(x)
    for (name, given), expected in zip(rep.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("how", FORWARDS)
@pytest.mark.parametrize("kind", ["expansion", "depthwise 3", "stem"])
def test_without_running_statistics_every_batch_is_its_own(how, kind):
    rep = layer(kind).double()
    for bn in rep.norms():
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None
        bn.track_running_stats = False
    x = images(2, LAYERS[kind][0], 6, 5).double()
    dy = outputs_gradient(rep, x)
    expected, given = step(rep, x, dy, "branches"), step(rep, x, dy, how)
    for key in expected:  # "eval" too: it uses the batch
        assert error(given, expected, key) <= 1e-12, key


@pytest.mark.parametrize("how", ["auto", *FORWARDS])
@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_batch_norms_are_folded_and_stay_as_they_are(how, kind):
    rep = layer(kind).double()
    for bn in rep.norms():
        bn.eval()
    x = images(2, LAYERS[kind][0], 6, 5).double()
    dy = outputs_gradient(rep, x)
    expected, given = step(rep, x, dy, "branches"), step(rep, x, dy, how)
    for key in expected:
        assert error(given, expected, key) <= 1e-12, key


def test_some_batch_norms_frozen_and_others_not_are_left_to_the_branches():
    rep = layer("expansion").double()
    rep.branches[1].bn.eval()
    x = images(2, 6, 6, 5).double()
    dy = outputs_gradient(rep, x)
    expected, given = step(rep, x, dy, "branches"), step(rep, x, dy, "collapsed")
    assert all(torch.equal(given[key], expected[key]) for key in expected if key != "eval")


@pytest.mark.parametrize("how", FORWARDS)
def test_a_single_value_per_channel_is_refused_as_batch_norm_does(how):
    rep = layer("expansion")
    with using_forward(rep, how), pytest.raises(ValueError, match="more than 1 value"):
        rep(images(1, 6, 1, 1))


# --- float32 and bf16 -----------------------------------------------------------------------------


def shifted(ratio: float):
    return lambda *s: images(*s, mean=0) + ratio * torch.sign(images(1, s[1], 1, 1, seed=5))


def tiny_spread(*s: int) -> Tensor:
    return 30 + 0.01 * images(*s, mean=0)


def constant_channels(*s: int) -> Tensor:
    x = images(*s, mean=0)
    x[:, ::2] = 7.0
    return x


HARD = {
    "mean / std 100": shifted(100),
    "mean 30, std .01": tiny_spread,
    "constant channels": constant_channels,
}


@pytest.mark.parametrize("how", FORWARDS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("zero_sum", [False, True])
@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_in_float32(case, zero_sum, kind, how):
    """At most ten times the branches' own error, and never NaN."""
    rep = layer(kind)
    if zero_sum:
        for branch in rep.branches:
            branch.conv.weight.data -= branch.conv.weight.data.mean((1, 2, 3), keepdim=True)
    x = HARD[case](8, LAYERS[kind][0], 15, 14).to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    exact = step(copy.deepcopy(rep).double(), x.double(), dy.double(), "branches")
    branches, given = step(rep, x, dy, "branches"), step(rep, x, dy, how)
    for key in exact:
        assert given[key].isfinite().all(), key
        floor = 1e-7 * scale_of(key, exact) / (scale_of(key, exact) + 1e-300)
        assert error(given, exact, key) <= 10 * error(branches, exact, key) + floor, key


@pytest.mark.parametrize("kind", ["expansion", "depthwise 3"])
def test_a_large_batch_of_large_maps_in_float32(kind):
    """256 images of 112 x 112: sums of 3.2 million terms."""
    rep = layer(kind)
    x = shifted(3)(256, LAYERS[kind][0], 112, 112)[:, :, :, :112]
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(rep).double()
        for part in (exact, rep):
            part.branches[0].bn.momentum = 1.0
        conv = exact.branches[0].conv
        z = F.conv2d(x.double(), conv.weight, None, 1, conv.padding, 1, conv.groups)
        var, mean = torch.var_mean(z, (0, 2, 3))
        with using_forward(rep, "collapsed"):
            rep(x)
    bn = rep.branches[0].bn
    assert ((bn.running_var - var) / var).abs().max() <= 1e-6
    assert ((bn.running_mean - mean) / var.sqrt()).abs().max() <= 1e-6


@pytest.mark.parametrize("how", FORWARDS)
@pytest.mark.parametrize(
    "kind", ["expansion", "projection", "depthwise 3", "depthwise 5, stride 2"]
)
def test_bf16_errs_at_most_twice_as_much_as_the_branches(kind, how):
    rep = layer(kind)
    x = images(4, LAYERS[kind][0], 15, 14).to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    exact = step(copy.deepcopy(rep).double(), x.double(), dy.double(), "branches")

    def run(name: str) -> Results:
        with torch.autocast("cpu", torch.bfloat16):
            return step(rep, x, dy.bfloat16(), name)

    branches, given = run("branches"), run(how)
    assert given["y"].dtype == branches["y"].dtype == torch.bfloat16
    for key in ("y", "dx", *(f"d {name}" for name, _ in rep.named_parameters())):
        assert given[key].dtype == branches[key].dtype
        floor = 1e-7 + 2**-8 * (key == "y")  # the output itself is rounded
        assert error(given, exact, key) <= 2 * error(branches, exact, key) + floor, key
    for key in (name for name, b in rep.named_buffers() if b.is_floating_point()):
        assert error(given, exact, key) <= 2 * error(branches, exact, key) + 1e-7, key


# --- a hundred steps ------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    settings = ReparamConfig(forward="branches")

    def rep(*shape: int) -> RepConv2d:
        return RepConv2d(*shape, reparam=settings)

    return nn.Sequential(
        rep(3, 8, 3, 2), nn.ReLU(), rep(8, 24, 1), nn.ReLU(), rep(24, 24, 3, 1, 24), nn.ReLU(),
        rep(24, 24, 5, 2, 24), rep(24, 8, 1), rep(8, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 5),
    ).double()  # fmt: skip


def hundred_steps(how: str, nudge: float = 0.0) -> Tensor:
    network = small_network()
    first = network[0].branches[0].conv.weight
    with torch.no_grad():
        first *= 1 + nudge
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    x = images(6, 3, 16, 16).double().to(memory_format=torch.channels_last)
    labels = torch.arange(6) % 5
    with using_forward(network, how):
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(network(x), labels).backward()
            optimizer.step()
    state = network.state_dict().values()
    return torch.cat([t.flatten() for t in state if t.is_floating_point()])


@pytest.mark.parametrize("how", FORWARDS)
def test_a_hundred_steps_stay_as_near_as_a_rounding_error(how):
    """Training is chaotic: the measure is a run whose first kernel is off by one unit in 2^52."""
    branches = hundred_steps("branches")
    nudged = (hundred_steps("branches", nudge=2**-52) - branches).norm()
    assert nudged > 0
    assert (hundred_steps(how) - branches).norm() <= 10 * nudged


# --- what surrounds a layer -----------------------------------------------------------------------


@pytest.mark.parametrize("how", FORWARDS)
def test_gradients_accumulate(how):
    rep = layer("depthwise 3").double()
    other = copy.deepcopy(rep)
    with using_forward(rep, how), using_forward(other, "branches"):
        for seed in (1, 2):
            x = images(2, 12, 5, 6, seed=seed).double()
            for r in (rep, other):
                r(x).square().sum().backward()
    for p, q in zip(rep.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("how", FORWARDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_updates_running_statistics_once(how, reentrant):
    rep, x = layer("expansion").double(), images(2, 6, 5, 6).double().requires_grad_()
    other = copy.deepcopy(rep)
    with using_forward(rep, how), using_forward(other, how):
        checkpoint(rep, x, use_reentrant=reentrant).square().sum().backward()
        other(x).square().sum().backward()
    for (name, given), expected in zip(
        rep.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(given, expected), name
    for p, q in zip(rep.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_what_follows_may_work_in_place():
    x = images(2, 6, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    for how in ("branches", *FORWARDS):
        rep = layer("expansion")
        with using_forward(rep, how):
            y = rep(x)
            y += 1
            F.relu(y, inplace=True).sum().backward()


def test_compiling_gives_one_graph():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    for kind in ("expansion", "depthwise 3", "stem"):
        torch._dynamo.reset()
        counter.frame_count = 0
        rep = layer(kind)
        rep.forward_mode = "stacked" if kind == "stem" else "collapsed"
        plain = copy.deepcopy(rep)
        x = images(2, LAYERS[kind][0], 6, 5).to(memory_format=torch.channels_last)
        compiled = torch.compile(rep, backend=counter, fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            y = compiled(x)
        y.square().sum().backward()
        expected = plain(x)
        expected.square().sum().backward()
        assert counter.frame_count == 1
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for p, q in zip(rep.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
        for b, c in zip(rep.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-5)


def test_two_processes_equal_one_with_the_joint_batch(tmp_path):
    """Rank 0 has three images, rank 1 two; gradients are summed over ranks by hand."""
    script = textwrap.dedent(f"""
        import sys, torch, torch.distributed as dist
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_collapse import FORWARDS, images, synced_network, synchronize, using_forward
        torch.set_num_threads(1)
        rank = int(sys.argv[1])
        store = "file://{tmp_path}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        for how in ("branches", *FORWARDS):
            network = synchronize(synced_network())
            x = images(5, 3, 9, 7).double().to(memory_format=torch.channels_last)
            own = (x[:3] if rank == 0 else x[3:]).requires_grad_()
            with using_forward(network, how):
                y = network(own)
                (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).square().sum().backward()
            grads = torch.cat([p.grad.flatten() for p in network.parameters()])
            dist.all_reduce(grads)
            buffers = torch.cat([b.flatten().double() for b in network.buffers()])
            torch.save((y.detach(), own.grad, grads, buffers), f"{tmp_path}/{{how}}{{rank}}.pt")
    """)
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err.decode()

    network = synced_network()
    x = images(5, 3, 9, 7).double().to(memory_format=torch.channels_last).requires_grad_()
    y = network(x)
    (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).square().sum().backward()
    joint = torch.cat([p.grad.flatten() for p in network.parameters()])
    statistics = torch.cat([b.flatten().double() for b in network.buffers()])
    close = {"rtol": 1e-9, "atol": 1e-9}
    for how in ("branches", *FORWARDS):
        (y0, dx0, grads, buffers), (y1, dx1, grads1, buffers1) = (
            torch.load(tmp_path / f"{how}{rank}.pt") for rank in (0, 1)
        )
        assert torch.equal(grads, grads1), how
        torch.testing.assert_close(buffers, buffers1, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([y0, y1]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([dx0, dx1]), x.grad, **close)
        torch.testing.assert_close(grads, joint, **close)
        torch.testing.assert_close(buffers, statistics, rtol=1e-12, atol=1e-12)


def synced_network() -> nn.Module:
    """Every form, and a batch norm alone."""
    torch.manual_seed(0)
    settings = ReparamConfig(forward="branches")
    return nn.Sequential(
        RepConv2d(3, 12, 3, 2, reparam=settings),
        nn.BatchNorm2d(12),
        RepConv2d(12, 12, 1, reparam=settings),
        RepConv2d(12, 12, 3, 1, 12, reparam=settings),
    ).double()


# --- which forward --------------------------------------------------------------------------------


def test_auto_follows_its_rule():
    def choice(kind: str, form: tuple[int, bool, bool] = FORMS[0], last: bool = True) -> str:
        rep = layer(kind, form)
        rep.forward_mode = "auto"
        x = images(2, LAYERS[kind][0], 6, 5)
        return choose_forward(rep, x.to(memory_format=torch.channels_last) if last else x)

    fast = "collapsed" if native.load() is not None else "branches"
    assert choice("expansion") == choice("projection") == "collapsed"
    assert choice("projection", (2, False, False)) == "stacked"
    assert choice("stem") == choice("pointwise, stride 2") == "stacked"
    assert choice("depthwise 3") == choice("depthwise 5, stride 2") == fast
    assert choice("expansion", last=False) == choice("depthwise 3", last=False) == "branches"
    assert choice("expansion", (1, False, False)) == "branches"
    rep = layer("expansion").eval()
    assert choose_forward(rep, images(2, 6, 6, 5)) == "branches", "asked for by name"
    rep.forward_mode = "auto"
    assert choose_forward(rep, images(2, 6, 6, 5)) == "folded"


def test_without_the_kernels_depthwise_layers_fall_back(monkeypatch):
    rep = layer("depthwise 3")
    x = images(2, 12, 6, 5).to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    with_kernels = step(rep, x, dy, "collapsed")
    monkeypatch.setattr(depthwise, "_functions", lambda device_type: None)
    rep.forward_mode = "auto"
    assert choose_forward(rep, x) == "branches"
    without = step(rep, x, dy, "collapsed")
    for key in without:
        assert error(without, with_kernels, key) <= 2e-6, key


def test_the_engine_is_restored_after_a_block():
    rep = layer("expansion")
    rep.forward_mode = "auto"
    with pytest.raises(RuntimeError), using_forward(rep, "stacked"):
        assert rep.forward_mode == "stacked"
        raise RuntimeError
    assert rep.forward_mode == "auto"


# --- what the fast forms leave to the branches, and what they refuse ------------------------------


def changed(rep: RepConv2d, name: str) -> RepConv2d:
    if name == "eps":
        rep.branches[1].bn.eps = 0.5
    elif name == "no weights":
        for branch in rep.branches:
            branch.bn = nn.BatchNorm2d(branch.bn.num_features, affine=False)
    elif name == "another norm":
        rep.branches[0].bn = nn.GroupNorm(2, rep.branches[0].bn.num_features)
    elif name == "torch's own synchronized":
        rep = nn.SyncBatchNorm.convert_sync_batchnorm(rep)
    else:
        rep = rep.bfloat16()
    rep.forward_mode = "collapsed"
    return rep


@pytest.mark.parametrize(
    "name", ["eps", "no weights", "another norm", "torch's own synchronized", "bf16 parameters"]
)
def test_unusual_layers_are_left_to_the_branches(name):
    rep = changed(layer("expansion", (3, False, False)), name)
    x = images(2, 6, 5, 6).to(next(rep.parameters()).dtype)
    assert choose_forward(rep, x) == "branches"
    assert choose_forward(rep.eval(), x) == "branches"
    assert rep(x).isfinite().all()


@pytest.mark.parametrize("how", FORWARDS)
def test_second_derivatives_are_refused(how):
    rep, x = layer("expansion"), images(2, 6, 5, 6).requires_grad_()
    with using_forward(rep, how):
        (g,) = torch.autograd.grad(rep(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


@pytest.mark.parametrize("kind", ["expansion", "projection"])
@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_kernels_that_cancel_what_channels_share(kind, ratio):
    """Zero-sum kernels over channels that share a signal `ratio` times their own: R loses most."""
    rep = layer(kind)
    for branch in rep.branches:
        branch.conv.weight.data -= branch.conv.weight.data.mean(1, keepdim=True)
    Ci = LAYERS[kind][0]
    x = images(8, Ci, 14, 14, mean=0) + ratio * images(8, 1, 14, 14, mean=0, seed=9)
    x = x.to(memory_format=torch.channels_last)
    dy = outputs_gradient(rep, x)
    exact = step(copy.deepcopy(rep).double(), x.double(), dy.double(), "branches")
    branches, given = step(rep, x, dy, "branches"), step(rep, x, dy, "collapsed")
    for key in exact:
        assert error(given, exact, key) <= 10 * error(branches, exact, key) + 1e-7, key


@pytest.mark.parametrize("kind", ["expansion", "depthwise 3"])
@pytest.mark.parametrize("case", ["constant channels", "mean 30, std .01", "mean / std 100"])
def test_bf16_outputs_of_channels_far_from_zero(kind, case):
    rep = layer(kind)
    x = HARD[case](8, LAYERS[kind][0], 15, 14).to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(rep).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            branches = rep(x).double()
            with using_forward(rep, "collapsed"):
                given = rep(x)
    assert given.dtype == torch.bfloat16
    errors = ((y.double() - exact).norm() / exact.norm() for y in (given, branches))
    given_error, branches_error = errors
    assert given_error <= 2 * branches_error + 2**-8


def test_synchronized_layers_exchange_the_same_sums_whatever_their_input():
    """One rank with a single position, or another format, must not go through the branches."""
    for kind in LAYERS:
        rep = synchronize(layer(kind))
        rep.forward_mode = "auto"
        for x in (images(1, LAYERS[kind][0], 1, 1), images(2, LAYERS[kind][0], 6, 5)):
            assert choose_forward(rep, x) != "branches"


def test_a_single_value_on_all_ranks_is_refused():
    with pytest.raises(ValueError, match="more than 1 value"):
        SyncBatchNorm2d(4)(images(1, 4, 1, 1))


def test_checkpointing_a_plain_batch_norm_updates_it_once():
    from ghosttrain.models.layers import ConvBN

    layer, x = ConvBN(6, 4), images(2, 6, 5, 6).requires_grad_()
    other = copy.deepcopy(layer)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    other(x).square().sum().backward()
    for given, expected in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(given, expected)
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_batch_norms_of_another_kind_are_not_synchronized_in_silence():
    with pytest.raises(TypeError, match="BatchNorm3d"):
        synchronize(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm3d(2)))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050"])
def test_a_whole_student_compiles_to_one_graph(model):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    student = create_model(model, 5, dropout=0).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(student)
    x = images(4, 3, 64, 64).to(memory_format=torch.channels_last)
    counter = CompileCounterWithBackend("aot_eager")
    y = torch.compile(student, backend=counter, fullgraph=True)(x)
    y.square().sum().backward()
    plain(x).square().sum().backward()
    assert counter.frame_count == 1
    for (name, p), q in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * (q.grad.norm() + 1), name
    for (name, b), c in zip(student.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-5, msg=name)
