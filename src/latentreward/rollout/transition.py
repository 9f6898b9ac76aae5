"""Stochastic step of a sampler as a Gaussian, with sampling and log-probability of the next state."""

import math
from dataclasses import dataclass

from torch import Tensor

from latentreward.contracts import TensorRecord
from latentreward.noise.base import per_sample


@dataclass(frozen=True)
class Transition(TensorRecord):
    """Gaussian distribution of the next state given the present state, in float32.

    Attributes:
        mean: ``(B, C, ...)`` mean of the next state.
        std: ``(B,)`` standard deviation of each element; 0 for a deterministic step.
        spread: ``(B,)`` standard deviation in the KL divergence between two policies. Equals ``std`` for DDIM; for
            flow matching the factor √−dt is left out, as in Flow-GRPO (arXiv:2505.05470).
    """

    mean: Tensor
    std: Tensor
    spread: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return next states ``mean + std·noise`` for noise ``(B, C, ...)``, or ``(K, B, C, ...)`` for K candidates."""
        return self.mean + per_sample(self.std, self.mean) * noise.to(self.mean)

    def log_prob(self, next_latents: Tensor) -> Tensor:
        """Compute the log density of next states, **averaged** over elements (as SPO, LPO and Flow-GRPO do), float32.

        The result is undefined where ``std`` is 0. ``next_latents`` gets no gradient.

        Args:
            next_latents: ``(B, C, ...)``, or ``(K, B, C, ...)`` for K candidates.

        Returns:
            ``(B,)``, or ``(K, B)``.
        """
        std = per_sample(self.std, self.mean)
        error = next_latents.detach().to(self.mean) - self.mean
        density = -(error**2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
        return density.flatten(1 - self.mean.ndim).mean(dim=-1)
