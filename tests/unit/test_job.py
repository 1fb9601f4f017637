"""A sweep under torchrun: what a cell that fails on one rank does to the others and to the sweep.

Run as a script this file is one of two ranks; the cells are shell scripts: $RANK says which rank
runs, $* is the command.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ghosttrain.engine import job

CELLS = {
    "good": ("exit 0", "exit 0"),
    "a mistake": ("exit 2", "exec sleep 600"),
    "killed": ("exec sleep 600", "kill -9 $$"),
    "a lost peer": ("sleep 1; exit 1", "exit 2"),
    "good again": ("exit 0", "sleep 1; exit 0"),
}
"""Name -> what rank 0 and rank 1 do."""
CODES = [0, 2, 137, 2, 0]
PYTHON = """#!/bin/sh
echo $RANK $GHOSTTRAIN_RENDEZVOUS "$3" >>{folder}/log$RANK
. {folder}/cell.$RANK."$3"
"""


def one_rank(folder: Path) -> int:
    job.GRACE = 0.3
    sys.executable = str(folder / "python")
    if os.environ["RANK"] == "1":
        return job.follow()
    with job.leading():
        codes = [job.run_everywhere((str(number),)) for number in range(len(CELLS))]
        (folder / "codes").write_text(json.dumps(codes))
        if "WAIT" in os.environ:
            job.run_everywhere(("wait",))
    return 0


@pytest.fixture
def two_ranks(tmp_path, monkeypatch):
    (tmp_path / "python").write_text(PYTHON.format(folder=tmp_path))
    (tmp_path / "python").chmod(0o755)
    cells = {str(number): what for number, what in enumerate(CELLS.values())}
    waits = f"echo $$ >{tmp_path}/pid$RANK; exec sleep 600"
    for name, what in (cells | {"wait": (waits, waits)}).items():
        for rank in (0, 1):
            (tmp_path / f"cell.{rank}.{name}").write_text(what[rank])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job_env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = []

    def start(**more):
        env = os.environ | job_env | more
        command = [sys.executable, __file__, str(tmp_path)]
        for rank in "01":
            processes.append(subprocess.Popen(command, env=env | {"RANK": rank}))
        return processes

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_cell_that_fails_on_one_rank_ends_on_all_and_the_next_one_runs(two_ranks, tmp_path):
    rank0, rank1 = two_ranks(WAIT="1")
    while not all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)):
        assert rank0.poll() is None and rank1.poll() is None
    assert json.loads((tmp_path / "codes").read_text()) == CODES
    logs = [(tmp_path / f"log{rank}").read_text().splitlines() for rank in (0, 1)]
    names = [*map(str, range(len(CELLS))), "wait"]
    assert [line.split()[2] for line in logs[0]] == names
    places = [[line.split()[1] for line in log] for log in logs]
    assert places[0] == places[1] and len({*places[0]}) == len(names)
    assert places[0][0] == "store:ghosttrain/0/1"

    rank0.send_signal(signal.SIGTERM)  # as torchrun ends a job; here one rank: it tells the other
    assert rank0.wait() == 143 and rank1.wait() == 0
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


if __name__ == "__main__":
    sys.exit(one_rank(Path(sys.argv[1])))
