"""What the main job imports before its first step: no package that takes seconds."""

from __future__ import annotations

from pathlib import Path

from helpers import load_script

ROOT = Path(__file__).parents[2]
HEAVY = {"timm", "torchvision", "sklearn", "scipy", "torch._dynamo", "sympy", "huggingface_hub",
         "wandb", "pandas", "matplotlib", "torch.utils.flop_counter"}  # fmt: skip


def test_the_main_job_imports_nothing_heavy_that_it_does_not_need() -> None:
    first_step = load_script("first_step")
    smaller = ("model=ghostnetv3_050", "train.global_batch=16", "teacher.check_samples=64")
    found = first_step.measure(ROOT, (*first_step.JOB, *smaller))
    first, end = ({*found[key]["modules"]} for key in ("first", "end"))
    assert {"torch", "ghosttrain.engine.train"} <= first
    assert not first & HEAVY
    # At the end pictures are drawn, and MACs are counted by the formulas of torch.
    assert end & HEAVY == {"matplotlib", "torch.utils.flop_counter"}
    assert 0 < found["first"]["cpu"] < found["end"]["cpu"] <= found["whole"]["cpu"]
