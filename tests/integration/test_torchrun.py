"""A sweep by torchrun on two nodes (two agents on this machine), whose data lie at other paths."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_images

ROOT = Path(__file__).resolve().parents[2]


def on_two_nodes(places: list[Path], *words: str) -> tuple[list[int], str]:
    """Return the exit codes of both agents, and what all processes printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                "--master_addr=127.0.0.1", f"--master_port={port}"]  # fmt: skip
    agents = [
        subprocess.Popen(
            [*torchrun, f"--node_rank={node}", "-m", "ghosttrain", *words],
            cwd=ROOT,
            env=os.environ | {"NODE_DATA": str(place)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, place in enumerate(places)
    ]
    try:
        out = "".join(agent.communicate(timeout=500)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    return [agent.returncode for agent in agents], out


@pytest.mark.slow
def test_two_nodes_run_what_is_missing_of_a_sweep(ghosttrain, tiny, tmp_path):
    nodes = [tmp_path / "a", tmp_path / "b"]
    make_images(nodes[0] / "images", classes=3)
    shutil.copytree(nodes[0], nodes[1])
    words = [*(w for w in tiny if not w.startswith("data.root")), "train.max_steps=1",
             "launch.device=cpu"]  # fmt: skip
    assert ghosttrain(*words, f"data.root={nodes[0] / 'images'}", "seed=1").code == 0
    (first,) = tmp_path.rglob("result.json")
    written = first.stat().st_mtime_ns

    words += ["-m", "data.root=$NODE_DATA/images"]
    codes, out = on_two_nodes(nodes, *words, "seed=1,2,3")
    assert codes == [0, 0] and "=== 3 of 3 runs finished" in out, out
    assert first.stat().st_mtime_ns == written
    results = sorted(tmp_path.rglob("result.json"))
    assert len(results) == 3 and {path.parent.name[:-1] for path in results} == {
        first.parent.name[:-1]
    }
    for path in results:
        if path != first:
            assert "x 2 processes" in (path.parent / "log.txt").read_text()
            assert json.loads(path.read_text())["weights"]["ema"]["n"] == 21

    (nodes[1] / "images" / "val" / "class2" / "0.JPEG").unlink()
    codes, out = on_two_nodes(nodes, *words, "seed=4")
    line = "data: 48 training and 20 held-out images with digest"
    assert codes[0] == 1 and line in out and "on rank 1 (" in out, out
    assert "every machine needs the same images in data.root" in out and "failed: " in out
