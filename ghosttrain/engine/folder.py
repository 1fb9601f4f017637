"""The run folder: where it is, whether a run there can go on, and what is known about its origin.
Imports no torch.

`config.yaml` settings, `provenance.json` origin, `metrics.jsonl`, `log.txt`, `checkpoints/`,
`model.safetensors` (final EMA weights), `result.json`, `curves.png`, `card.md`. A run is finished
when `result.json` exists: it is written last. Everything is written atomically: a file is either
the old one or the new one, never half; `run_files.py` reads and writes the small ones.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ghosttrain.config.identity import flatten, run_name, run_settings, settings_hash
from ghosttrain.config.schema import Config
from ghosttrain.engine.detection_words import detection_lines
from ghosttrain.engine.metrics import WORDS, class_lines, score, table_lines, verdict
from ghosttrain.engine.rows import METRICS, read_metrics
from ghosttrain.engine.run_files import (
    is_signed,
    read_config,
    read_provenance,
    read_result,
    without_remedy,
    write_config,
)
from ghosttrain.errors import UserError, remedy
from ghosttrain.files import (
    PACKAGE,
    Damaged,
    nearest,
    no_file,
    no_folder,
    remove_parts,
    resolved,
    write_json,
)
from ghosttrain.locks import LEASE, LOCK, is_locked, locked
from ghosttrain.text import clock, listed
from ghosttrain.version import __version__


def run_folder(config: Config) -> Path:
    """Return the folder of this run; the same settings always give the same folder."""
    return resolved(config.run.root) / run_name(config)


def has_begun(folder: Path) -> bool:
    """Whether a step of a run was kept there: a start that failed before that leaves nothing."""
    if (folder / "result.json").exists() or has_checkpoint(folder):
        return True
    metrics = folder / METRICS
    if not metrics.is_file() or metrics.stat().st_size == 0:
        return False
    kinds = {row.get("kind") for row in read_metrics(folder)}
    return kinds != {"skipped"}


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint of the run in `folder`, whole or not."""
    return any((folder / "checkpoints").glob("last*.pt"))


def continued(folder: Path, config: Config, notes: list[str]) -> Config:
    """Return the settings with which the run in `folder` goes on: those of the command, and where
    it was extended. A start that failed before its first step is no run: whoever comes next takes
    its folder.

    A finished run whose command now says only more `train.epochs` is extended: from its last step
    on, the learning rate is that of the longer run.

    Args:
        folder: a run folder, or one that is not there yet.
        config: the settings of the command.
        notes: what the user should hear is added.

    Raises:
        UserError: it holds a run with other settings, which are named.
    """
    path = folder / "config.yaml"
    if not has_begun(folder):
        return config
    try:
        old = read_config(folder)
    except UserError as error:
        with suppress(Damaged):
            made = read_provenance(folder) or {}
            config = with_extensions(config, made.get("extended_at_epochs", ()))
        _validate_hash(folder, config)
        if path.exists():
            notes.append(f"{without_remedy(error)}: written anew")
        return config
    config = with_extensions(_with_known(config, old), old.train.extended_at)
    before, now = (_apart_from_data(run_settings(each)) for each in (old, config))
    changed = _changed(before, now)
    if not changed:
        return config
    longer = config.train.epochs > old.train.epochs and config.train.max_steps is None
    if changed == ["train.epochs"] and longer and _is_finished(folder):
        notes.append(
            f"extended from {old.train.epochs} to {config.train.epochs} epochs: from here on the "
            "learning rate is that of the longer run"
        )
        return with_extensions(config, (*old.train.extended_at, old.train.epochs))
    raise _other_settings(folder, before, now)


def validate_settings(folder: Path, before: Mapping[str, Any], config: Config) -> None:
    """Refuse to go on from a checkpoint of other settings: `before` are those that it holds.

    Raises:
        UserError: naming the settings that differ and what to type.
    """
    before, now = _apart_from_data(before), _apart_from_data(run_settings(config))
    before = {**_added_since(before, now), **before}
    if config.train.extended_at:
        free = ("train.epochs", "train.extended_at")
        before, now = ({k: v for k, v in each.items() if k not in free} for each in (before, now))
    if _changed(before, now):
        raise _other_settings(folder, before, now)


def _added_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of settings that the version which wrote `before` did not have: what they
    do was not done then.
    """
    defaults = flatten(Config().model_dump(mode="json"))
    return {key: defaults[key] for key in now if key not in before and key in defaults}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def _other_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> UserError:
    changes = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in _changed(before, now)]
    return UserError(
        f"{folder} holds a run with other settings "
        f"({listed(changes, 4, joiner='; ')}); choose another run.name or "
        "run.fresh=true"
    )


def _set_earlier_result_aside(folder: Path, config: Config) -> None:
    """Keep the result of a run that is extended under a name that says after how many epochs."""
    if config.train.extended_at:
        with suppress(UserError):
            result = read_result(folder)
            if result and result["settings"] != settings_hash(config):
                aside = folder / f"result-{config.train.extended_at[-1]}epochs.json"
                (folder / "result.json").replace(aside)


def _apart_from_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where and what the data are: their record is compared (`same_data`)."""
    return {k: v for k, v in settings.items() if k not in ("data.root", "data.digest")}


def _with_known(config: Config, old: Config) -> Config:
    """Return the settings with the digest of starting weights that the run knows: a run goes on
    without the file that it started from.
    """
    model = config.model
    if model.weights_digest is None and model.weights == old.model.weights:
        model = model.model_copy(update={"weights_digest": old.model.weights_digest})
    return config.model_copy(update={"model": model})


def with_extensions(config: Config, epochs: Sequence[int]) -> Config:
    """Return the settings of a run that was extended when it had taken these numbers of epochs."""
    train = config.train.model_copy(update={"extended_at": tuple(epochs)})
    return config.model_copy(update={"train": train})


def _is_finished(folder: Path) -> bool:
    return (folder / "result.json").is_file() and has_checkpoint(folder)


def _validate_hash(folder: Path, config: Config) -> None:
    """Refuse other settings than those of `result.json`, where `config.yaml` cannot be read. Those
    of a checkpoint are compared when it is read.
    """
    try:
        result = read_result(folder)
    except UserError:
        return
    if result and (result["settings"], result["seed"]) != (settings_hash(config), config.seed):
        raise UserError(
            f"{folder} holds a run with other settings (its config.yaml cannot be read); choose "
            "another run.name or run.fresh=true"
        )


@contextmanager
def opened(config: Config, notes: list[str], arguments: Sequence[str] = ()) -> Iterator[Config]:
    """Own the run folder inside this block: create it, or move an old run aside for `run.fresh`.
    Yields the settings with which its run goes on (`continued`).

    Writes settings and provenance; adds to `notes` what the user should hear. The folder is locked
    for this process until the block or the process ends. `arguments` are the command's, for the
    provenance; none where a program trains.

    Raises:
        UserError: the folder cannot be written, another process trains in it, or it holds a run
            with other settings.
    """
    folder = run_folder(config)
    with ExitStack() as locks:
        try:
            validate_startable(config)
            if config.run.fresh and folder.exists():
                with _locked(folder):
                    notes += _set_aside(folder)
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            locks.enter_context(_locked(folder))
            validate_nothing_planted(config)  # nobody else has begun here meanwhile
            for each in (folder, folder / "checkpoints"):
                remove_parts(each)
            config = continued(folder, config, notes)  # within the lock: no other begins meanwhile
            made = made_by_other_code(folder)
            if made:
                notes.append(f"its first epochs were {made}")
            kept = config.model_copy(update={"run": config.run.model_copy(update={"fresh": False})})
            write_config(folder, kept)
            write_json(folder / "provenance.json", provenance(config, arguments))
            _set_earlier_result_aside(folder, config)
        except (OSError, UserError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise UserError(
                f"cannot write the run folder {folder}: {cause.strerror or cause}; "
                + (remedy(cause) or "type run.root=/a/folder/you/may/write")
            ) from None
        yield config


def validate_startable(config: Config) -> None:
    """Refuse a run folder that `opened` cannot make or take; nothing is changed.

    Raises:
        UserError: a link or what is no file is planted there, it cannot be written, or what lies in
            it is no run's.
    """
    validate_nothing_planted(config)
    folder = run_folder(config)
    place = nearest(folder)
    fault = f"is {no_folder(place)}" if no_folder(place) else "may not be written by you"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write the run folder {folder}: {place} {fault}; type "
            "run.root=/a/folder/you/may/write"
        )
    _validate_is_of_a_run(folder, config.run.fresh)


def validate_nothing_planted(config: Config) -> None:
    """Refuse links below `run.root` on the way to the run folder, and in it: in a root that several
    people write, one may lead to any file of this user's; and FIFOs, devices and sockets, of which
    a reader would wait for ever. `run.root` itself may be a link.

    Raises:
        UserError: naming the link and where it leads.
    """
    root, folder = resolved(config.run.root), run_folder(config)
    way = [folder, *folder.parents]
    inside = [each for part in (folder, folder / "checkpoints") for each in _entries(part)]
    for each in [*reversed(way[: way.index(root)]), *inside]:
        if each.is_symlink():
            raise UserError(
                f"{each} is a link (to {os.readlink(each)}): nothing is written through links "
                "below run.root: remove it, or type run.root=/the/folder/itself"
            )
        if each.exists() and not (each.is_file() or each.is_dir()):
            raise UserError(f"{each} is {no_file(each)}: remove it, or choose another run.name")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _is_of_a_run(folder: Path) -> bool:
    """Whether a folder holds what a run leaves, and not only a file of the same name."""
    return has_begun(folder) or is_signed(folder)


def _set_aside(folder: Path) -> list[str]:
    """Give the folder of a run another name; return a line that says so, or none where it is empty.

    Raises:
        UserError: it is no run's.
    """
    _validate_is_of_a_run(folder, is_moved=True)
    if _is_empty(folder):
        return []
    aside = folder.with_name(f"{folder.name}.moved-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.rename(aside)
    return [f"run.fresh: the earlier run was moved to {aside}"]


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds no more than a start leaves that was killed."""
    return {each.name for each in _entries(folder)} <= {"checkpoints", LOCK, LEASE}


def _validate_is_of_a_run(folder: Path, is_moved: bool) -> None:
    """Refuse a folder with a config.yaml that no run wrote: it would be written over; where the
    folder `is_moved`, any that is no run's.

    Raises:
        UserError: naming it.
    """
    if not folder.exists() or _is_of_a_run(folder):
        return
    if is_moved and not _is_empty(folder):
        raise UserError(
            f"run.fresh: {folder} is not moved aside, because it is no run's (it has no "
            "config.yaml of one and no checkpoint): choose another run.name"
        )
    if (folder / "config.yaml").exists():
        raise UserError(
            f"{folder / 'config.yaml'} is no run's, and would be written over: choose another "
            "run.name"
        )


def is_running(folder: Path) -> bool:
    """Whether another process trains in this run folder now."""
    with suppress(OSError):  # no such folder; or no locks there: `opened` will say so
        return is_locked(folder)
    return False


def _locked(folder: Path) -> AbstractContextManager[None]:
    return locked(
        folder,
        f"{{owner}} is training in {folder}; wait for it, or choose another run.name",
    )


def provenance(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Return versions, commit, command and machine of this process; the command is None where a
    program trains without one: config.yaml has its settings.
    """
    command = shlex.join(["python", "-m", "ghosttrain", *arguments]) if arguments else None
    names = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "pillow")
    return {
        "ghosttrain": __version__,
        "code": code_hash(),
        "commit": _commit(),
        "command": command,
        "extended_at_epochs": list(config.train.extended_at),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def code_hash() -> str:
    """Hash (8 hex digits) of the package's sources: which version of the code a run was made by."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".cpp")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def made_by_other_code(folder: Path) -> str | None:
    """Return a line when the run in `folder` was made by another version of the code."""
    try:
        made = (read_provenance(folder) or {}).get("code")
    except Damaged:
        path = folder / "provenance.json"
        return f"made by an unknown version of the code ({path} is damaged)"
    now = code_hash()
    if made in (None, now):
        return None
    return f"made by another version of the code ({made}, now {now}); run.fresh=true runs it anew"


def result_lines(result: dict[str, Any]) -> list[str]:
    """Return the final table of a run, one string per line."""
    classes, best, form = result["classes"], result["best"], result["model"]
    notes = {result["headline"]: "   <- the result"}
    if "ignoring" in result:
        lines = detection_lines(result["weights"], classes, result["ignoring"], notes)
    else:
        lines = table_lines(result["weights"], len(classes["names"]), notes)
        lines += class_lines(classes)
        lines.append(verdict(score(result), classes))
    by = next(key for key in WORDS if key in best)
    lines.append(
        f"best EMA on the way: {best[by]:.2f} % {WORDS[by]} after epoch {best['epoch']} "
        "(not the result: the held-out set chose it)"
    )
    sizes = f"{form['params_train'] / 1e6:.3f} M parameters, {form['macs_train'] / 1e6:.1f} M MACs"
    if "fused" in result["weights"]:
        pair = "in float vs rounded as INT8" if form.get("weight_bits") else "fused vs unfused"
        what = "an output of the head" if "ignoring" in result else "a logit"
        lines.append(f"{pair}: largest difference of {what} {result['fuse_max_diff']:.1e}")
        fused = f"{form['params_fused'] / 1e6:.3f} M, {form['macs_fused'] / 1e6:.1f} M"
        sizes = f"{sizes} in training form; {fused} fused"
    lines.append(f"{sizes}; at {form['eval_size']} px")
    lines.append(
        f"time {clock(result['seconds'])}; {result['images_per_second']:.0f} images/s in training"
    )
    return lines + result["notes"]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the git commit of a checkout, with '+' when files differ from it; None for an
    installed wheel.
    """
    if not (PACKAGE.parent / ".git").exists():
        return None
    git = ["git", "-C", str(PACKAGE.parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(dirty.strip())
