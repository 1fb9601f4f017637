"""Break one line of the code at a time and see whether a test notices; the table: docs/mutants.md.

scripts/mutate                     # all of them: about an hour on two idle cores
scripts/mutate label_smoothing     # some, by name
scripts/mutate 'drawn:*'           # by pattern: those that mutmut makes

The breaks are those of tests/mutants.yaml, which also says which tests guard which file, and DRAWN
more from mutmut. Each is tried in a copy of the tree. A break that makes the tests hang is killed.
"""

import hashlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST, TABLE = ROOT / "tests/mutants.yaml", ROOT / "docs/mutants.md"
DRAWN, SEED, WORKERS, LIMIT_S = 100, 9, 2, 600.0
DRAWN_FROM = [
    "ghosttrain/engine/train.py",
    "ghosttrain/engine/classification.py",
    "ghosttrain/engine/evaluate.py",
    "ghosttrain/distill/losses.py",
    "ghosttrain/optim/schedule.py",
    "ghosttrain/optim/ema.py",
    "ghosttrain/data/augment.py",
    "ghosttrain/data/order.py",
]
running: set[int] = set()
"""Processes of tests, each the head of its group."""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    change: str
    """What is changed, for the table."""
    code: str
    """The whole file, broken."""


def listed() -> list[Mutant]:
    """Return the mutants of the list; SystemExit where a text is not there exactly once."""
    mutants = []
    for file, breaks in yaml.safe_load(LIST.read_text())["mutants"].items():
        code = (ROOT / file).read_text()
        for name, (old, new) in breaks.items():
            if (count := code.count(old)) != 1:
                sys.exit(
                    f"{LIST}: {name}: this text stands {count} times in {file}, not once: {old}"
                )
            mutants.append(Mutant(name, file, shown(old, new), code.replace(old, new)))
    return mutants


def shown(old: str, new: str) -> str:
    old, new = (" ".join(text.split()).replace("|", "\\|") for text in (old, new))
    return f"`{old}` -> `{new}`"


def changed_lines(old: list[str], new: list[str]) -> tuple[str, str]:
    """Return the lines of both that are not the other's."""
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return "\n".join(old), "\n".join(new)


def drawn() -> list[Mutant]:
    """Draw from mutmut's mutants of each file equally many, by a hash of what they change.

    So an edit of one line leaves the draw of the others as it was. Literal strings are left alone:
    the wording of a message is no number.
    """
    from mutmut.mutation.file_mutation import create_mutations

    mutants = []
    for i, file in enumerate(DRAWN_FROM):
        # mutmut passes over decorated functions, `evaluate` among them: it does not see decorators.
        code = re.sub(r"^( *)@", r"\1#@", (ROOT / file).read_text(), flags=re.M)
        module, mutations, *_ = create_mutations(file, code)
        found = {}
        same: Counter[str] = Counter()
        for mutation in mutations:
            old, new = mutation.original_node, mutation.mutated_node
            if type(old).__name__ == "SimpleString":
                continue
            text = f"{module.code_for_node(old)} -> {module.code_for_node(new)}"
            same[text] += 1
            digest = hashlib.sha256(f"{SEED} {file} {text} {same[text]}".encode()).hexdigest()
            found[digest] = mutation
        share = DRAWN // len(DRAWN_FROM) + (i < DRAWN % len(DRAWN_FROM))
        for digest in sorted(found)[:share]:
            mutation = found[digest]
            broken = module.deep_replace(mutation.original_node, mutation.mutated_node).code
            change = shown(*changed_lines(code.splitlines(), broken.splitlines()))
            broken = re.sub(r"^( *)#@", r"\1@", broken, flags=re.M)
            mutants.append(Mutant(f"drawn:{Path(file).stem}:{digest[:6]}", file, change, broken))
    return mutants


def copy_tree(to: Path) -> None:
    """Copy the files that git tracks or would track."""
    names = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_guard(tree: Path, tests: list[str], file: str = "", limit_s: float | None = None) -> str:
    """Return what stopped the tests in a tree: a test, "time limit", or "" if all passed."""
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    if file.endswith(".cpp"):  # a broken kernel does not stay in the cache of kernels
        env["TORCH_EXTENSIONS_DIR"] = str(tree / ".kernels")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += [f"--basetemp={tree / '.tmp'}", *tests]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    running.add(process.pid)
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return "time limit"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what the tests started
        process.wait()
        running.discard(process.pid)
    stopped = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, flags=re.M)
    if process.returncode == 0:
        return ""
    if not stopped and process.returncode not in (2, 3) and process.returncode > 0:
        sys.exit(f"pytest could not run the tests:\n{output[-2000:]}")
    return stopped[0] if stopped else f"pytest ended with {process.returncode}"


def guards(file: str, guard: dict[str, list[str]]) -> list[str]:
    """Return the tests that guard a file: its own, then those of every file."""
    return [*guard.get(file, []), *(t for t in guard["always"] if t not in guard.get(file, []))]


def read_table() -> dict[str, str]:
    """Return the rows of the table by the mutant's name."""
    lines = TABLE.read_text().splitlines() if TABLE.is_file() else []
    return {m[1]: line for line in lines if (m := re.match(r"\| (\S+) \| ghosttrain/", line))}


def write_table(rows: dict[str, str]) -> None:
    """Write the table, and how many of its mutants survived."""
    survived = sum("| **survived**" in row for row in rows.values())
    equivalent = sum("| equivalent: " in row for row in rows.values())
    head = f"""# Mutants: what notices a broken line

`scripts/mutate` wrote this table. Each row is one broken line; the last column says which test
noticed it first (of those that `tests/mutants.yaml` lists for its file), or that none did. The
names that begin with `drawn:` were made by mutmut and drawn with a fixed seed, equally many from
{", ".join(f"`{Path(file).stem}`" for file in DRAWN_FROM)}. The other ones were chosen by hand,
before the tests of what a run reports were written: 64 of 152 survived then (the file's history).

{len(rows)} mutants: {len(rows) - survived - equivalent} killed, {equivalent} equivalent, \
{survived} survived.

| mutant | file | change | noticed by |
|---|---|---|---|
"""
    TABLE.write_text(head + "\n".join(rows.values()) + "\n")


def main(patterns: list[str]) -> int:
    if any(pattern.startswith("-") for pattern in patterns):
        sys.exit(__doc__)
    settings = yaml.safe_load(LIST.read_text())
    only_listed = patterns and not any(p.startswith(("drawn", "*")) for p in patterns)
    mutants = listed() + ([] if only_listed else drawn())
    order = [mutant.name for mutant in mutants]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in order):
            sys.exit(f"no mutant is called {pattern}: choose from\n" + "\n".join(order))
    if patterns:
        mutants = [m for m in mutants if any(fnmatchcase(m.name, p) for p in patterns)]

    rows = read_table()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(WORKERS):
            copy_tree(Path(folder) / str(number))
            trees.put(Path(folder) / str(number))
        files = dict.fromkeys(mutant.file for mutant in mutants)
        tests = dict.fromkeys(test for file in files for test in guards(file, settings["guard"]))
        if stopped := run_guard(Path(folder) / "0", list(tests)):
            sys.exit(f"the tests do not pass without any mutant: {stopped}")

        def attempt(mutant: Mutant) -> None:
            tree, started = trees.get(), time.monotonic()
            try:
                (tree / mutant.file).write_text(mutant.code)
                tests = guards(mutant.file, settings["guard"])
                stopped = run_guard(tree, tests, mutant.file, LIMIT_S)
                shutil.copy2(ROOT / mutant.file, tree / mutant.file)
                os.utime(tree / mutant.file)  # else Python takes the broken one from its cache
            finally:
                trees.put(tree)
            reason = (settings["equivalent"] or {}).get(mutant.name)
            unnoticed = f"equivalent: {reason}" if reason else "**survived**"
            noticed = f"`{stopped}`" if stopped else unnoticed
            rows[mutant.name] = f"| {mutant.name} | {mutant.file} | {mutant.change} | {noticed} |"
            print(f"{time.monotonic() - started:4.0f} s  {mutant.name}: {noticed}", flush=True)

        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                list(pool.map(attempt, mutants))
            except BaseException:  # Ctrl-C too: else the pool would wait for the tests to end
                for process in list(running):
                    os.killpg(process, signal.SIGKILL)
                raise
            finally:
                order += [name for name in rows if only_listed and name.startswith("drawn:")]
                write_table({name: rows[name] for name in order if name in rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
