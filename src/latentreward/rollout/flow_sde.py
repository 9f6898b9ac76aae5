"""Flow-matching sampler with noise, for rectified flows."""

import torch
from torch import Tensor

from latentreward.noise.predictions import predicted_clean
from latentreward.rollout.base import StepSampler
from latentreward.rollout.transition import Transition


class FlowSDESampler(StepSampler):
    r"""Sampler of Flow-GRPO's stochastic differential equation for a rectified flow (arXiv:2505.05470).

    With σ and σ' the levels before and after a step, d = σ' − σ < 0, v the predicted velocity and a = ``noise_level``,

    .. math::
        w = a\sqrt{\sigma / (1 - \sigma)}, \qquad x' \sim \mathcal N\Bigl(
        x\bigl(1 + \tfrac{w^2}{2\sigma} d\bigr) + v\bigl(1 + \tfrac{w^2 (1 - \sigma)}{2\sigma}\bigr) d,\; w^2 |d|\Bigr).

    Where σ = 1, the denominator 1 − σ uses the next level instead, as in Flow-GRPO's code; likewise where 1 − σ is less
    than half of the step, as at UniPC's first level, 1 − 10⁻⁶. The equation has the flow's marginals, but its published
    steps have these marginals only for small d. For example, with a perfect prediction of a single image, a = 0.7,
    shift 3 and 10 to 40 steps, the noise's standard deviation is 3 to 6 % above σ' after the first two steps (σ near
    1), up to 4 % above in the middle, and 20 % and more above in the last steps. a = 0 gives Euler's step.

    Args:
        timesteps: ``(T,)`` timesteps of the family's own schedule, see :meth:`Family.levels
            <latentreward.families.Family.levels>`.
        sigmas: ``(T + 1,)`` noise levels of that schedule, from the noisiest one to 0.
        noise_level: Factor a on the noise, at least 0; Flow-GRPO uses 0.7.
    """

    def __init__(self, timesteps: Tensor, sigmas: Tensor, noise_level: float = 0.7) -> None:
        self.timesteps = timesteps
        sigma, step = sigmas[:-1], sigmas[1:] - sigmas[:-1]
        spread = noise_level * (sigma / (1 - torch.where(1 - sigma < -step / 2, sigmas[1:], sigma))).sqrt()
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
