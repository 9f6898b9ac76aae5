"""Stochastic step of a sampler as a Gaussian, with sampling and log-probability of the next state."""

import math
from dataclasses import dataclass
from typing import Literal

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
        density: ``normal``: log-probabilities are those of the Gaussian. ``squares``: they are the negative mean square
            of next state − mean, as released for coefficients-preserving sampling (arXiv:2509.05952); this ignores the
            standard deviation.
    """

    mean: Tensor
    std: Tensor
    spread: Tensor
    density: Literal["normal", "squares"] = "normal"

    def sample(self, noise: Tensor) -> Tensor:
        """Return next states ``mean + std·noise`` for noise ``(B, C, ...)``, or ``(K, B, C, ...)`` for K candidates."""
        return self.mean + per_sample(self.std, self.mean) * noise.to(self.mean)

    def log_prob(self, next_latents: Tensor) -> Tensor:
        """Compute the log density of next states, **averaged** over elements (as SPO, LPO and Flow-GRPO do), float32.

        Of a ``normal`` step it is undefined where ``std`` is 0. ``next_latents`` gets no gradient.

        Args:
            next_latents: ``(B, C, ...)``, or ``(K, B, C, ...)`` for K candidates.

        Returns:
            ``(B,)``, or ``(K, B)``.
        """
        density = -((next_latents.detach().to(self.mean) - self.mean) ** 2)
        if self.density == "normal":
            std = per_sample(self.std, self.mean)
            density = density / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
        return density.flatten(1 - self.mean.ndim).mean(dim=-1)
