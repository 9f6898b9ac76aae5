"""What lies at a path: a model folder of this program, one of the two papers' layouts, or a run of this program."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from latentreward.checkpoints.files import newest_first
from latentreward.checkpoints.shards import is_sharded
from latentreward.errors import InputError
from latentreward.scoring.hub import downloaded
from latentreward.scoring.layouts.base import StoredReward
from latentreward.scoring.layouts.model_folder import PretrainedReward, is_model_folder
from latentreward.scoring.layouts.published import PublishedDiNaLRM, PublishedLRM, PublishedSettings
from latentreward.scoring.layouts.run import TrainedReward

logger = logging.getLogger(__name__)

__all__ = ["PublishedDiNaLRM", "PublishedLRM", "StoredReward", "checkpoint_of", "find_reward"]

PREFERRED = (r"reward(-v\d+)?\.ckpt", r"last(-v\d+)?\.ckpt")
"""Names of checkpoints that are taken before others of a run; Lightning numbers those of a later run."""
NO_CHECKPOINT = (".yaml", ".yml", ".json", ".safetensors", ".md", ".txt")
"""Endings of files that are none."""


def find_reward(
    path: str,
    config: str | None = None,
    base: str | None = None,
    average: bool = True,
    *,
    revision: str | None = None,
    trusted: bool = False,
    published: PublishedSettings | None = None,
) -> StoredReward:
    """What lies at ``path``, in a folder or on the hub.

    Args:
        path: Checkpoint, folder of a run, model folder, published layout, or hub id.
        config: Settings of a run, if not beside its checkpoint.
        base: Pipeline of the frozen weights, if not the one that the model names.
        average: Whether the moving average of ``TrainableEMA`` stands for the weights, if a checkpoint has one.
        revision: Branch, tag or commit of a hub id.
        trusted: Whether the model may name any class; see :mod:`.trust`.
        published: What the files of a published layout do not hold; None takes the defaults.

    Raises:
        InputError: If it is none of them, or a setting was given for one that takes none.
    """
    here = Path(path).exists()
    if here and revision is not None:
        raise InputError(f"revision={revision!r} is for hub ids, but reward model {path!r} lies here; leave it out")
    place = Path(path) if here else downloaded(path, revision)
    layout = published_layout(place, base, published)
    if layout is None and published is not None:
        raise InputError(
            f"published is set, but reward model {path!r} has none of the two published layouts and holds its settings "
            "itself; leave it out"
        )
    if layout is None and is_model_folder(place):
        layout = PretrainedReward(place, base, trusted)
    if layout is not None:
        if config is not None:
            raise InputError(f"config is set, but reward model {path!r} is no run and needs none; leave it out")
        return layout
    if config is not None and not Path(config).is_file():
        raise InputError(f"config={config!r} does not exist; give the config.yaml of the reward's run")
    settings = None if config is None else Path(config)
    return TrainedReward(checkpoint_of(place), settings, average, base, trusted)


def published_layout(place: Path, base: str | None, settings: PublishedSettings | None = None) -> StoredReward | None:
    """One of the two papers' layouts, perhaps incomplete, if ``place`` is one."""
    if (place / "state_dict.pt").is_file() or (place / "unet" / "config.json").is_file():
        return PublishedLRM(place, base, settings)
    if (place / "checkpoint" / "rm_head.pt").is_file() or (place / "checkpoint" / "backbone_lora").is_dir():
        return PublishedDiNaLRM(place, base, settings)
    return None


def checkpoint_of(place: Path) -> Path:
    """``place`` itself, or the checkpoint of the run in the folder ``place``: by preferred name, the newest of those.

    Raises:
        InputError: If it is a file of another kind, or the folder holds none.
    """
    if place.suffix.lower() in NO_CHECKPOINT and place.is_file():
        raise InputError(
            f"reward model {str(place)!r} is no checkpoint; give one (.ckpt), or the folder of the model or of the run"
        )
    if place.is_file() or is_sharded(place):
        return place
    found = [path for path in place.rglob("*.ckpt") if not any(is_sharded(parent) for parent in path.parents)]
    if not found:
        raise InputError(
            f"reward model {str(place)!r} holds no checkpoint (*.ckpt), no head.safetensors, and neither published "
            "layout; give the folder of a model or of a run, or a checkpoint"
        )
    named = ([path for path in found if re.fullmatch(name, path.name)] for name in PREFERRED)
    candidates = newest_first(next(filter(None, named), found))
    taken, newer = candidates[0], newest_first(found)[0]
    if len(candidates) > 1 or taken != newer:
        names = f"{taken.relative_to(place)} is taken" + ("" if taken == newer else f", though {newer.name} is newer")
        logger.warning("%s holds %d checkpoints: %s; give a file's own path for another one", place, len(found), names)
    return taken
