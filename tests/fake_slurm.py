"""Slurm for tests: `sbatch` executes the script it is given, `srun` starts the tasks of two nodes,
both of this machine, with the variables that Slurm sets (sbatch's and srun's manuals).

`install` puts the programs into a folder for the PATH. A job whose training waits at its second
checkpoint (`pause_at_second_save`) is preempted, once: its steps are signalled, then all of its
processes killed, and it starts again with SLURM_RESTART_COUNT=1. Jobs and what they wrote lie in
the folder of the variable FAKE_SLURM.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

NAMES = ("sbatch", "srun", "scontrol", "sacct")
NODES = "127.0.0.[1-2]"
GRACE = 60.0
"""Seconds between the signal of a preemption and SIGKILL; a job that ended, or was requeued, is not
waited for."""


def install(folder: Path) -> dict[str, str]:
    """Write the programs to `folder`/bin; return the variables of a process that finds them."""
    (folder / "bin").mkdir(parents=True)
    for name in NAMES:
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        program.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "FAKE_SLURM": str(folder)}


def pause_at_second_save(folder: Path) -> None:
    """Write a `sitecustomize.py` to `folder`, for PYTHONPATH: the process of a job that is about to
    put a second checkpoint in the place of the first says so and waits to be preempted; a restarted
    one does not.
    """
    (folder / "sitecustomize.py").write_text(
        "import os, pathlib, sys, time\n"
        "def hook(event, arguments):\n"
        "    if event == 'os.rename' and str(arguments[1]).endswith('last-1.pt'):\n"
        "        name = f\"saved-{os.environ['SLURM_JOB_ID']}\"\n"
        "        pathlib.Path(os.environ['FAKE_SLURM'], name).touch()\n"
        "        time.sleep(600)\n"
        "if 'SLURM_PROCID' in os.environ and 'SLURM_RESTART_COUNT' not in os.environ:\n"
        "    sys.addaudithook(hook)\n"
    )


# --- the programs ---------------------------------------------------------------------------------


def sbatch(words: list[str]) -> int:
    """Start a job, or one per element of an array, each watched by a process of its own."""
    script = Path(words[-1])
    options = _options(re.findall(r"^#SBATCH (.+)$", script.read_text(), re.M), words[:-1])
    if options.get("partition") == "absent":
        print("sbatch: error: invalid partition specified: absent", file=sys.stderr)
        return 1
    job = 1 + len(list(_folder().glob("job-*")))
    (_folder() / f"job-{job}").write_text(script.read_text())
    last = re.match(r"0-(\d+)", options.get("array", ""))
    for element in range(int(last[1]) + 1) if last else [-1]:
        command = [sys.executable, __file__, "watch", str(job), str(element), shlex.join(words)]
        with open(_folder() / "watch.log", "a") as log:
            subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    print(f"Submitted batch job {job}")
    return 0


def watch(words: list[str]) -> int:
    """Run one job until it ends by itself; preempt it once where its training waits for that."""
    array, element, given = int(words[0]), int(words[1]), shlex.split(words[2])
    script = _folder() / f"job-{array}"
    options = _options(re.findall(r"^#SBATCH (.+)$", script.read_text(), re.M), given[:-1])
    job = array if element < 0 else 100 * array + element
    nodes = int(options.get("nodes", "1"))
    per_node = int(options.get("ntasks-per-node", "1"))
    env = dict(os.environ) | {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_JOB_NODELIST": NODES if nodes == 2 else "127.0.0.1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_GTIDS": "0",
    }
    if element >= 0:
        env |= {"SLURM_ARRAY_JOB_ID": str(array), "SLURM_ARRAY_TASK_ID": str(element)}
    output = options.get("output", str(_folder() / "%j.out"))
    output = output.replace("%A_%a", f"{array}_{element}").replace("%j", str(job))
    state, saved = _folder() / f"state-{job}", _folder() / f"saved-{job}"
    requeue = _folder() / f"requeue-{array}_{element}" if element >= 0 else None
    requeue = requeue or _folder() / f"requeue-{job}"
    for restart in range(3):
        env |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        state.write_text("RUNNING")
        with open(output, "a") as log:
            process = subprocess.Popen(
                ["bash", script], env=env, stdout=log, stderr=log, start_new_session=True
            )
            preempted = _wait(process, requeue, saved if restart == 0 else None)
        if not (requeue.exists() or (preempted and "requeue" in options)):
            state.write_text("COMPLETED" if process.returncode == 0 else "FAILED")
            return 0
        requeue.unlink(missing_ok=True)
        print(f"job {job} requeued", flush=True)
    return 1


def _wait(process: subprocess.Popen[bytes], requeue: Path, saved: Path | None) -> bool:
    """Wait for the end of a job, or `scontrol requeue`; return whether it was preempted, which is
    when the file `saved` came.

    srun passes the signal to its tasks only. FAKE_SLURM_SIGNAL=USR2 is what submitit asks for.
    """
    number = getattr(signal, f"SIG{os.environ.get('FAKE_SLURM_SIGNAL', 'TERM')}")
    until = None
    while process.poll() is None:
        time.sleep(0.02)
        if saved is not None and saved.exists() and until is None:
            for step in _folder().glob(f"step-{process.pid}-*"):
                with suppress(ProcessLookupError):
                    os.kill(int(step.name.split("-")[2]), number)
            until = time.monotonic() + GRACE
        if requeue.exists() or (until is not None and time.monotonic() > until):
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return until is not None


def srun(words: list[str]) -> int:
    """Start the tasks of a step; return the highest exit code."""
    command_at = next(
        i for i, word in enumerate(words)
        if not word.startswith("-") and words[i - 1] not in ("--output", "--error")
    )  # fmt: skip
    options, command = words[:command_at], words[command_at:]
    nodes, tasks = (int(os.environ[f"SLURM_{name}"]) for name in ("NNODES", "NTASKS"))
    here = tasks // nodes
    env = dict(os.environ) | {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
        "SLURM_STEP_TASKS_PER_NODE": f"{here}(x{nodes})",
    }
    processes = []
    for task in range(tasks):
        node = task // here
        on_node = range(node * here, (node + 1) * here)
        own = {
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task % here),
            "SLURM_NODEID": str(node),
            "SLURM_GTIDS": ",".join(map(str, on_node)),
        }
        streams = [_stream(options, name, task) for name in ("--output", "--error")]
        processes.append(
            subprocess.Popen(command, env=env | own, stdout=streams[0], stderr=streams[1])
        )
        (_folder() / f"step-{os.getpgrp()}-{processes[-1].pid}").touch()
    codes: list[int | None] = [None]
    kill = os.environ.get("SLURM_KILL_BAD_EXIT")
    while None in codes:
        codes = [process.poll() for process in processes]
        if "1" in (_options([], options).get("kill-on-bad-exit"), kill) and any(codes):
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return max(128 - code if code < 0 else code for code in codes if code is not None)


def _stream(options: list[str], name: str, task: int) -> int | None:
    """Open the file that a task writes to, as `--output FOLDER/%A_%a_%t_log.out` says."""
    if name not in options:
        return None
    path = options[options.index(name) + 1].replace("%t", str(task))
    path = path.replace("%j", os.environ["SLURM_JOB_ID"])
    for mark, variable in (("%A", "SLURM_ARRAY_JOB_ID"), ("%a", "SLURM_ARRAY_TASK_ID")):
        path = path.replace(mark, os.environ.get(variable, ""))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def scontrol(words: list[str]) -> int:
    """`scontrol requeue JOB`."""
    assert words[0] == "requeue", words
    (_folder() / f"requeue-{words[1]}").touch()
    return 0


def sacct(words: list[str]) -> int:
    """`sacct -o JobID,State,NodeList --parsable2 -j JOB ...`."""
    print("JobID|State|NodeList")
    jobs = [words[i + 1] for i, word in enumerate(words) if word == "-j"]
    for path in _folder().glob("state-*"):
        job = int(path.name.removeprefix("state-"))
        name = str(job) if job < 100 else f"{job // 100}_{job % 100}"
        if name.split("_")[0] in jobs:
            print(f"{name}|{path.read_text() or 'RUNNING'}|{NODES}")
    return 0


def _folder() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def _options(lines: list[str], words: list[str]) -> dict[str, str]:
    """Return the options of a script's #SBATCH lines and of sbatch's own: `--name=value`."""
    given = [*(word for line in lines for word in shlex.split(line, comments=True)), *words]
    pairs = (word.removeprefix("--").partition("=") for word in given)
    return {name: value for name, _, value in pairs}


if __name__ == "__main__":
    programs = {
        "sbatch": sbatch,
        "watch": watch,
        "srun": srun,
        "scontrol": scontrol,
        "sacct": sacct,
    }
    raise SystemExit(programs[sys.argv[1]](sys.argv[2:]))
