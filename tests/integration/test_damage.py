"""Every file that a run or a cache reads, with a flipped bit, cut short, with a page of zeros: one
line, or the same content; never a stack trace, never another result in silence."""

from __future__ import annotations

import random
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import make
from helpers import make_images, only_run

from ghosttrain.cli import main
from ghosttrain.distill.cache import open_cache
from ghosttrain.engine.checkpoint import content_digests, read_checkpoint
from ghosttrain.engine.rows import read_rows
from ghosttrain.engine.run_files import damaged_products, read_config, read_provenance, read_result
from ghosttrain.engine.weights_file import read_weights
from ghosttrain.errors import UserError
from ghosttrain.files import Damaged, write_json
from ghosttrain.models.weights.files import read_about, read_state

CASES = 50
"""Of each file."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and a cache of teacher outputs."""
    root = tmp_path_factory.mktemp("made")
    make_images(root / "d", classes=3, train=4, val=2)
    words = [
        "+recipe=compact_kd", "model=mobilenetv2_050", "reparam=none", "teacher=none",
        "distill=none", "data=folder", f"data.root={root / 'd'}", "data.train_size=32",
        "data.eval_size=32", "data.workers=0", "train.global_batch=4", "train.epochs=1",
        "tracker.log_every=1", "train.save_every=2steps", f"run.root={root / 'runs'}",
    ]  # fmt: skip
    assert main(words) == 0
    make(root / "cache")
    return root


def damages(whole: bytes, seed: str) -> Iterator[bytes]:
    """Flip a bit, cut, or zero a page of 512 bytes; at the ends, where formats keep their own
    data, as often as elsewhere."""
    draw, size = random.Random(seed), len(whole)

    def place() -> int:
        near = min(size, 2000)
        ends = [draw.randrange(near), size - 1 - draw.randrange(near), draw.randrange(size)]
        return draw.choice(ends)

    for number in range(CASES):
        content = bytearray(whole)
        if number % 5 < 3:
            content[place()] ^= 1 << draw.randrange(8)
        elif number % 5 == 3:
            del content[place() :]
        else:
            begin = place()
            content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))
        yield bytes(content)


def weights(path: Path) -> Any:
    tensors, about = read_weights(path)
    assert read_about(path, "x") is not None
    assert content_digests(read_state(path)) == content_digests(tensors)
    return content_digests(tensors), about


def outputs(path: Path) -> Any:
    cache = open_cache(
        path if path.is_dir() else next(p for p in path.parents if p.name == "cache")
    )
    samples = range(cache.info.samples)
    return [cache.read(draw, samples).tolist() for draw in range(cache.info.draws)], cache.info


READERS: dict[str, Callable[[Path], Any]] = {
    "runs/config.yaml": lambda path: read_config(path.parent),
    "runs/result.json": lambda path: read_result(path.parent),
    "runs/provenance.json": lambda path: read_provenance(path.parent),
    "runs/metrics.jsonl": lambda path: read_rows(path.parent),
    "runs/checkpoints/last.pt": lambda path: content_digests(read_checkpoint(path)),
    "runs/model.safetensors": weights,
    "runs/checkpoints/best.safetensors": weights,
    "cache/cache.json": outputs,
    "cache/tables.safetensors": outputs,
    "cache/draws/00000/000000.shard": outputs,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_damage_is_one_line_or_changes_nothing(made: Path, name: str) -> None:
    top, _, below = name.partition("/")
    path = (only_run(made / "runs") if top == "runs" else made / "cache") / below
    whole, read = path.read_bytes(), READERS[name]
    expected, found = read(path), 0
    assert whole and (expected is None or expected)
    try:
        for number, content in enumerate(damages(whole, name)):
            path.write_bytes(content)
            try:
                now = read(path)
            except (UserError, Damaged, OSError) as error:
                assert str(error) and "\n" not in str(error), (name, number)
                found += 1
                continue
            if name == "runs/metrics.jsonl":
                rows, damaged = now
                assert [row for row in expected[0] if row in rows] == rows, number
                lost = len(expected[0]) - len(rows)
                # What is lost at the end is said by the run that goes on (test_track).
                assert lost <= 1 or damaged or rows[-1:] != expected[0][-1:], number
                found += lost > 0
            elif content != whole:
                assert now == expected, (name, number)
    finally:
        path.write_bytes(whole)
    assert found > CASES / 2
    assert read(path) == expected


def test_a_finished_run_with_a_damaged_file_ends_as_it_was(made: Path, tmp_path, capsys) -> None:
    """By the command line: each product damaged in turn, and each input of `eval` and `fuse`."""
    run = only_run(made / "runs")
    whole = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    before = read_result(run)
    config = read_config(run)
    words = shlex.split(read_provenance(run)["command"])[3:]
    for name in ("model.safetensors", "result.json", "card.md"):
        path = run / name
        path.write_bytes(whole[path][:-20])
        if name == "model.safetensors":
            for verb in ("eval", "fuse"):
                assert main([verb, str(run)]) == 2
                assert f"{path} cannot be read as weights" in capsys.readouterr().err
        assert main(words) == 0
        out = capsys.readouterr().out
        assert "made anew from the last checkpoint" in out
        after = read_result(run)
        assert after["weights"] == before["weights"] and damaged_products(run, after) == []
        assert (run / "model.safetensors").read_bytes() == whole[run / "model.safetensors"]
    assert main(words) == 0 and capsys.readouterr().out.startswith("finished: ")
    assert read_config(run) == config
    result = read_result(run)
    other = {kind: row | {"top1": 0.0} for kind, row in result["weights"].items()}
    assert main(["eval", str(run)]) == 0 and capsys.readouterr().out.count("as reported") == 3
    write_json(run / "result.json", result | {"weights": other})
    assert main(["eval", str(run)]) == 1
    assert f"these are not the numbers of {run / 'result.json'}" in capsys.readouterr().out
    last = run / "checkpoints" / "last.pt"
    (run / "result.json").unlink()
    last.write_bytes(b"\0" * 100)
    assert main(words) == 0  # the one before is used: the steps after it run again
    out = capsys.readouterr().out
    assert f"{last} is damaged (" in out and "the one before is used" in out
    assert (last.parent / "damaged-last.pt").read_bytes() == b"\0" * 100  # not kept as a good one
    assert read_result(run)["weights"] == before["weights"]
    assert (run / "model.safetensors").read_bytes() == whole[run / "model.safetensors"]
    shutil.rmtree(run)
    for path, content in whole.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_hostile_files_are_refused_at_once(made: Path, tmp_path: Path) -> None:
    """A checkpoint that claims a tensor of a terabyte in a kilobyte, and one nested too deep."""
    nested: Any = []
    for _ in range(3000):
        nested = [nested]
    for content in ({"student": nested}, {"student": torch.zeros(1).expand(10**12)}):
        try:
            torch.save(content | {"sha256": {}}, tmp_path / "last.pt")
        except RecursionError:
            continue
        with pytest.raises((UserError, OSError)):
            read_checkpoint(tmp_path / "last.pt")
