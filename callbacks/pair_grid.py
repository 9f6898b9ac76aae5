"""Callback that draws validation pairs with their scores."""

import logging
import math
from bisect import insort
from collections.abc import Callable, Iterable
from operator import attrgetter, itemgetter
from typing import Any, Literal, NamedTuple

import torch
from latentreward.callbacks.resumed_settings import output_path
from latentreward.callbacks.sample_grid import show
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from PIL import Image
from torch import Tensor

from latentreward.core.errors import check_at_least_one, check_choices
from latentreward.core.reports.drawing import PLAIN, RIGHT, WRONG, draw_pair, strip, tile, to_images
from latentreward.data.alignment.experience import of_all_ranks
from latentreward.reward.modules.reward import PairModule

logger = logging.getLogger(__name__)

Shown = Literal["first", "worst"]
NAMES: dict[Shown, tuple[str, str]] = {
    "first": ("val/pairs", "scored_pairs.png"),
    "worst": ("val/worst_pairs", "worst_pairs.png"),
}
"""Names of the picture in TensorBoard and in the run's folder; of two callbacks, each has its own."""


class ScoredPairGrid(Callback):
    """Callback that draws validation pairs with their scores, and by how much the model errs.

    The picture is the image ``val/pairs`` in TensorBoard and ``scored_pairs.png`` in the run's log folder; with
    ``shown: worst`` they are ``val/worst_pairs`` and ``worst_pairs.png``; of a second run in the folder
    ``scored_pairs-v1.png``. Each cell shows a pair: the preferred image
    on the left, the prompt above, and the scores at the first evaluation level below. Pictures that were edited stand
    before both. The frame is green where the model ranks the pair as its label does, red where it does not, grey for a
    tie. Pairs of all ranks are considered.
    Latents are decoded by the model's VAE, a pair at a time. If pairs cannot be drawn, one warning says why and the
    callback does nothing: for latents if there is no VAE, for latents under FSDP (which shards the VAE), and for
    modules that score no pairs.

    Args:
        num_pairs: Pairs in the picture.
        image_size: Longer side of a drawn image, in pixels.
        columns: Pairs side by side.
        shown: ``first`` draws the first pairs of the validation data, the same each time; ``worst`` the pairs whose
            rejected image is the furthest ahead of the preferred one, the largest error first.

    Raises:
        InputError: If a number is below 1, or ``shown`` is neither of the two.

    Example:
        ``--trainer.callbacks+=ScoredPairGrid --trainer.callbacks.shown=worst``
    """

    def __init__(self, num_pairs: int = 12, image_size: int = 128, columns: int = 3, shown: Shown = "first") -> None:
        check_at_least_one(num_pairs=num_pairs, image_size=image_size, columns=columns)
        check_choices(ScoredPairGrid, shown=shown)
        self.num_pairs, self.image_size, self.columns, self.shown = num_pairs, image_size, columns, shown
        self.output_name = NAMES[shown][1]
        self._found: list[FoundPair] = []
        self._seen = 0
        self._off = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the pairs found in the last validation."""
        self._found, self._seen = [], 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Keep those pairs of the batch that belong to this rank's ``num_pairs`` so far."""
        if trainer.sanity_checking or trainer.fast_dev_run or self._off:  # type: ignore[attr-defined]
            return
        if problem := no_picture(trainer, pl_module, batch):
            self._off = True
            if trainer.is_global_zero:
                logger.warning("ScoredPairGrid draws nothing: %s", problem)
            return
        size = len(batch)
        rewards = torch.stack([outputs.chosen[:size], outputs.rejected[:size]], dim=1)  # of the first level
        pairs = zip(rewards.float().reshape(size, 2, -1).mean(dim=2).tolist(), batch.label.tolist(), strict=True)
        for row, (scores, label) in enumerate(pairs):
            if self.shown == "first":  # ranks take the rows in turn
                place = float(self._seen * trainer.world_size + trainer.global_rank)
            else:
                margin = 0.0 if label == 0.5 else scores[0] - scores[1]
                place = -math.inf if math.isnan(margin) else margin
            key = place, batch.pair_ids[row]
            self._seen += 1
            if len(self._found) < self.num_pairs or key < self._found[-1].key:
                shown = *((source,) for source in batch.sources), (batch.chosen, batch.rejected)
                images = [torch.stack([one[row] for one in alike]) for alike in shown]
                kept = tuple(one.cpu() for one in images) if batch.latent_space is not None else self._drawn(images)
                insort(self._found, FoundPair(key, batch.prompts[row], scores, label, kept), key=attrgetter("key"))
                del self._found[self.num_pairs :]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture to TensorBoard and to the run's folder; each rank draws its own pairs of it."""
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = output_path(trainer, self.output_name)  # a collective call
        found, self._found = self._found, []
        # Keys travel first: pictures of pairs that are not drawn stay on their rank.
        keys = sorted(key for rank in of_all_ranks([pair.key for pair in found]) for key in rank)[: self.num_pairs]
        mine = [(pair.key, self._cell(pair, pl_module)) for pair in found if pair.key <= keys[-1]]
        cells = sorted((pair for rank in of_all_ranks(mine) for pair in rank), key=itemgetter(0))[: self.num_pairs]
        if not cells or not trainer.is_global_zero:
            return
        show(trainer, NAMES[self.shown][0], tile([cell for _, cell in cells], self.columns), path)

    def _drawn(self, parts: Iterable[Tensor]) -> list[Image.Image]:
        """Draw the images of batches ``(B, 3, H, W)``, or the frames of clips."""
        return [strip(to_images(one, self.image_size)) for pixels in parts for one in pixels]

    def _cell(self, pair: "FoundPair", pl_module: LightningModule) -> Image.Image:
        images = pair.images
        if isinstance(images, tuple):
            decode: Callable[[Tensor], Tensor] = pl_module.latent_decoder.decode  # type: ignore[assignment, union-attr]
            images = self._drawn(decode(one.to(pl_module.device)) for one in images)
        preferred, other = pair.scores
        right = preferred > other
        if pair.label == 0.5:
            colour, words = PLAIN, ("no preference", "")
        else:
            colour = RIGHT if right else WRONG
            words = ("preferred", "" if right else f"errs by {other - preferred:.3f}")
        captions = ["source"] * (len(images) - 2)
        captions += [f"{score:+.3f} {word}" for score, word in zip(pair.scores, words, strict=True)]
        level = next(iter(pl_module.eval_levels)).replace("sigma", "σ ").replace("t", "t ")  # type: ignore[arg-type]
        return draw_pair(images, captions, f"[{level}] {pair.prompt}", colour)


class FoundPair(NamedTuple):
    """Pair that may be drawn."""

    key: tuple[float, str]  # Place among the pairs of all ranks
    prompt: str  # Prompt
    scores: list[float]  # Scores of the preferred and of the other image
    label: float  # Probability that the preferred image wins; ½ for a tie
    # Pictures that were edited and both images as they are drawn, or latents ``(1, C, ...)`` of each of the former and
    # ``(2, C, ...)`` of the latter on the CPU
    images: list[Image.Image] | tuple[Tensor, ...]


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
