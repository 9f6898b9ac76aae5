"""From the deterministic step that a pipeline took to the distribution of stochastic steps with the same marginals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise.predictions import ancestral_variance, predicted_clean
from latentreward.rollout import Transition

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class Levels:
    """Noise levels before and after a step, in the scheduler's coordinates: a state is ``signal·x_0 + noise·ε``.

    Attributes:
        timestep: What the network took.
        signal: a before the step.
        noise: s before the step.
        next_timestep: Timestep of the state after it; 0 after the last step.
        next_signal: a' after the step.
        next_noise: s' after the step.
        next_scale: Factor that takes the next state to what the network takes.
    """

    timestep: float
    signal: float
    noise: float
    next_timestep: float
    next_signal: float
    next_noise: float
    next_scale: float = 1.0

    def ancestral(self, latents: Tensor, next_latents: Tensor, eta: float) -> Transition:
        """The step with noise that leads where the deterministic one led, in distribution.

        The two states of a first-order deterministic step hold the prediction behind it: x = a x̂_0 + s ε̂ and
        x' = a' x̂_0 + s' ε̂ are two equations for x̂_0 and ε̂; :func:`~latentreward.noise.predictions.ancestral_variance`
        has the rest.

        Args:
            latents: x, ``(B, C, ...)``.
            next_latents: x', ``(B, C, ...)``, as the scheduler made it.
            eta: η.
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
        """Predicted clean latents x̂_0 of next states, float32, from the network's output for them.

        Args:
            next_latents: ``(B, C, ...)``, times :attr:`next_scale`.
            model_output: ``(B, C, ...)``.
            prediction_type: ``epsilon``, ``v_prediction`` or ``flow``.
        """
        signal, noise = self.next_signal * self.next_scale, self.next_noise * self.next_scale
        return predicted_clean(prediction_type, next_latents.float(), model_output.float(), signal, noise)


def levels_of(scheduler: SchedulerMixin, timestep: float) -> Levels:
    """Levels around the step that ``scheduler`` has just taken from ``timestep``.

    Raises:
        InputError: If it does not take first-order deterministic steps of an unclipped prediction.
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
    index = scheduler.step_index  # of the next step
    sigma, next_sigma = (float(value) for value in scheduler.sigmas[index - 1 : index + 1])
    next_timestep = float(scheduler.timesteps[index]) if index < len(scheduler.timesteps) else 0.0
    if family == "FlowMatchEulerDiscreteScheduler":
        return Levels(timestep, 1 - sigma, sigma, next_timestep, 1 - next_sigma, next_sigma)
    return Levels(timestep, 1.0, sigma, next_timestep, 1.0, next_sigma, next_scale=(1 + next_sigma**2) ** -0.5)
