"""A reward model's place: download, layout (model folder, published layout of a paper, training run), fingerprint."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from latentreward.core.checkpoints.shards import is_sharded, newest_first
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, first_line, printable
from latentreward.core.storage.hub import TIMEOUT, commit_on_hub, is_hub_id, model_info, not_found, silence, split_id
from latentreward.reward.scoring.files import configs_beside
from latentreward.reward.scoring.layouts.base import StoredReward
from latentreward.reward.scoring.layouts.model_folder import PretrainedReward, is_model_folder
from latentreward.reward.scoring.layouts.papers import (
    PublishedDiNaLRM,
    PublishedLayout,
    PublishedLRM,
    PublishedSettings,
)

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


PREFERRED = (r"reward(-v\d+)?\.ckpt", r"last(-v\d+)?\.ckpt")
"""Names of checkpoints that are preferred over all others of a run, in this order; Lightning numbers a later run's."""


@dataclass(frozen=True)
class ModelSource:
    """Where a reward model comes from, and what its files do not say; fields are options of commands and classes.

    Attributes:
        path: Checkpoint or folder of a training run; folder or hub id of a model that ``publish`` or
            ``RewardModel.save_pretrained`` wrote; folder or hub id of a published layout (``casiatao/LRM``,
            ``liuhuohuo/DiNa-LRM-SD35M-12layers``). A hub id may be followed by a folder in the repository:
            ``owner/name/folder``.
        config: ``config.yaml`` of a training run; by default the one beside the checkpoint.
        base: Pipeline with the frozen base weights, a folder or hub id; by default the one that the model names.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether to import classes that the model's settings name and that are not registered;
            importing runs their code.
        published: Settings that the files of a published layout do not hold, such as ``guidance: 1``.
    """

    path: PathText
    config: PathText | None = None
    base: PathText | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    published: PublishedSettings | None = None

    def __str__(self) -> str:
        """Return the path, with the revision of a hub id as ``owner/name@revision``."""
        return f"{self.path}" if self.revision is None else f"{self.path}@{self.revision}"


def find_reward(source: ModelSource, average: bool = True) -> StoredReward:
    """Detect the layout of the reward model at ``source``; weights are not read yet.

    ``average`` takes the weights that the callback ``TrainableEMA`` averaged, if a checkpoint has them.

    Raises:
        InputError: If no layout is found, ``path`` is a diffusers pipeline, or ``config``, ``revision`` or
            ``published`` does not apply to the layout.
    """
    path, config, base, revision = source.path, source.config, source.base, source.revision
    if not str(path).strip():
        raise InputError("the path of the reward model is empty; give a checkpoint, a folder or a hub id")
    here = Path(path).exists()
    if here and revision is not None:
        raise InputError(f"revision={revision!r} is for hub ids, but reward model {path!r} lies here; leave it out")
    place = Path(path) if here else downloaded(path, revision)
    if (place / "model_index.json").is_file() and not any((place / mark).is_file() for mark in MARKS):
        remedy = "give a checkpoint, or the folder of a model or of a run"
        raise InputError(f"reward model {path!r} is a diffusers pipeline, not a reward; {remedy}")
    published = published_layout(place)
    heads = (head for depth in ("", "*/", "*/*/") for head in place.glob(f"{depth}rm_head.pt"))
    if published is None and (head := next(heads, None)) is not None:  # what diffusion-rm's training writes
        layout = "has in checkpoint/ beside config.json, with backbone_lora/; arrange a folder so"
        raise InputError(f"reward model {path!r} holds {head.relative_to(place)}, which the published layout {layout}")
    if published is None and source.published is not None:
        own = "has neither published layout and holds its settings itself"
        raise InputError(f"published is set, but reward model {path!r} {own}; leave it out")
    if published is not None or is_model_folder(place):
        if config is not None:
            raise InputError(f"config is set, but reward model {path!r} is not a run and needs none; leave it out")
        if published is not None:
            return published(place, base, source.published)
        return PretrainedReward(place, base, source.trust_remote_code)
    if config is not None and not Path(config).is_file():
        raise InputError(f"config={config!r} does not exist; give the config.yaml of the reward's run")
    from latentreward.reward.scoring.layouts.run import TrainedReward

    settings = None if config is None else Path(config)
    return TrainedReward(checkpoint_of(place), settings, average, base, source.trust_remote_code)


def published_layout(place: Path) -> type[PublishedLayout] | None:
    """Return the class of the published layout (LRM or DiNa-LRM) in the folder ``place``, or None if there is neither.

    One characteristic file is enough; loading reports files that are missing.
    """
    if (place / "state_dict.pt").is_file() or (place / "unet" / "config.json").is_file():
        return PublishedLRM
    if (place / "checkpoint" / "rm_head.pt").is_file() or (place / "checkpoint" / "backbone_lora").is_dir():
        return PublishedDiNaLRM
    return None


def checkpoint_of(place: Path) -> Path:
    """Return the checkpoint at ``place``, or inside it if ``place`` is the folder of a training run.

    Of several checkpoints, those with the first name in :data:`PREFERRED` that occurs count; of these (or of all, if
    no name occurs) the newest is returned.

    Raises:
        InputError: If ``place`` is a file that is not a checkpoint, or a folder without one.
    """
    if place.suffix.lower() in (".yaml", ".yml", ".json", ".safetensors", ".md", ".txt") and place.is_file():
        raise InputError(f"reward model {str(place)!r} is not a checkpoint; give one (.ckpt), or the folder of a run")
    if place.is_file() or is_sharded(place):
        return place
    found = [path for path in place.rglob("*.ckpt") if path.exists() and not any(map(is_sharded, path.parents))]
    if not found:
        raise InputError(
            f"reward model {str(place)!r} holds no checkpoint (*.ckpt), no head.safetensors, and neither published "
            "layout; give a checkpoint, or the folder of a model or of a run"
        )
    named = ([path for path in found if re.fullmatch(name, path.name)] for name in PREFERRED)
    candidates = newest_first(next(filter(None, named), found))
    taken, newer = candidates[0], newest_first(found)[0]
    if len(candidates) > 1 or taken != newer:
        names = f"{taken.relative_to(place)} is taken" + (
            "" if taken == newer else f", though {newer.relative_to(place)} is newer"
        )
        message = printable(f"{place} holds {len(found)} checkpoints: {names}")
        logging.getLogger(__name__).warning("%s; give a file's own path for another one", message)
    return taken


WHOLE, BLOCKS, BLOCK = 1 << 24, 64, 1 << 16
"""Size in bytes up to which files are hashed in full; number, and size in bytes, of blocks hashed of larger files."""


def fingerprint(place: str | Path, revision: str | None = None) -> str:
    """Return one line with the name of a file or folder and a hash of its contents, or a hub id and its commit.

    Files that count: for a checkpoint or the folder of a run, the checkpoints and ``config*.yaml``, but not logs; for
    any other folder, all files except hidden ones, pictures and ``README.md``. A file of up to ``WHOLE`` bytes, and any
    table, is hashed in full; of a larger file the size and ``BLOCKS`` evenly spread blocks of ``BLOCK`` bytes. The
    location does not count: a moved or copied folder has the same fingerprint. A base pipeline that a model names in
    its own settings counts by its name only.

    Other text is returned unchanged. The revision of a hub id is named if the commit is not known.
    """
    path = Path(place)
    if not path.exists():
        if not is_hub_id(str(place), folders=True):
            return str(place)
        return f"{place} at {commit_on_hub(str(place), revision) or revision or 'an unknown commit'}"
    digest, root = hashlib.blake2b(digest_size=16), path if path.is_dir() else path.parent
    for name, file in sorted((os.path.relpath(file, root), file) for file in files_of(path)):
        size = file.stat().st_size
        digest.update(f"{name if path.is_dir() or file != path else ''}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= WHOLE or file.suffix in (".csv", ".json", ".jsonl", ".parquet", ".txt", ".yaml"):
                while block := stream.read(WHOLE):
                    digest.update(block)
                continue
            for start in np.linspace(0, size - BLOCK, BLOCKS).astype(np.int64).tolist():
                stream.seek(start)
                digest.update(stream.read(BLOCK))
    return f"{path.absolute().name}, {digest.hexdigest()}"


def files_of(place: Path) -> set[Path]:
    """List the files at ``place`` that scores depend on; see :func:`fingerprint`."""
    if place.suffix == ".ckpt" or is_sharded(place):
        return {*_files(place), *configs_beside(place)}
    if place.is_file():
        return {place}
    checkpoints = [*place.rglob("*.ckpt")]
    is_model = any((place / name).exists() for name in ("model_index.json", "config.json", "head.safetensors"))
    if checkpoints and not is_model and not published_layout(place):
        return {file for path in checkpoints for file in (*_files(path), *configs_beside(path))}
    return {
        file
        for file in _files(place)
        if not any(part.startswith(".") for part in file.relative_to(place).parts)
        and file.name != "README.md"
        and file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp")
    }


def _files(place: Path) -> Iterable[Path]:
    return [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
