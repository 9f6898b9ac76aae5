"""Callback that prints the accuracy of a test with its interval."""

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from latentreward.core.bootstrap import clustered_accuracy
from latentreward.core.reports.tables import with_interval
from latentreward.data.alignment.experience import of_all_ranks
from latentreward.data.readers.base import normalise_prompt
from latentreward.reward.metrics.pairwise import preferred_margin
from latentreward.reward.modules.reward import PairModule


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
        """Forget the pairs of an earlier test."""
        self._sums, self._pairs = {}, 0

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Add the pairs of a test step, at every evaluation level."""
        if not isinstance(pl_module, PairModule):
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
        """Gather the numbers of all ranks, and print a line on rank 0."""
        if not isinstance(pl_module, PairModule):
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
