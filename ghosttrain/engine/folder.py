"""The run folder: where it is, whether a run there can go on, and what is known about its origin.
Imports no torch.

`config.yaml` settings, `provenance.json` origin, `metrics.jsonl`, `log.txt`, `checkpoints/`,
`model.safetensors` (final EMA weights), `result.json`, `curves.png`, `card.md`. A run is finished
when `result.json` exists: it is written last. Everything is written atomically: a file is either
the old one or the new one, never half.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ghosttrain import __version__
from ghosttrain.config.identity import result_settings, run_name, settings_hash
from ghosttrain.config.schema import Config
from ghosttrain.errors import UserError, remedy
from ghosttrain.files import PACKAGE, expanded, locked, write_json, write_text
from ghosttrain.text import clock, listed, one_line

RESULT_KEYS = {
    *("headline", "weights", "best", "model", "seconds", "images_per_second", "steps", "data"),
}
"""What every `result.json` holds."""


def run_folder(config: Config) -> Path:
    """Return the folder of this run; the same settings always give the same folder."""
    return expanded(config.run.root).resolve() / run_name(config)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return `result.json` of a finished run, None for an unfinished one.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = RESULT_KEYS - result.keys()
    except (ValueError, AttributeError) as error:
        missing, result = {one_line(error)}, None
    if missing:
        reason = f"it lacks {min(missing)}" if result is not None else min(missing)
        raise UserError(
            f"{path} is damaged ({reason}): delete it and type the command of this run again, "
            "which makes it anew from the last checkpoint"
        )
    return result


def has_begun(folder: Path) -> bool:
    """Whether a step of a run was kept there: a start that failed before that leaves nothing."""
    if any((folder / name).exists() for name in ("result.json", "checkpoints/last.pt")):
        return True
    metrics = folder / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def read_config(folder: Path) -> Config:
    """Return the settings of the run in `folder`.

    Raises:
        UserError: no run there, or settings this version does not know.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    try:
        return Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        reason = one_line(error).partition(" [type=")[0]
        raise UserError(
            f"{path} cannot be read ({reason}): type the command of this run with --cfg job > "
            f"{shlex.quote(str(path))}"
        ) from None


def validate_same_run(folder: Path, config: Config) -> None:
    """Refuse to go on in a folder that holds a run with other settings. A start that failed before
    its first step is no run: whoever comes next takes its folder.

    Raises:
        UserError: naming the settings that differ and what to type.
    """
    if not (has_begun(folder) and (folder / "config.yaml").is_file()):
        return
    old = read_config(folder)
    if settings_hash(old) == settings_hash(config) and old.seed == config.seed:
        return
    before, now = ({**result_settings(c), "seed": c.seed} for c in (old, config))
    changes = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    raise UserError(
        f"{folder} holds a run with other settings "
        f"({listed(changes, 4, joiner='; ')}); choose another run.name or "
        "run.fresh=true"
    )


@contextmanager
def opened(config: Config, notes: list[str]) -> Iterator[Path]:
    """Own the run folder inside this block: create it, or move an old run aside for `run.fresh`.

    Writes settings and provenance; adds to `notes` what the user should hear. The folder is locked
    for this process until the block or the process ends.

    Raises:
        UserError: the folder cannot be written, another process trains in it, or it holds a run
            with other settings.
    """
    folder = run_folder(config)
    with ExitStack() as locks:
        try:
            if config.run.fresh and folder.exists():
                with _locked(folder):
                    aside = folder.with_name(f".{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
                    folder.rename(aside)
                    notes.append(f"run.fresh: the earlier run was moved to {aside}")
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            locks.enter_context(_locked(folder))
            validate_same_run(folder, config)  # within the lock: no other process begins meanwhile
            made = made_by_other_code(folder)
            if made:
                notes.append(f"its first epochs were {made}")
            kept = config.model_copy(update={"run": config.run.model_copy(update={"fresh": False})})
            settings = yaml.safe_dump(kept.model_dump(mode="json"), sort_keys=False)
            write_text(folder / "config.yaml", settings)
            write_json(folder / "provenance.json", provenance())
        except (OSError, UserError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise UserError(
                f"cannot write the run folder {folder}: {cause.strerror or cause}; "
                + (remedy(cause) or "type run.root=/a/folder/you/may/write")
            ) from None
        yield folder


def _locked(folder: Path) -> AbstractContextManager[None]:
    return locked(
        folder,
        f"another process is training in {folder}; wait for it, or choose another run.name",
    )


def provenance() -> dict[str, Any]:
    """Return versions, commit, command and machine of this process."""
    names = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "pillow")
    return {
        "ghosttrain": __version__,
        "code": code_hash(),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "ghosttrain", *sys.argv[1:]]),
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
    path = folder / "provenance.json"
    try:
        made = json.loads(path.read_text(encoding="utf-8")).get("code") if path.is_file() else None
    except (ValueError, AttributeError):
        return f"made by an unknown version of the code ({path} is damaged)"
    now = code_hash()
    if made in (None, now):
        return None
    return f"made by another version of the code ({made}, now {now}); run.fresh=true runs it anew"


def result_lines(result: dict[str, Any]) -> list[str]:
    """Return the final table of a run, one string per line."""
    lines = [f"{'weights':<10}{'top-1 %':>9}{'top-5 %':>9}"]
    for name, row in result["weights"].items():
        mark = "   <- the result" if name == result["headline"] else ""
        lines.append(f"{name:<10}{row['top1']:>9.2f}{row['top5']:>9.2f}{mark}")
    best, form = result["best"], result["model"]
    lines.append(
        f"best EMA on the way: {best['top1']:.2f} % top-1 after epoch {best['epoch']} "
        "(not the result: the held-out set chose it)"
    )
    sizes = f"{form['params_train'] / 1e6:.3f} M parameters, {form['macs_train'] / 1e6:.1f} M MACs"
    if "fused" in result["weights"]:
        lines.append(
            f"fused vs unfused: largest difference of a logit {result['fuse_max_diff']:.1e}"
        )
        fused = f"{form['params_fused'] / 1e6:.3f} M, {form['macs_fused'] / 1e6:.1f} M"
        sizes = f"{sizes} in training form; {fused} fused"
    lines.append(f"{sizes}; at {form['eval_size']} px")
    lines.append(
        f"time {clock(result['seconds'])}; {result['images_per_second']:.0f} images/s in training"
    )
    return lines


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
