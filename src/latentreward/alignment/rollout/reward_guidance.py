"""Guidance of a rollout by a reward: each step's mean is moved along the reward's gradient (Euphonium)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment.policies.policy import Policy
from latentreward.alignment.rewards.base import Reward
from latentreward.alignment.rollout.samplers import Sampling, StepSampler, Transition, inside_window
from latentreward.alignment.rollout.trajectories import sample_trajectories
from latentreward.core.contracts import NoisyStates, PromptBatch
from latentreward.core.errors import InputError, check_range
from latentreward.core.running import phase
from latentreward.diffusion.noise.processes import per_sample


@dataclass(frozen=True, kw_only=True)
class GuidedTransition(Transition):
    """Transition of which samples are drawn around a moved mean; its log-probability is that of the mean as it was.

    A policy that learns from guided samples thereby learns to reach them without guidance.
    """

    shift: Tensor  # ``(B, C, ...)`` what is added to the mean in sampling

    @property
    def guided(self) -> Transition:
        """Return the distribution that samples are drawn from."""
        return Transition(self.mean + self.shift, self.std, self.spread, self.density)

    def sample(self, noise: Tensor) -> Tensor:
        return self.guided.sample(noise)


@dataclass
class RewardGuidance:
    r"""Settings of guidance by a reward's gradient (Euphonium, arXiv:2602.04928).

    With g = ∇R(x_t, t, c) at the state before the step, and Δ the length of the step in σ, the next state is drawn from

    .. math:: \mathcal N\bigl(\mu + a\,\Delta\, g,\; s^2 \Delta\bigr), \qquad a = s^2 / 2\beta.

    s is the noise per √Δ (:attr:`Transition.spread`). To first order, the step is the one with the most reward minus 2β
    times the KL divergence from the unguided step. DDIM's transitions have Δ = 1. A step without noise is not guided.

    Attributes:
        scale: a, in latents squared per unit of the reward; None takes s² / 2β.
        beta: β in units of the reward, positive; without effect if ``scale`` is given. 3.125 in Euphonium's released
            settings, which gives a = 0.01 at η = 0.25.
        times_step: Whether the factor Δ is there, as in the released settings.
        normalise: Whether g is divided by its norm over the whole batch. The guidance of a sample then depends on the
            others; off in the released settings.
        low: Lowest timestep of the steps with guidance.
        high: Highest timestep of the steps with guidance. Euphonium guides the last 4 of 16 steps at shift 5, which
            start at timestep 625 and below.
    """

    scale: float | None = None
    beta: float = 3.125
    times_step: bool = True
    normalise: bool = False
    low: float = 0.0
    high: float = 625.0

    def __post_init__(self) -> None:
        check_range("(0, inf)", "Euphonium uses 0.01", scale=self.scale)
        check_range("(0, inf)", "Euphonium uses 3.125", beta=self.beta)
        check_range(f"[-inf, {self.high}]", "exchange low and high", low=self.low)

    def check(self, sampler: StepSampler) -> None:
        """Raise InputError if no step of the window has noise."""
        sampler.noisy_steps(self.low, self.high)

    def guide(self, transition: Transition, gradient: Tensor) -> GuidedTransition:
        """Move the mean of ``transition`` along the reward's ``gradient`` ``(B, C, ...)``."""
        # The policy's loss must not reach the reward's weights through the guidance.
        direction = gradient.detach().float()
        if self.normalise:
            # Over the whole batch, as the released code does under this option.
            direction = direction / (direction.norm() + 1e-8)
        noisy = transition.std > 0
        spread = transition.spread.where(noisy, 1.0)
        factor = spread**2 / (2 * self.beta) if self.scale is None else torch.full_like(spread, self.scale)
        if self.times_step:
            factor = factor * (transition.std / spread) ** 2
        shift = per_sample(factor.where(noisy, 0.0), direction) * direction
        return GuidedTransition(shift=shift, **vars(transition))


def require_gradient(reward: Reward, user: str = "guidance") -> None:
    """Raise InputError if ``reward`` has no gradient to the states, which ``user`` needs."""
    if not reward.differentiable:
        raise InputError(f"{type(reward).__name__} gives no gradient, which {user} needs; take a LatentReward")


def require_finite(slope: Tensor, reward: Reward) -> Tensor:
    """Return a gradient ``slope`` of ``reward``; raise InputError if it is not finite."""
    if not slope.isfinite().all():
        name = reward.name or type(reward).__name__
        raise InputError(f"reward {name} has a gradient that is not finite; look at its formula, or compute in float32")
    return slope


def refuse_float16(precision: str | int) -> None:
    """Raise InputError for a trainer's precision in which the unscaled gradients of a reward vanish."""
    if precision == "16-mixed":
        raise InputError("trainer.precision=16-mixed: the reward's gradients vanish in float16; use bf16-mixed")


@phase("reward")
def reward_gradient(reward: Reward, states: NoisyStates, encoded: Any) -> Tensor:
    """Compute the gradient ``(N, C, ...)`` of each state's reward with respect to the state, float32."""
    leaf = states.latents.detach().float().requires_grad_()
    with torch.enable_grad():
        total = reward(NoisyStates(leaf, states.timesteps, states.rows), encoded).sum()
    (slope,) = torch.autograd.grad(total, leaf)
    return require_finite(slope, reward)


class GuidedSampler(StepSampler):
    """Sampler whose transitions are guided by a differentiable reward of noisy states.

    ``encoded`` is the result of :meth:`Reward.encode_prompts` for the prompts of the rows of every batch, in order.
    """

    def __init__(self, sampler: StepSampler, guidance: RewardGuidance, reward: Reward, encoded: Any) -> None:
        guidance.check(sampler)
        require_gradient(reward)
        self.sampler, self.guidance, self.reward, self.encoded = sampler, guidance, reward, encoded
        self.timesteps, self.noise_std, self.noise_setting = sampler.timesteps, sampler.noise_std, sampler.noise_setting

    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        plain = self.sampler.transition(latents, model_output, timesteps)
        inside = inside_window(timesteps, self.guidance.low, self.guidance.high)
        if not inside.any():
            return plain
        rows = torch.arange(len(latents), device=latents.device)
        states = NoisyStates(latents, timesteps.to(latents.device), rows)
        gradient = reward_gradient(self.reward, states, self.encoded)
        return self.guidance.guide(plain, gradient * per_sample(inside.to(gradient), gradient))

    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        return self.sampler.clean(latents, model_output, timesteps)


def sample_guided(
    policy: Policy,
    reward: Reward,
    prompts: PromptBatch,
    guidance: RewardGuidance,
    sampling: Sampling,
    guidance_scale: float | None,
    seed: int,
) -> Tensor:
    """Sample finished latents ``(B, C, ...)``, float32, with steps that are guided by ``reward``."""
    sampler = sampling.sampler(policy.family)
    guided = GuidedSampler(sampler, guidance, reward, reward.encode_prompts(prompts.prompts))
    return sample_trajectories(policy, guided, prompts, sampling, guidance_scale, seed, kept="finished").finished
