"""A reward model's place: download, layout (model folder, published layout of a paper, training run), fingerprint."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from latentreward.core.checkpoints.shards import is_sharded, newest_first
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, printable
from latentreward.core.storage.hub import TIMEOUT, commit_on_hub, is_hub_id, model_info, not_found, silence, split_id
from latentreward.reward.scoring.files import PublishedSettings, configs_beside

if TYPE_CHECKING:
    from latentreward.reward.scoring.stored import StoredReward

MARKS = ("head.safetensors", "state_dict.pt", "checkpoint/rm_head.pt")
"""Path of a file that identifies each layout: model folder, LRM, DiNa-LRM."""
NEEDED = (".ckpt", ".metadata", "rm_head.pt")
"""Ends of files of which a folder of no known layout needs one: checkpoint, index of shards, DiNa-LRM's head."""
PREFERRED = (r"reward(-v\d+)?\.ckpt", r"last(-v\d+)?\.ckpt")
"""Names of checkpoints that are preferred over all others of a run, in this order; Lightning numbers a later run's."""
WHOLE, BLOCKS, BLOCK = 1 << 24, 64, 1 << 16
"""Size in bytes up to which files are hashed in full; number, and size in bytes, of blocks hashed of larger files."""


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
    """
    path, config, base, trusted = source.path, source.config, source.base, source.trust_remote_code
    place = Path(path) if Path(path).exists() else downloaded(path, source.revision)
    from latentreward.reward.scoring.stored import PretrainedReward, is_model_folder

    layout = published_layout(place)
    saved = layout is None and is_model_folder(place)
    if layout is None and source.published is not None:
        own = "has neither published layout and holds its settings itself"
        raise InputError(f"published is set, but reward model {path!r} {own}; leave it out")
    if saved:
        return PretrainedReward(place, base, trusted)
    from latentreward.reward.scoring import importers  # few models have another layout

    if layout is not None:
        return getattr(importers, layout)(place, base, source.published)
    settings = None if config is None else Path(config)
    return importers.TrainedReward(checkpoint_of(place), settings, average, base, trusted)


def name_of(source: str) -> str:
    """Return the last part of a local path; a hub id is returned unchanged."""
    path = Path(source)
    # os.path.exists returns False for a name that is too long for a file; pathlib's exists raises.
    return path.absolute().name if path.is_absolute() or os.path.exists(source) else source  # noqa: PTH110


def published_layout(place: Path) -> str | None:
    """Return the class of the published layout of ``place``, by name; None if it has neither of the two.

    One characteristic file is enough; loading reports files that are missing.
    """
    if (place / "state_dict.pt").is_file() or (place / "unet" / "config.json").is_file():
        pipeline = (place / "model_index.json").is_file() and not (place / "state_dict.pt").is_file()
        return None if pipeline else "PublishedLRM"
    if (place / "checkpoint" / "rm_head.pt").is_file() or (place / "checkpoint" / "backbone_lora").is_dir():
        return "PublishedDiNaLRM"
    return None


def downloaded(name: str, revision: str | None = None) -> Path:
    """Download a reward model ``owner/name[/folder]`` at a branch, tag or commit, and return its local folder.

    The local cache serves if the hub is offline.
    """
    if not is_hub_id(name := name.rstrip("/"), folders=True):
        raise InputError(f"reward model {name!r} does not exist; give a model folder, a run, a checkpoint or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, folder = split_id(name)
    online = False
    try:
        info = model_info(repository, revision)
        if online := info is not None:
            check_folder(name, folder, [file.rfilename for file in info.siblings or ()])
        patterns = f"{folder}/*" if folder else None
        options: dict[str, Any] = {"allow_patterns": patterns, "etag_timeout": TIMEOUT, "local_files_only": not online}
        return Path(snapshot_download(repository, revision=revision, **options)) / folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        answered = online or isinstance(error, HfHubHTTPError | HFValidationError)
        at = "" if revision is None else f" at revision {revision!r}"
        reason = type(error).__name__ if answered else silence()
        raise InputError(f"reward model {name!r}{at} {not_found(name, reason)}") from error


def check_folder(name: str, folder: str, files: Iterable[str]) -> None:
    """Raise InputError, before gigabytes are loaded, if ``folder`` of a repository holds no model."""
    inside = [PurePosixPath(file) for file in files]
    own = {str(path.relative_to(folder)) for path in inside if path.is_relative_to(folder)}
    if not own.intersection(MARKS) and not any(path.endswith(NEEDED) for path in own):
        found = {str(path).removesuffix(f"/{mark}") for path in inside for mark in MARKS if path.match(f"?*/{mark}")}
        remedy = f"add one of its folders: {', '.join(sorted(found))}" if found else "check the name"
        raise InputError(f"reward model {name!r} does not point to a reward model; {remedy}")


def checkpoint_of(place: Path) -> Path:
    """Return the checkpoint at ``place``, or inside it if ``place`` is the folder of a training run.

    Of several checkpoints, those with the first name in :data:`PREFERRED` that occurs count; of these (or of all, if
    no name occurs) the newest is returned.
    """
    if is_sharded(place) or (place.is_file() and place.suffix.lower() not in (".yaml", ".json", ".safetensors")):
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
        beside = "" if taken == newer else f", though {newer.relative_to(place)} is newer"
        message = f"{place} holds {len(found)} checkpoints: {taken.relative_to(place)} is taken{beside}"
        logging.getLogger(__name__).warning("%s; give a file's own path for another one", printable(message))
    return taken


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

    def inside(folder: Path) -> list[Path]:
        return [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]

    is_model = any((place / name).exists() for name in ("model_index.json", "config.json", "head.safetensors"))
    checkpoints = [] if is_model or published_layout(place) else [*place.rglob("*.ckpt")]
    if place.suffix == ".ckpt" or is_sharded(place):
        checkpoints = [place]
    if checkpoints:
        return {file for path in checkpoints for file in (*inside(path), *configs_beside(path))}
    if place.is_file():
        return {place}
    pictures = (".png", ".jpg", ".jpeg", ".webp")
    named = ((file, file.relative_to(place)) for file in inside(place) if file.suffix.lower() not in pictures)
    return {file for file, name in named if name.name != "README.md" and not any(p[0] == "." for p in name.parts)}
