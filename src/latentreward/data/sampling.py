"""Which pairs a rank sees, and in which order."""

from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from latentreward.errors import InputError
from latentreward.seeding import pair_generator


class PairSampler(DistributedSampler[int]):
    """A rank's share of the rows for evaluation: every world-size-th, from its own number on.

    No row is repeated: Lightning leaves a ``DistributedSampler`` as it is, where its own would fill ranks up with
    rows that metrics then count twice.

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
    """A rank's training batches, from an order of the pairs that depends on the seed and the epoch alone.

    A step takes the next batch size × world size pairs of the order, and rank r every world-size-th of them from r
    on: the same pairs meet in a step for every split of one global batch size into ranks. The last batch is smaller,
    by equally many pairs on all ranks; the pairs that then remain, fewer than the world size, sit this epoch out.
    A :class:`~latentreward.data.loading.ResumableBatchSampler`, whose state is the number of pairs used.

    Args:
        rows: Number of pairs.
        batch_size: Pairs per batch and rank.
        num_replicas: World size.
        rank: Number of this rank.
        shuffle: New order each epoch; the order of the rows otherwise.
        seed: Seed of the order.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.rows, self.batch_size, self.num_replicas, self.rank = rows, batch_size, num_replicas, rank
        self.shuffle, self.seed = shuffle, seed
        self.epoch = self.used = 0

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch; another one starts with its first pair."""
        if epoch != self.epoch:
            self.epoch, self.used = epoch, 0

    def order(self) -> list[int]:
        """The epoch's order over all ranks, used pairs included."""
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
        """Batches per rank that are left of the epoch."""
        return self._batches(self.rows - self.used)

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Epoch and pairs used, after ``batches`` batches of an iteration begun now."""
        taken = min(batches * self.batch_size, (self.rows - self.used) // self.num_replicas) * self.num_replicas
        return {"epoch": self.epoch, "used": self.used + taken, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a place in an epoch, whatever the batch and world size it was left with.

        Raises:
            InputError: If it belongs to data of another size.
        """
        if state_dict["rows"] != self.rows:
            raise InputError(
                f"data.train has {self.rows} pairs, but the checkpoint stopped in an epoch of {state_dict['rows']}; "
                "go on with the data it was trained on, or start anew"
            )
        self.epoch, self.used = state_dict["epoch"], state_dict["used"]

    def _batches(self, rows: int) -> int:
        return -(-(rows // self.num_replicas) // self.batch_size)


def even_batch_size(rows: int, num_replicas: int, batch_size: int) -> int:
    """A batch size near ``batch_size`` with which all ranks run equally many batches over unequal shares.

    Shares differ by one pair at most. That is an extra batch only if the smaller share fills its batches exactly, and
    a rank with an extra batch would wait forever in the first collective call of it.
    """
    share, extra = divmod(rows, num_replicas)
    if not extra or share % batch_size:
        return batch_size
    smaller_first = chain(range(batch_size - 1, 1, -1), count(batch_size + 1))
    return next(size for size in smaller_first if share % size)
