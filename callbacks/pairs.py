"""Callbacks on scored pairs: pictures of them, a table of their scores, and the interval of a test's accuracy."""

import logging
import math
from bisect import insort
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from latentreward.callbacks.prompt_monitor import show
from latentreward.callbacks.resumed_settings import log_folder, output_path
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from typing_extensions import override

from latentreward.core.bootstrap import clustered_accuracy
from latentreward.core.contracts import to_float64
from latentreward.core.errors import InputError, check_at_least_one, check_choices
from latentreward.core.reports.drawing import PLAIN, RIGHT, WRONG, draw_pair, strip, tile, to_images
from latentreward.core.reports.tables import with_interval
from latentreward.core.storage.durable import replacing, write_errors_named
from latentreward.data.alignment.experience import of_all_ranks
from latentreward.data.readers.base import normalise_prompt
from latentreward.reward.metrics.pairwise import preferred_margin
from latentreward.reward.modules.reward import RewardModule

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
    ``shown: worst`` they are ``val/worst_pairs`` and ``worst_pairs.png``. Each cell shows a pair: the preferred image
    on the left, the prompt above, and the scores at the first evaluation level below. Pictures that were edited stand
    before both. The frame is green where the model ranks the pair as its label does, red where it does not, grey for a
    tie. Pairs of all ranks are considered. If pairs cannot be drawn, one warning says why.

    Args:
        num_pairs: Pairs in the picture.
        image_size: Longer side of a drawn image, in pixels.
        columns: Pairs side by side.
        shown: ``first`` draws the first pairs of the validation data, the same each time; ``worst`` the pairs whose
            rejected image is the furthest ahead of the preferred one, the largest error first.

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
        self._found, self._seen = [], 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
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
    prompt: str
    scores: list[float]  # Scores of the preferred and of the other image
    label: float  # Probability that the preferred image wins; ½ for a tie
    # As drawn, or latents on the CPU: ``(1, C, ...)`` of each picture that was edited, ``(2, C, ...)`` of both images
    images: list[Image.Image] | tuple[Tensor, ...]


def no_picture(trainer: Trainer, pl_module: LightningModule, batch: Any) -> str:
    """Return the reason why pairs of a batch cannot be drawn; an empty string if they can."""
    if not isinstance(pl_module, RewardModule):
        return f"{type(pl_module).__name__} does not score pairs"
    if batch.latent_space is None:
        return ""
    if pl_module.latent_decoder is None:
        return "the data are latents, and the model has no VAE to decode them"
    if isinstance(trainer.strategy, ModelParallelStrategy):  # one rank alone cannot call it
        return "the data are latents, and FSDP shards the VAE that decodes them"
    return ""


class PairScoreWriter(BasePredictionWriter):
    """Callback that writes the scores of ``predict`` to one parquet file per rank: ``scores_rank0.parquet``, ….

    Rows are pairs × noise levels with the columns ``pair_id``, ``chosen_key``, ``rejected_key``, ``label``,
    ``timestep``, ``sigma``, ``chosen_score``, ``rejected_score``, ``margin``. An unlabelled pair has
    label ½, like a tie. A file grows batch by batch under a hidden name and is renamed when its rank has finished, so
    a file with the final name is complete.

    Args:
        output_dir: Folder of the files; None takes ``predictions/`` in the run's log folder.
        overwrite: Replace files of an earlier prediction instead of stopping.

    Example:
        ``latentreward predict --config … --predictions.output_dir=scores``; the command line adds this callback itself.
    """

    def __init__(self, output_dir: Path | None = None, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.output_dir, self.overwrite = output_dir, overwrite
        self._path: Path
        self._writer: Any = None
        self._open = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = log_folder(trainer) / "predictions"  # a collective call
        self._path = Path(self.output_dir or folder) / f"scores_rank{trainer.global_rank}.parquet"
        if self._path.exists() and not self.overwrite:
            raise InputError(
                f"{self._path} is there already; set predictions.overwrite: true or another predictions.output_dir"
            )

    @override
    def write_on_batch_end(self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        rewards = prediction.chosen, prediction.rejected  # (N,), or (N, out_dim) of a head with several outputs
        chosen, rejected = (to_float64(one).reshape(len(one), -1).mean(dim=1).tolist() for one in rewards)
        table = pa.table(
            {
                "pair_id": list(prediction.pair_ids),
                "chosen_key": list(prediction.chosen_keys),
                "rejected_key": list(prediction.rejected_keys),
                "label": to_float64(prediction.label).tolist(),
                "timestep": to_float64(prediction.timesteps).tolist(),
                "sigma": to_float64(prediction.chosen_sigmas).tolist(),
                "chosen_score": chosen,
                "rejected_score": rejected,
                "margin": [first - second for first, second in zip(chosen, rejected, strict=True)],
            }
        )
        with write_errors_named(self._path):
            if self._writer is None:
                partial = self._open.enter_context(replacing(self._path))
                self._writer = self._open.enter_context(
                    parquet.ParquetWriter(partial, table.schema, write_page_checksum=True)
                )
            self._writer.write_table(table)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._writer is not None:
            self._open.close()
            self._writer = None
            others = ", and beside it those of the other ranks" if trainer.world_size > 1 else ""
            rank_zero_info(f"scores: {self._path}{others}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(Exception):
            self._open.__exit__(type(exception), exception, exception.__traceback__)
        self._writer = None


class AccuracyInterval(Callback):
    """Callback that prints ``test/accuracy`` with its 95 % interval and the number of pairs, after a test.

    The interval resamples prompts, as that of ``latentreward benchmark``. The numbers cover the pairs of all ranks;
    pairs labelled ½ are left out. For modules that score no pairs the callback does nothing. ``latentreward test`` has
    it by default.
    """

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._pairs = self._levels = 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums, self._pairs = {}, 0

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        if not isinstance(pl_module, RewardModule):
            return
        counts = (outputs.weight > 0) & (outputs.label != 0.5)
        margin = preferred_margin(outputs.chosen[counts], outputs.rejected[counts], outputs.label[counts])
        credit = pl_module.metrics["all"].pair_metrics["accuracy"].credit(margin).tolist()  # type: ignore[operator, union-attr, index]
        prompts = [normalise_prompt(prompt) for prompt in batch.prompts]
        self._levels = len(pl_module.eval_levels)
        scores_per_row = outputs.chosen[0].numel()
        # A head with several outputs has several comparisons of a pair, in the order of its rows.
        rows = counts.nonzero().flatten().repeat_interleave(scores_per_row).tolist()
        for row, one in zip(rows, credit, strict=True):
            sums = self._sums.setdefault(prompts[row % len(batch)], np.zeros(2))
            sums += one, 1
        self._pairs += int(counts[: len(batch)].sum())

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, RewardModule):
            return
        ranks = of_all_ranks((self._sums, self._pairs))
        if not trainer.is_global_zero:
            return
        total: dict[str, np.ndarray] = {}
        for found, _ in ranks:
            for prompt, sums in found.items():
                total[prompt] = total.get(prompt, 0) + sums
        estimate = clustered_accuracy(np.array([total[prompt] for prompt in sorted(total)]).reshape(-1, 2))
        pairs = sum(number for _, number in ranks)
        rank_zero_info(
            f"test: accuracy in %, with 95 % interval over prompts: {with_interval(estimate)}; {pairs} pairs of "
            f"{len(total)} prompts, mean over {self._levels} noise levels"
        )
