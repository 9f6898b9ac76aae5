"""Base class of preference losses, helpers for heads with several outputs, and the gather of the pairs of all ranks.

A loss is written for a single process with the global batch: each rank computes it over the rows of all ranks. The
backward of the gather sums the gradients that all ranks have for a row, and gives the sum to the rank that owns the
row. Gradients of a rank's own rows are then world size times those of a single process; averaging over ranks (DDP,
FSDP) gives exactly the single-process gradient of every parameter.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from latentreward.core.contracts import PairScores, PairTargets, widest_float
from latentreward.core.promises import Part, detached, finite, returns, wrong_tensor


def per_row(values: Tensor, margin: Tensor) -> Tensor:
    """Reshape one value per pair, ``(B,)``, to broadcast against a margin ``(B,)`` or ``(B, out_dim)``."""
    return values.reshape(-1, *(1,) * (margin.ndim - 1))


def mean_over_outputs(values: Tensor) -> Tensor:
    """Average the columns of a head with several outputs: ``(B, out_dim)`` or ``(B,)`` to ``(B,)``."""
    return values if values.ndim == 1 else values.mean(dim=1)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    r"""Compute the weighted mean over pairs, :math:`\sum_i w_i l_i / \sum_i w_i`; 0 if every weight is 0.

    Args:
        values: One value per pair, ``(B,)``.
        weight: Weights, ``(B,)``, which need not sum to 1.

    Returns:
        A scalar in the dtype of ``values``.
    """
    weight = weight.to(values.dtype)
    # The least positive number keeps a batch without weight at 0 / tiny = 0 instead of NaN.
    return (weight * values).sum() / weight.sum().clamp_min(torch.finfo(values.dtype).tiny)


class SetLoss(nn.Module, Part):
    """Base class of losses that show their settings in ``print(model)``.

    Attributes:
        changes_buffers: Whether buffers of the loss may change in training; checkpoints of trainable weights then hold
            them too.
    """

    changes_buffers: bool = True

    def extra_repr(self) -> str:
        """Return the loss's numbers and choices, for ``print(model)``."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if not isinstance(value, bool))


def _wrong_losses(losses: Tensor, scores: PairScores, shape: Sequence[int]) -> str | None:
    problem = wrong_tensor(losses, shape) if finite(scores.margin) else None
    return problem or detached(losses, scores.margin)


class PreferenceLoss(SetLoss):
    """Base class of losses over preference pairs.

    ``forward`` needs the pairs of the global batch: with several processes, gather those of all ranks with
    :func:`latentreward.reward.gather_pair_scores` first. Weights are then normalised over the pairs of all ranks, and
    the average of the ranks' gradients, as in DDP, equals the gradient of a single process with all pairs.

    The loss per pair is computed in float64, which costs little for B numbers: with soft labels the gradient is a
    difference of nearly equal terms, imprecise in float32. The result is float32, also under autocast.

    Attributes:
        needs_cross_scores: Whether ``scores.cross`` must be given: scores of every image with every prompt of the
            batch.
    """

    needs_cross_scores: bool = False

    @abstractmethod
    @returns(lambda found, loss, scores: _wrong_losses(found, scores, scores.label.shape))
    def per_pair(self, scores: PairScores) -> Tensor:
        """Compute the unweighted loss of each pair, averaged over the outputs of the head: ``(B,)``, float64."""

    @abstractmethod
    @returns(
        lambda found, loss, scores: (
            wrong_tensor(found, scores.chosen.shape, low=0.0, high=1.0) if finite(scores.margin) else None
        )
    )
    def win_probability(self, scores: PairScores) -> Tensor:
        """Compute the probability that chosen wins under this loss's model: shape of the scores, float32."""

    @returns(lambda found, loss, scores: _wrong_losses(found, scores, ()))
    def forward(self, scores: PairScores) -> Tensor:
        """Compute the weighted mean of :meth:`per_pair`.

        Args:
            scores: Pairs of all ranks; rewards ``(B,)`` or ``(B, out_dim)``.

        Returns:
            Scalar, float32.

        Raises:
            ValueError: If the columns of ``scores`` do not have one row per pair.
        """
        rows = scores.chosen.shape[:1]
        if scores.chosen.ndim not in (1, 2) or scores.rejected.shape != scores.chosen.shape:
            raise ValueError(
                f"chosen {tuple(scores.chosen.shape)} and rejected {tuple(scores.rejected.shape)} must both be (B,) or "
                "(B, out_dim)"
            )
        for name in ("label", "weight", "chosen_sigmas", "rejected_sigmas"):
            if getattr(scores, name).shape != rows:  # (1,) would broadcast silently
                raise ValueError(f"{name} has shape {tuple(getattr(scores, name).shape)}, expected {tuple(rows)}")
        if widest_float(scores.chosen.device) != torch.float64:
            scores = scores.to("cpu")
        return weighted_mean(self.per_pair(scores), scores.weight).float()


def _world_size() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


class _GatherRows(torch.autograd.Function):
    """All-gather of ``(sizes[rank], ...)`` to ``(sum(sizes), ...)``; backward is an all-reduce, cut to the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # all_gather wants equal shapes, and ranks may have different numbers of rows.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        blocks = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(blocks, padded)
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        # all_reduce works in place, and autograd may use the gradient elsewhere.
        total = grad_output.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.split(ctx.sizes)[distributed.get_rank()], None


def gather_with_grad(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order; gradients flow back to the rank that owns a row.

    This is a collective call: every rank must make it, and if gradients are needed, every rank must run backward. Ranks
    may have different numbers of rows (batches of different aspect buckets).

    Args:
        rows: ``(B_rank, ...)``; dtype and trailing shape must be equal on all ranks.

    Returns:
        ``(sum of B_rank, ...)``; ``rows`` itself if there is one process.
    """
    world_size = _world_size()
    if world_size == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    return _GatherRows.apply(rows, torch.cat(counts).tolist())


def gather_pair_scores(scores: PairScores) -> PairScores:
    """Gather the pairs of all ranks, in rank order, float32, in one collective call, and one more for targets.

    ``scores.cross`` is returned as given: these scores are computed from embeddings that are gathered already
    (:func:`gather_with_grad`), so they span all ranks.

    Args:
        scores: The pairs of this rank; rewards ``(B,)`` or ``(B, out_dim)``.

    Returns:
        The pairs of all ranks; ``scores`` itself if there is one process.
    """
    if _world_size() == 1:
        return scores
    names = ("chosen", "rejected", "label", "weight", "chosen_sigmas", "rejected_sigmas")
    if scores.targets is not None:
        given = [tensor for field in fields(PairTargets) if (tensor := getattr(scores.targets, field.name)) is not None]
        gathered = gather_with_grad(torch.stack([tensor.float() for tensor in given], dim=1)).unbind(dim=1)
        scores = replace(scores, targets=PairTargets(*gathered))
    # One collective call for six columns: each costs a round trip.
    table = torch.cat([getattr(scores, name).float().reshape(len(scores.label), -1) for name in names], dim=1)
    rewards, rest = gather_with_grad(table).tensor_split([table.shape[1] - 4], dim=1)
    chosen, rejected = (half.reshape(-1, *scores.chosen.shape[1:]) for half in rewards.chunk(2, dim=1))
    return replace(scores, **dict(zip(names, (chosen, rejected, *rest.unbind(dim=1)), strict=True)))
