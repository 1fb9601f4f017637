"""What strangers supply (runs, stores, downloaded files) is data: no code of theirs is run. Where
that is a matter of which function is called, the sources of the package are looked through.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import refusal

from ghosttrain.deploy.formats import torch_export
from ghosttrain.engine.checkpoint import read_checkpoint
from ghosttrain.files import PACKAGE
from ghosttrain.models.weights.files import read_state

SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
OWN_BATCHES = "data/loader.py"
"""Unpickles the batches of its own workers."""


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield file, dotted name of what is called, and the call, of the whole package."""
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield name, ast.unparse(node.func), node


def option(call: ast.Call, name: str) -> object:
    found = [word.value for word in call.keywords if word.arg == name]
    return ast.literal_eval(found[0]) if found else None


def test_nothing_is_unpickled_but_batches_of_own_workers():
    seen = set()
    for file, name, call in calls():
        if name.endswith(("torch.load", "jit.load", "np.load", "numpy.load")):
            safe = option(call, "weights_only") is True or option(call, "allow_pickle") is False
            assert safe, (file, ast.unparse(call))
            seen.add(name)
        assert not name.endswith((".Unpickler", "pickle.load", "joblib.load", "read_pickle")), file
        if name.endswith("pickle.loads"):
            assert file == OWN_BATCHES
            seen.add(name)
        if name.startswith("yaml.") and name not in ("yaml.safe_load", "yaml.safe_dump"):
            assert name in ("yaml.YAMLError", "yaml.load") and "unsafe" not in ast.unparse(call)
            assert name == "yaml.YAMLError" or ast.unparse(call.args[1]) == "_Settings", file
        assert not name.endswith(("full_load", "unsafe_load")), file
    assert seen == {"torch.load", "np.load", "pickle.loads"}
    modules = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
    for file, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in modules for name in names):
                assert file in (OWN_BATCHES, "deploy/formats/torch_export.py"), (file, names)


def test_no_shell_is_started_and_no_text_is_run():
    for file, name, call in calls():
        assert option(call, "shell") in (None, False), (file, ast.unparse(call))
        assert name not in ("eval", "exec", "compile", "os.system", "os.popen"), file
        assert not name.endswith(("getoutput", "getstatusoutput", "subprocess_shell")), file
        if name.startswith("subprocess.") and call.args:  # a list: no shell reads it
            assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr), (file, name)


class Exploit:
    """What a pickle may hold: unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def exploit(tmp_path: Path) -> Iterator[Exploit]:
    """Checks afterwards that it was not run."""
    yield Exploit(tmp_path / "was run")
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("plain", [False, True], ids=["archive", "pickle"])
def test_a_checkpoint_or_weights_that_would_run_code_are_refused(tmp_path, exploit, plain):
    path = tmp_path / "last.pt"
    if plain:
        path.write_bytes(pickle.dumps({"state_dict": exploit}))
    else:
        torch.save({"state_dict": exploit}, path)
    refusal(lambda: read_state(path), str(path))
    with pytest.raises(Exception, match=r"damaged|read"):
        read_checkpoint(path)


def rewritten(source: Path, target: Path, change: dict[str, bytes]) -> None:
    """Copy an archive with some of its records changed or added, by how their names end."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        top = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            ends = [end for end in change if name.endswith(end)]
            new.writestr(name, change.pop(ends[0]) if ends else old.read(name))
        for name, content in change.items():
            new.writestr(f"{top}/{name}", content)


def test_an_exported_program_that_holds_pickles_is_refused(tmp_path, exploit):
    """PyTorch reads weights, constants and example inputs of an archive by pickle where that says
    so."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.shift = torch.zeros(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + self.shift

    good = tmp_path / "good.pt2"
    torch_export.convert(Net(), torch.zeros(1, 2), good, "fp32", False)
    assert torch_export.load(good).shape == (1, 2)
    pickled = io.BytesIO()
    torch.save((exploit,), pickled)
    with zipfile.ZipFile(good) as archive:
        names = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    changes = [{"model.pt": pickled.getvalue()}]
    for part in ("weights", "constants"):
        (config,) = (name for name in names if name.endswith(f"{part}_config.json"))
        record = json.loads(names[config])
        (first, *_) = record["config"].values()
        first["use_pickle"] = True
        payload = f"data/{part}/{first['path_name']}"
        changes.append({config: json.dumps(record).encode(), payload: pickled.getvalue()})
        if part == "constants":
            first |= {"path_name": "opaque_obj_0", "use_pickle": True}
            content = pickle.dumps(exploit)
            changes.append(
                {config: json.dumps(record).encode(), "data/constants/opaque_obj_0": content}
            )
    for number, change in enumerate(changes):
        bad = tmp_path / f"{number}.pt2"
        rewritten(good, bad, dict(change))
        refusal(lambda bad=bad: torch_export.load(bad), "pickled objects", "export the run again")
    rewritten(good, tmp_path / "code.pt2", {"data/aotinductor/model/a.so": b"\x7fELF"})
    refusal(lambda: torch_export.load(tmp_path / "code.pt2"), "machine code")
