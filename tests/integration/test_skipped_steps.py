"""A step whose loss is not finite is left out: the run is, to the bit, one that never saw it.

Run as a script (`python test_skipped_steps.py STEP RANK WORDS...`) this file is one of two ranks,
the images of one of which are broken in one step.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from helpers import only_run
from torch import Tensor, nn

from ghosttrain import ranks
from ghosttrain.config.schema import Config
from ghosttrain.data.loader import Batch, Loader
from ghosttrain.distill.features import StudentOutput
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.engine.checkpoint import read_checkpoint
from ghosttrain.engine.classification import objective
from ghosttrain.engine.guard import Guard, Skip, _Copies, all_finite, skip_note
from ghosttrain.engine.rows import read_metrics
from ghosttrain.optim.ema import Ema
from ghosttrain.optim.lamb import Lamb

WORDS = ["tracker.log_every=2", "train.micro_batch=8", "run.name=it", "train.eval_every=9"]
NAN, INF = float("nan"), float("inf")


class Breaking:
    """Spoils one image in one step of those that a loader delivers for training."""

    def __init__(self, *steps: int, value: float = NAN, parts: int = 2) -> None:
        self.steps, self.value, self.parts, self.count = steps, value, parts, 0
        self.samples: list[int] = []
        self.delivered = Loader._delivered

    def __call__(self, loader: Loader, batch: Batch) -> Batch:
        batch = self.delivered(loader, batch)
        if loader._loader.dataset.replace_seed is None:  # of the evaluation
            return batch
        self.count += 1
        step, part = divmod(self.count - 1, self.parts)
        if step + 1 in self.steps and part == self.parts - 1:
            batch.images[1, 0, 3, 3] = self.value
            self.samples = batch.indices.tolist()
        return batch

    def install(self, patch: Any) -> Breaking:
        patch.setattr(Loader, "_delivered", lambda loader, batch: self(loader, batch))
        return self


def leaving_out(patch: pytest.MonkeyPatch, step: int) -> None:
    """Leave a good step out by other means than `Guard`: what its forward changes is put back, the
    optimizer and the average do nothing."""
    found: dict[str, Any] = {"step": 0}
    build, begin, update, lamb = Guard.__init__, Guard.begin, Ema.update, Lamb.step

    def building(guard: Guard, network: nn.Module, *args: Any, **options: Any) -> None:
        found["network"] = network
        build(guard, network, *args, **options)

    def beginning(guard: Guard) -> None:
        found["step"] += 1
        found["buffers"] = [buffer.clone() for buffer in found["network"].buffers()]
        begin(guard)

    def stepping(optimizer: Lamb) -> None:
        if found["step"] != step:
            lamb(optimizer)

    def updating(average: Ema, model: nn.Module) -> None:
        if found["step"] != step:
            return update(average, model)
        for buffer, before in zip(found["network"].buffers(), found["buffers"], strict=True):
            buffer.data = before

    patch.setattr(Guard, "__init__", building)
    patch.setattr(Guard, "begin", beginning)
    patch.setattr(Lamb, "step", stepping)
    patch.setattr(Ema, "update", updating)


def state_of(root: Path) -> dict[str, Any]:
    """Return all that the last checkpoint holds of weights, moments, average and statistics."""
    saved = read_checkpoint(root / "it" / "checkpoints" / "last.pt")
    return {key: saved[key] for key in ("student", "optimizer", "ema", "buffers", "step")}


def assert_same(one: Any, other: Any, place: str = "") -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}.{number}")
    else:
        assert one == other, place


@pytest.mark.parametrize("on_device", [False, True])
def test_a_broken_image_leaves_no_trace(ghosttrain, tiny, tmp_path, monkeypatch, on_device):
    """6 steps of two micro-batches, the fourth broken: decided before the step, or undone after it
    without a look, as on a GPU."""
    if on_device:
        init = Guard.__init__
        monkeypatch.setattr(Guard, "__init__", lambda guard, *args, **_: init(guard, *args, False))
    with monkeypatch.context() as patch:
        broken = Breaking(4).install(patch)
        run = ghosttrain(*tiny, *WORDS, f"run.root={tmp_path}/broken")
    assert run.code == 0, run.err
    line = "note: step 4 was skipped: label is not finite; metrics.jsonl has the sample numbers"
    assert run.out.count(line) == 1
    assert "note: 1 step was skipped: loss or gradient was not finite" in run.out
    (row,) = (r for r in read_metrics(tmp_path / "broken" / "it") if r["kind"] == "skipped")
    assert row == {"kind": "skipped", "step": 4, "cause": "label", "of_teacher": False, "rank": 0,
                   "samples": broken.samples}  # fmt: skip
    with monkeypatch.context() as patch:
        leaving_out(patch, 4)
        control = ghosttrain(*tiny, *WORDS, f"run.root={tmp_path}/control")
    assert control.code == 0, control.err
    # A GPU cannot undo the counters of the host before the row of step 4: they are put right there.
    assert_same(state_of(tmp_path / "broken"), state_of(tmp_path / "control"))


def test_one_of_two_ranks_is_enough(tiny, tmp_path):
    words = [*tiny, *WORDS[:1], "run.name=it", "train.global_batch=16", "launch.device=cpu"]

    def go(step: int) -> list[str]:
        folder = tmp_path / f"broken{step}"
        folder.mkdir()
        started = [
            subprocess.Popen(
                [sys.executable, __file__, str(step), str(rank), *words, f"run.root={folder}"],
                env=ranks.environment(rank, 2, f"file://{folder}/meeting"),
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=500)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], outputs
        return outputs

    said, samples = go(2)
    assert "note: step 2 was skipped: label is not finite on rank 1; metrics.jsonl" in said
    (row,) = (r for r in read_metrics(tmp_path / "broken2" / "it") if r["kind"] == "skipped")
    assert row["rank"] == 1 and samples.strip().endswith(f"samples {row['samples']}")
    go(-2)
    assert_same(state_of(tmp_path / "broken2"), state_of(tmp_path / "broken-2"))


def one_rank(step: int, rank: int, words: list[str]) -> int:
    """Be a rank: in step `step` an image of rank 1 is broken; -`step`: both leave that one out."""
    from ghosttrain.cli import main

    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    broken = Breaking(step, parts=1)
    if step < 0:
        leaving_out(patch, -step)
    elif rank == 1:
        broken.install(patch)
    code = main(words)
    print("samples", broken.samples)
    return code


def test_a_run_goes_back_to_its_checkpoint_and_on_with_other_images(
    ghosttrain, tiny, tmp_path, monkeypatch
):
    """Saved after step 2; steps 3 to 5 of 9 are broken, one more than may be in a row."""
    words = [*tiny, "run.name=it", "tracker.log_every=1", "train.save_every=2steps",
             "train.max_skips=2", "train.epochs=3", "train.eval_every=9"]  # fmt: skip
    with monkeypatch.context() as patch:
        Breaking(3, 4, 5, parts=1).install(patch)
        run = ghosttrain(*words)
    assert run.code == 0, run.err
    assert (
        "note: 3 steps in a row were skipped before step 6 (train.max_skips=2): the run goes back "
        "to the weights of step 4; it goes on with the images that follow" in run.out
    )
    saved = read_checkpoint(only_run(tmp_path / "runs") / "checkpoints" / "last.pt")
    assert saved["step"] == 9 and saved["guard"] == {
        "skipped": 3, "in_a_row": 0, "last_taken": 9, "rolled_back_at": 5
    }  # fmt: skip
    # Saved when two steps had been skipped: the weights are those after step 2.
    with monkeypatch.context() as patch:
        Breaking(*range(4, 10), parts=1).install(patch)
        again = ghosttrain(*words, "run.name=again")
    assert again.code == 2
    assert (
        "3 steps in a row were skipped before step 10 (train.max_skips=2): training diverged; the "
        in (again.err)
    )


def test_a_teacher_is_named():
    """Its answer to one image is infinite; the student and the labels are good."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    guard = Guard(network, optimizer, Ema(network, 0.9), on_host=True)
    config = Config.model_validate({"distill": {"name": "soft_ce"}})
    images, targets = torch.randn(2, 3, 1, 1), torch.eye(3)[:2]
    before = [p.detach().clone() for p in network.parameters()]
    for number, logits in enumerate(([0.0, 1.0, 2.0], [0.0, INF, 2.0]), 1):
        answer = TeacherOutput(torch.tensor([logits, [1.0, 0.0, 0.0]]), None)
        student = lambda images: StudentOutput(network(images), None)  # noqa: E731
        guard.begin()
        terms = objective(config, 0.5, student, answer, images, targets)
        guard.backward(terms, torch.tensor([7, 5]), 1)
        assert guard.passes(number) is (number == 1)
        guard.end()
        optimizer.zero_grad()
    (skip,) = guard.read()
    assert skip == Skip(2, "soft_ce", True, 0, [7, 5]) and guard.skipped == guard.in_a_row == 1
    assert skip_note([skip]).startswith("note: step 2 was skipped: the teacher's answer is not")
    assert all(map(torch.equal, before, network.parameters()))


def test_a_loss_that_is_infinite_is_enough():
    """Its gradients are finite: those of the sum of the weights, whatever is added to it."""
    network = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    guard = Guard(network, optimizer, Ema(network, 0.9), on_host=True)
    for added, passes in ((0.0, True), (INF, False), (NAN, False)):
        guard.begin()
        loss = network.weight.sum() + network.bias.sum() + added
        guard.backward({"loss": loss}, torch.tensor([0]), 1)
        assert guard.passes(1) is passes
        optimizer.zero_grad()


def test_what_learns_for_the_first_time_in_a_skipped_step_of_a_gpu():
    """Layers thaw and freeze: one that never learnt has no moments to go back to, and the counter
    of one that is frozen stays."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    network = nn.Sequential(first, second)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    guard = Guard(network, optimizer, Ema(network, 0.9), on_host=False)
    cases = ((first, 1.0), (first, 1.0), (second, NAN), (second, 1.0), (first, NAN), (second, 1.0))
    for number, (layer, value) in enumerate(cases, 1):
        guard.begin()
        loss = value * layer(torch.ones(1, 2)).sum()
        guard.backward({"loss": loss}, torch.tensor([0]), 1)
        if guard.passes(number):
            optimizer.step()
        guard.end()
        optimizer.zero_grad()
    assert [skip.step for skip in guard.read()] == [3, 5]
    for layer in (first, second):
        for parameter in layer.parameters():
            state = optimizer.state[parameter]
            assert parameter.isfinite().all() and state["exp_avg"].isfinite().all()
            assert state["step"] == 2


def test_what_is_not_finite_is_seen_and_undone():
    for value in (NAN, INF, -INF):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            tensors = [torch.ones(3, dtype=dtype), torch.arange(2), torch.ones(1, dtype=dtype)]
            assert all_finite(tensors)
            tensors[0][1] = value
            assert not all_finite(tensors)
    tensors = [torch.tensor([1.0, -2.0]), torch.tensor([3], dtype=torch.int64),
               torch.tensor([0.5], dtype=torch.bfloat16)]  # fmt: skip
    before, copies = [t.clone() for t in tensors], _Copies(tensors)
    for passed in (True, False):
        copies.keep()
        tensors[0][0], tensors[2][0] = NAN, INF
        tensors[1] += 1
        after = [t.clone() for t in tensors]
        copies.back_unless(torch.tensor(passed))
        expected = after if passed else before
        assert all(a.equal(b) or a.isnan().any() for a, b in zip(tensors, expected, strict=True))
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)


if __name__ == "__main__":
    sys.exit(one_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
