"""Flow-matching samplers with noise, for rectified flows."""

from typing import Literal, get_args

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise.predictions import predicted_clean
from latentreward.rollout.base import StepSampler
from latentreward.rollout.transition import Transition

FlowNoise = Literal["flow", "dance", "cps"]
"""How a flow's step adds noise; see :class:`FlowSDESampler`."""


class FlowSDESampler(StepSampler):
    r"""Sampler that adds noise to the steps of a rectified flow.

    With σ and σ' the levels before and after a step, d = σ' − σ < 0, v the predicted velocity and a = ``noise_level``,
    the kinds ``flow`` (Flow-GRPO, arXiv:2505.05470) and ``dance`` (DanceGRPO, arXiv:2505.07818) are steps of a
    stochastic differential equation with the spread w:

    .. math::
        w = a\sqrt{\sigma / (1 - \sigma)} \text{ or } w = a, \qquad x' \sim \mathcal N\Bigl(
        x\bigl(1 + \tfrac{w^2}{2\sigma} d\bigr) + v\bigl(1 + \tfrac{w^2 (1 - \sigma)}{2\sigma}\bigr) d,\; w^2 |d|\Bigr).

    For ``flow``, the denominator 1 − σ uses the next level where σ = 1, as in Flow-GRPO's code; likewise where 1 − σ is
    less than half of the step, as at UniPC's first level, 1 − 10⁻⁶. The equation has the flow's marginals, but its
    published steps have these marginals only for small d. For example, with a perfect prediction of a single image, a =
    0.7, shift 3 and 10 to 40 steps, the noise's standard deviation is 3 to 6 % above σ' after the first two steps (σ
    near 1), up to 4 % above in the middle, and 20 % and more above in the last steps. a = 0 gives Euler's step.

    The kind ``cps`` (coefficients-preserving sampling, arXiv:2509.05952) keeps the share of noise in the state at σ':

    .. math::
        s = \sigma' \sin(a\pi/2), \qquad x' \sim \mathcal N\bigl(
        (1 - \sigma')\hat x_0 + \sqrt{\sigma'^2 - s^2}\,\hat\epsilon,\; s^2\bigr),
        \qquad \hat x_0 = x - \sigma v, \quad \hat\epsilon = x + (1 - \sigma) v.

    Its last step has no noise. Its log-probability is the released one: the negative mean square of the noise added.

    Args:
        timesteps: ``(T,)`` timesteps of the family's own schedule, see :meth:`Family.levels
            <latentreward.families.Family.levels>`.
        sigmas: ``(T + 1,)`` noise levels of that schedule, from the noisiest one to 0.
        noise_level: Factor a on the noise, at least 0; Flow-GRPO uses 0.7, DanceGRPO 0.3. At most 1 for ``cps``.
        kind: How noise is added.

    Raises:
        InputError: If ``noise_level`` is out of the kind's range.
    """

    def __init__(self, timesteps: Tensor, sigmas: Tensor, noise_level: float = 0.7, kind: FlowNoise = "flow") -> None:
        check_noise_level(kind, noise_level)
        self.timesteps, self.kind = timesteps, kind
        self.noise_setting = f"noise_level={noise_level:g}"
        sigma, after = sigmas[:-1], sigmas[1:]
        step = after - sigma
        if kind == "cps":
            self.noise_std = spread = after * torch.sin(torch.tensor(noise_level * torch.pi / 2)).to(after)
            of_noise = (after**2 - spread**2).clamp(min=0).sqrt()
            of_latents, of_velocity = 1 - after + of_noise, of_noise * (1 - sigma) - (1 - after) * sigma
        else:
            spread = noise_level * torch.ones_like(sigma)
            if kind == "flow":
                spread = spread * (sigma / (1 - torch.where(1 - sigma < -step / 2, after, sigma))).sqrt()
            self.noise_std = spread * (-step).sqrt()
            growth = spread**2 / (2 * sigma)
            of_latents, of_velocity = 1 + growth * step, (1 + growth * (1 - sigma)) * step
        self._table = torch.stack([sigma, of_latents, of_velocity, self.noise_std, spread], dim=1)

    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        """See :meth:`StepSampler.transition`."""
        _, of_latents, of_velocity, std, spread = self._columns(self._table, timesteps, latents)
        mean = of_latents * latents.float() + of_velocity * model_output.float()
        return Transition(mean, std.flatten(), spread.flatten(), "squares" if self.kind == "cps" else "normal")

    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`StepSampler.clean`."""
        sigma = self._columns(self._table, timesteps, latents)[0]
        return predicted_clean("flow", latents.float(), model_output.float(), 1.0 - sigma, sigma)


def check_noise_level(kind: FlowNoise, noise_level: float) -> None:
    """Raise InputError if there is no such kind of noise, or ``noise_level`` is out of its range."""
    if kind not in get_args(FlowNoise):
        raise InputError(f"flow_noise={kind!r} must be one of {', '.join(get_args(FlowNoise))}")
    if not 0 <= noise_level < float("inf"):
        raise InputError(f"noise_level={noise_level:g} must be 0 or above; Flow-GRPO takes 0.7")
    if kind == "cps" and noise_level > 1:
        raise InputError(
            f"noise_level={noise_level:g} must be at most 1 with flow_noise=cps, where 1 replaces all noise of the "
            "state; Flow-GRPO takes 0.8"
        )
