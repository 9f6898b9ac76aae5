"""Flow-matching sampler with noise, for SD3 and SD3.5."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise.predictions import predicted_clean
from latentreward.rollout.base import StepSampler, make_scheduler
from latentreward.rollout.transition import Transition


class FlowSDESampler(StepSampler):
    r"""Sampler of Flow-GRPO's stochastic differential equation for a rectified flow (arXiv:2505.05470).

    With σ and σ' the levels before and after a step, d = σ' − σ < 0, v the predicted velocity and a = ``noise_level``,

    .. math::
        w = a\sqrt{\sigma / (1 - \sigma)}, \qquad x' \sim \mathcal N\Bigl(
        x\bigl(1 + \tfrac{w^2}{2\sigma} d\bigr) + v\bigl(1 + \tfrac{w^2 (1 - \sigma)}{2\sigma}\bigr) d,\; w^2 |d|\Bigr).

    Where σ = 1, the denominator 1 − σ uses the next level instead, as in Flow-GRPO's code. The equation has the flow's
    marginals, but its published steps have these marginals only for small d. For example, with a perfect prediction of
    a single image, a = 0.7, shift 3 and 10 to 40 steps, the noise's standard deviation is 3 to 6 % above σ' after the
    first two steps (σ near 1), up to 4 % above in the middle, and 20 % and more above in the last steps. Timesteps and
    levels are those of diffusers' ``FlowMatchEulerDiscreteScheduler`` with the pipeline's config; a = 0 gives that
    scheduler's Euler step.

    Args:
        scheduler_config: The pipeline's saved scheduler config.
        num_inference_steps: Number of steps T.
        noise_level: Factor a on the noise, at least 0; Flow-GRPO uses 0.7.

    Raises:
        InputError: If the scheduler cannot make ``num_inference_steps`` steps, or its config has
            ``use_dynamic_shifting`` (timesteps depend on the image size) or ``invert_sigmas``.
    """

    def __init__(self, scheduler_config: Mapping[str, Any], num_inference_steps: int, noise_level: float = 0.7) -> None:
        self.timesteps, sigmas = _schedule(scheduler_config, num_inference_steps)
        sigma, step = sigmas[:-1], sigmas[1:] - sigmas[:-1]
        spread = noise_level * (sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))).sqrt()
        self.noise_std = spread * (-step).sqrt()
        self.noise_setting = f"noise_level={noise_level:g}"
        growth = spread**2 / (2 * sigma)
        self._table = torch.stack(
            [sigma, 1 + growth * step, (1 + growth * (1 - sigma)) * step, self.noise_std, spread], dim=1
        )

    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        """See :meth:`StepSampler.transition`."""
        _, of_latents, of_velocity, std, spread = self._columns(self._table, timesteps, latents)
        mean = of_latents * latents.float() + of_velocity * model_output.float()
        return Transition(mean, std.flatten(), spread.flatten())

    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`StepSampler.clean`."""
        sigma = self._columns(self._table, timesteps, latents)[0]
        return predicted_clean("flow", latents.float(), model_output.float(), 1.0 - sigma, sigma)


def _schedule(config: Mapping[str, Any], num_inference_steps: int) -> tuple[Tensor, Tensor]:
    """Return the timesteps ``(T,)`` and noise levels ``(T + 1,)`` of diffusers' scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    for name in ("use_dynamic_shifting", "invert_sigmas"):
        if config.get(name):
            raise InputError(
                f"the scheduler config has {name}=true, which no SD3 policy was trained with; set it to false there, "
                "and shift to the one to sample with"
            )
    scheduler = make_scheduler(FlowMatchEulerDiscreteScheduler, config, num_inference_steps)
    return scheduler.timesteps.to(torch.float32), scheduler.sigmas.to(torch.float32)
