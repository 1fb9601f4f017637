"""Two processes: what they sum, average and count, and that they train what one process trains.

Run as a script (`python test_two_ranks.py RANK FOLDER`) this file is one of the two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import by_hand
import pytest
import torch
from by_hand import Plain
from helpers import only_run, refusal
from torch import Tensor, nn

from ghosttrain.config.schema import Config
from ghosttrain.engine import distributed
from ghosttrain.engine import evaluate as evaluate_module
from ghosttrain.engine import student as student_module
from ghosttrain.engine.checkpoint import read_checkpoint
from ghosttrain.engine.evaluate import HeldOutImages, evaluate
from ghosttrain.engine.track import Meter

RUNS = {
    "two_ranks": (2, by_hand.BATCH // 2, 0.0, "lamb"),
    "two_ranks_accumulated": (2, by_hand.BATCH // 4, 0.0, "lamb"),
    "two_ranks_accumulated_dropout": (2, by_hand.BATCH // 4, 0.5, "lamb"),
    "two_ranks_float32": (2, by_hand.BATCH // 4, 0.0, "sgd"),
    "two_ranks_batch_norm": (2, by_hand.BATCH // 2, 0.0, "lamb"),
    "two_ranks_sync_batch_norm": (2, by_hand.BATCH // 2, 0.0, "lamb"),
    "two_ranks_sync_batch_norm_float32": (2, by_hand.BATCH // 2, 0.0, "sgd"),
}
"""Name -> (ranks, micro-batch, dropout, optimizer)."""
LOGITS = [[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [1.0, 2.0, 0.0], [3.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
LABELS = [2, 0, 0, 0, 2]  # five images, four of them hits: rank 0 holds three, rank 1 two


def settings(name: str, micro_batch: int, optimizer: str) -> list[str]:
    given = [f"train.micro_batch={micro_batch}", f"optim={optimizer}"]
    given += ["optim.lr_batch=null"] * (optimizer == "sgd")
    return given + ["train.sync_bn=true"] * ("sync_batch_norm" in name)


# --- in each of the two processes -----------------------------------------------------------------


def one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["GHOSTTRAIN_RENDEZVOUS"] = f"file://{folder}/cache"
    distributed.start()
    torch.save(outputs_of(rank), folder / f"{rank}.pt")
    distributed.stop()
    images: list[int] = []
    add = Meter.add

    def counting_add(meter: Meter, losses: dict[str, Tensor], count: int) -> None:
        images.append(count)
        add(meter, losses, count)

    Meter.add = counting_add
    for name, (_, micro_batch, dropout, optimizer) in RUNS.items():
        os.environ["GHOSTTRAIN_RENDEZVOUS"] = f"file://{folder}/cache_{name}"
        dtype = torch.float32 if optimizer == "sgd" else torch.float64
        student = partial(Plain, dropout=dropout, dtype=dtype, batch_norm="batch_norm" in name)
        student_module.build_student = lambda _, classes, student=student: student(len(classes))
        given = settings(name, micro_batch, optimizer)
        images.clear()
        assert by_hand.run(folder / "images", folder / name, *given) == 0
        (folder / f"{name}{rank}.json").write_text(json.dumps(images))


def outputs_of(rank: int) -> dict[str, Any]:
    """Return what this rank gets of every function of `distributed`, of the meter and of
    `evaluate`."""
    outputs: dict[str, Any] = {"rank": distributed.rank(), "ranks": distributed.world_size()}
    outputs["sum"] = distributed.all_sum(torch.tensor([1, 10]) * (rank + 1))
    outputs["max"] = distributed.all_max(torch.tensor([3.0, 5.0]) * (1 - 2 * rank))
    distributed.validate_same("both", "same", "nothing to do")
    other = partial(distributed.validate_same, "each", f"of {rank}", "make it the same")
    outputs["refusal"] = refusal(other)
    outputs["broadcast"] = distributed.broadcast({"from": rank})

    norms = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3)).double()
    other = nn.BatchNorm1d(2)
    for buffer in [*norms.buffers(), *other.buffers()]:
        buffer.fill_(4 + 2 * rank)
    norms[0].running_mean[1] = -3.0 * rank
    distributed.average_buffers(norms, other)
    distributed.average_buffers(nn.Linear(2, 2))  # has none
    outputs["buffers"] = [*norms.buffers(), *other.buffers()]

    layer = nn.Linear(1, 1, bias=False)
    model = distributed.parallel(layer, torch.device("cpu"))
    parts = []
    for part in range(2):
        with distributed.no_sync(model, part == 0):
            model(torch.full((1, 1), 10.0**part * (1 + rank))).sum().backward()
        parts.append(layer.weight.grad.item())
    outputs["gradients"] = parts

    meter = Meter()
    for loss in (1.0, 4.0):
        meter.add({"loss": torch.tensor(loss + rank)}, 8)
        meter.end_step(torch.tensor(True))
    outputs["loss"] = meter.read()["loss"]

    class Batches:
        def batches(self, plan: Any) -> Any:
            return ((torch.tensor(i), torch.tensor([LABELS[k] for k in i])) for i in plan)

    class Table(nn.Module):
        def __init__(self, wrong_at: int | None = None) -> None:
            super().__init__()
            self.wrong_at = wrong_at

        def forward(self, numbers: Tensor) -> Tensor:
            logits = torch.tensor(LOGITS)
            if self.wrong_at is not None:
                logits[self.wrong_at, 0] += 0.5
            return logits[numbers]

    with mock.patch.object(evaluate_module, "eval_loader", lambda *_, **__: Batches()):
        held_images = HeldOutImages(range(len(LABELS)), Config(), torch.device("cpu"), batch=2)
    batches = list(held_images)
    outputs["images"] = [numbers.tolist() for numbers, _ in batches]
    models = {"ema": Table(), "fused": Table(wrong_at=3)}  # image 3 is rank 1's
    found = evaluate(models, batches, torch.device("cpu"), 5)
    tops = ("top1", "top5", "n")
    outputs["table"] = {k: {key: row[key] for key in tops} for k, row in found.table.items()}
    outputs["difference"] = found.difference
    return outputs


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    by_hand.make_images(folder / "images")
    command = [sys.executable, __file__]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GHOSTTRAIN_PARENT": str(os.getpid())}
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], env=env, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    while None in [rank.poll() for rank in ranks]:
        if any(rank.poll() for rank in ranks):  # the other one would wait for it
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    errors = [rank.communicate()[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return folder


@pytest.fixture(scope="module")
def outputs(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_sums_maxima_and_what_rank_0_says(outputs) -> None:
    for rank, got in enumerate(outputs):
        assert (got["rank"], got["ranks"]) == (rank, 2)
        assert got["sum"].tolist() == [3, 30]
        assert got["max"].tolist() == [3, 5]
        assert got["broadcast"] == {"from": 0}
        assert got["refusal"].startswith("each: of 1 on rank 1 (")  # on both ranks alike
        assert got["refusal"].endswith("; make it the same")
        assert got["loss"] == 3  # of 1, 4, 2 and 5


def test_floating_buffers_become_their_mean_and_counters_stay(outputs) -> None:
    for rank, got in enumerate(outputs):
        mean, var, count, *rest = got["buffers"]
        assert mean.tolist() == [5, -1.5] and var.tolist() == [5, 5]
        assert mean.dtype == torch.float64 and count == 4 + 2 * rank
        assert all(b.tolist() in ([5] * 2, [5] * 3) for b in rest if b.is_floating_point())


def test_gradients_are_averaged_with_the_last_part_only(outputs) -> None:
    assert [got["gradients"][0] for got in outputs] == [1, 2]
    assert [got["gradients"][1] for got in outputs] == [16.5, 16.5]  # of 11 and 22


def test_an_uneven_share_of_images_is_counted_image_by_image(outputs) -> None:
    assert [got["images"] for got in outputs] == [[[0, 2], [4]], [[1, 3]]]
    for got in outputs:
        expected = {"top1": 80, "top5": 100, "n": 5}
        assert got["table"] == {"ema": expected, "fused": expected}
        assert got["difference"] == 0.5


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Optimizer -> weights of one process and the whole batch at once, and of it accumulated."""
    states = {}
    for name, optimizer, dtype, micro_batch in [
        ("lamb", "lamb", torch.float64, by_hand.BATCH),
        ("lamb_accumulated", "lamb", torch.float64, by_hand.BATCH // 4),
        ("sgd", "sgd", torch.float32, by_hand.BATCH),
        ("sgd_accumulated", "sgd", torch.float32, by_hand.BATCH // 4),
        ("lamb_batch_norm", "lamb", torch.float64, by_hand.BATCH),
        ("lamb_batch_norm_accumulated", "lamb", torch.float64, by_hand.BATCH // 2),
        ("sgd_batch_norm", "sgd", torch.float32, by_hand.BATCH),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                student_module,
                "build_student",
                lambda _, classes, d=dtype, b="batch_norm" in name: Plain(
                    len(classes), dtype=d, batch_norm=b
                ),
            )
            root = folder / name
            given = settings(name, micro_batch, optimizer)
            assert by_hand.run(folder / "images", root, *given) == 0
        states[name] = state_of(root)
    return states


def state_of(root: Path) -> dict[str, Tensor]:
    saved = read_checkpoint(only_run(root) / "checkpoints" / "last.pt")
    average = {f"average {name}": value for name, value in saved["ema"]["model"].items()}
    return saved["student"] | average


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("lamb_accumulated", "lamb", 1e-12),
        ("two_ranks", "lamb", 1e-12),
        ("two_ranks_accumulated", "lamb", 1e-12),
        ("sgd_accumulated", "sgd", 1e-6),
        ("two_ranks_float32", "sgd", 1e-6),
        ("two_ranks_sync_batch_norm", "lamb_batch_norm", 1e-12),
        ("two_ranks_sync_batch_norm_float32", "sgd_batch_norm", 1e-6),
    ],
)
def test_ranks_and_accumulation_train_what_the_whole_batch_trains(
    folder, whole, name, reference, tolerance
) -> None:
    state = whole[name] if name in whole else state_of(folder / name)
    assert by_hand.difference(state, whole[reference]) < tolerance


def test_plain_batch_norm_of_two_ranks_differs_in_its_statistics_alone(folder, whole) -> None:
    """From one process with micro-batches of a rank's size: its statistics follow one after the
    other, the ranks' are averaged."""
    ours, theirs = (
        {name: value for name, value in state.items() if "running" not in name}
        for state in (state_of(folder / "two_ranks_batch_norm"),
                      whole["lamb_batch_norm_accumulated"])
    )  # fmt: skip
    assert by_hand.difference(ours, theirs) < 1e-12
    whole_batch = {k: v for k, v in whole["lamb_batch_norm"].items() if "running" not in k}
    assert by_hand.difference(ours, whole_batch) > 1e-6


def test_what_they_report_is_what_one_process_reports(folder, whole) -> None:
    reports = []
    for name in ("lamb", "lamb_accumulated", "two_ranks", "two_ranks_accumulated"):
        run = only_run(folder / name)
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses = [row["loss"] for row in rows if row["kind"] == "train"]
        reports.append((losses, json.loads((run / "result.json").read_text())["weights"]))
    for losses, weights in reports:
        assert losses == pytest.approx(reports[0][0], rel=1e-6)
        assert weights == reports[0][1]


def test_the_log_says_how_the_batch_is_cut(folder, whole) -> None:
    for name, line in {
        "lamb": "batch: 12 = 12 (seen by batch norm) x 1 accumulated x 1 process,",
        "lamb_accumulated": "batch: 12 = 3 (seen by batch norm) x 4 accumulated x 1 process,",
        "two_ranks_accumulated": "batch: 12 = 3 (seen by batch norm) x 2 accumulated x 2 processes",
    }.items():
        assert line in (only_run(folder / name) / "log.txt").read_text(), name


def test_the_images_of_all_ranks_are_counted(folder) -> None:
    for name, (ranks, micro_batch, *_) in RUNS.items():
        for rank in range(ranks):
            images = json.loads((folder / f"{name}{rank}.json").read_text())
            assert set(images) == {micro_batch * ranks}, name
            assert sum(images) == by_hand.STEPS * by_hand.BATCH, name


def test_each_rank_drops_out_by_a_seed_of_its_own(folder) -> None:
    name = "two_ranks_accumulated_dropout"
    ranks, micro_batch, dropout, _ = RUNS[name]
    _, raw, average = by_hand.loop(folder / "images", dropout, micro_batch, ranks)
    expected = raw | {f"average {k}": value for k, value in average.items()}
    assert by_hand.difference(state_of(folder / name), expected) < 1e-6


def test_statistics_of_batch_norm_are_the_mean_of_those_of_the_ranks(folder) -> None:
    """In the weights as in their average; the ranks' micro-batches differ."""
    _, raw, average = by_hand.loop(folder / "images", 0.0, by_hand.BATCH // 2, 2, batch_norm=True)
    expected = raw | {f"average {k}": value for k, value in average.items()}
    assert by_hand.difference(state_of(folder / "two_ranks_batch_norm"), expected) < 1e-6


def test_synchronized_batch_norm_sees_the_batch_of_all_ranks(folder) -> None:
    _, raw, average = by_hand.loop(folder / "images", 0.0, by_hand.BATCH, 1, batch_norm=True)
    expected = raw | {f"average {k}": value for k, value in average.items()}
    assert by_hand.difference(state_of(folder / "two_ranks_sync_batch_norm"), expected) < 1e-6


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), Path(sys.argv[2]))
