"""The Python of README runs as it stands; its and the docs' commands run for two steps, on small
data and a teacher that is here (slow)."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))
COMMANDS = importlib.import_module("test_docs").COMMANDS
SMALL = [
    "train.max_steps=2", "train.micro_batch=null", "train.global_batch=16", "data.workers=0",
    "teacher.check_samples=0", "launch.device=cpu",
]  # fmt: skip
PHOTOS = ["data=folder", "data.train_size=64", "data.eval_size=64", "launch.nproc=1"]
BENCH = {
    "optim": ["--rounds", "1"],
    "data": ["--rounds", "1", "--images", "16", "data.train_size=64"],
    "distill": ["--rounds", "1", "--images", "16", "train.micro_batch=2", "data.train_size=64"],
    "step": ["--rounds", "1", "train.micro_batch=2", "data.train_size=64"],
}


DETECT = [
    "train.max_steps=2", "train.global_batch=4", "data.train_size=64", "data.eval_size=64",
    "data.workers=0", "teacher.trust=true", "launch.device=cpu",
]  # fmt: skip


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ghosttrain", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_python_of_readme_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"{block}\nprint(run, len(list(deployed.parameters())))"],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.rglob("result.json")
    assert str(result.parent) in done.stdout and "epoch 1/1" in done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    """A folder with finished runs of two steps, on digits and on photos (`photos`), and a cache of
    two draws.
    """
    folder = tmp_path_factory.mktemp("docs")
    words = ["+recipe=compact_kd", "model=ghostnetv3_050", *SMALL]
    assert run([*words, "run.name=RUN"], folder).returncode == 0
    teacher = ["+recipe=baseline", "model=mobilenetv2_050", f"data.root={photo_folder}", *PHOTOS]
    assert run([*teacher, *SMALL, "run.name=photos"], folder).returncode == 0
    cache = ["cache", *words, "cache.dir=teacher_cache", "cache.draws=5"]
    assert run(cache, folder).returncode == 0
    for name in ("ssdlite", "retinanet"):
        detect = ["detect", f"+recipe=detect_{name}", f"run.name={name}", *DETECT]
        assert run(detect, folder).returncode == 0
    return folder


DEPLOY = {
    "export": ["--images", "9"],
    "quantize": ["--images", "9", "--max-drop", "100"],
    "latency": ["--rounds", "3"],
    "pareto": [],
    "publish": [],
}
"""Verb -> what makes it short."""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str, finished: Path, photo_folder: Path) -> None:
    words = shlex.split(command, comments=True)
    if "hydra/launcher=submitit_slurm" in words:
        pytest.skip("needs a cluster; that it composes is tested")
    if words[:2] == ["eval", "--weights"]:
        pass
    elif words[0] in ("eval", "fuse", "wrong", "predict"):
        words[1] = words[1].replace("RUN", "runs/RUN")
        words = [str(photo_folder / "val") if w in ("photo.jpg", "folder") else w for w in words]
    elif words[:2] in (["detect", "eval"], ["detect", "show"]):
        words[2] = "runs/ssdlite"
    elif words[0] == "detect":
        words = [w for w in words if w.partition("=")[0] not in ("data", "data.root")] + DETECT
        words = [w.replace("=RUN", "=runs/retinanet") for w in words]
        words += ["run.name=anew"] * (len(words) == 1 + len(DETECT))
    elif words[0] == "bench":
        kept = [w for w in words[2:] if "=" in w and "cuda" not in w]
        words = [*words[:2], *kept, *BENCH[words[1]]]
    elif words[0] == "study":
        words += [*SMALL, "seed=0,1"] if words[1] != "list" else []
    elif words[0] in ("cost", "doctor"):
        pass
    elif words[0] == "data":
        if "+recipe=detect_ssdlite" in words:
            words = [w for w in words if not w.startswith(("data=", "data.root="))]
        words = [w.replace("/path", str(photo_folder / "train")) for w in words]
    elif words[0] in ("report", *DEPLOY):
        if "litert" in command:
            pytest.importorskip("litert_torch")
        boxes = "--nms" in words or "onnx_nms" in command
        words = [re.sub(r"^RUN", f"runs/{'ssdlite' if boxes else 'RUN'}", w) for w in words]
        words += DEPLOY.get(words[0], [])
    elif words[0] != "cache" or words[1].startswith("+"):
        verb = [word for word in words if word in ("cache", "lr_find")]
        words = [w.replace("runs/teacher", "runs/photos") for w in words]
        one_set = any(word.startswith(("data.split", "data.fold")) for word in words)
        root = photo_folder / "train" if one_set else photo_folder
        words = [re.sub(r"^data.root=.*", f"data.root={root}", w) for w in words]
        words = [re.sub(r"(=[\w.]+),.*", r"\1", w) if w.startswith("seed") else w for w in words]
        words = [w for w in words if w.partition("=")[0] not in ("data", "launch.nproc")]
        own = {word.partition("=")[0] for word in words}
        if "data.root" in own:
            words += PHOTOS
            taught = any("compact_kd" in word for word in words)
            words += ["teacher=efficientnet_lite0"] * (taught and "teacher" not in own)
        words += [word for word in SMALL if word.partition("=")[0] not in own or "train." in word]
        if "run.name=longer" in words:  # its length is what it shows
            words.remove("train.max_steps=2")
        words = verb + [word for word in words if word not in verb]
        if "lr_find" in verb:
            words += ["--steps", "10"]
    done = run(words, finished)
    assert done.returncode == 0, f"{words}\n{done.stderr[-2000:]}"
