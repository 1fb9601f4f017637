"""The small files of a run folder: one writer and one reader for each. Imports no torch.

`config.yaml` settings, `provenance.json` origin, `result.json` the end. Each carries a SHA-256 of
itself, so that a file that was cut or damaged is found; readers know the types and bounds of what
they read, and how large it may be. What reads `metrics.jsonl` stands in `track.py`, checkpoints in
`checkpoint.py`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml.events import AliasEvent

from ghosttrain.config.schema import Config
from ghosttrain.errors import UserError
from ghosttrain.files import Damaged, file_digest, read_json, read_limited, write_json, write_text
from ghosttrain.text import first_fault, one_line

LARGEST = 1_000_000
"""Bytes that a small file may have."""
SIGNED = "# sha256 of the lines above: "
PRODUCTS = ("model.safetensors", "curves.png", "confusion.png", "card.md")
"""What a finished run leaves; it can be made anew from the last checkpoint."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=-1, le=100)]
"""In per cent; -1: there is nothing to measure it on."""
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Record(BaseModel):
    """Read from a file; keys beside these are kept."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Row(_Record):
    top1: Percent
    top5: Percent
    balanced: Percent
    macro_f1: Percent
    ece: Percent
    loss: Finite


class _Best(_Record):
    top1: Annotated[float, Field(ge=-1, le=100)] | None = None
    balanced: Annotated[float, Field(ge=-1, le=100)] | None = None
    ap: Annotated[float, Field(ge=-1, le=100)] | None = None
    epoch: Count


class _Classes(_Record):
    names: list[str]
    images: list[Count]
    recall: list[Percent | None]
    precision: list[Percent | None]
    confusion: list[list[Count]] | None


class _Sizes(_Record):
    name: str
    params_train: Count
    params_fused: Count
    macs_train: Count
    macs_fused: Count
    eval_size: Count


class _Half(_Record):
    images: Count
    digest: str


class _Data(_Record):
    train: _Half
    held_out: _Half


class Result(_Record):
    """What every `result.json` holds."""

    headline: str
    weights: dict[str, _Row]
    """Kind of weights -> accuracy in per cent."""
    classes: _Classes
    """Of the headline's weights."""
    best: _Best
    fuse_max_diff: Finite
    model: _Sizes
    seconds: Finite
    images_per_second: Finite
    steps: Count
    data: _Data
    settings: str
    """`identity.settings_hash`."""
    seed: Count
    notes: list[str] = []
    """What the course of the run teaches (`advice.py`)."""
    files: dict[str, str]
    """Name of a product -> SHA-256."""


class _BoxRow(_Record):
    ap: Share
    ap50: Share
    n: Count


class _BoxClasses(_Record):
    names: list[str]
    boxes: list[Count]
    ap: list[Percent | None]
    confusion: None


class DetectionResult(Result):
    """What the `result.json` of a detector holds."""

    weights: dict[str, _BoxRow]  # type: ignore[assignment]
    """Kind of weights -> the numbers of COCO in per cent."""
    classes: _BoxClasses  # type: ignore[assignment]
    """Of the headline's weights."""
    ignoring: _BoxRow
    """Of a detector that ignores the picture."""


# --- config.yaml ----------------------------------------------------------------------------------


def write_config(folder: Path, config: Config) -> None:
    """Write the settings of a run."""
    write_text(folder / "config.yaml", config_text(config))


def config_text(config: Config) -> str:
    """Return settings as the text of a config.yaml, which `read_config` reads."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return f"{text}{SIGNED}{hashlib.sha256(text.encode()).hexdigest()}\n"


def read_config(folder: Path) -> Config:
    """Return the settings of the run in `folder`.

    Raises:
        UserError: no run there, a damaged file, or settings this version does not know.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    try:
        text, signed, digest = read_limited(path, LARGEST).decode().rpartition(SIGNED)
        if not signed or hashlib.sha256(text.encode()).hexdigest() != digest.strip():
            raise Damaged("it is not as it was written")
        return Config.model_validate(yaml.load(text, _Settings))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({_reason(error)}): the command of this run writes it anew; "
            "with --cfg job it prints the settings"
        ) from None


def is_signed(folder: Path) -> bool:
    """Whether `folder` has a config.yaml that `write_config` wrote, by its last line."""
    try:
        return SIGNED.encode() in read_limited(folder / "config.yaml", LARGEST)
    except (OSError, Damaged):
        return False


class _Settings(yaml.SafeLoader):
    """Plain YAML without aliases, of which a few lines can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        return super().compose_node(parent, index)


# --- result.json ----------------------------------------------------------------------------------


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of a run with the digests of what it leaves: the last file of a run."""
    there = (name for name in PRODUCTS if (folder / name).is_file())
    files = {name: file_digest(folder / name) for name in there}
    write_json(folder / "result.json", {**result, "files": files})


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return `result.json` of a finished run, None for an unfinished one.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        result = read_json(path, LARGEST)
        kind = DetectionResult if "ignoring" in result else Result
        kind.model_validate(result)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({_reason(error)}): the command of this run makes it anew from the "
            "last checkpoint"
        ) from None
    return result


def damaged_products(folder: Path, result: dict[str, Any]) -> list[str]:
    """Return which products of a finished run are missing or not as they were written."""
    return [
        name
        for name, digest in result["files"].items()
        if name in PRODUCTS
        and not ((folder / name).is_file() and file_digest(folder / name) == digest)
    ]


# --- provenance.json ------------------------------------------------------------------------------


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Return where a run comes from; None where nothing says so.

    Raises:
        Damaged: the file is.
    """
    path = folder / "provenance.json"
    return read_json(path, LARGEST) if path.is_file() else None


def without_remedy(error: UserError) -> str:
    """Return which file is damaged and how, for the command that mends it itself."""
    return str(error).rpartition(": the command of this run")[0]


def _reason(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return first_fault(error)
    return one_line(error).partition(" [type=")[0][:200]
