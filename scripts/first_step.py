"""Measure how long a run takes from the start of its process to the end of its first step.

python scripts/first_step.py [CHECKOUT ...] [--rounds 7] [key=value ...]

A run of one step of the main job, in a process of its own; checkouts (default: this one) take
turns. Prints medians of CPU and wall seconds, and their ratio to those of the first checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
JOB = ("+recipe=compact_kd", "model=ghostnetv3_130", "train.max_steps=1")
COLUMNS = ("first step, CPU s", "first step, s", "whole run, CPU s", "whole run, s")
CHILD = """
import atexit, importlib.util, json, os, runpy, sys, time

out, began = sys.argv.pop(1), float(sys.argv.pop(1))

def note(name):
    values = {"cpu": time.process_time(), "wall": time.time() - began, "modules": [*sys.modules]}
    with open(os.path.join(out, name), "w") as file:
        json.dump(values, file)

class Hook:
    # Wraps `Ema.update`, which ends a step, where its module is imported: torch comes no sooner.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "ghosttrain.optim.ema":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            update = module.Ema.update

            def first(self, model):
                update(self, model)
                module.Ema.update = update
                note("first")

            module.Ema.update = first

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hook)
atexit.register(note, "end")
runpy.run_module("ghosttrain", run_name="__main__", alter_sys=True)
"""


def measure(checkout: Path, job: tuple[str, ...] = JOB) -> dict[str, Any]:
    """Run `job` by the code of `checkout`; return `first` and `end`: seconds of CPU and wall since
    the start of the process, and the modules it has imported by then; `whole`: its CPU and wall
    seconds with its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        subprocess.run(
            [sys.executable, "-c", CHILD, folder, str(began), *job, f"run.root={folder}/runs"],
            env=os.environ | {"PYTHONPATH": str(checkout)},
            cwd=folder, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found = {name: json.loads((Path(folder) / name).read_text()) for name in ("first", "end")}
    return found | {"whole": {"cpu": cpu, "wall": ended - began}}


def main() -> None:
    """Measure the checkouts in turns, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="checkouts, and key=value for all runs")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    settings = tuple(word for word in options.words if "=" in word)
    checkouts = [Path(word).resolve() for word in options.words if "=" not in word] or [ROOT]
    rows: list[list[tuple[float, ...]]] = [[] for _ in checkouts]
    for number in range(options.rounds + 1):  # the first warms the files' cache
        order = list(range(len(checkouts)))
        for place in order if number % 2 else reversed(order):
            found = measure(checkouts[place], JOB + settings)
            seconds = (found[key][kind] for key in ("first", "whole") for kind in ("cpu", "wall"))
            if number:
                rows[place].append(tuple(seconds))
    middles = [[median(column) for column in zip(*measured, strict=True)] for measured in rows]
    for checkout, measured, middle in zip(checkouts, rows, middles, strict=True):
        print(f"{checkout}, median (lowest to highest) of {options.rounds} runs")
        for place, name in enumerate(COLUMNS):
            values = [row[place] for row in measured]
            share = middle[place] / middles[0][place]
            print(
                f"  {name:19} {middle[place]:6.2f} ({min(values):.2f} to {max(values):.2f}), "
                f"{share:.2f} of the first checkout's"
            )


if __name__ == "__main__":
    main()
