"""Detection of a reward model's layout from a path: model folder, published layout of a paper, or training run."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from latentreward.core.checkpoints.shards import is_sharded, newest_first
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, printable
from latentreward.reward.scoring.hub import MARKS, downloaded
from latentreward.reward.scoring.layouts.base import StoredReward
from latentreward.reward.scoring.layouts.model_folder import PretrainedReward, is_model_folder
from latentreward.reward.scoring.layouts.papers import (
    PublishedDiNaLRM,
    PublishedLayout,
    PublishedLRM,
    PublishedSettings,
)
from latentreward.reward.scoring.layouts.run import TrainedReward

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
