r"""Advantage weighted matching (AWM, arXiv:2509.25050): a clipped policy gradient on the denoising error of a flow.

With m = ⟨(v − u)²⟩ the error of the velocity v at clean latents x₀ and noise ε, u = ε − x₀, the log-probability of x₀
is replaced by

.. math:: \ell = -m\,g(\sigma) \quad\text{or, with } p \text{ the power,}\quad
    \ell = -\frac{(m + 10^{-10})^p - 10^{-10 p}}{p}\,\sigma,

and the loss is that of :mod:`latentreward.alignment.losses.clipped_policy` with the ratio ρ = exp(ℓ − ℓ_old), plus the
squared differences from the reference and from a moving average of the policy. At ρ = 1 its gradient is −A ∇ℓ.
"""

import math
from typing import Literal, NamedTuple

from torch import Tensor

from latentreward.alignment.losses.clipped_policy import clipped_objective
from latentreward.core.contracts import widest_float
from latentreward.core.errors import check_choices, check_range
from latentreward.reward.losses.base import SetLoss

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
Divergence = Literal["uniform", "elbo"]
ROUND = 1e-10
"""Number added to m, so that its power has a finite slope at 0."""


def squared_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared difference of two ``(B, C, ...)`` tensors: ``(B,)`` float64, float32 on mps."""
    wide = widest_float(velocity.device)
    return (velocity.to(wide) - target.to(wide)).square().flatten(1).mean(dim=1)


def matching_log_prob(
    velocity: Tensor, target: Tensor, sigmas: Tensor, weighting: Weighting = "ghuber", power: float = 0.25
) -> Tensor:
    """Compute ℓ ``(B,)``, float64, of v and u = ε − x₀, ``(B, C, ...)``, at noise levels ``(B,)``.

    ``weighting`` gives g(σ): ``uniform`` 1, ``t`` σ, ``t2`` σ²; ``ghuber`` the form with the ``power`` p, ``huber`` a
    square root less its value at m = 0.
    """
    error = squared_error(velocity, target)
    level = sigmas.to(error)
    match weighting:
        case "uniform":
            return -error
        case "t":
            return -error * level
        case "t2":
            return -error * level**2
        case "huber":
            return -((error + ROUND).sqrt() - math.sqrt(ROUND)) * level
    return -((error + ROUND) ** power - ROUND**power) * level / power


def velocity_divergence(velocity: Tensor, other: Tensor, sigmas: Tensor, weight: Divergence = "uniform") -> Tensor:
    """Compute the divergence ``(B,)``, float64, of v and another velocity u ``(B, C, ...)``, which gets no gradient.

    ``uniform`` gives ⟨(v − u)²⟩; ``elbo`` divides by 2 s², s = 0.7 √(σ / (1 − min(σ, 0.99))).
    """
    error = squared_error(velocity, other.detach())
    if weight == "uniform":
        return error
    level = sigmas.to(error)
    # As released: at σ = 1 the weight would be 0, and the divergence without effect; 0.7 is the flow SDE's noise level.
    return error * (1 - level.clamp(max=0.99)) / (2 * 0.7**2 * level)


class MatchingResult(NamedTuple):
    """Loss and its parts; all scalars, float32."""

    loss: Tensor  # ``policy + kl_weight · kl + average_weight · average_kl``
    policy: Tensor  # The clipped policy term
    kl: Tensor  # Mean divergence from the reference; 0 if not given
    average_kl: Tensor  # Mean divergence from the policy's moving average; 0 if not given
    clipped: Tensor  # Share of samples whose ratio lies outside 1 ± ``clip_range``
    ratio: Tensor  # Mean ratio


class MatchingLoss(SetLoss):
    """AWM's loss: a clipped policy term, and divergences from the reference and from a moving average.

    Args:
        weighting: Form of ℓ; see :func:`matching_log_prob`. The released configs have ``ghuber``.
        power: p of ``ghuber``.
        clip_range: Range of the ratio, in (0, 1]. The released configs have 1, and one optimiser step per rollout,
            where the ratio is 1 and nothing is clipped.
        kl_weight: Weight of the divergence from the reference; 0 leaves it out.
        average_weight: Weight of the divergence from the policy's moving average; 0 leaves it out.
        divergence: Weight of both divergences by noise level; see :func:`velocity_divergence`.
        max_advantage: Bound: advantages are clamped to [−``max_advantage``, ``max_advantage``].
        scale_to: Value to which an advantage of ``max_advantage`` is scaled; None does not scale.
    """

    def __init__(
        self,
        weighting: Weighting = "ghuber",
        power: float = 0.25,
        clip_range: float = 1.0,
        kl_weight: float = 1e-3,
        average_weight: float = 1.0,
        divergence: Divergence = "uniform",
        max_advantage: float = 5.0,
        scale_to: float | None = 1.0,
    ) -> None:
        super().__init__()
        check_choices(MatchingLoss, weighting=weighting, divergence=divergence)
        check_range("(0, 1]", "AWM uses 0.25", power=power)
        check_range("(0, 1]", "AWM uses 1", clip_range=clip_range)
        check_range("[0, inf)", "0 leaves the term out", kl_weight=kl_weight, average_weight=average_weight)
        check_range("(0, inf)", max_advantage=max_advantage, scale_to=scale_to)
        self.weighting, self.power, self.clip_range = weighting, power, clip_range
        self.kl_weight, self.average_weight, self.divergence = kl_weight, average_weight, divergence
        self.max_advantage, self.scale_to = max_advantage, scale_to

    def log_prob(self, velocity: Tensor, target: Tensor, sigmas: Tensor) -> Tensor:
        """Compute ℓ ``(B,)`` in this loss's form; see :func:`matching_log_prob`."""
        return matching_log_prob(velocity, target, sigmas, self.weighting, self.power)

    def forward(
        self,
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantage: Tensor,
        kl: Tensor | None = None,
        average_kl: Tensor | None = None,
    ) -> MatchingResult:
        """Compute the loss from ℓ under the policy and under the one that sampled, for the same noise; all ``(B,)``.

        Divergences with a weight above 0 must be given.
        """
        if (self.kl_weight and kl is None) or (self.average_weight and average_kl is None):
            raise ValueError("a divergence with a weight above 0 is missing")
        weight = advantage.to(log_prob).clamp(-self.max_advantage, self.max_advantage)
        if self.scale_to is not None:
            weight = weight * (self.scale_to / self.max_advantage)
        rows, ratio, clipped = clipped_objective(log_prob - old_log_prob.detach(), weight, self.clip_range)
        policy = rows.mean()
        zero = policy.new_zeros(())
        drift, spread = (zero if one is None else one.mean() for one in (kl, average_kl))
        loss = policy + self.kl_weight * drift + self.average_weight * spread
        parts = (policy, drift, spread, clipped.float().mean(), ratio.mean())
        return MatchingResult(loss.float(), *(part.detach().float() for part in parts))
