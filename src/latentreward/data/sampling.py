"""Samplers that choose the pairs of each rank and their order."""

from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from latentreward.core.errors import InputError
from latentreward.core.running import pair_generator
from latentreward.data.loading import check_same_order


class PairSampler(DistributedSampler[int]):
    """Sampler of one rank's rows for evaluation: every ``num_replicas``-th row, starting with row ``rank``.

    No row is repeated. Lightning's own distributed sampler repeats rows until all ranks have equally many, and metrics
    would count the repeated rows twice. Lightning does not replace a ``DistributedSampler``, hence the base class.

    Args:
        rows: Number of pairs.
        num_replicas: World size.
        rank: Number of this rank.
    """

    def __init__(self, rows: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(rows), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self.share = range(rank, rows, num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)


class PairBatchSampler:
    """Sampler of one rank's training batches, from an order of the pairs that depends on seed and epoch alone.

    Each step takes the next ``batch_size * num_replicas`` pairs of the order. Rank r takes every ``num_replicas``-th
    of these pairs, starting with pair r. A step therefore has the same pairs for every world size, as long as the
    global batch size is equal. The last batch of an epoch may be smaller, with equally many pairs on all ranks. Fewer
    than ``num_replicas`` pairs may remain after the last batch; they are not used in this epoch.

    Implements :class:`~latentreward.data.loading.ResumableBatchSampler`; the state is the epoch, the number of
    pairs used, and what determines their order.

    Args:
        rows: Number of pairs.
        batch_size: Pairs per batch and rank.
        num_replicas: World size.
        rank: Number of this rank.
        shuffle: Whether each epoch has a new random order; without it the order is that of the rows.
        seed: Seed of the order.
    """

    def __init__(
        self, rows: int, batch_size: int, *, num_replicas: int = 1, rank: int = 0, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.rows, self.batch_size, self.num_replicas, self.rank = rows, batch_size, num_replicas, rank
        self.shuffle, self.seed = shuffle, seed
        self.epoch = self.used = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; an epoch other than the current one starts at its first pair."""
        if epoch != self.epoch:
            self.epoch, self.used = epoch, 0

    def order(self) -> list[int]:
        """Return the order of all pairs in the current epoch, over all ranks, used pairs included."""
        if not self.shuffle:
            return list(range(self.rows))
        generator = pair_generator(self.seed, "order", self.epoch, "")
        return torch.randperm(self.rows, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        left = self.order()[self.used :]
        share = left[: len(left) - len(left) % self.num_replicas][self.rank :: self.num_replicas]
        for start in range(0, len(share), self.batch_size):
            yield share[start : start + self.batch_size]

    def __len__(self) -> int:
        return self._batches(self.rows)

    def remaining(self) -> int:
        """Return the number of batches per rank that are left in the epoch."""
        return self._batches(self.rows - self.used)

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Return the state after ``batches`` batches of an iteration started now."""
        taken = min(batches * self.batch_size, (self.rows - self.used) // self.num_replicas) * self.num_replicas
        order = {"rows": self.rows, "seed": self.seed, "shuffle": self.shuffle}
        return {"epoch": self.epoch, "used": self.used + taken, **order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the epoch and the number of pairs used; batch size and world size may differ from those at saving.

        Raises:
            InputError: If the state was saved with another number of pairs, another seed or another ``shuffle``.
        """
        if state_dict["rows"] != self.rows:
            raise InputError(
                f"data.train has {self.rows} pairs, but the checkpoint stopped in an epoch of {state_dict['rows']}; "
                "go on with the data it was trained on, or start anew"
            )
        check_same_order(state_dict, seed=self.seed, shuffle=self.shuffle)
        self.epoch, self.used = state_dict["epoch"], state_dict["used"]

    def _batches(self, rows: int) -> int:
        return -(-(rows // self.num_replicas) // self.batch_size)


def even_batch_size(rows: int, num_replicas: int, batch_size: int) -> int:
    """Return a batch size near ``batch_size`` that gives all ranks equally many evaluation batches.

    Numbers of pairs per rank differ by at most one. The extra pair makes an extra batch only if the other ranks' pairs
    fill their batches exactly. A rank with an extra batch would wait forever in that batch's first collective call.
    Sizes below ``batch_size`` are tried first. ``rows`` counts the pairs of all ranks.
    """
    share, extra = divmod(rows, num_replicas)
    if not extra or share % batch_size:
        return batch_size
    smaller_first = chain(range(batch_size - 1, 1, -1), count(batch_size + 1))
    return next(size for size in smaller_first if share % size)
