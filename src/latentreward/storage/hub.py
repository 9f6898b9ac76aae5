"""Questions to the hub: one try each, after which the local cache speaks for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

TIMEOUT = 10.0
"""Seconds to wait for the hub."""


def hub_answers(repository: str, name: str, revision: str | None = None) -> bool:
    """Tell whether the hub can be asked for file ``name``, where ``hf_hub_download`` would retry half a minute.

    Raises:
        HfHubHTTPError: If the hub answers that there is no such file, or no access to it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository, name, revision=revision)
    return _asked_once(lambda: get_hf_file_metadata(url, timeout=TIMEOUT)) is not None


@cache
def read_locally(source: str, revision: str | None = None) -> bool:
    """Tell whether ``source`` is a folder, or a hub id for which the local cache speaks; asked once in a process.

    Args:
        source: Folder or hub id.
        revision: Branch, tag or commit of a hub id.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(source).is_dir() or not hub_answers(source, "config.json", revision)
    except (HfHubHTTPError, HFValidationError):  # which whoever loads it will be told as well
        return False


def model_info(repository: str, revision: str | None = None) -> ModelInfo | None:
    """Ask for what the hub knows of a model repository; None if it does not answer.

    Raises:
        HfHubHTTPError: If the hub answers that there is no such repository or revision, or no access to it.
        HFValidationError: If ``repository`` is no valid name.
    """
    from huggingface_hub import HfApi

    return _asked_once(lambda: HfApi().model_info(repository, revision=revision, timeout=TIMEOUT))


def _asked_once(question: Callable[[], Any]) -> Any:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return question()
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # whatever the HTTP client of the day raises without a network
        return None


@cache
def commit_on_hub(name: str, revision: str | None = None) -> str | None:
    """Commit of a hub id, or of a folder in it, the same throughout a process.

    As for loading, the hub is asked first, and the local cache if it is silent.

    Args:
        name: Hub id.
        revision: Branch, tag or commit.

    Returns:
        None if neither tells.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = "/".join(name.split("/")[:2])
    try:
        info = model_info(repository, revision)
        if info is not None:
            return info.sha
        return Path(snapshot_download(repository, revision=revision, local_files_only=True)).name
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def cached_files(name: str, revision: str | None = None) -> Path | None:
    """Folder of what the local cache has of a hub id, or of a folder in it; None if that is nothing.

    Args:
        name: Hub id.
        revision: Branch, tag or commit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, folder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        found = Path(snapshot_download(repository, revision=revision, local_files_only=True)) / folder
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return found if found.is_dir() else None
