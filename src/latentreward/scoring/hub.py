"""Reward models on the hub: fetched, and uploaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from latentreward.errors import InputError, first_line
from latentreward.storage.hub import TIMEOUT, model_info

MARKS = ("head.safetensors", "state_dict.pt", "checkpoint/rm_head.pt")
"""One file of each layout."""


def downloaded(name: str, revision: str | None = None) -> Path:
    """Folder of a hub id, or of a folder in it (``owner/name/folder``); from the local cache if the hub is silent.

    Args:
        name: Hub id.
        revision: Branch, tag or commit.

    Raises:
        InputError: If ``name`` looks like none, or the hub does not have it.
    """
    parts = name.rstrip("/").split("/")
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.endswith(".ckpt") or len(parts) < 2:
        raise InputError(f"reward model {name!r} does not exist; give a model folder, a run, a checkpoint or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
    at = "" if revision is None else f" at revision {revision!r}"
    online = False
    try:
        info = model_info(repository, revision)
        if online := info is not None:
            check_folder(name, folder, [file.rfilename for file in info.siblings or ()])
        root = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=f"{folder}/*" if folder else None,
            etag_timeout=TIMEOUT,
            local_files_only=not online,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__ if online or isinstance(error, HfHubHTTPError | HFValidationError) else SILENT
        raise InputError(
            f"reward model {name!r} is neither here nor to be had from the hub{at} ({reason}); check the name, the "
            "network and your access"
        ) from error
    return Path(root) / folder


SILENT = "the hub does not answer, and the local cache does not have it"


def check_folder(name: str, folder: str, files: Iterable[str]) -> None:
    """Before gigabytes are fetched: raise InputError if a repository has no model in ``folder``, but has in others."""
    inside = [PurePosixPath(file) for file in files]
    if folder and not any(path.is_relative_to(folder) for path in inside):
        raise InputError(f"reward model {name!r}: the repository has no folder {folder!r}; {others(inside)}")
    own = {str(path.relative_to(folder)) for path in inside if path.is_relative_to(folder)}
    if not own.intersection(MARKS) and not any(path.endswith(".ckpt") for path in own) and models_in(inside):
        raise InputError(f"reward model {name!r} has no model at that place; {others(inside)}")


def models_in(files: Iterable[PurePosixPath]) -> list[str]:
    """Folders of a repository that hold a model."""
    return sorted({str(path).removesuffix(f"/{mark}") for path in files for mark in MARKS if path.match(f"?*/{mark}")})


def others(files: Iterable[PurePosixPath]) -> str:
    """Tail of a message: where the models are."""
    found = models_in(files)
    return f"add one of its folders: {', '.join(found)}" if found else "check the name"


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload reward model",
) -> str:
    """Put a model folder on the hub as a commit of a repository, which is made if it is not there; returns its address.

    Args:
        folder: As :func:`~latentreward.scoring.layouts.saving.save_pretrained` writes it.
        repository: ``owner/name``.
        private: Whether a new repository is private; None takes the owner's default.
        token: Access token; None takes that of ``huggingface-cli login`` or ``HF_TOKEN``.
        revision: Branch, which is made if it is not there; None is the main one.
        commit_message: Of the commit.

    Raises:
        InputError: If the hub does not answer or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(token=token, library_name="latentreward")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message=commit_message
        )
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no hub id ({first_line(error)}); give owner/name") from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise InputError(
            f"{repository!r}: the hub refuses ({first_line(error)}); check the name and your token"
        ) from error
    except Exception as error:  # whatever the HTTP client of the day raises without a network
        raise InputError(f"{repository!r}: the hub does not answer ({first_line(error)}); check the network") from error
    return str(commit.commit_url)
