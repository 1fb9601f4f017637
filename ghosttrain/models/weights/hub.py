"""Published weights from the Hugging Face hub: from its cache on this machine, or downloaded.

Apart from `sources.py`, which every run with a teacher imports, and most without the hub's client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
    with _asking(name, published, setting) as (repo, filenames, revision):
        for filename in filenames:
            with suppress(LocalEntryNotFoundError):
                return Path(
                    hf_hub_download(repo, filename, revision=revision, local_files_only=True)
                )
        if not download:
            raise FileNotFoundError("not on this machine")
        found = _first_on_hub(repo, filenames, revision)
        return Path(hf_hub_download(repo, found, revision=revision))


def validate_on_hub(name: str, published: PretrainedCfg, setting: str) -> None:
    """Ask the hub whether it has published weights, and fetch nothing.

    Raises:
        UserError: as `hub_file` where it downloads.
    """
    with _asking(name, published, setting) as (repo, filenames, revision):
        _first_on_hub(repo, filenames, revision)


@contextmanager
def _asking(
    name: str, published: PretrainedCfg, setting: str
) -> Iterator[tuple[str, Sequence[str], str | None]]:
    """Yield the repository of published weights, the names that their file may have, the best
    first, and the revision; turn what is raised within the block into one line.
    """
    if published.hf_hub_id is None:
        raise UserError(f"no weights of {name} are published: type {setting}=PATH")
    repo, _, revision = published.hf_hub_id.partition("@")
    filenames = ["model.safetensors", "pytorch_model.bin"]
    if published.hf_hub_filename:
        filenames = [published.hf_hub_filename]
    try:
        yield repo, filenames, revision or None
    except Exception as error:  # the hub's, its HTTP library's, the system's
        url = hf_hub_url(repo, filenames[0], revision=revision or None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"the weights of {name} cannot be had from the hub ({reason}):"
            f" fetch {url} where there is a network, then type {setting}=PATH"
        ) from error


def _first_on_hub(repo: str, filenames: Sequence[str], revision: str | None) -> str:
    """Return the first of `filenames` that the repository has; raise what the hub says of the last.

    Asked before a download because it fails at once: without a network that tries for 23 s
    (measured here with huggingface_hub 2.4.0).
    """
    for filename in filenames[:-1]:
        with suppress(EntryNotFoundError):
            get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), timeout=10)
            return filename
    get_hf_file_metadata(hf_hub_url(repo, filenames[-1], revision=revision), timeout=10)
    return filenames[-1]
