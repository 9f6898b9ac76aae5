"""Back-propagation in two stages, for a policy and a reward (or reference) that share one network."""

from collections.abc import Callable

import torch
from torch import Tensor


def surrogate(latents: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute the mean of ``score(latents)``, with the backward pass through ``score`` already done.

    Gradient checkpointing computes blocks again in the backward pass, with the adapter that is active at that time.
    Therefore this function back-propagates through the reward itself; call it under ``policy.adapters.use("reward")``.
    The scalar that it returns carries d mean / d latents into the policy's graph. Call ``backward`` on that scalar
    later, when the policy's adapter is active again.

    Args:
        latents: ``(N, C, ...)`` with the policy's graph.
        score: Differentiable function of latents that returns scores of any shape.

    Returns:
        Scalar float32. Its gradient flows into ``latents`` only, not into weights or other inputs of ``score``.
    """
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad():
        mean = score(leaf).float().mean()
    # To the latents alone: weights of the reward, which may be the policy's network, get no gradient.
    (slope,) = torch.autograd.grad(mean, leaf)
    return mean.detach() + gradient_carrier(latents, slope).sum()


def gradient_carrier(latents: Tensor, slope: Tensor) -> Tensor:
    """Return zeros ``(N,)`` float32 with derivative ``slope`` with respect to ``latents``, both ``(N, C, ...)``."""
    return ((latents - latents.detach()).float() * slope.float()).flatten(1).sum(dim=1)
