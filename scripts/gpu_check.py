"""What can only be checked on a GPU: scripts/gpu_check [NAME ...] [--device cuda] [--json FILE]

Each check runs by itself and prints `ok` with its figures, or `FAILED` with what went wrong; at the
end stands a table, the same is in gpu_check.json, and the exit code is 1 when one failed. Errors
are relative to the largest value of a result, against float64. Without a GPU it lists what it would
run. `--device cpu` runs what a CPU can run, to test the script.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import ReparamConfig
from ghosttrain.distill.features import Network
from ghosttrain.engine.cuda_graph import record
from ghosttrain.engine.train import mixed_precision
from ghosttrain.files import write_json
from ghosttrain.models import depthwise
from ghosttrain.models.create import create_model
from ghosttrain.models.depthwise import reference
from ghosttrain.models.reparam import RepConv2d, fuse, using_forward
from ghosttrain.models.sync_bn import synchronize
from ghosttrain.optim.ema import Ema
from ghosttrain.optim.lamb import Lamb

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050")
# (N, k, stride, C, H, W): branches, kernel side, stride, channels, map.
DEPTHWISE = (
    (3, 3, 1, 20, 7, 5), (1, 5, 2, 32, 7, 5), (3, 3, 1, 12, 112, 112), (3, 3, 2, 96, 56, 56),
    (3, 5, 2, 72, 28, 28), (2, 5, 1, 40, 14, 14), (5, 3, 1, 480, 7, 7), (0, 3, 2, 16, 33, 17),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(CHECKS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", default="gpu_check.json", metavar="FILE")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CHECKS):
        parser.error(f"{unknown.pop()!r} is no check; choose from: {', '.join(CHECKS)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; on a machine with one this runs:")
        for check in options.names or CHECKS:
            print(f"  {check:15} {(CHECKS[check].__doc__ or '').splitlines()[0]}")
        return 0
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for check in options.names or CHECKS:
        started = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            lines = CHECKS[check](device)
            state = "ok"
        except Exception:
            lines, state = traceback.format_exc().splitlines(), "FAILED"
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
        found[check] = {"state": state, "seconds": seconds, "peak_mib": peak, "lines": lines}
        print(f"--- {check}: {state} ({seconds:.0f} s)", *lines, sep="\n  ", flush=True)
    about = {"device": name, "torch": str(torch.__version__), "cuda": torch.version.cuda}
    write_json(Path(options.json), {**about, "checks": found})
    print(f"\n{'check':15} state   seconds  peak MiB of this process")
    for check, each in found.items():
        print(f"{check:15} {each['state']:6} {each['seconds']:8.0f} {each['peak_mib']:9.0f}")
    failed = [check for check, each in found.items() if each["state"] != "ok"]
    print(f"{options.json}: " + (f"failed: {', '.join(failed)}" if failed else "all passed"))
    return int(bool(failed))


def worst_error(results: tuple[Tensor, ...], truths: tuple[Tensor, ...]) -> float:
    """Return the largest error, relative to the largest value of its tensor."""
    errors = [
        (
            (result.double() - truth.to(result.device).double()).abs().max() / truth.abs().max()
        ).item()
        for result, truth in zip(results, truths, strict=True)
        if truth.numel() and truth.abs().max() > 0
    ]
    return max(errors, default=0.0)


def median_ms(call: Callable[[], object], device: torch.device, rounds: int = 15) -> float:
    """Return the median time of a call in ms, from events of the device."""
    times = []
    for _ in range(3 + rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            since = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - since))
    return sorted(times[3:])[rounds // 2]


# --- the checks -----------------------------------------------------------------------------------


def triton_kernels(device: torch.device) -> list[str]:
    """The three depthwise functions: equal to the definition in float64, and their times."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a kernel that `prove` refuses warns
        kernels = depthwise._functions(device.type)
    assert kernels is not None, "no compiled functions for this device"
    lines = []
    for N, k, stride, C, H, W in DEPTHWISE:
        B = 16
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)  # noqa: B023

        def last(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=torch.channels_last)

        x, shift = last(normal(B, C, H, W) + 3), normal(C) + 3
        dy = last(normal(B, C, -(-H // stride), -(-W // stride)))
        w, abc, tap_abc = normal(N, k, k, C), normal(3, N, C), normal(3, C)
        calls = {
            "depthwise_stats": (x, w, shift, stride),
            "depthwise_reduce": (x, dy, shift, k, stride),
            "depthwise_grads": (x, dy, w, shift, abc, tap_abc, stride),
        }
        figures = []
        for name, given in calls.items():
            function, definition = getattr(kernels, name), getattr(reference, name)
            if name == "depthwise_grads" and not N:
                continue  # the definition wants a branch
            wide = tuple(v.double() if isinstance(v, Tensor) else v for v in given)
            results, truths = function(*given), definition(*wide)
            if isinstance(results, Tensor):
                results, truths = (results,), (truths,)
            error = worst_error(results, truths)
            assert error < 3e-6, f"{name} {(N, k, stride, C, H, W)} is off by {error:.1e}"
            assert all(map(torch.equal, results, _tuple(function(*given)))), f"{name}: other bits"
            ms = median_ms(lambda f=function, g=given: f(*g), device)  # type: ignore[misc]
            contiguous = tuple(v.contiguous() if isinstance(v, Tensor) else v for v in given)
            plain = median_ms(lambda f=definition, g=contiguous: f(*g), device)  # type: ignore[misc]
            figures.append(f"{name[10:]} {error:.0e} {ms:.3f} ms (operators {plain:.3f})")
        lines.append(f"N k stride C H W = {N} {k} {stride} {C} {H} {W}: " + "; ".join(figures))
    return lines


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def layers(device: torch.device) -> list[str]:
    """Every form of a re-parameterized layer against its branches in float64: y, dx, dW, buffers.

    A form may have twice the error of the branches in the same number format.
    """
    lines = []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for C_in, C_out, k, stride, groups in ((64, 64, 1, 1, 1), (96, 24, 1, 1, 1), (24, 96, 1, 1, 1),
                                           (96, 96, 3, 1, 96), (96, 96, 5, 2, 96)):  # fmt: skip
        torch.manual_seed(0)
        rep = RepConv2d(C_in, C_out, k, stride, groups, reparam=ReparamConfig()).to(device)
        rep = rep.to(memory_format=torch.channels_last)
        for norm in rep.norms():
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        x = torch.randn(16, C_in, 28, 28).to(device).contiguous(memory_format=torch.channels_last)
        dy = torch.randn(16, C_out, -(-28 // stride), -(-28 // stride)).to(device)
        truth = _trained(copy.deepcopy(rep).double(), x.double(), dy.double(), "branches", False)
        for bf16 in (False, True):
            errors = {
                form: worst_error(_trained(copy.deepcopy(rep), x, dy, form, bf16), truth)
                for form in ("branches", "stacked", "collapsed", "auto")
            }
            shown = ", ".join(f"{form} {error:.1e}" for form, error in errors.items())
            lines.append(f"{C_in}->{C_out} k{k} s{stride} {'bf16' if bf16 else 'fp32'}: {shown}")
            bound = max(2 * errors["branches"], 5e-6)
            assert max(errors.values()) <= bound, "\n".join(lines)
    return lines


def _trained(rep: nn.Module, x: Tensor, dy: Tensor, form: str, bf16: bool) -> tuple[Tensor, ...]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with using_forward(rep, form), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        y = rep(x)
    y.backward(dy.to(y.dtype))
    grads = [p.grad for p in rep.parameters()]
    buffers = [b for b in rep.buffers() if b.is_floating_point()]
    return (y.detach(), x.grad, *grads, *buffers)  # type: ignore[arg-type]


def students(device: torch.device) -> list[str]:
    """Whole students: loss and gradient of every form against float64; eval against fused."""
    lines = []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in FAMILIES:
        torch.manual_seed(0)
        model = create_model(name, 10).to(device).to(memory_format=torch.channels_last)
        images = torch.randn(32, 3, 96, 96).to(device).contiguous(memory_format=torch.channels_last)
        labels = torch.arange(32, device=device) % 10
        exact = copy.deepcopy(model).cpu().double()  # few GPUs are fast in float64
        truth = _gradient(exact, images.cpu().double(), labels.cpu(), "branches", False)
        figures = {}
        for form in ("branches", "collapsed"):
            for bf16 in (False, True):
                loss, gradient = _gradient(copy.deepcopy(model), images, labels, form, bf16)
                cosine = F.cosine_similarity(gradient.cpu().double(), truth[1], dim=0).item()
                figures[form, bf16] = abs(loss / truth[0] - 1), cosine
        model.eval()
        with torch.inference_mode():
            gap = (model(images) - fuse(model)(images)).abs().max().item()
        shown = ", ".join(
            f"{form} {'bf16' if bf16 else 'fp32'} loss {error:.0e} gradient {cosine:.5f}"
            for (form, bf16), (error, cosine) in figures.items()
        )
        lines.append(f"{name}: {shown}; fused differs by {gap:.1e}")
        assert figures["collapsed", False][0] < 1e-4 and figures["collapsed", False][1] > 0.999, (
            lines
        )
        assert figures["collapsed", True][0] < 2e-2, lines
        assert figures["collapsed", True][1] > figures["branches", True][1] - 0.05, lines
        assert gap < 1e-3, lines
    return lines


def _gradient(
    model: nn.Module, images: Tensor, labels: Tensor, form: str, bf16: bool
) -> tuple[float, Tensor]:
    with (
        using_forward(model, form),
        torch.autocast(images.device.type, torch.bfloat16, enabled=bf16),
    ):
        logits = model(images)
    loss = F.cross_entropy(logits.to(next(model.parameters()).dtype), labels)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]


def nccl(device: torch.device) -> list[str]:
    """Synchronized statistics, DDP and the sums of evaluation through the device's own backend."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            torch.manual_seed(0)
            model = create_model(FAMILIES[0], 10).to(device).to(memory_format=torch.channels_last)
            alone, synced = copy.deepcopy(model), synchronize(copy.deepcopy(model))
            ids = [0] if device.type == "cuda" else None
            synced = nn.parallel.DistributedDataParallel(synced, device_ids=ids)
            images = torch.randn(16, 3, 96, 96).to(device)
            images = images.contiguous(memory_format=torch.channels_last)
            labels = torch.arange(16, device=device) % 10
            losses = []
            for network in (alone, synced):
                loss = F.cross_entropy(network(images), labels)
                loss.backward()
                losses.append(loss.item())
            assert abs(losses[0] - losses[1]) < 1e-4, losses
            total = torch.ones(3, dtype=torch.int64, device=device)
            dist.all_reduce(total)
        finally:
            dist.destroy_process_group()
    return [f"{backend}, 1 rank: loss {losses[0]:.6f}, synchronized under DDP {losses[1]:.6f}"]


def ranks(device: torch.device) -> list[str]:
    """A run of six steps on every GPU there is, one process each, against one process."""
    count = torch.cuda.device_count() if device.type == "cuda" else 2
    if count == 1:
        return ["there is one GPU: several processes were not tried"]
    tops = []
    with tempfile.TemporaryDirectory() as folder:
        for nproc in (1, count):
            _cli(
                "+recipe=compact_kd", "model=ghostnetv3_050", f"launch.device={device.type}",
                "train.max_steps=6", f"train.global_batch={16 * count}", "train.sync_bn=true",
                "train.precision=fp32", f"launch.nproc={nproc}", f"run.root={folder}",
                f"run.name=on{nproc}",
            )  # fmt: skip
            tops.append(load_file(f"{folder}/on{nproc}/model.safetensors"))
    one, several = (torch.cat([t.double().flatten() for _, t in sorted(w.items())]) for w in tops)
    difference = (one - several).norm() / one.norm()
    assert difference < 1e-3, difference
    return [f"{count} processes: weights differ by {difference:.1e} of their norm from one's"]


def optimizer(device: torch.device) -> list[str]:
    """Twenty steps of LAMB and of the average on the device against float64 on the CPU."""
    torch.manual_seed(0)
    model = create_model(FAMILIES[0], 10).to(device)
    exact = copy.deepcopy(model).cpu().double()
    sides = [(each, Lamb(each.parameters(), lr=1e-2), Ema(each, 0.9)) for each in (model, exact)]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator) for p in exact.parameters()]
        for each, lamb, ema in sides:
            for parameter, grad in zip(each.parameters(), grads, strict=True):
                parameter.grad = grad.to(parameter.device, parameter.dtype)
            lamb.step()
            ema.update(each)
    lines = []
    for what, ours, truth in (
        ("LAMB", model, exact),
        ("EMA", sides[0][2].model, sides[1][2].model),
    ):
        pairs = zip(ours.parameters(), truth.parameters(), strict=True)
        error = max(worst_error((a.detach(),), (b.detach(),)) for a, b in pairs)
        lines.append(f"{what}: largest error of a weight {error:.1e}")
        assert error < 1e-4, lines
    return lines


def cuda_graph(device: torch.device) -> list[str]:
    """A run of two micro-batches a step with `train.cuda_graph` against one without; and times."""
    if device.type != "cuda":
        return ["a CPU has none"]
    lines, weights = [], []
    with tempfile.TemporaryDirectory() as folder:
        for recorded in ("false", "true"):
            job = [
                "+recipe=compact_kd", "model=ghostnetv3_050", "train.max_steps=6",
                "train.micro_batch=64", "train.global_batch=128", "train.precision=fp32",
                "distill.features_weight=1", "reparam.forward=collapsed", f"run.root={folder}",
                f"run.name={recorded}", f"train.cuda_graph={recorded}",
            ]  # fmt: skip
            _cli(*job)
            weights.append(load_file(f"{folder}/{recorded}/model.safetensors"))
    plain, graphed = (
        torch.cat([t.double().flatten() for _, t in sorted(w.items())]) for w in weights
    )
    difference = (plain - graphed).norm() / plain.norm()
    lines.append(f"6 steps of 2 x 64 images: weights differ by {difference:.1e} of their norm")
    assert difference < 1e-4, lines
    batch = 128
    images = torch.randn(batch, 3, 224, 224).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device)
    config = compose(["+recipe=compact_kd", "data.train_size=224", "data.in_chans=3"]).config
    for name in ("ghostnetv3_100", "mobilenetv2_100", "shufflenetv2_100"):
        for form, bf16 in itertools.product(("branches", "collapsed"), (False, True)):
            times = []
            for recorded in (False, True):
                network = Network(create_model(name, reparam={"forward": form})).to(device)
                network = network.to(memory_format=torch.channels_last)
                autocast = mixed_precision("bf16" if bf16 else "fp32", device)
                replica = record(network, config, batch, autocast) if recorded else network

                def step() -> None:
                    with autocast():  # noqa: B023
                        logits = replica(images).logits  # noqa: B023
                    F.cross_entropy(logits.float(), labels).backward()
                    network.zero_grad(set_to_none=not recorded)  # noqa: B023

                times.append(median_ms(step, device))
            number_format = "bf16" if bf16 else "fp32"
            lines.append(
                f"{name} {form} {number_format}: {times[0]:.1f} ms, recorded {times[1]:.1f}"
            )
    return lines


def run(device: torch.device) -> list[str]:
    """The main job on the digits, then the same command again, `eval`, and a compiled run."""
    with tempfile.TemporaryDirectory() as folder:
        job = ["+recipe=compact_kd", f"launch.device={device.type}", f"run.root={folder}"]
        small = device.type == "cpu"
        size = "model=ghostnetv3_050" if small else "model=ghostnetv3_130"
        short = ["train.max_steps=2"] if small else []
        output = _cli(*job, size, *short)
        result = next(Path(folder).rglob("result.json")).parent
        again = _cli("eval", str(result), f"launch.device={device.type}")
        tail = output.splitlines()[-12:] + again.splitlines()
        if small:
            return tail
        since = time.perf_counter()
        output = _cli(*job, "model=ghostnetv3_050", "train.compile=true", "train.epochs=2")
        last = next(line for line in output.splitlines() if line.startswith("epoch 2/"))
        return [*tail, f"compiled ({time.perf_counter() - since:.0f} s): {last}"]


def resume(device: torch.device) -> list[str]:
    """A digits run of 200 steps, asked to end on the way and gone on with, against a whole one."""
    steps = 200 if device.type == "cuda" else 6
    weights = []
    with tempfile.TemporaryDirectory() as folder:
        for root in ("whole", "stopped"):
            job = [
                sys.executable, "-m", "ghosttrain", "+recipe=compact_kd", "model=ghostnetv3_050",
                f"launch.device={device.type}", f"train.max_steps={steps}", "tracker.log_every=2",
                f"run.root={folder}/{root}", "run.name=it",
            ]  # fmt: skip
            if root == "stopped":
                process = subprocess.Popen(job, cwd=ROOT, stdout=subprocess.DEVNULL)
                rows = Path(folder, root, "it", "metrics.jsonl")
                while process.poll() is None and not (rows.is_file() and rows.stat().st_size):
                    time.sleep(0.05)
                process.terminate()
                code = process.wait()
                assert code == 75, f"exit code {code} after SIGTERM"
            output = _cli(*job[3:])
            weights.append(load_file(f"{folder}/{root}/it/model.safetensors"))
    place = next(line for line in output.splitlines() if line.startswith("resumed"))
    whole, stopped = weights
    apart = sum(not torch.equal(whole[key], stopped[key]) for key in whole)
    largest = max((whole[key].double() - stopped[key].double()).abs().max().item() for key in whole)
    assert largest < 1e-2, (place, largest)
    return [f"{place}: {apart} of {len(whole)} tensors differ, by at most {largest:.1e}"]


def bench(device: torch.device) -> list[str]:
    """`bench step` and `bench optim` of the 1.0x networks."""
    lines = []
    batch, size, rounds = ("128", "224", "20") if device.type == "cuda" else ("2", "64", "1")
    for model in ("ghostnetv3_100", "mobilenetv2_100", "shufflenetv2_100"):
        lines += _cli(
            "bench", "step", f"model={model}", f"launch.device={device.type}",
            f"train.micro_batch={batch}", f"data.train_size={size}", "--rounds", rounds,
            "--forwards", "collapsed,branches",
        ).splitlines()  # fmt: skip
    lines += _cli("bench", "optim", f"launch.device={device.type}", "--rounds", rounds).splitlines()
    return lines


def _cli(*arguments: str) -> str:
    command = [sys.executable, "-m", "ghosttrain", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


CHECKS: dict[str, Callable[[torch.device], list[str]]] = {
    "triton_kernels": triton_kernels,
    "layers": layers,
    "students": students,
    "nccl": nccl,
    "ranks": ranks,
    "optimizer": optimizer,
    "cuda_graph": cuda_graph,
    "run": run,
    "resume": resume,
    "bench": bench,
}

if __name__ == "__main__":
    sys.exit(main())
