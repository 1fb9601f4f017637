"""What the main job imports before its first step: no package that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("timm", "torchvision", "sklearn", "scipy", "torch._dynamo", "sympy", "huggingface_hub",
         "wandb", "pandas", "torch.utils.flop_counter")  # fmt: skip
SCRIPT = """
import sys
from ghosttrain.cli import main
from ghosttrain.optim.ema import Ema

update = Ema.update

def first(self, model):
    update(self, model)
    Ema.update = update
    print("FIRST STEP", *sys.modules)

Ema.update = first
code = main(sys.argv[1:])
print("END", *sys.modules)
sys.exit(code)
"""


def test_the_main_job_imports_nothing_heavy_that_it_does_not_need(tmp_path: Path) -> None:
    job = ["+recipe=compact_kd", "model=ghostnetv3_050", "teacher.check_samples=64",
           "train.global_batch=16", "train.max_steps=1", f"run.root={tmp_path}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *job],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {line.split(" ", 1)[0]: set(line.split()) for line in done.stdout.splitlines() if line}
    first, end = found["FIRST"], found["END"]
    assert {"torch", "ghosttrain.engine.train"} <= first
    assert not first & {*HEAVY, "matplotlib"}
    # The formulas of MACs are torch's; pictures are drawn at the end.
    assert end & {*HEAVY, "matplotlib"} == {"matplotlib", "torch.utils.flop_counter"}
