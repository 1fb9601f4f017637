"""Every format with one student of each family: scripts/test_formats [--again]

Makes an environment for each group of packages that do not go together (.formats/env-*, on top of
.venv, whose PyTorch they share), trains three small runs on the digits, and exports each in every
format: 224 px and 97 px with a fixed batch, 160x224 px with a free one where the format knows it,
and INT8 at the run's own 64 px. What is done is kept in .formats and not repeated. The table goes
to docs/deploy.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".formats"
ENVIRONMENTS = {
    "main": (["onnx", "torch_export"], []),
    "openvino": (["openvino"], ["openvino==2026.4.1", "nncf==3.4.0"]),
    "executorch": (["executorch", "coreml"], ["executorch==1.5.1", "torchao==0.18.0"]),
    "ncnn": (["ncnn"], ["pnnx==20261020", "ncnn==1.0.20261020"]),
    "litert": (["litert"], ["litert-torch==0.10.0"]),
}
"""Name -> its formats, what is installed for them."""
MODELS = ("ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050")
CASES = {
    "224": ["--size", "224", "--batch", "1"],
    "97": ["--size", "97", "--batch", "1"],
    "160x224": ["--size", "160x224"],
    "int8": ["--max-drop", "5"],  # three of 60 images
}
INT8 = ("onnx", "openvino", "executorch", "litert")
IMAGES = "60"
MARKS = "<!-- formats: begin -->", "<!-- formats: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="repeat what was done")
    again = parser.parse_args().again
    WORK.mkdir(exist_ok=True)
    for model in MODELS:
        train(model)
    rows = []
    for name, (formats, packages) in ENVIRONMENTS.items():
        python = environment(name, packages)
        for model in MODELS:
            for made in formats:
                for case in CASES:
                    if case != "int8" or made in INT8:
                        rows.append(row(python, model, made, case, again))
                        print(text_of(rows[-1]), flush=True)
    write_table(rows)
    return int(any(not row["ok"] for row in rows))


def call(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the work folder, on one thread, and return what it printed."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=WORK, env=environ, capture_output=True, text=True)
    if check and done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done


def environment(name: str, packages: list[str]) -> str:
    """Return the Python of an environment, which is made where it is missing."""
    base = ROOT / ".venv/bin/python"
    if not packages:
        return str(base)
    folder, done = WORK / f"env-{name}", WORK / f"env-{name}/installed"
    python = folder / "bin/python"
    if not done.exists() or done.read_text() != " ".join(packages):
        call(str(base), "-m", "venv", str(folder))
        site, shared = (
            call(str(p), "-c", "import site; print(site.getsitepackages()[0])").stdout.strip()
            for p in (python, base)
        )
        (Path(site) / "base.pth").write_text(f"{shared}\n")
        call(str(python), "-m", "pip", "install", "-q", *packages)
        done.write_text(" ".join(packages))
    return str(python)


def train(model: str) -> None:
    """Train the run of a model, or find it finished."""
    words = ["+recipe=baseline", f"model={model}", "train.epochs=6", f"run.name={model}"]
    call(str(ROOT / ".venv/bin/python"), "-m", "ghosttrain", *words)


def row(python: str, model: str, made: str, case: str, again: bool) -> dict:
    """Export once, or read what an earlier call found."""
    file = WORK / f"{model}-{made}-{case}.json"
    if file.exists() and not again:
        return json.loads(file.read_text())
    run = f"runs/{model}"
    verb = ["quantize", run] if case == "int8" else ["export", run]
    done = call(
        python, "-m", "ghosttrain", *verb, "--to", made, "--images", IMAGES, *CASES[case],
        check=False,
    )  # fmt: skip
    name = f"{made}_int8" if case == "int8" else made
    report = WORK / run / "export" / name / "report.json"
    found = {"model": model, "format": made, "case": case, "ok": done.returncode == 0}
    if report.exists():
        found["report"] = json.loads(report.read_text())
    if not found["ok"]:
        found["said"] = " ".join((done.stdout + done.stderr).split())[-400:]
    file.write_text(json.dumps(found))
    return found


def cells(row: dict) -> list[str]:
    """Return what stands in the table about one export."""
    report = row.get("report", {})
    batch = (report.get("input") or ["?"])[0]
    head = [row["model"], row["format"], row["case"], "any" if batch is None else str(batch)]
    if not report or (not row["ok"] and not report.get("verified")):
        return [*head, "no", "", "", "", "", row.get("said", "")[-80:]]
    size = f"{report['bytes'] / 1e6:.2f}"
    found = report.get("comparison")
    if found is None:
        return [*head, "yes", "", "", "", size, report["note"]]
    share = found["largest"] / found["scale"]
    top1 = f"{found['top1_exported']:.1f} / {found['top1']:.1f}"
    note = "" if row["ok"] else "rejected"
    return [*head, "yes", f"{share:.0e}", top1, f"{report['latency_ms']:.2f}", size, note]


def text_of(row: dict) -> str:
    return "  ".join(cells(row))


def write_table(rows: list[dict]) -> None:
    """Put the table between its marks in docs/deploy.md."""
    page = ROOT / "docs/deploy.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    head = ["student", "format", "px", "batch", "converted", "difference", "top-1: file / PyTorch",
            "ms", "MB", "note"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    page.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{after}")
    print(page)


if __name__ == "__main__":
    sys.exit(main())
