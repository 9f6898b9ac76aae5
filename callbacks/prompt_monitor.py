"""Base class of callbacks that sample a policy on fixed prompts."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from latentreward.alignment import AlignmentModule, Sampling, sample_latents
from latentreward.core.contracts import PathText, PromptBatch
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.running import evaluating
from latentreward.data.alignment.prompt_files import read_prompts

SEED = 0  # seed of the initial and the sampler's noise, equal in every run so that pictures of two runs can be compared


class PromptMonitor(Callback, ABC):
    """Base class of callbacks that measure a policy every N optimiser steps, on the same prompts and noise.

    The prompts are split over the ranks; all ranks take part and get the same result. A sample depends only on its
    prompt and on the prompt's index in the list. After a measurement, also one that raised, training modes, adapters
    and gradients are as before. Global generators are not used, so a run with a monitor ends with the same weights as
    a run without.

    Args:
        prompts: Fixed prompts, or a file of them (formats of ``PromptDataModule``).
        num_prompts: Prompts to take from the start of the list.
        every_n_steps: Optimiser steps between two measurements.
        images_per_prompt: Pictures per prompt, each from its own noise.
        batch_size: Pictures that a rank samples, decodes or scores at once.
        sampling: Sampler settings; None takes those of the module's rollouts. An ``eta`` or ``noise_level`` of None is
            that of rollouts: 1 and 0.7.

    Raises:
        InputError: If there is no prompt, a number is below 1, or the module aligns no policy.
    """

    def __init__(
        self,
        prompts: Sequence[str] | PathText,
        num_prompts: int,
        every_n_steps: int = 500,
        images_per_prompt: int = 1,
        batch_size: int = 8,
        sampling: Sampling | None = None,
    ) -> None:
        name = type(self).__name__
        numbers = {"num_prompts": num_prompts, "every_n_steps": every_n_steps}
        check_at_least_one(f"{name}.", **numbers, images_per_prompt=images_per_prompt, batch_size=batch_size)
        texts = read_prompts(prompts, f"{name}.prompts") if isinstance(prompts, str) else tuple(prompts)
        if not texts:
            raise InputError(f"prompts of {name} is empty; give prompts, or a file of them")
        self.prompts = texts[:num_prompts]
        self.every_n_steps, self.batch_size, self.sampling = every_n_steps, batch_size, sampling
        self.images_per_prompt = images_per_prompt
        self._looked = 0

    @abstractmethod
    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Measure the reference before the first step, and again when a run is resumed, for later comparison."""

    @abstractmethod
    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Measure the policy; called every ``every_n_steps`` optimiser steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the reference, so that settings that cannot work fail before training."""
        if not isinstance(pl_module, AlignmentModule):
            raise InputError(f"{type(self).__name__} watches the alignment of a policy, not {type(pl_module).__name__}")
        self._looked = trainer.global_step
        with evaluating(pl_module), torch.no_grad(), pl_module.compute_precision():
            self.begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure the policy if the batch ended with an optimiser step at which a measurement is due."""
        assert isinstance(pl_module, AlignmentModule)
        before, self._looked = self._looked, trainer.global_step
        if before // self.every_n_steps != self._looked // self.every_n_steps:
            with evaluating(pl_module), torch.no_grad(), pl_module.compute_precision():
                self.look(trainer, pl_module)

    def share(self, trainer: Trainer) -> list[PromptBatch]:
        """Return this rank's prompts in batches; ranks with fewer repeat some, so that all have equally many."""
        count, world = len(self.prompts) * self.images_per_prompt, trainer.world_size
        mine = [(trainer.global_rank + world * turn) % count for turn in range(-(-count // world))]
        prompts = tuple(self.prompts[picture // self.images_per_prompt] for picture in mine)
        keys = tuple(f"{picture // self.images_per_prompt}-{picture % self.images_per_prompt}" for picture in mine)
        return PromptBatch(prompts, keys).split(self.batch_size)

    def sampling_of(self, pl_module: AlignmentModule) -> Sampling:
        """Return the settings of the sampler: own ones, or those of the module's rollouts."""
        return self.sampling or pl_module.sampling

    def latents(
        self, trainer: Trainer, pl_module: AlignmentModule, reference: bool
    ) -> Iterator[tuple[PromptBatch, Tensor]]:
        """Sample finished latents ``(B, C, ...)``, which must be finite, for each of this rank's batches."""
        sampling, policy = self.sampling_of(pl_module).with_noise(), pl_module.policy
        for batch in self.share(trainer):
            with policy.editing_at(sampling.height, sampling.width):
                made = sample_latents(policy, batch, sampling, pl_module.guidance_scale, SEED, reference)
            broken = ~made.isfinite().flatten(1).all(dim=1)
            if broken.any():
                prompt = batch.prompts[int(broken.nonzero()[0])]
                raise InputError(
                    f"optimiser step {trainer.global_step}: latents sampled for {prompt[:60]!r} are not finite; go "
                    "back to an earlier checkpoint, with a lower learning rate or precision 32-true"
                )
            yield batch, made

    def pictures(
        self, trainer: Trainer, pl_module: AlignmentModule, reference: bool
    ) -> Iterator[tuple[PromptBatch, Tensor, Tensor]]:
        """Sample this rank's batches: prompts, latents ``(B, C, ...)`` and pixels ``(B, 3, ...)``, about [-1, 1]."""
        vae = pl_module.policy.vae
        if vae is None:
            raise InputError(f"{type(self).__name__} needs the policy's VAE; load it from a full pipeline folder")
        for batch, latents in self.latents(trainer, pl_module, reference):
            yield batch, latents, vae.decode(latents)

    def gather(self, trainer: Trainer, rows: Tensor) -> Tensor:
        """Collect ``rows``, one per picture, from all ranks: ``(P, images, ...)`` in the order of the prompts."""
        if trainer.world_size > 1:
            shares = trainer.strategy.all_gather(rows.to(trainer.strategy.root_device))
            rows = shares.transpose(0, 1).flatten(0, 1)
        count = len(self.prompts) * self.images_per_prompt
        return rows[:count].unflatten(0, (len(self.prompts), self.images_per_prompt)).cpu()


def log_now(trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
    """Log at this very step, whatever ``log_every_n_steps`` is; ``ModelCheckpoint`` can monitor the values.

    All ranks must pass equal values. At the start of training only the loggers get the values.
    """
    if pl_module._current_fx_name == "on_train_batch_end":
        pl_module.log_dict(dict(values), logger=False)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)
