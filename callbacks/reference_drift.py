"""Callback that measures how far alignment has moved a policy from its reference."""

from collections.abc import Sequence
from typing import Any

import torch
from latentreward.callbacks.prompt_monitor import SEED, PromptMonitor, log_now
from lightning.pytorch import Trainer
from torch import Tensor

from latentreward.alignment import AlignmentModule
from latentreward.core.contracts import PathText, PromptBatch
from latentreward.core.errors import InputError
from latentreward.core.seeding import pair_generator


class ReferenceDrift(PromptMonitor):
    """Callback that logs the mean squared difference between the predictions of policy and reference.

    The value at each noise level is logged as ``drift/sigma_{level}``. Both networks predict, without guidance, from
    the same noisy latents: samples of the reference for fixed prompts, with fixed noise added at each level. The drift
    is 0 at the start. ``drift/mean`` is the mean over levels; a sudden rise often comes before the pictures visibly
    change.

    Args:
        prompts: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`.
        num_prompts: Prompts to take from the start of the list.
        every_n_steps: Optimiser steps between two measurements.
        sigmas: Noise levels in (0, 1]; for each, the nearest level of the policy's noise process is used.
        options: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`; ``sampling`` is that of the
            reference's samples.

    Raises:
        InputError: If a setting is out of range.

    Example:
        ``--trainer.callbacks+=ReferenceDrift --trainer.callbacks.prompts=prompts.txt``
    """

    def __init__(
        self,
        prompts: Sequence[str] | PathText,
        num_prompts: int = 8,
        every_n_steps: int = 100,
        sigmas: Sequence[float] = (0.2, 0.5, 0.8),
        **options: Any,
    ) -> None:
        super().__init__(prompts, num_prompts, every_n_steps, images_per_prompt=1, **options)
        if not sigmas or len(set(sigmas)) < len(sigmas) or not all(0.0 < sigma <= 1.0 for sigma in sigmas):
            raise InputError(
                f"sigmas={tuple(sigmas)} of ReferenceDrift must be one or more levels in (0, 1], each once"
            )
        self.sigmas = tuple(sigmas)
        self._states: list[tuple[PromptBatch, Tensor, Tensor, Tensor]] = []

    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Make the noisy latents and the reference's predictions for them."""
        policy, self._states = pl_module.policy, []
        for batch, latents in self.latents(trainer, pl_module, reference=True):
            generators = [pair_generator(SEED, "drift noise", 0, key) for key in batch.keys]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
            for timestep in policy.noise_process.timesteps_at(torch.tensor(self.sigmas)):
                timesteps = timestep.expand(len(batch)).to(latents.device)
                noisy = policy.noise_process.add_noise(latents.float(), noise.to(latents.device), timesteps)
                with policy.reference():
                    predicted = policy.predict(noisy, timesteps, policy.encode_prompts(batch.prompts))
                # On the CPU: the states wait for hours and would take the memory of training.
                self._states.append((batch, timesteps.cpu(), noisy.cpu(), predicted.float().cpu()))

    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Log the difference of the policy's present predictions from the reference's."""
        policy, device = pl_module.policy, pl_module.device
        errors: list[list[Tensor]] = [[] for _ in self.sigmas]
        for index, (batch, timesteps, noisy, reference) in enumerate(self._states):
            now = policy.predict(noisy.to(device), timesteps.to(device), policy.encode_prompts(batch.prompts))
            error = (now.float() - reference.to(device)).square().flatten(1).mean(dim=1)
            errors[index % len(self.sigmas)].append(error)
        rows = torch.stack([torch.cat(level) for level in errors], dim=1)
        drifts = self.gather(trainer, rows).flatten(0, 1).mean(dim=0)
        values = {f"drift/sigma_{sigma:g}": drift for sigma, drift in zip(self.sigmas, drifts.tolist(), strict=True)}
        log_now(trainer, pl_module, {**values, "drift/mean": drifts.mean().item()})
