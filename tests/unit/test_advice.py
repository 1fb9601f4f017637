"""What the course of a run teaches: courses written by hand, and what is said of them."""

from __future__ import annotations

import pytest
from helpers import some_result

from ghosttrain.config.schema import Config
from ghosttrain.engine.advice import advice
from ghosttrain.files import write_json
from ghosttrain.study.lr_find import smoothed, suggested


def course(losses: list[float], tops: list[float], training: list[float]) -> list[dict]:
    held = [
        {"kind": "eval", "step": 10 * (k + 1), "ema_loss": loss, "ema_top1": top}
        for k, (loss, top) in enumerate(zip(losses, tops, strict=True))
    ]
    return held + [
        {"kind": "train", "step": k + 1, "loss": loss} for k, loss in enumerate(training)
    ]


FALLING = [1.0 - 0.008 * k for k in range(100)]
LEVEL = [80.0] * 10


def said(rows: list[dict], config: Config | None = None, **parts: object) -> list[str]:
    config = config or Config()
    result = some_result(config, **parts)
    result["classes"]["images"] = [600, 200]
    return advice(config, rows, result, 10)


def test_a_held_out_loss_that_rises_while_training_goes_on_falling() -> None:
    rising = [0.9, 0.6, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
    (line,) = said(course(rising, LEVEL, FALLING))
    assert "lowest after epoch 3 (0.400) and rose to 0.750" in line
    assert said(course(rising, LEVEL, FALLING[::-1])) == []  # training did not fall
    assert said(course([0.9, 0.6, 0.4, *[0.42] * 7], LEVEL, FALLING)) == []
    assert said(course(rising[:5], LEVEL[:5], FALLING)) == []  # too few to judge


def test_a_run_that_was_still_getting_better() -> None:
    losses = [1 - 0.05 * k for k in range(10)]
    (line,) = said(course(losses, [50.0, 55, 60, 62, 64, 66, 68, 70, 73, 76], FALLING))
    assert "still getting better at its end (held-out top-1 69.00 -> 74.50 %" in line
    assert said(course(losses, [*[80.0] * 8, 80.3, 80.4], FALLING)) == []  # within its error


@pytest.mark.parametrize(
    ("macs", "size", "mixup", "loss", "parts"),
    [
        (499e6, 224, 0.8, "none", ["Mixup"]), (501e6, 224, 0.8, "none", []),
        (499e6, 224, 0.2, "kl", []), (49e6, 224, 0.0, "kl", ["a teacher"]),
        (49e6, 224, 0.8, "kl", ["Mixup", "a teacher"]), (49e6, 96, 0.8, "kl", []),
    ],
)  # fmt: skip
def test_what_others_found_for_small_networks(macs, size, mixup, loss, parts) -> None:
    config = Config()
    config = config.model_copy(update={
        "augment": config.augment.model_copy(update={"mixup_alpha": mixup}),
        "distill": config.distill.model_copy(update={"name": loss}),
    })  # fmt: skip
    model = some_result(config)["model"] | {"macs_fused": macs, "eval_size": size}
    lines = said([], config, model=model)
    assert len(lines) == len(parts)
    assert all(part in line and "advice: " in line for part, line in zip(parts, lines, strict=True))


@pytest.mark.parametrize(("teacher", "words"), [(10.0, "note: on the same"), (50.0, "on the same")])
def test_a_teacher_is_compared_on_the_same_images(tmp_path, teacher, words) -> None:
    taught = some_result(Config())
    taught["weights"] = {k: row | {"top1": teacher} for k, row in taught["weights"].items()}
    write_json(tmp_path / "result.json", taught)
    config = Config()
    config = config.model_copy(update={
        "teacher": config.teacher.model_copy(update={"weights": str(tmp_path)}),
        "distill": config.distill.model_copy(update={"name": "kl"}),
    })  # fmt: skip
    (line,) = said([], config)
    assert line.startswith(words) and f"its teacher reaches {teacher:.2f} % top-1" in line
    half = {"images": 8, "digest": "other"}
    assert said([], config, data={"train": half, "held_out": half}) == []
    (tmp_path / "result.json").write_text("{")
    assert said([], config) == []


def test_the_rate_at_which_the_loss_falls_fastest() -> None:
    rates = [10 ** (-5 + k / 10) for k in range(50)]
    losses = [2.0] * 20 + [2 - 0.15 * k for k in range(1, 11)] + [0.5 + 0.3 * k for k in range(20)]
    assert rates[20] <= suggested(rates, losses) <= rates[28]
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3, 3, 3])
    first, second = smoothed([1.0, 2.0])
    assert first == 1 and second == pytest.approx((0.9 * 0.1 * 1 + 0.1 * 2) / (1 - 0.81))
