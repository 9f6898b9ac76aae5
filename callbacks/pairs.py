"""Callbacks on pairs: pictures of scored ones, a table of scores, and those of a policy by timesteps."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

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

from latentreward.alignment import StepRatios
from latentreward.core.contracts import RolloutStatistics, to_float64
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.reports.drawing import PLAIN, RIGHT, WRONG, draw_pair, strip, tile, to_images
from latentreward.core.storage.durable import replacing, write_errors_named
from latentreward.reward import gather_with_grad
from latentreward.reward.modules.reward import RewardModule

logger = logging.getLogger(__name__)


class ScoredPairGrid(Callback):
    """Callback that draws the first validation pairs with their scores, and by how much the model errs.

    The picture is the image ``val/pairs`` in TensorBoard and ``scored_pairs.png`` in the run's log folder. Each cell
    shows a pair of rank 0: the preferred image on the left, the prompt above, and the scores at the first evaluation
    level below. Pictures that were edited stand before both. The frame is green where the model ranks the pair as its
    label does, red where it does not, grey for a tie. If pairs cannot be drawn, one warning says why.

    Args:
        num_pairs: Pairs in the picture.
        image_size: Longer side of a drawn image, in pixels.
        columns: Pairs side by side.

    Example:
        ``--trainer.callbacks+=ScoredPairGrid --trainer.callbacks.num_pairs=24``
    """

    output_name = "scored_pairs.png"

    def __init__(self, num_pairs: int = 12, image_size: int = 128, columns: int = 3) -> None:
        check_at_least_one(num_pairs=num_pairs, image_size=image_size, columns=columns)
        self.num_pairs, self.image_size, self.columns = num_pairs, image_size, columns
        self._cells: list[Image.Image] = []
        self._off = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cells = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        quiet = trainer.sanity_checking or trainer.fast_dev_run or not trainer.is_global_zero  # type: ignore[attr-defined]
        if quiet or self._off or len(self._cells) == self.num_pairs:
            return
        problem = "" if isinstance(pl_module, RewardModule) else f"{type(pl_module).__name__} does not score pairs"
        if not problem and batch.latent_space is not None:
            if pl_module.latent_decoder is None:
                problem = "the data are latents, and the model has no VAE to decode them"
            elif isinstance(trainer.strategy, ModelParallelStrategy):  # one rank alone cannot call it
                problem = "the data are latents, and FSDP shards the VAE that decodes them"
        if problem:
            self._off = True
            logger.warning("ScoredPairGrid draws nothing: %s", problem)
            return
        size = len(batch)
        rewards = torch.stack([outputs.chosen[:size], outputs.rejected[:size]], dim=1)  # of the first level
        scores = rewards.float().reshape(size, 2, -1).mean(dim=2).tolist()
        level = next(iter(pl_module.eval_levels)).replace("sigma", "σ ").replace("t", "t ")  # type: ignore[arg-type]
        for row in range(min(size, self.num_pairs - len(self._cells))):
            parts = [one[row : row + 1] for one in (*batch.sources, batch.chosen, batch.rejected)]
            if batch.latent_space is not None:
                parts = [pl_module.latent_decoder.decode(one.to(pl_module.device)) for one in parts]  # type: ignore[operator, union-attr]
            images = [strip(to_images(one[0], self.image_size)) for one in parts]
            preferred, other = scores[row]
            label, right = batch.label[row].item(), preferred > other
            if label == 0.5:
                colour, words = PLAIN, ("no preference", "")
            else:
                colour = RIGHT if right else WRONG
                words = ("preferred", "" if right else f"errs by {other - preferred:.3f}")
            captions = ["source"] * (len(images) - 2)
            captions += [f"{score:+.3f} {word}" for score, word in zip(scores[row], words, strict=True)]
            self._cells.append(draw_pair(images, captions, f"[{level}] {batch.prompts[row]}", colour))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = output_path(trainer, self.output_name)  # a collective call
        if self._cells:
            show(trainer, "val/pairs", tile(self._cells, self.columns), path)


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


class TimestepBands(Callback):
    """Callback that logs rollouts and training steps by bands of the timestep; bands without rows are left out.

    For each rollout of a module that learns from its own rollouts: ``rollout/kept_share_t_{low}_{high}``, the share of
    candidate groups that are kept for training, and the quartiles of the score gaps tanh(Δ/2) between best and worst
    candidate, ``rollout/gap_25_t_...``, ``gap_50`` and ``gap_75``, which help to choose selection thresholds. For
    training on pairs (LPO, SPO): ``train/implicit_accuracy_t_...``, the share of pairs whose better state has gained
    more log-probability over the reference than the worse state, and ``train/margin_t_...``, the mean difference of
    the two gains. All are over the rows of all ranks.

    Args:
        edges: Ascending timesteps; bands are [low, high), the last one closed.

    Example:
        ``--trainer.callbacks+=TimestepBands --trainer.callbacks.edges=[0,250,500,750,1000]``
    """

    def __init__(self, edges: Sequence[float] = (0.0, 250.0, 500.0, 750.0, 1000.0)) -> None:
        if len(edges) < 2 or list(edges) != sorted(set(edges)):
            raise InputError(f"edges={list(edges)} of TimestepBands must be at least two ascending timesteps")
        self.edges = tuple(edges)
        self._seen: RolloutStatistics | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        statistics = getattr(pl_module, "rollout_statistics", None)
        if statistics is None or statistics is self._seen:
            return
        self._seen, values = statistics, {}
        for band, rows in self._bands(statistics.timesteps):
            quartiles = statistics.gap[rows].float().flatten().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            values[f"rollout/kept_share_{band}"] = statistics.kept[rows].float().mean().item()
            values |= {f"rollout/gap_{name}_{band}": value for name, value in zip((25, 50, 75), quartiles, strict=True)}
        pl_module.log_dict(values)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        ratios = outputs.get("ratios") if isinstance(outputs, dict) else None
        if not isinstance(ratios, StepRatios):
            return
        values = {}
        # One collective call for both columns.
        pairs = torch.stack([ratios.timesteps.to(ratios.chosen), ratios.chosen - ratios.rejected], dim=1)
        timesteps, margins = gather_with_grad(pairs).unbind(dim=1)  # without gradient, as these have none
        for band, rows in self._bands(timesteps):
            values[f"train/implicit_accuracy_{band}"] = (margins[rows] > 0).float().mean()
            values[f"train/margin_{band}"] = margins[rows].mean()
        pl_module.log_dict(values, batch_size=len(batch))

    def _bands(self, timesteps: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield name and row indices of each band that has rows."""
        for low, high in pairwise(self.edges):
            upper = timesteps <= high if high == self.edges[-1] else timesteps < high
            rows = ((timesteps >= low) & upper).nonzero().flatten()
            if len(rows):
                yield f"t_{low:g}_{high:g}", rows
