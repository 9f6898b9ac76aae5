"""Download and upload of reward models on the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.hub import TIMEOUT, is_hub_id, model_info, not_found, silence, split_id

MARKS = ("head.safetensors", "state_dict.pt", "checkpoint/rm_head.pt")
"""Path of a file that identifies each layout: model folder, LRM, DiNa-LRM."""
NEEDED = (".ckpt", ".metadata", "rm_head.pt")
"""Ends of files of which a folder of no known layout needs one: checkpoint, index of shards, DiNa-LRM's head."""


def downloaded(name: str, revision: str | None = None) -> Path:
    """Download a reward model ``owner/name[/folder]`` at a branch, tag or commit, and return its local folder.

    The local cache serves if the hub is offline.

    Raises:
        InputError: If ``name`` does not look like a hub id, or neither hub nor cache has the model.
    """
    if not is_hub_id(name := name.rstrip("/"), folders=True):
        raise InputError(f"reward model {name!r} does not exist; give a model folder, a run, a checkpoint or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, folder = split_id(name)
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
        answered = online or isinstance(error, HfHubHTTPError | HFValidationError)
        reason = type(error).__name__ if answered else silence()
        raise InputError(f"reward model {name!r}{at} {not_found(name, reason)}") from error
    return Path(root) / folder


def check_folder(name: str, folder: str, files: Iterable[str]) -> None:
    """Raise InputError, before gigabytes are loaded, if ``folder`` of a repository is missing or holds no model."""
    inside = [PurePosixPath(file) for file in files]
    if folder and not any(path.is_relative_to(folder) for path in inside):
        raise InputError(f"reward model {name!r}: the repository has no folder {folder!r}; {others(inside)}")
    own = {str(path.relative_to(folder)) for path in inside if path.is_relative_to(folder)}
    if not own.intersection(MARKS) and not any(path.endswith(NEEDED) for path in own):
        raise InputError(f"reward model {name!r} does not point to a reward model; {others(inside)}")


def models_in(files: Iterable[PurePosixPath]) -> list[str]:
    """Return the folders of a repository that hold a model, from the paths of its files."""
    return sorted({str(path).removesuffix(f"/{mark}") for path in files for mark in MARKS if path.match(f"?*/{mark}")})


def others(files: Iterable[PurePosixPath]) -> str:
    """Return the end of an error message: a list of the repository's folders that hold models."""
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
    """Upload a model folder to the hub as one commit, and return the commit's URL.

    Args:
        folder: Model folder.
        repository: ``owner/name``; the repository is created if it does not exist.
        private: Whether a new repository is private; None takes the owner's default.
        token: Access token; None takes that of ``huggingface-cli login`` or ``HF_TOKEN``.
        revision: Branch, created if it does not exist; None is the main branch.
        commit_message: Message of the commit.

    Raises:
        InputError: If the hub does not answer or rejects the upload.
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
        raise InputError(f"{repository!r} is not a hub id ({first_line(error)}); give owner/name") from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise InputError(f"{repository!r}: the hub refuses ({first_line(error)}); check name and token") from error
    except Exception as error:  # without a network the error's type depends on the HTTP client of huggingface_hub
        raise InputError(f"{repository!r}: the hub does not answer ({first_line(error)}); check the network") from error
    return str(commit.commit_url)
