"""Lightning data modules that give batches of prompts, of rows from rollouts of prompts, or of prompts and pairs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import Dataset

from latentreward.core.contracts import PathText, PromptBatch
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.running import pair_generator, run_seed
from latentreward.data.alignment.experience import ExperienceSampler
from latentreward.data.alignment.prompt_files import read_prompts
from latentreward.data.loading import CountedBatches, ResumableLoader, as_is, shares_of
from latentreward.data.readers.base import MAX_PROMPT_CHARS


class PromptOrder(Dataset[PromptBatch]):
    """Endless sequence of distinct prompts: pass after pass over all of them, each pass in a new random order."""

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self._orders: dict[int, list[int]] = {}

    def __getitems__(self, places: Sequence[int]) -> PromptBatch:
        """Return the prompts at the given indices of the sequence, with keys ``PASS/ROW``."""
        rows = []
        for number, place in (divmod(place, len(self.prompts)) for place in places):
            if number not in self._orders:
                order = torch.randperm(len(self.prompts), generator=pair_generator(self.seed, "prompts", number, ""))
                last = {key: value for key, value in self._orders.items() if key == number - 1}
                self._orders = {**last, number: order.tolist()}
            rows.append((number, self._orders[number][place]))
        return PromptBatch(
            tuple(self.prompts[row] for _, row in rows), tuple(f"{number}/{row}" for number, row in rows)
        )


class PromptSampler(CountedBatches):
    """Sampler of one rank's batches of indices into the sequence of prompts.

    A global batch is the next ``batch_size * num_replicas`` indices. Rank r takes every ``num_replicas``-th of them,
    starting with index r. The state adds the number of prompts used to that of ``CountedBatches``.
    """

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self.used = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.used += self.taken * self.global_batch
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        self.taken = 0
        for number in range(self.remaining()):
            start, self.taken = self.used + number * self.global_batch, number + 1
            if self.max_prompts is not None and start + self.global_batch >= self.max_prompts:
                self.finish()
            yield list(range(start + self.rank, start + self.global_batch, self.num_replicas))

    def state_dict(self, batches: int) -> dict[str, Any]:
        return {**super().state_dict(batches), "used": self.used + batches * self.global_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.used = state_dict["used"]


class PromptLoaders(LightningDataModule):
    """Data module of training batches for alignment, from a list of prompts.

    A module with rollouts of its own (LPO, SPO, GRPO) gets batches of rollout rows. A rollout runs whenever fewer rows
    are left than an optimiser step takes. Any other module (ReFL) gets batches of prompts.

    An epoch is a fixed number of batches and independent of passes over the prompts. Each pass has a new random order,
    which does not depend on the world size. Checkpoints hold the position in the pass and the unused rollout rows.

    Args:
        prompts: Distinct prompts to train on.
        batch_size: Rows per batch and rank.
        batches_per_epoch: Batches per rank in an epoch; sets when epoch checkpoints and validation happen.
        prompts_per_rollout: Prompts per rollout and rank.
        passes: End the run after this many passes over the prompts, once the rows left are too few for an optimiser
            step. None leaves the end to the trainer. Papers give their training length in such passes.
        max_empty_rollouts: Stop the run with an error after this many rollouts in succession that kept no row.
        seed: Seed of the orders of prompts and rows; None takes the run's ``seed_everything``.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        batch_size: int = 8,
        batches_per_epoch: int = 100,
        prompts_per_rollout: int = 8,
        passes: int | None = None,
        max_empty_rollouts: int = 4,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one(
            "data.",
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            prompts_per_rollout=prompts_per_rollout,
            passes=passes,
            max_empty_rollouts=max_empty_rollouts,
        )
        self.prompts = tuple(prompts)
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.prompts_per_rollout, self.passes = prompts_per_rollout, passes
        self.max_empty_rollouts = max_empty_rollouts
        self.seed = run_seed(seed)

    def train_dataloader(self) -> ResumableLoader:
        """Return batches of rollout rows or of prompts; every rank gets equally many rows."""
        shares, order = shares_of(self.trainer), PromptOrder(self.prompts, self.seed)
        if len(self.prompts) < shares["num_replicas"]:
            told = f"data.prompts has {len(self.prompts)} prompts for {shares['num_replicas']} ranks"
            raise InputError(f"{told}; use fewer devices or more prompts")
        if getattr(self.trainer, "overfit_batches", 0):
            told = "trainer.overfit_batches: rollouts give new batches"
            raise InputError(f"{told}; give data.prompts a short file instead")
        learner = self.trainer.lightning_module if self.trainer else None
        settings: dict[str, Any] = {
            "batch_size": self.batch_size,
            "batches_per_epoch": self.batches_per_epoch,
            "max_prompts": None if self.passes is None else self.passes * len(self.prompts),
            "finish": self._stop,
            "seed": self.seed,
            **shares,
        }
        if getattr(learner, "experience", None) is None:
            prompts = PromptSampler(**settings)
            return ResumableLoader(order, prompts, collate_fn=as_is)
        experience = ExperienceSampler(
            order,
            learner,
            prompts_per_rollout=self.prompts_per_rollout,
            max_empty_rollouts=self.max_empty_rollouts,
            accumulated=lambda: self.trainer.accumulate_grad_batches if self.trainer else 1,  # may change by epoch
            **settings,
        )
        return ResumableLoader(experience.rows, experience, collate_fn=as_is)

    def _stop(self) -> None:
        if self.trainer:
            self.trainer.should_stop = True


class PromptDataModule(PromptLoaders):
    """Data module of prompts from a file, for alignment; repeated prompts count once.

    The file is text with one prompt per line, or JSON lines, a JSON list, CSV, TSV or parquet with a column
    ``prompt``, ``caption`` or ``Prompt``.

    Args:
        prompts: File of prompts to train on.
        max_prompt_chars: Largest number of characters in a prompt; text encoders read a few hundred.
        options: See :class:`PromptLoaders`.
    """

    def __init__(self, prompts: PathText, max_prompt_chars: int = MAX_PROMPT_CHARS, **options: Any) -> None:
        super().__init__(read_prompts(prompts, max_prompt_chars=max_prompt_chars), **options)


class PromptsAndImages(LightningDataModule):
    """Data module of training batches ``{"prompts": PromptBatch, "images": PreferenceBatch}``.

    Prompts and images keep their own batch sizes, orders and positions in checkpoints. An epoch ends with the shorter
    of the two.

    Args:
        prompts: Data module of prompts to sample from; validation uses its validation loader.
        images: ``PreferenceDataModule`` or ``CachedPreferenceDataModule``; only its ``train`` split is used.
    """

    def __init__(self, prompts: PromptLoaders, images: LightningDataModule) -> None:
        super().__init__()
        self.prompts, self.images = prompts, images

    def prepare_data(self) -> None:
        """Call ``prepare_data`` of both data modules."""
        for part in (self.prompts, self.images):
            part.prepare_data()

    def setup(self, stage: str) -> None:
        """Give both data modules the trainer and set them up."""
        for part in (self.prompts, self.images):
            part.trainer = self.trainer
            part.setup(stage)

    def teardown(self, stage: str) -> None:
        """Tear both data modules down; that of images then tells how many could not be read."""
        for part in (self.prompts, self.images):
            part.teardown(stage)

    def train_dataloader(self) -> CombinedLoader:
        """Return both training loaders combined; an epoch ends with the shorter one."""
        loaders = {"prompts": self.prompts.train_dataloader(), "images": self.images.train_dataloader()}
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> Any:
        """Return the validation loader of the prompts."""
        return self.prompts.val_dataloader()
