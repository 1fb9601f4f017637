"""A new loss, also one that compares features, is one function with its settings and one file: the
steps of CONTRIBUTING.md, with its text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FUNCTION, SETTINGS = (
    re.search(rf"```{language}\n(.*?)```", GUIDE, re.S)[1]  # type: ignore[index]
    for language in ("python", "yaml")
)


def test_a_loss_of_features_is_one_function_and_one_file(tmp_path: Path) -> None:
    for folder in ("ghosttrain", "conf", "recipes"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    with open(tmp_path / "ghosttrain" / "distill" / "losses.py", "a") as file:
        file.write(f"\n\n{FUNCTION}")
    (tmp_path / "conf" / "distill" / "feature_mse.yaml").write_text(SETTINGS)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ghosttrain", *args],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    digits = [
        "+recipe=compact_kd", "model=mobilenetv2_050", "teacher=digits", "data.train_size=32",
        "data.eval_size=32", "teacher.check_samples=64", "train.max_steps=2", "data.workers=0",
        "tracker.log_every=1",
    ]  # fmt: skip
    losses = {}
    for scale in ("1", "3"):
        done = run(*digits, "distill=feature_mse", f"distill.scale={scale}", f"run.name=s{scale}")
        assert done.returncode == 0, done.stderr
        (metrics,) = tmp_path.rglob(f"s{scale}/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses[scale] = next(row for row in rows if row["kind"] == "train")
    assert losses["3"]["feature_mse"] / losses["1"]["feature_mse"] > 2.99
    assert losses["1"]["feature_mse"] > 0 and "label" in losses["1"]
    wrong = run(*digits, "distill=kl", "distill.scale=3")
    assert wrong.returncode == 2 and "it is a setting of feature_mse" in wrong.stderr
    assert "scale" in run("help", "distill").stdout
