"""The harness of the benchmarks: turns, medians, ratios; and the tables of the three parts."""

from __future__ import annotations

import pytest
import timm
import torch

from ghosttrain.data.policies import RANDAUGMENT
from ghosttrain.study.harness import Quartiles, Time, paired_ratios, quartiles, take_turns, timed
from ghosttrain.study.photos import two_photos, write_crops

CPU = torch.device("cpu")


def sides(order: list[tuple[str, int]], **factors: float):
    """Sides whose times are the round's number times a factor; they note when they are called."""

    def side(name: str, factor: float):
        def call(number: int) -> dict[str, Time]:
            order.append((name, number))
            first = Time(factor * number, 10 * factor * number)
            return {"first": first, "both": first + first}

        return call

    return {name: side(name, factor) for name, factor in factors.items()}


def test_sides_take_turns_and_the_first_rounds_do_not_count() -> None:
    order: list[tuple[str, int]] = []
    times = take_turns(sides(order, a=1.0, b=3.0), rounds=5, warm_up=2, threads=1)
    assert order == [(name, number) for number in range(7) for name in "ab"]
    assert times["a", "first"].cpu == (2, 3, 4, 5, 6)
    assert times["b", "first"].wall == (60, 90, 120, 150, 180)
    assert times["b", "both"].cpu == (12, 18, 24, 30, 36)
    assert quartiles(times["a", "first"].cpu) == (3, 4, 5)
    assert times["b", "first"].ratio(times["a", "first"], CPU) == 3
    assert times["b", "first"].clock(torch.device("cuda")) == times["b", "first"].wall


def test_there_and_back_every_second_round_is_reversed() -> None:
    order: list[tuple[str, int]] = []
    take_turns(sides(order, a=1.0, b=1.0), 2, warm_up=1, threads=1, there_and_back=True)
    assert "".join(name for name, _ in order) == "baabba"


def test_threads_are_restored_also_when_a_side_fails() -> None:
    torch.set_num_threads(2)
    seen = []

    def fails(number: int) -> dict[str, Time]:
        seen.append(torch.get_num_threads())
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        take_turns({"a": fails}, 1, 0, threads=1)
    assert seen == [1] and torch.get_num_threads() == 2


def test_quartiles_and_ratios_by_hand() -> None:
    assert quartiles([7.0]) == Quartiles(7, 7, 7)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]).text(1) == "3.0 (2.0 to 4.0)"
    assert paired_ratios([2.0, 6.0, 12.0], [1.0, 2.0, 3.0]) == (2.5, 3.0, 3.5)


def test_a_call_is_timed_by_both_clocks() -> None:
    calls: list[int] = []
    time = timed(lambda: calls.append(1), CPU)
    assert calls == [1] and time.cpu >= 0 and time.wall > 0


def test_bench_optim_prints_a_row_per_part_and_side(ghosttrain) -> None:
    outcome = ghosttrain("bench", "optim", "model=ghostnetv3_050", "--rounds", "2")
    assert outcome.code == 0, outcome.err
    head, _, _, titles, _, *rows = outcome.out.splitlines()
    assert "ghostnetv3_050: 978 tensors, 3.395 M parameters; CPU" in head
    assert ", 1 thread, C++ kernels o" in head and f"torch {torch.__version__}" in head
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["LAMB"] * 3 + ["EMA"] * 3 + ["both"] * 3
    assert [row[1] for row in cells[:3]] == ["ours", "timm", "timm, no clipping"]
    assert all((row[4] == "1.00") or row[1] != "ours" for row in cells)


@pytest.mark.slow
def test_bench_distill_prints_a_row_per_comparison(ghosttrain) -> None:
    outcome = ghosttrain(
        "bench", "distill", "data.train_size=64", "train.global_batch=4", "--images", "8",
        "--rounds", "1", "teacher=efficientnet_lite0",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    head, second, _, titles, _, *rows = outcome.out.splitlines()
    assert "mobilenetv2_050 and tf_efficientnet_lite0: a pass over 8 JPEG photos" in head
    assert "cached: features:4" in second and titles.startswith("| side")
    assert len(rows) == 6 and "epoch, cached outputs" in rows[1]


def test_bench_data_prints_speed_stages_distances_and_workers(ghosttrain) -> None:
    small = ["data.train_size=32", "data.eval_size=32", "--images", "8", "--rounds", "1"]
    outcome = ghosttrain("bench", "data", *small)
    assert outcome.code == 0, outcome.err
    head, second, *tables = outcome.out.split("\n")
    assert head.startswith("8 JPEG files (500x375 crops of photographs") and "batches of 8" in head
    assert "JPEGs decoded by simplejpeg" in second and f"timm {timm.__version__}" in second
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in tables if row]
    speeds = [row for row in cells if row[0] in ("training", "validation")]
    assert [row[1] for row in speeds] == ["ours", "timm, prefetcher", "timm, each image"] * 2
    for part in (speeds[:3], speeds[3:]):  # the ratio is that of the times beside it
        own = float(part[0][3].split()[0])
        for row in part:
            theirs, ratio = float(row[3].split()[0]), float(row[4].split()[0])
            assert abs(theirs / own - ratio) < 0.02 * ratio + 0.01
    shares = {row[0]: int(row[2]) for row in cells if len(row) == 3 and row[2].isdigit()}
    assert {"decode", "RandAugment", "normalise"} <= set(shares)
    assert 95 <= sum(shares.values()) <= 105
    distances = {row[0]: int(row[1]) for row in cells if len(row) == 3 and "." in row[2]}
    assert set(RANDAUGMENT) | {"decode", "crop, resize"} == set(distances)
    assert distances.pop("crop, resize") <= 2 and max(distances.values()) <= 1


def test_bench_data_of_ones_own_images(ghosttrain, tmp_path) -> None:
    write_crops(two_photos(), tmp_path, 6, classes=2)
    words = ["bench", "data", f"data.root={tmp_path}", "--images", "8", "--rounds", "1"]
    few = ghosttrain(*words)
    assert few.code == 2 and "needs --images 8 image files" in few.err and "has 6" in few.err
    one_set = ["bench", "data", f"data.root={tmp_path / 'train'}", "--rounds", "1", "--images", "4"]
    small = ["data.train_size=32", "data.eval_size=32"]
    done = ghosttrain(*one_set, *small, "data.split=0.3")
    assert done.code == 0, done.err
    assert done.out.startswith(f"4 JPEG files ({tmp_path / 'train'})")
    for word in ("data.workers=2", "launch.device=cpu"):
        refused = ghosttrain(*one_set, word)
        assert refused.code == 2 and "does nothing in bench data" in refused.err
