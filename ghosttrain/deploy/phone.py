"""The benchmark programs of LiteRT and ExecuTorch on an Android phone: their commands, and what
they print.

Not run on a phone here: the commands are those of both projects' own documentation
(https://ai.google.dev/edge/litert/models/measurement, https://docs.pytorch.org/executorch), the
parsers are tested on outputs that others recorded.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ghosttrain.deploy.formats import of_file
from ghosttrain.errors import UserError

DEVICE_FOLDER = "/data/local/tmp"
PROGRAMS = {"litert": "benchmark_model", "executorch": "executor_runner"}
"""Format -> program that has to lie in `DEVICE_FOLDER`."""


class PhoneLatency(NamedTuple):
    """In milliseconds per pass."""

    mean: float
    least: float
    most: float
    passes: int


def commands(path: Path, threads: int, passes: int) -> list[list[str]]:
    """Return what copies a file to the phone, and what times it there.

    Raises:
        UserError: no program times files of this format.
    """
    name = of_file(path)
    if name not in PROGRAMS:
        raise UserError(
            f"--adb: {path} is of {name}; {' and '.join(PROGRAMS)} have a program for the phone"
        )
    there = f"{DEVICE_FOLDER}/{path.name}"
    program = f"{DEVICE_FOLDER}/{PROGRAMS[name]}"
    options = {
        "litert": [
            f"--graph={there}",
            f"--num_threads={threads}",
            f"--num_runs={passes}",
            "--warmup_runs=10",
            "--use_xnnpack=true",
        ],
        "executorch": [
            f"--model_path={there}",
            f"--cpu_threads={threads}",
            f"--num_executions={passes}",
        ],
    }
    return [
        ["adb", "push", str(path), there],
        ["adb", "shell", program, *options[name]],
    ]


def time_on_phone(path: Path, threads: int, passes: int) -> PhoneLatency | None:
    """Run the commands where adb finds a phone, and return the time; None where there is none.

    Raises:
        UserError: a command failed, or printed no time.
    """
    if not has_phone():
        return None
    text = ""
    for command in commands(path, threads, passes):
        done = subprocess.run(command, capture_output=True, text=True)
        text = done.stdout + done.stderr
        if done.returncode:
            last = " ".join(text.strip().splitlines()[-1:])
            raise UserError(f"{shlex.join(command)} failed: {last}")
    return parsed(of_file(path), text)


def has_phone() -> bool:
    """Whether adb is installed and knows a device."""
    if shutil.which("adb") is None:
        return False
    done = subprocess.run(["adb", "devices"], capture_output=True, text=True)
    return any(line.endswith("\tdevice") for line in done.stdout.splitlines())


def parsed(name: str, text: str) -> PhoneLatency:
    """Return the time of a pass from what a program printed.

    Raises:
        UserError: there is none in it.
    """
    found = {"litert": _litert, "executorch": _executorch}[name](text)
    if found is None:
        raise UserError(f"{PROGRAMS[name]} printed no time: {' '.join(text.split())[-200:]}")
    return found


def _litert(text: str) -> PhoneLatency | None:
    """The last line of counts is that of the passes that follow the warm-up; in microseconds."""
    number = r"([\d.e+]+)"
    rows = re.findall(rf"count=(\d+) .*?min={number} max={number} avg={number}", text)
    if not rows:
        return None
    count, least, most, mean = rows[-1]
    return PhoneLatency(float(mean) / 1e3, float(least) / 1e3, float(most) / 1e3, int(count))


def _executorch(text: str) -> PhoneLatency | None:
    """In milliseconds; the sum of all passes, and in newer versions each of them."""
    total = re.search(r"Model executed successfully (\d+) time\(s\) in ([\d.]+) ms", text)
    if total is None:
        return None
    each = [float(ms) for ms in re.findall(r"Iteration \d+ of \d+: ([\d.]+) ms", text)]
    count, mean = int(total[1]), float(total[2]) / int(total[1])
    return PhoneLatency(mean, min(each, default=mean), max(each, default=mean), count)


def lines(path: Path, threads: Sequence[int], passes: int) -> list[str]:
    """Return the commands for a phone, and the times where one is there."""
    found = [f"on a phone ({PROGRAMS.get(of_file(path), '')} has to lie in {DEVICE_FOLDER} there):"]
    for count in threads:
        found += [f"  {shlex.join(command)}" for command in commands(path, count, passes)]
        if time := time_on_phone(path, count, passes):
            found.append(
                f"  {count} threads: mean {time.mean:.2f} ms, {time.least:.2f} to {time.most:.2f}, "
                f"{time.passes} passes"
            )
        else:
            found.append("  not run: adb is not installed, or finds no phone")
    return found
