"""What the training pictures of a reward are like: kept in its checkpoints, compared with the data of later runs."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Subset

from latentreward.core.errors import errors_at
from latentreward.core.storage.json_files import checked
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import ExifOrientation
from latentreward.reward.scoring.recipe import SETTINGS
from latentreward.reward.scoring.reward_model import RewardModel
from latentreward.reward.scoring.scoring_noise import timesteps_of
from latentreward.reward.scoring.stored import sizes_of, sizes_record

logger = logging.getLogger(__name__)

SIZE_SETTINGS = "data.size and data.resize, or the cache's images,"
"""Names of the settings that decide the size of images, for messages."""


class TrainingPictures(Callback):
    """Callback of every reward module: notes how its training pictures are turned, resized and edited.

    It warns where a resumed run, a validation, a test or a prediction has other pictures.
    """

    def __init__(self) -> None:
        self.sizes: ImageSizes | None = None

    def record(self, model: RewardModel, checkpoint: dict[str, Any]) -> None:
        """Save what is known of the training pictures."""
        checkpoint |= {"exif": model.exif, "edits": model.edits, "image_sizes": sizes_record(self.sizes)}

    def restore(self, model: RewardModel, checkpoint: dict[str, Any]) -> None:
        """Read what :meth:`record` saved."""
        model.exif = checked(ExifOrientation, checkpoint.get("exif"), "exif")
        model.edits = checked(bool | None, checkpoint.get("edits"), "edits")
        with errors_at("image_sizes: "):
            self.note_sizes(model, sizes_of(checkpoint.get("image_sizes")))

    def note_sizes(self, model: RewardModel, sizes: ImageSizes | None) -> None:
        """Note the sizes of the training pictures; None leaves those of the model."""
        self.sizes = sizes
        model.image_sizes = sizes or model.image_sizes

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if scores are by default computed at noise levels that the training does not draw."""
        process, generator, noise = pl_module.noise_process, torch.Generator().manual_seed(0), pl_module.model.noise
        # 64 draws from a generator of its own: the run's random numbers stay as they are.
        drawn = process.sigma(torch.cat([pl_module.levels.draw(generator, process) for _ in range(64)]))
        scored = process.sigma(timesteps_of(noise, process))
        if scored.min() < drawn.min() - 0.1 or scored.max() > drawn.max() + 0.1:
            rank_zero_warn(
                f"model.levels draws noise levels {drawn.min():.2g} to {drawn.max():.2g}, but scores are by default at "
                f"{noise}; score with --noise.sigmas [{drawn.median():.2g}], or train at that level too"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how the data turn and resize pictures, and whether they edit; warn if a resumed run changes it.

        A learning rate finder also sets the trainer's ``ckpt_path``, but goes back to step 0.
        """
        model, dataset = pl_module.model, next(datasets_of(trainer.train_dataloader), None)
        exif, sizes = getattr(dataset, "exif", None), getattr(dataset, "image_sizes", None)
        sizes_record(sizes)  # raises if the rule cannot be saved
        if trainer.global_step:
            warn_if_other(trainer, "resume", "exif", model.exif, exif, "the reader's exif")
            self.compare(trainer, "resume", model, trainer.train_dataloader)
        model.exif = exif or model.exif
        if (edits := edits_of(dataset)) is not None:
            model.edits = edits
        self.note_sizes(model, sizes or self.sizes)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if an evaluation without training has pictures of other sizes, or only one of the two has edits."""
        evaluated = {"validate": trainer.val_dataloaders, "test": trainer.test_dataloaders}
        evaluated["predict"] = trainer.predict_dataloaders
        if (command := str(trainer.state.fn.value)) in evaluated:  # type: ignore[union-attr]
            self.compare(trainer, command, pl_module.model, evaluated[command])

    on_test_start = on_predict_start = on_validation_start

    def compare(self, trainer: Trainer, command: str, model: RewardModel, loaders: Any) -> None:
        """Warn of pictures of other sizes than those of the training, or of edits in only one of the two."""
        for dataset in datasets_of(loaders):
            sizes = getattr(dataset, "image_sizes", None)
            warn_if_other(trainer, command, "image sizes", self.sizes, sizes, SIZE_SETTINGS)
            warn_if_other(trainer, command, "edits", model.edits, edits_of(dataset), "the reader's sources")


def warn_if_other(trainer: Trainer, command: str, name: str, trained: Any, now: Any, setting: str) -> None:
    """Warn if the data have another value than the training had; None is unknown."""
    if None not in (trained, now) and trained != now and trainer.is_global_zero:
        logger.warning(
            f"{command}: the reward was trained with {name}: {trained}, the data now have {name}: {now}; set "
            f"{setting} to keep to the training"
        )


def datasets_of(loaders: Any) -> Iterator[Any]:
    """Yield the data set of each loader that has one; a trainer holds one loader or a list."""
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        dataset = getattr(loader, "dataset", None)
        while isinstance(dataset, Subset):  # of random_split, in a script of one's own
            dataset = dataset.dataset
        if dataset is not None:
            yield dataset


def edits_of(dataset: Any) -> bool | None:
    """Tell whether the images of a data set are edits of pictures; None if it does not know."""
    taken = getattr(dataset, "taken", None)
    return None if taken is None else taken[0] > 0


def record_building(module: Any, checkpoint: dict[str, Any]) -> None:
    """Save how to build a reward module's model, if its parts know that, for a run that writes no config."""
    built = {"backbone": module.model.backbone.built_by, "head": module.model.head.built_by}
    if None not in built.values():
        training = {"module": f"{type(module).__module__}.{type(module).__qualname__}"}
        checkpoint[SETTINGS] = {"training": training, **{part: asdict(made) for part, made in built.items()}}
