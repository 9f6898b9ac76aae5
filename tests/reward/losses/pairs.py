"""Small batches of scores for the tests of this folder."""

import torch
from torch import Tensor

from latentreward.core.contracts import CrossScores, PairScores


def scores_of(margin: Tensor, label: float | Tensor = 1.0, sigmas: float | Tensor = 0.0) -> PairScores:
    """Pairs with the given margin (the rejected reward is 0), unit weights and one noise level each."""
    rows = margin.shape[:1]
    as_column = lambda value: torch.as_tensor(value, dtype=torch.float32).expand(rows)  # noqa: E731
    return PairScores(
        chosen=margin,
        rejected=torch.zeros_like(margin),
        label=as_column(label),
        weight=torch.ones(rows),
        chosen_sigmas=as_column(sigmas),
        rejected_sigmas=as_column(sigmas),
    )


def random_scores(seed: int, pairs: int = 6, out_dim: int | None = None, *, cross: bool = False) -> PairScores:
    """Random pairs with ties, soft labels, weights and two noise levels; ``cross`` agrees with the rewards."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pairs,) if out_dim is None else (pairs, out_dim)
    chosen, rejected = 3 * torch.randn(2, *shape, generator=generator)
    across = None
    if cross:
        across = CrossScores(*(3 * torch.randn(2, pairs, pairs, generator=generator)))
        chosen, rejected = across.chosen.diagonal(), across.rejected.diagonal()
    sigmas = torch.rand(2, pairs, generator=generator)
    sigmas[1, ::2] = sigmas[0, ::2]
    return PairScores(
        chosen=chosen,
        rejected=rejected,
        label=torch.tensor([1.0, 0.5, 0.7, 0.9, 1.0, 0.5]).repeat(pairs)[:pairs],
        weight=torch.rand(pairs, generator=generator) + 0.1,
        chosen_sigmas=sigmas[0],
        rejected_sigmas=sigmas[1],
        cross=across,
    )


def swapped(scores: PairScores) -> PairScores:
    """The same pairs with all sides exchanged."""
    return PairScores(
        chosen=scores.rejected,
        rejected=scores.chosen,
        label=1 - scores.label,
        weight=scores.weight,
        chosen_sigmas=scores.rejected_sigmas,
        rejected_sigmas=scores.chosen_sigmas,
        cross=None if scores.cross is None else CrossScores(scores.cross.rejected, scores.cross.chosen),
    )
