"""Proofs that a run loses nothing; what they found: docs/durability.md.

scripts/chaos [KILLS]      a small run, killed at random moments and inside saves, until it ends;
                           then asked to end by signals, as often
scripts/crashpoints        stopped before each file operation, one after the other; then each fails
scripts/powercut           the same on a disk whose power is cut (root; a loop-mounted ext4)

Each time the same command goes on afterwards, and what it leaves is compared with what a run leaves
that nothing stopped: weights byte for byte; the last checkpoint, the rows of metrics and the result
but for their times.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import importlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "+recipe=compact_kd", "model=mobilenetv2_050", "reparam=none", "teacher=none", "distill=none",
    "model.dropout=0.1", "data=digits", "data.train_size=16", "data.eval_size=16", "budget=full",
    "train.global_batch=480", "train.micro_batch=120", "train.epochs=2", "train.save_every=1step",
    "tracker.log_every=1", "launch.device=cpu", "run.name=run",
]  # fmt: skip
"""2 epochs of 2 steps, each step of several micro-batches; a checkpoint after every step."""
LOG = Path(tempfile.gettempdir()) / "ghosttrain-durability.log"
"""Where the commands write their errors."""
EXT4_IOC_SHUTDOWN, WITHOUT_FLUSHING_THE_LOG = 0x8004587D, 2


# --- comparing ------------------------------------------------------------------------------------


def differences(run: Path, whole: Path) -> list[str]:
    """Return what differs between two finished runs, apart from times, or cannot be read."""
    from ghosttrain.errors import UserError

    try:
        return _differences(run, whole)
    except (UserError, OSError) as error:
        return [str(error)]


def _differences(run: Path, whole: Path) -> list[str]:
    from ghosttrain.engine.checkpoint import content_digests, read_checkpoint
    from ghosttrain.engine.rows import read_rows
    from ghosttrain.engine.run_files import damaged_products, read_result

    found = [
        name
        for name in ("model.safetensors", "checkpoints/best.safetensors")
        if (run / name).read_bytes() != (whole / name).read_bytes()
    ]
    states = []
    for each in (run, whole):
        state = read_checkpoint(each / "checkpoints" / "last.pt")
        del state["seconds"], state["conditions"]
        states.append(content_digests(state))
    found += [f"last.pt {key}" for key in states[0] if states[0][key] != states[1].get(key)]
    (rows, damaged), (others, _) = read_rows(run), read_rows(whole)
    for row in (*rows, *others):
        row.pop("images_per_second", None)
    found += ["metrics.jsonl"] * (rows != others or damaged > 0)
    results = [read_result(each) for each in (run, whole)]
    for result in results:
        if result is None:
            return [*found, "no result.json"]
        for key in ("seconds", "images_per_second", "files"):
            del result[key]
    found += ["result.json"] * (results[0] != results[1])
    found += damaged_products(run, read_result(run) or {})
    parts = [path.name for path in run.rglob(".*.part")]
    return found + parts


# --- processes ------------------------------------------------------------------------------------


def forked(words: list[str], before: Callable[[], object] = lambda: None) -> int:
    """Run the command in a fork of this process, which has imported everything; return its code."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            from ghosttrain.cli import main

            before()
            code = main(words)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def before_operation(number: int, root: Path, act: Callable[[], object]) -> Callable[[], object]:
    """Return what makes this process do `act` before the `number`-th time (from 1) that it changes
    a file below `root`, in any thread. What is about to reach the disk is cut in half first.
    """
    seen = 0

    def count(path: object = None, handle: int | None = None) -> None:
        nonlocal seen
        if path is not None and not os.fspath(path).startswith(str(root)):  # type: ignore[call-overload]
            return
        seen += 1
        if seen == number:
            if handle is not None:
                with suppress(OSError):
                    os.ftruncate(handle, os.fstat(handle).st_size // 2)
            act()

    def install() -> None:
        real_open, real_os_open, real_fsync = builtins.open, os.open, os.fsync
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

        def watched_open(file: object, mode: str = "r", *args: object, **options: object) -> object:
            if isinstance(file, str | Path) and set(mode) & set("wax+"):
                count(file)
            return real_open(file, mode, *args, **options)  # type: ignore[call-overload]

        def watched_os_open(path: object, flags: int, *args: object, **options: object) -> int:
            if flags & writes and isinstance(path, str | Path):
                count(path)
            return real_os_open(path, flags, *args, **options)  # type: ignore[arg-type]

        def watched_fsync(handle: int) -> None:
            link = f"/proc/self/fd/{handle}"
            if os.readlink(link).startswith(str(root)):
                writable = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
                count(handle=handle if os.path.isfile(link) and writable else None)
            real_fsync(handle)

        builtins.open, os.open, os.fsync = watched_open, watched_os_open, watched_fsync  # type: ignore[assignment]
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
            real = getattr(os, name)

            def watched(
                path: object, *args: object, real: object = real, **options: object
            ) -> None:
                count(path)
                real(path, *args, **options)  # type: ignore[operator]

            setattr(os, name, watched)

    return install


def imported() -> None:
    """Import what a run needs, once, for all forks; one thread, or a fork would miss the others."""
    import torch

    torch.set_num_threads(1)
    importlib.import_module("ghosttrain.engine.train")
    importlib.import_module("ghosttrain.native").load()


# --- the three proofs -----------------------------------------------------------------------------


def crashpoints(
    folder: Path, every: int = 1, first: int = 1, words: list[str] = SMALL
) -> list[str]:
    """Stop a run before each `every`-th file operation, go on, compare; return what was not as it
    should be.
    """
    imported()
    whole, root = folder / "whole", folder / "runs"
    assert forked([*words, f"run.root={whole}"]) == 0
    faults, number = [], first
    while True:
        shutil.rmtree(root, ignore_errors=True)
        code = forked([*words, f"run.root={root}"],
                      before_operation(number, root, lambda: os._exit(9)))  # fmt: skip
        if code == 0:
            break
        faults += _gone_on(words, root, whole, f"operation {number}", code)
        number += every
    print(f"crashpoints: {len(range(first, number, every))} of {number - 1} operations, "
          f"{len(faults)} faults")  # fmt: skip
    return faults


def failures(folder: Path, every: int = 1, words: list[str] = SMALL) -> list[str]:
    """Let each `every`-th file operation fail (no space, a failing disk, too large a file, in
    turn); a run that ends with one line goes on afterwards.
    """
    imported()
    folder.mkdir(exist_ok=True)
    whole, root, reached = folder / "whole", folder / "runs", folder / "reached"
    assert forked([*words, f"run.root={whole}"]) == 0
    faults, number, tried = [], 1, 0
    reached.touch()
    while reached.exists():
        shutil.rmtree(root, ignore_errors=True)
        reached.unlink()
        error = (errno.ENOSPC, errno.EIO, errno.EFBIG)[tried % 3]

        def fail(error: int = error) -> None:
            reached.touch()
            raise OSError(error, os.strerror(error))

        def before(number: int = number, fail: Callable[[], object] = fail) -> None:
            importlib.import_module("ghosttrain.engine.saving").RETRY = 0.01
            before_operation(number, root, fail)()

        code = forked([*words, f"run.root={root}"], before)
        if code == 2:
            code = forked([*words, f"run.root={root}"])
        place = f"operation {number} ({errno.errorcode[error]})"
        if code:
            faults.append(f"{place}: exit code {code}")
        else:
            faults += [f"{place}: {each}" for each in differences(root / "run", whole / "run")]
        number, tried = number + every, tried + 1
    print(f"failures: {tried - 1} of {number - every - 1} operations, {len(faults)} faults")
    return faults


def _gone_on(words: list[str], root: Path, whole: Path, place: str, code: int) -> list[str]:
    """Go on after a stop; return what is not as it should be."""
    if code != 9:
        return [f"{place}: exit code {code}"]
    if again := forked([*words, f"run.root={root}"]):
        return [f"{place}: going on ends with exit code {again}"]
    return [f"{place}: {found}" for found in differences(root / "run", whole / "run")]


def powercut(folder: Path, every: int = 1, words: list[str] = SMALL) -> list[str]:
    """Cut the power of the disk that a run writes to before each `every`-th file operation, and
    after its end; mount it again, go on, compare.
    """
    imported()
    whole, image, mount = folder / "whole", folder / "disk", folder / "mounted"
    assert forked([*words, f"run.root={whole}"]) == 0
    mount.mkdir()
    faults, number, cuts = [], 1, 0
    root = mount / "runs"

    def cut() -> None:
        handle = os.open(mount, os.O_RDONLY)
        fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING_THE_LOG))
        os._exit(9)

    ended = False
    while not ended:
        with open(image, "wb") as file:
            file.truncate(200 << 20)
        for command in (
            ["mkfs.ext4", "-q", "-F", str(image)],
            ["mount", "-o", "loop", str(image), str(mount)],
        ):
            subprocess.run(command, check=True)
        try:
            code = forked([*words, f"run.root={root}"], before_operation(number, root, cut))
            if code == 0:  # it came to its end: cut the power then
                ended = True
                code = forked(["--version"], cut)
            subprocess.run(["umount", str(mount)], check=True)
            subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
            place = f"operation {number}" if not ended else "the end"
            if ended and (found := differences(root / "run", whole / "run")):
                faults += [f"after the end: {each}" for each in found]
            faults += _gone_on(words, root, whole, place, code)
        finally:
            subprocess.run(["umount", str(mount)], check=False)
        cuts, number = cuts + 1, number + every
    print(f"powercut: {cuts} cuts, {len(faults)} faults")
    return faults


def chaos(
    folder: Path, kills: int, ranks: int, seed: int = 0, words: list[str] = SMALL
) -> list[str]:
    """Kill a run and all its processes at random moments, every other time inside a save; return
    what was not as it should be.
    """
    whole, root, draw = folder / f"whole{ranks}", folder / f"runs{ranks}", random.Random(seed)
    words = [*words, f"launch.nproc={ranks}"]
    command = [sys.executable, "-m", "ghosttrain", *words]
    started = time.monotonic()
    subprocess.run([*command, f"run.root={whole}"], check=True, stdout=subprocess.DEVNULL)
    length = time.monotonic() - started
    faults, killed, inside, ended = [], 0, 0, 0
    while killed < kills or root.exists():
        last = killed >= kills
        process = subprocess.Popen([*command, f"run.root={root}"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
        moment = time.monotonic() + draw.uniform(0.4 * length, length)
        in_save = draw.random() < 0.5
        while process.poll() is None and not last:
            saving = any(root.rglob("checkpoints/.*.part"))
            if time.monotonic() > moment and (saving or not in_save):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                killed, inside = killed + 1, inside + saving
                break
            time.sleep(0.0005)
        error = process.communicate()[1]
        if process.returncode == 0:
            ended += 1
            faults += [f"run {ended}: {each}" for each in differences(root / "run", whole / "run")]
            shutil.rmtree(root)
        elif process.returncode != -signal.SIGKILL:
            return [*faults, f"exit code {process.returncode}: {error.decode()[-500:]}"]
    print(f"chaos: {ranks} rank(s), {killed} kills, {inside} of them inside a save, {ended} runs "
          f"ended, {len(faults)} faults")  # fmt: skip
    return faults


def signals(
    folder: Path, count: int, how: str, seed: int = 0, words: list[str] = SMALL
) -> list[str]:
    """Ask a run to end by signals at random moments, from its imports on, until it ends; return
    what was not as it should be: a traceback, another exit code, a process or a temporary file that
    is left, half a minute without an end.

    `how`: `1` or `2` ranks of its own; `torchrun`: two, one of which hears the signal.
    """
    whole, root, draw = folder / f"whole-{how}", folder / f"runs-{how}", random.Random(seed)
    temporary = folder / f"temporary-{how}"
    temporary.mkdir()
    command = [sys.executable, "-m", "ghosttrain", *words, f"launch.nproc={how}"]
    if how == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m",
                   "ghosttrain", *words]  # fmt: skip
    started = time.monotonic()
    subprocess.run([*command, f"run.root={whole}"], check=True, stdout=subprocess.DEVNULL)
    length = time.monotonic() - started
    faults, sent, ended = [], 0, 0
    while sent < count or root.exists():
        process = subprocess.Popen(
            [*command, f"run.root={root}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, start_new_session=True, env={**os.environ, "TMPDIR": str(temporary)},
        )  # fmt: skip
        number = draw.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        told = None
        if sent < count:
            time.sleep(draw.uniform(0, length))
            told = _hearer(process.pid) if how == "torchrun" else process.pid
        if told is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(told, number)
                sent += 1
        place = f"{how}, {signal.Signals(number).name}, signal {sent}"
        try:
            error = process.communicate(timeout=60 + 3 * length)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return [*faults, f"{place}: it does not end: {process.communicate()[1][-500:]}"]
        if _is_left(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            faults.append(f"{place}: a process is left")
        faults += [f"{place}: {path.name} is left" for path in temporary.glob("ghosttrain-*")
                   if path.name != f"ghosttrain-{os.getuid()}"]  # fmt: skip
        if process.returncode == 0:
            ended += 1
            faults += [f"run {ended}: {each}" for each in differences(root / "run", whole / "run")]
            shutil.rmtree(root)
        elif how != "torchrun":
            if process.returncode not in (75, 130, 128 + number, -number):
                faults.append(f"{place}: exit code {process.returncode}")
            if "Traceback" in error:
                faults.append(f"{place}: {error[-1500:]}")
    print(f"signals: {how}, {sent} signals, {ended} runs ended, {len(faults)} faults")
    return faults


def _hearer(agent: int) -> int | None:
    """Return the first rank that torchrun started; None before it did."""
    children = Path(f"/proc/{agent}/task/{agent}/children")
    with suppress(OSError, ValueError, IndexError):
        return int(children.read_text().split()[0])
    return None


def _is_left(group: int) -> bool:
    """Whether a process of this group is there after five seconds."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def main() -> int:
    """Run the proof that the command line names, in a folder of its own."""
    name, *numbers = sys.argv[1:]
    if name == "powercut" and (reason := no_powercut()):
        print(f"powercut: skipped, {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
        here = Path(folder).resolve()
        count = int(numbers[0]) if numbers else None
        faults: list[str] = []
        if name == "chaos":
            faults = [f for n in (1, 2) for f in chaos(here, (count or 100) // 2, n)]
        if name in ("chaos", "signals"):
            kinds = ("1", "2", "torchrun")
            faults += [f for how in kinds for f in signals(here, (count or 90) // 3, how)]
        elif name == "failures":
            faults = failures(here, count or 1)
        elif name == "crashpoints":
            faults = crashpoints(here, count or 1)
            if count is None:
                faults += failures(here / "failures")
        else:
            faults = powercut(here, count or 1)
    print(json.dumps(faults, indent=1) if faults else "all runs ended as one that nothing stopped")
    return int(bool(faults))


def no_powercut() -> str | None:
    """Return why the power of a disk cannot be cut here; None: it can."""
    if os.geteuid() != 0:
        return "it needs root"
    if not os.path.exists("/dev/loop-control") or shutil.which("mkfs.ext4") is None:
        return "it needs loop devices and mkfs.ext4"
    return None


if __name__ == "__main__":
    sys.exit(main())
