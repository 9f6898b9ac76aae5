"""Callback that draws samples from before and after alignment side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentreward.callbacks.prompt_monitor import PromptMonitor
from latentreward.callbacks.resumed_settings import output_path
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from latentreward.alignment import AlignmentModule
from latentreward.core.contracts import PathText, sources_of
from latentreward.core.errors import check_at_least_one
from latentreward.core.reports.drawing import PLAIN, draw_pair, strip, tile, to_image, to_images
from latentreward.core.storage.durable import replacing


class SampleGrid(PromptMonitor):
    """Callback that draws the policy's samples for fixed prompts beside the reference's from the same noise.

    Beside edits the pictures that were edited are drawn. Of clips, four frames are drawn.

    The picture is the image ``samples`` in TensorBoard and the file ``samples/step_{optimiser step}.png`` in the run's
    log folder, or in ``samples-v1`` if an earlier run wrote ``samples``.

    Args:
        prompts: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`.
        num_prompts: Prompts to take from the start of the list.
        image_size: Longer side of a drawn sample, in pixels.
        columns: Prompts side by side.
        options: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`.

    Raises:
        InputError: If a setting is out of range.

    Example:
        ``--trainer.callbacks+=SampleGrid --trainer.callbacks.prompts=prompts.txt``
    """

    output_name = "samples"

    def __init__(
        self,
        prompts: Sequence[str] | PathText,
        num_prompts: int = 9,
        image_size: int = 128,
        columns: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(prompts, num_prompts, images_per_prompt=1, **options)
        check_at_least_one("SampleGrid.", image_size=image_size, columns=columns)
        self.image_size, self.columns = image_size, columns
        self._before: list[Image.Image] = []

    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Draw the reference's samples."""
        self._before = self._draw(trainer, pl_module, reference=True)

    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Sample the fixed prompts now, and write one picture of all samples beside the reference's."""
        folder = output_path(trainer, self.output_name)  # a collective call
        # All ranks sample, and rank 0 alone draws.
        after = self._draw(trainer, pl_module, reference=False)
        if not trainer.is_global_zero:
            return
        captions = ("before", f"step {trainer.global_step}")
        cells = []
        for *pair, prompt in zip(self._before, after, self.prompts, strict=True):
            encoder = pl_module.policy.source_encoder
            sources = [] if encoder is None else [encoder.pixels(source) for source in sources_of(prompt)]
            shown = [*(to_image(pixels, self.image_size) for pixels in sources), *pair]
            cells.append(draw_pair(shown, ["source"] * len(sources) + [*captions], prompt, PLAIN))
        picture = tile(cells, self.columns)
        show(trainer, "samples", picture, folder / f"step_{trainer.global_step:06d}.png")

    def _draw(self, trainer: Trainer, pl_module: AlignmentModule, reference: bool) -> list[Image.Image]:
        made = [to_bytes(pixels, self.image_size) for _, _, pixels in self.pictures(trainer, pl_module, reference)]
        return [Image.fromarray(array) for array in self.gather(trainer, torch.cat(made)).flatten(0, 1).numpy()]


def show(trainer: Trainer, name: str, picture: Image.Image, path: Path) -> None:
    """Write a picture as the image ``name`` of this optimiser step to TensorBoard, and to a file."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")
    with replacing(path) as partial:
        picture.save(partial, "png")


def to_bytes(pixels: Tensor, size: int) -> Tensor:
    """Convert images or clips in [-1, 1] to bytes ``(B, h, w, 3)`` on the CPU, the longer side of a frame ``size``."""
    return torch.stack([torch.from_numpy(np.array(strip(to_images(one, size)))) for one in pixels])
