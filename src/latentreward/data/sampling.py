"""Which pairs a rank sees, and in which order."""

from collections.abc import Iterator
from itertools import chain, count

import torch
from torch.utils.data import DistributedSampler

from latentreward.seeding import pair_generator


class PairSampler(DistributedSampler[int]):
    """A rank's share of an epoch's order, which depends on the seed and the epoch alone.

    Rank r takes every world-size-th pair from r on, so the same pairs meet in a step for every split of one global
    batch size into ranks. No pair is repeated: Lightning leaves a ``DistributedSampler`` as it is, where its own
    would fill ranks up with pairs that metrics then count twice.

    Args:
        rows: Number of pairs.
        num_replicas: World size.
        rank: Number of this rank.
        shuffle: New order each epoch; the order of the rows otherwise.
        seed: Seed of the order.
        drop_last: Leave out the last pairs of the order, fewer than the world size, so that all ranks get equally
            many; training needs that.
    """

    def __init__(
        self,
        rows: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(range(rows), num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.rows = rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return len(range(self.rank, self._used_rows(), self.num_replicas))

    def order(self) -> list[int]:
        """The epoch's order over all ranks."""
        if not self.shuffle:
            return list(range(self._used_rows()))
        generator = pair_generator(self.seed, "order", self.epoch, "")
        return torch.randperm(self.rows, generator=generator).tolist()[: self._used_rows()]

    def _used_rows(self) -> int:
        return self.rows - self.rows % self.num_replicas if self.drop_last else self.rows


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
