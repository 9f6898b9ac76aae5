"""Group-relative advantages (GRPO): rewards normalised within the samples of one state or prompt."""

import torch
from torch import Tensor


def group_advantages(scores: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Compute advantages among K candidates of a state: (score − mean) / (std + ε), with the population std.

    Args:
        scores: ``(K, B)`` scores, one column per state.
        epsilon: ε, which gives groups of equal scores the advantage 0 instead of 0 / 0.

    Returns:
        Advantages ``(K, B)``, float32.
    """
    values = scores.double()
    std, mean = torch.std_mean(values, dim=0, correction=0)
    return ((values - mean) / (std + epsilon)).float()


def tracked_advantages(rewards: Tensor, groups: Tensor, global_std: bool = False, epsilon: float = 1e-4) -> Tensor:
    """Compute advantages among the samples of each prompt, in any order of the rows (arXiv:2505.05470).

    Args:
        rewards: ``(N,)`` or ``(N, T)``, one row per sample; columns are independent.
        groups: ``(N,)`` int64: index of the prompt of each sample.
        global_std: Divide by the standard deviation over all rows instead of the group's.
        epsilon: ε, which gives groups of equal rewards the advantage 0 instead of 0 / 0.

    Returns:
        Advantages in the shape of ``rewards``, float32.
    """
    values, advantages = rewards.double(), torch.empty_like(rewards, dtype=torch.float32)
    overall = values.std(dim=0, correction=0)
    for group in groups.unique():
        rows = groups == group
        std, mean = torch.std_mean(values[rows], dim=0, correction=0)
        advantages[rows] = ((values[rows] - mean) / ((overall if global_std else std) + epsilon)).float()
    return advantages
