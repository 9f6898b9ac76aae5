"""Callback that draws validation pairs with their scores."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from PIL import Image

from latentreward.errors import InputError
from latentreward.modules.pairs import PairModule
from latentreward.reports.drawing import PLAIN, RIGHT, WRONG, draw_pair, strip, tile, to_images
from latentreward.storage.durable import replacing

logger = logging.getLogger(__name__)


class ScoredPairGrid(Callback):
    """Callback that draws the first validation pairs with their scores.

    The picture is the image ``val/pairs`` in TensorBoard and ``scored_pairs.png`` in the run's log folder. Each cell
    shows a pair: the preferred image on the left, the prompt above, and the scores at the first evaluation level below.
    The frame is green where the model ranks the pair as its label does, red where it does not, grey for a tie. Latents
    are decoded by the model's VAE, a pair at a time. If pairs cannot be drawn, one warning says why and the callback
    does nothing: for latents if there is no VAE, for latents under FSDP (which shards the VAE), and for modules that
    score no pairs.

    Args:
        num_pairs: Pairs in the picture.
        image_size: Longer side of a drawn image, in pixels.
        columns: Pairs side by side.

    Raises:
        InputError: If an argument is below 1.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: ScoredPairGrid
                  init_args: {num_pairs: 12}
    """

    def __init__(self, num_pairs: int = 12, image_size: int = 128, columns: int = 3) -> None:
        if min(num_pairs, image_size, columns) < 1:
            raise InputError(f"num_pairs={num_pairs}, image_size={image_size}, columns={columns} must be at least 1")
        self.num_pairs, self.image_size, self.columns = num_pairs, image_size, columns
        self._cells: list[Image.Image] = []
        self._off = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the pairs drawn in the last validation."""
        self._cells = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw pairs of the batch until ``num_pairs`` are drawn."""
        missing = self.num_pairs - len(self._cells)
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.fast_dev_run or self._off or missing <= 0:  # type: ignore[attr-defined]
            return
        if problem := no_picture(trainer, pl_module, batch):
            self._off = True
            logger.warning("ScoredPairGrid draws nothing: %s", problem)
            return
        for row in range(min(missing, len(batch))):
            pair = torch.stack([batch.chosen[row], batch.rejected[row]])
            if batch.latent_space is not None:
                pair = pl_module.latent_decoder.decode(pair)  # type: ignore[operator, union-attr]
            scores = [rewards[row].float().mean().item() for rewards in (outputs.chosen, outputs.rejected)]
            images = [strip(to_images(one, self.image_size)) for one in pair]
            colour = PLAIN if batch.label[row] == 0.5 else RIGHT if scores[0] > scores[1] else WRONG
            captions = [f"{score:+.3f}" for score in scores]
            self._cells.append(draw_pair(images, captions, batch.prompts[row], colour))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture to TensorBoard and to ``scored_pairs.png``."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is a collective call
        if not self._cells:
            return
        picture = tile(self._cells, self.columns)
        for log in trainer.loggers:
            if isinstance(log, TensorBoardLogger):
                log.experiment.add_image("val/pairs", np.asarray(picture), trainer.global_step, dataformats="HWC")
        with replacing(folder / "scored_pairs.png") as partial:
            picture.save(partial, "png")


def no_picture(trainer: Trainer, pl_module: LightningModule, batch: Any) -> str:
    """Return the reason why pairs of a batch cannot be drawn; an empty string if they can."""
    if not isinstance(pl_module, PairModule):
        return f"{type(pl_module).__name__} does not score pairs"
    if batch.latent_space is None:
        return ""
    if pl_module.latent_decoder is None:
        return "the data are latents, and the model has no VAE to decode them"
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):  # one rank alone cannot call it
        return "the data are latents, and FSDP shards the VAE that decodes them"
    return ""
