"""Pictures of pairs with their scores."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from latentreward.errors import InputError
from latentreward.reports.drawing import PLAIN, RIGHT, WRONG, draw_pair, tile, to_image
from latentreward.storage.durable import replacing


class ScoredPairGrid(Callback):
    """Draw the first validation pairs with their scores: image ``val/pairs`` in TensorBoard, and a PNG beside the log.

    A cell is a pair, the preferred image on the left, its prompt above and the scores at the first evaluation level
    below. The frame is green where the model ranks the pair as its label does, red where it does not, grey for a tie.

    Args:
        num_pairs: Pairs in the picture.
        image_size: Pixels of a side at which an image is shown.
        columns: Cells side by side.

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

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last picture."""
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
        """Draw pairs until there are enough."""
        missing = self.num_pairs - len(self._cells)
        if not trainer.is_global_zero or missing <= 0:
            return
        chosen, rejected = batch.chosen[:missing], batch.rejected[:missing]
        if batch.latent_space is not None:
            vae = pl_module.model.backbone.vae
            if vae is None:
                return
            chosen, rejected = vae.decode(chosen), vae.decode(rejected)
        for row in range(len(chosen)):
            scores = [rewards[row].float().mean().item() for rewards in (outputs.chosen, outputs.rejected)]
            images = to_image(chosen[row], self.image_size), to_image(rejected[row], self.image_size)
            colour = PLAIN if batch.label[row] == 0.5 else RIGHT if scores[0] > scores[1] else WRONG
            captions = [f"{score:+.3f}" for score in scores]
            self._cells.append(draw_pair(images, captions, batch.prompts[row], colour))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks, so it stands before the condition
        if not self._cells or trainer.sanity_checking:
            return
        picture = tile(self._cells, self.columns)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/pairs", np.asarray(picture), trainer.global_step, dataformats="HWC")
        with replacing(folder / "scored_pairs.png") as partial:
            picture.save(partial, "png")
