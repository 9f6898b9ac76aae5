"""Conversion of a pipeline's deterministic step to the stochastic step with the same marginals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise.base import ancestral_variance, predicted_clean
from latentreward.rollout import Transition

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class Levels:
    """Noise levels before and after a step of a scheduler, whose states are ``signal·x_0 + noise·ε``."""

    timestep: float  # timestep given to the network in this step
    signal: float  # factor a before the step
    noise: float  # factor s before the step
    next_timestep: float  # timestep of the state after the step; 0 after the last step
    next_signal: float  # factor a' after the step
    next_noise: float  # factor s' after the step
    # Factor by which the next state is multiplied before it goes into the network (``scale_model_input`` of diffusers)
    next_scale: float = 1.0

    def ancestral(self, latents: Tensor, next_latents: Tensor, eta: float) -> Transition:
        """Return the distribution of the next state under the stochastic step with the same marginals.

        The network's prediction is recovered from the states ``(B, C, ...)`` before and after a first-order
        deterministic step: x = a x̂_0 + s ε̂ and x' = a' x̂_0 + s' ε̂ are two equations for x̂_0 and ε̂. The noise has
        the variance of :func:`~latentreward.noise.base.ancestral_variance` for ``eta`` in [0, 1], as in DDIM.
        """
        determinant = self.signal * self.next_noise - self.next_signal * self.noise
        level, following = (self.signal**2, self.noise**2), (self.next_signal**2, self.next_noise**2)
        std = ancestral_variance(level, following, eta) ** 0.5
        kept = (self.next_noise**2 - std**2) ** 0.5
        of_state = self.next_signal * (self.next_noise - kept) / determinant
        of_next = (self.signal * kept - self.next_signal * self.noise) / determinant
        mean = of_state * latents.float() + of_next * next_latents.float()
        spread = torch.full((len(latents),), std, device=latents.device)
        return Transition(mean, spread, spread)

    def clean(self, next_latents: Tensor, model_output: Tensor, prediction_type: str) -> Tensor:
        """Return the clean latents x̂_0 that the network predicts for the next states, float32.

        States, already multiplied by :attr:`next_scale`, and the network's output for them are ``(B, C, ...)``. The
        prediction type is ``epsilon``, ``v_prediction`` or ``flow``.
        """
        signal, noise = self.next_signal * self.next_scale, self.next_noise * self.next_scale
        return predicted_clean(prediction_type, next_latents.float(), model_output.float(), signal, noise)


def levels_of(scheduler: SchedulerMixin, timestep: float) -> Levels:
    """Return the noise levels before and after the step that ``scheduler`` has just taken from ``timestep``.

    Raises:
        InputError: If the scheduler is not one of DDIM, Euler and flow-matching Euler, or if its settings turn on
            clipping of predictions or stochastic sampling.
    """
    family, config = type(scheduler).__name__, scheduler.config
    if config.get("clip_sample") or config.get("thresholding") or config.get("stochastic_sampling"):
        raise InputError(f"step search needs a {family} with clip_sample, thresholding and stochastic_sampling off")
    if family == "DDIMScheduler":
        after = int(timestep) - config.num_train_timesteps // scheduler.num_inference_steps
        alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
        next_alpha_bar = float(scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod)
        levels = (alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
        return Levels(timestep, *levels, max(after, 0), next_alpha_bar**0.5, (1 - next_alpha_bar) ** 0.5)
    if family not in ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        raise InputError(
            f"step search reads the prediction off deterministic first-order steps, which {family} does not take; use "
            "DDIMScheduler, EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler (from_config)"
        )
    index = scheduler.step_index  # the scheduler has already advanced to the next step
    sigma, next_sigma = (float(value) for value in scheduler.sigmas[index - 1 : index + 1])
    next_timestep = float(scheduler.timesteps[index]) if index < len(scheduler.timesteps) else 0.0
    if family == "FlowMatchEulerDiscreteScheduler":
        return Levels(timestep, 1 - sigma, sigma, next_timestep, 1 - next_sigma, next_sigma)
    return Levels(timestep, 1.0, sigma, next_timestep, 1.0, next_sigma, next_scale=(1 + next_sigma**2) ** -0.5)
