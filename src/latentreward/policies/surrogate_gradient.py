"""Gradients from a reward, or the reference, into a policy where all are adapters of one network."""

from collections.abc import Callable

import torch
from torch import Tensor


def surrogate(latents: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of ``score(latents)``, back-propagated through ``score`` at once and through ``latents`` later.

    Gradient checkpointing computes blocks again in the backward pass, with the adapter that is at work then. So the
    reward's part is done here, while its adapter is at work (call this under ``policy.adapters.use("reward")``), and
    what comes back carries d mean / d latents into the policy's part, once the policy's adapter is at work again.

    Args:
        latents: ``(N, C, ...)`` with the policy's graph.
        score: Differentiable scores, any shape, of the latents it is given; their mean is what is differentiated.

    Returns:
        Scalar float32. Its gradient stops at ``latents`` for anything else that ``score`` depends on.
    """
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad():
        mean = score(leaf).float().mean()
    (slope,) = torch.autograd.grad(mean, leaf)
    return mean.detach() + gradient_carrier(latents, slope).sum()


def gradient_carrier(latents: Tensor, slope: Tensor) -> Tensor:
    """Zeros ``(N,)`` float32 whose derivative with respect to ``latents`` ``(N, C, ...)`` is ``slope``."""
    return ((latents - latents.detach()).float() * slope.float()).flatten(1).sum(dim=1)
