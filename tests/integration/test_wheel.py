"""The built wheel works from any folder: it carries conf/, recipes/, the digits teacher and the
sources of the C++ kernels."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_build_install_and_two_steps(tmp_path):
    dist, site, home = (tmp_path / name for name in ("dist", "site", "home"))
    home.mkdir()
    # The source distribution, and the wheel from it.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), cwd=ROOT)
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/METADATA")))
    with tarfile.open(source) as archive:
        folder = source.name.removesuffix(".tar.gz")
        (same,) = (archive.extractfile(f"{folder}/{name}") for name in ["PKG-INFO"])
        assert same is not None and same.read() == metadata
        assert f"{folder}/LICENSE" in archive.getnames()
    about = Metadata.from_email(metadata, validate=True)  # as a package index does
    assert about.name == "ghosttrain" and about.license_expression == "Apache-2.0"
    assert about.description and about.description.startswith("# ghosttrain")
    for name in (
        "ghosttrain/conf/config.yaml",
        "ghosttrain/recipes/compact_kd.yaml",
        "ghosttrain/recipes/ablation/no_ema.yaml",
        "ghosttrain/models/digits_teacher.safetensors",
        "ghosttrain/native/optim.cpp",
        "ghosttrain/py.typed",
    ):
        assert name in names
    assert not any(name.startswith(("tests", "conf", "recipes")) for name in names)

    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    run(*pip, "--target", str(site), str(wheel), cwd=home)
    isolated = {"PYTHONPATH": str(site)}
    where = run(
        sys.executable, "-c", "import ghosttrain; print(ghosttrain.__file__)", cwd=home, **isolated
    )
    assert Path(where.strip()).is_relative_to(site)
    train = [sys.executable, "-m", "ghosttrain", "+recipe=compact_kd", "model=ghostnetv3_050"]
    out = run(*train, "train.max_steps=2", cwd=home, **isolated)
    assert "teacher: digits" in out and "<- the result" in out
    (result,) = home.rglob("result.json")
    assert json.loads(result.read_text())["steps"] == 2
