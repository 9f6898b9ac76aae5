"""All-gather of rows with gradient, so that a loss can be written for a single process with the global batch.

Each rank computes the same loss over the rows of all ranks. The backward of the gather sums the gradients that all
ranks have for a row, and gives the sum to the rank that owns the row. Gradients of a rank's own rows are then world
size times those of a single process; averaging over ranks (DDP, FSDP) gives exactly the single-process gradient of
every parameter.
"""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from latentreward.contracts import PairScores, PairTargets


def _world_size() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


class _GatherRows(torch.autograd.Function):
    """All-gather of ``(sizes[rank], ...)`` to ``(sum(sizes), ...)``; backward is an all-reduce, cut to the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        blocks = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(blocks, padded)
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
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
    table = torch.cat([getattr(scores, name).float().reshape(len(scores.label), -1) for name in names], dim=1)
    rewards, rest = gather_with_grad(table).tensor_split([table.shape[1] - 4], dim=1)
    chosen, rejected = (half.reshape(-1, *scores.chosen.shape[1:]) for half in rewards.chunk(2, dim=1))
    return replace(scores, **dict(zip(names, (chosen, rejected, *rest.unbind(dim=1)), strict=True)))
