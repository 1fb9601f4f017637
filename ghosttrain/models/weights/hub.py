"""Published weights from the Hugging Face hub: from its cache on this machine, or downloaded.

Apart from `sources.py`, which every run with a teacher imports, and most without the hub's client.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import PretrainedCfg

from ghosttrain.errors import UserError


def hub_file(name: str, published: PretrainedCfg, setting: str, download: bool) -> Path:
    """Return published weights, from the hub's cache on this machine or downloaded.

    Raises:
        UserError: there are none, or they cannot be had.
    """
    if published.hf_hub_id is None:
        raise UserError(f"no weights of {name} are published: type {setting}=PATH")
    repo, _, revision = published.hf_hub_id.partition("@")
    filenames = ["model.safetensors", "pytorch_model.bin"]
    if published.hf_hub_filename:
        filenames = [published.hf_hub_filename]
    try:
        return Path(_fetch(repo, revision or None, filenames, download))
    except Exception as error:  # the hub's, its HTTP library's, the system's
        url = hf_hub_url(repo, filenames[0], revision=revision or None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"the weights of {name} cannot be had from the hub ({reason}):"
            f" fetch {url} where there is a network, then type {setting}=PATH"
        ) from error


def _fetch(repo: str, revision: str | None, filenames: Sequence[str], download: bool) -> str:
    """Return the local path of the first of `filenames` that the repository has."""
    for filename in filenames:
        with contextlib.suppress(LocalEntryNotFoundError):
            return hf_hub_download(repo, filename, revision=revision, local_files_only=True)
    if not download:
        raise FileNotFoundError("not on this machine")
    for filename in filenames[:-1]:
        with contextlib.suppress(EntryNotFoundError):
            return _download(repo, filename, revision)
    return _download(repo, filenames[-1], revision)


def _download(repo: str, filename: str, revision: str | None) -> str:
    # Asked for first because it fails at once: without a network the download tries for 23 s
    # (measured here with huggingface_hub 2.4.0).
    get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), timeout=10)
    return hf_hub_download(repo, filename, revision=revision)
