"""No module imports another one that leads back to it: not inside a folder, not for types alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def module_names() -> dict[str, Path]:
    """Return the modules of the package by name."""
    names = {}
    for path in (ROOT / "ghosttrain").rglob("*.py"):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported(path: Path, names: dict[str, Path]) -> set[str]:
    """Return the package's modules that a file imports anywhere: in functions, for types, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in members if name in names}
            if any(name not in names for name in members):
                found.add(node.module)
    return {name for name in found if name in names}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle, or none."""
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := visit(other, [*above, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_imports_go_in_a_circle() -> None:
    names = module_names()
    graph = {name: imported(path, names) for name, path in names.items()}
    assert len(graph) > 70 and "ghosttrain.models.collapse.step" in graph
    assert "ghosttrain.api" in graph["ghosttrain"]  # for types alone
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_what_classifies_imports_no_detector() -> None:
    """torchvision's detectors cost seconds, and classification has no use for them."""
    modules = [
        "deploy.export", "deploy.latency_of", "deploy.pareto", "deploy.quantize",
        "deploy.runtime", "engine.load", "study.bench_step",
    ]  # fmt: skip
    lines = [f"import ghosttrain.{name}" for name in modules]
    lines += ["import sys", 'assert "torchvision.models.detection" not in sys.modules']
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
