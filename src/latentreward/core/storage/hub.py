"""Requests to the Hugging Face hub, each tried once; without an answer, callers fall back to the local cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

TIMEOUT = 10.0  # seconds to wait for an answer of the hub
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(name: str, folders: bool = False) -> bool:
    """Tell whether ``name`` has the form ``owner/name`` of a hub id, or with ``folders`` also ``owner/name/folder``."""
    repository, _ = split_id(name)
    return HUB_ID.fullmatch(repository) is not None and (folders or name == repository) and not name.endswith(".ckpt")


def split_id(name: str) -> tuple[str, str]:
    """Return the repository ``owner/name`` of a hub id, and the folder in it (empty for its root)."""
    parts = name.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def hub_answers(repository: str, name: str, revision: str | None = None) -> bool:
    """Tell whether the hub answers a request for the metadata of file ``name``; HfHubHTTPError if it has none.

    Without a network, ``hf_hub_download`` would retry for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository, name, revision=revision)
    return _asked_once(lambda: get_hf_file_metadata(url, timeout=TIMEOUT)) is not None


def silence() -> str:
    """Say why the hub does not answer."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE keeps the hub from being asked" if constants.HF_HUB_OFFLINE else "the hub does not answer"


def not_found(name: str, reason: str) -> str:
    """Describe a name that is no path here and that the hub does not give for ``reason``, with the remedy."""
    folder, _, last = name.rpartition("/")
    if folder and Path(folder).is_dir():
        return f"does not exist: {folder} holds no {last}, and the hub does not give it ({reason}); check the path"
    return f"is not here and cannot be fetched from the hub ({reason}); check the name, the network and your access"


@cache
def read_locally(source: str, revision: str | None = None) -> bool:
    """Tell whether ``source`` is to be read without the hub: a folder, or a hub id while the hub does not answer."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(source).is_dir() or not hub_answers(source, "config.json", revision)
    except (HfHubHTTPError, HFValidationError):  # loading will raise the same error, with its own message
        return False


def model_info(repository: str, revision: str | None = None) -> ModelInfo | None:
    """Ask the hub about a model repository; None without an answer. An HfHubHTTPError says that it has none."""
    from huggingface_hub import HfApi

    return _asked_once(lambda: HfApi().model_info(repository, revision=revision, timeout=TIMEOUT))


def _asked_once(question: Callable[[], Any]) -> Any:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return question()
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # without a network, each version's HTTP client raises errors of its own
        return None


@cache
def commit_on_hub(name: str, revision: str | None = None) -> str | None:
    """Return the commit that a hub id, or a folder in it, and revision stand for; None if nobody knows it.

    As for loading, the local cache is read if the hub does not answer. The answer is kept for the whole process.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _ = split_id(name)
    try:
        info = model_info(repository, revision)
    except (HfHubHTTPError, HFValidationError):
        return None
    if info is not None:
        return info.sha
    found = cached_files(repository, revision)
    return None if found is None else found.name


def cached_files(name: str, revision: str | None = None) -> Path | None:
    """Folder of what the local cache has of a hub id, or of a folder in it; None if that is nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, folder = split_id(name)
    try:
        found = Path(snapshot_download(repository, revision=revision, local_files_only=True)) / folder
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return found if found.is_dir() else None
