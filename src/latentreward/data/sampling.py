"""Samplers that choose the pairs of each rank and their order, also in batches of one image size."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from latentreward.core.errors import InputError
from latentreward.core.running import pair_generator
from latentreward.data.loading import ResumableBatchSampler, check_same_order


class PairBatchSampler(ResumableBatchSampler):
    """Sampler of one rank's training batches, from an order of the pairs that depends on seed and epoch alone.

    Each step takes the next ``batch_size * num_replicas`` pairs of the order. Rank r takes every ``num_replicas``-th
    of these pairs, starting with pair r. A step therefore has the same pairs for every world size, as long as the
    global batch size is equal. The last batch of an epoch may be smaller, with equally many pairs on all ranks. Fewer
    than ``num_replicas`` pairs may remain after the last batch; they are not used in this epoch.

    The state is the epoch, the number of pairs used, and what determines their order. Without ``shuffle``, the order of
    each epoch is that of the rows.
    """

    def __init__(
        self, rows: int, batch_size: int, *, num_replicas: int = 1, rank: int = 0, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.rows, self.batch_size, self.num_replicas, self.rank = rows, batch_size, num_replicas, rank
        self.shuffle, self.seed = shuffle, seed
        self.epoch = self.used = 0

    def set_epoch(self, epoch: int) -> None:
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
        return self._batches(self.rows - self.used)

    def state_dict(self, batches: int) -> dict[str, Any]:
        taken = min(batches * self.batch_size, (self.rows - self.used) // self.num_replicas) * self.num_replicas
        order = {"rows": self.rows, "seed": self.seed, "shuffle": self.shuffle}
        return {"epoch": self.epoch, "used": self.used + taken, **order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["rows"] != self.rows:
            raise other_rows(self.rows, state_dict["rows"])
        check_same_order(state_dict, seed=self.seed, shuffle=self.shuffle)
        self.epoch, self.used = state_dict["epoch"], state_dict["used"]

    def _batches(self, rows: int) -> int:
        return -(-(rows // self.num_replicas) // self.batch_size)


def other_rows(now: int, before: int) -> InputError:
    """Return the error about training data of another number of pairs than that of a checkpoint."""
    told = f"data.train has {now} pairs, but the checkpoint stopped in an epoch of {before}"
    return InputError(f"{told}; go on with the data it was trained on, or start anew")


SmallBuckets = Literal["fill", "short", "drop"]
"""Treatment of the last pairs of an image size, see :class:`BucketBatchSampler`."""


@dataclass(frozen=True)
class Sizing:
    """Settings that determine the batches of an epoch."""

    batch_size: int  # pairs per batch and rank
    tokens_per_batch: int | None = None  # instead of ``batch_size``: latent positions per batch and rank
    small_buckets: SmallBuckets = "short"  # treatment of a size's last pairs, see :class:`BucketBatchSampler`
    world_size: int = 1  # number of ranks
    seed: int = 0  # seed of the shuffled order
    shuffle: bool = True  # whether each epoch has a new random order; False keeps the order of the data set

    def pairs_per_rank(self, tokens: int) -> int:
        """Return the pairs per batch and rank, at least 1, for latents with ``tokens`` positions (height × width)."""
        return self.batch_size if self.tokens_per_batch is None else max(1, self.tokens_per_batch // tokens)


class BucketBatchSampler(ResumableBatchSampler):
    """Sampler of a rank's training batches, each with pairs of one image size, that can resume inside an epoch.

    Each training step takes batch size × world size pairs of one size and splits them over the ranks, so that all ranks
    have batches of one shape. The last pairs of a size, too few for a full step, are treated as ``small_buckets`` says:

    - ``short``: They make one smaller step. If their number is not a multiple of the world size, fewer pairs than ranks
      are repeated. Every pair is used.
    - ``fill``: They make one full step, filled up with repeated pairs of this size. Every pair is used, and all batches
      of a size have one shape.
    - ``drop``: They are left out of the epoch; with ``shuffle``, the next epoch leaves out other pairs. A size with
      fewer pairs than a full step is never used.

    The order depends on seed and epoch alone. With a single size, the order is that of
    :class:`~latentreward.data.PairBatchSampler`. A resumed epoch continues with the pairs that it has not used
    yet, also with another world size or batch size.

    ``sizes`` are latent height and width of each pair, ``(N, 2)``, or ``(N, 3)`` with its number of sources too.
    """

    def __init__(self, sizes: np.ndarray, sizing: Sizing, rank: int = 0) -> None:
        shapes, bucket = np.unique(sizes, axis=0, return_inverse=True)
        self.tokens, self.bucket = shapes[:, :2].prod(axis=1).tolist(), bucket.reshape(-1)
        self.sizing, self.rank = sizing, rank
        self.epoch = self.skip = 0
        self.spans: list[dict[str, Any]] = []
        self._planned: tuple[int, list[dict[str, Any]], list[np.ndarray]] | None = None
        if not len(self):
            raise InputError(
                f"data.train: {len(self.bucket)} pairs in {len(shapes)} sizes, each with fewer than one batch on "
                f"{sizing.world_size} ranks, and small_buckets=drop; set it to short or fill, or lower batch_size"
            )

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.skip, self.spans = epoch, 0, []

    def __iter__(self) -> Iterator[list[int]]:
        for group in self._groups()[self.skip :]:
            yield group[self.rank :: self.sizing.world_size].tolist()

    def __len__(self) -> int:
        counts = np.bincount(self.bucket, minlength=len(self.tokens)).tolist()
        steps = (divmod(count, self._full_step(tokens)) for count, tokens in zip(counts, self.tokens, strict=True))
        return sum(full + (rest > 0 and self.sizing.small_buckets != "drop") for full, rest in steps)

    def remaining(self) -> int:
        return len(self._groups()) - self.skip

    def state_dict(self, batches: int) -> dict[str, Any]:
        span = {**asdict(self.sizing), "batches": self.skip + batches}
        spans = [*self.spans, span] if span["batches"] else self.spans
        return {"epoch": self.epoch, "pairs": len(self.bucket), "spans": [dict(span) for span in spans]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        spans = [dict(span) for span in state_dict["spans"]]
        if spans and state_dict["pairs"] != len(self.bucket):
            raise other_rows(len(self.bucket), state_dict["pairs"])
        self.epoch, self.skip, self.spans = state_dict["epoch"], 0, spans
        if spans and {name: value for name, value in spans[-1].items() if name != "batches"} == asdict(self.sizing):
            self.skip = self.spans.pop()["batches"]

    def describe(self) -> str:
        """Describe in one line the pairs, sizes and steps."""
        told = f"{len(self.bucket)} pairs of {len(self.tokens)} sizes in {len(self)} steps"
        return f"{told} over {self.sizing.world_size} ranks; small_buckets={self.sizing.small_buckets}"

    def _full_step(self, tokens: int) -> int:
        return self.sizing.pairs_per_rank(tokens) * self.sizing.world_size

    def _groups(self) -> list[np.ndarray]:
        """Return the pairs of each step with the present sizing, without pairs that earlier sizings used."""
        if self._planned is None or self._planned[:2] != (self.epoch, self.spans):
            left = np.ones(len(self.bucket), dtype=bool)
            for span in map(dict, self.spans):
                taken = span.pop("batches")
                for group in self._plan_epoch(self.epoch, Sizing(**span), left)[:taken]:
                    left[group] = False
            self._planned = self.epoch, list(self.spans), self._plan_epoch(self.epoch, self.sizing, left)
        return self._planned[2]

    def _plan_epoch(self, epoch: int, sizing: Sizing, left: np.ndarray) -> list[np.ndarray]:
        """Group the pairs that are ``left`` ``(N,)`` into steps of one size.

        Steps are sorted by the position of their first pair in the epoch's order.
        """
        order = np.arange(len(left))
        if sizing.shuffle:
            generator = pair_generator(sizing.seed, "order", epoch, "")
            order = torch.randperm(len(left), generator=generator).numpy()
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        order = order[left[order]]
        buckets = self.bucket[order]
        groups = []
        for number, tokens in enumerate(self.tokens):
            step = sizing.pairs_per_rank(tokens) * sizing.world_size
            rows = order[buckets == number]
            rest = len(rows) % step
            groups += list(rows[: len(rows) - rest].reshape(-1, step))
            if rest and sizing.small_buckets != "drop":
                size = step if sizing.small_buckets == "fill" else rest + -rest % sizing.world_size
                start = len(rows) - rest
                groups.append(np.resize(np.concatenate([rows[start:], rows[:start]]), size))
        return sorted(groups, key=lambda group: position[group[0]])


class EvaluationBatches(DistributedSampler[list[int]]):
    """Sampler of a rank's evaluation batches, each with pairs of one image size.

    It is the ``sampler`` of a ``DataLoader`` with ``batch_size=None``. Over all ranks, every pair is used once, and
    every rank gets the same number of batches: one with more would wait forever in its last one's first collective
    call. If the number of batches is not a multiple of the world size, the largest are cut in two. If there are too few
    pairs to cut, small batches of one size are joined instead. Lightning's own distributed sampler repeats pairs, which
    metrics would count twice; it does not replace a ``DistributedSampler``, hence the base class. ``sizes`` are as for
    :class:`BucketBatchSampler`.
    """

    def __init__(self, sizes: np.ndarray, sizing: Sizing, rank: int = 0) -> None:
        super().__init__(range(len(sizes)), sizing.world_size, rank, shuffle=False)  # type: ignore[arg-type]
        shapes, bucket = np.unique(sizes, axis=0, return_inverse=True)
        batches = []
        for number, tokens in enumerate(shapes[:, :2].prod(axis=1).tolist()):
            rows, step = np.flatnonzero(bucket.reshape(-1) == number), sizing.pairs_per_rank(tokens)
            batches += [rows[start : start + step] for start in range(0, len(rows), step)]
        batches = _cut_evenly(batches, sizing.world_size) or _join_evenly(batches, bucket, sizing.world_size)
        batches.sort(key=lambda rows: rows[0])
        self._mine = [rows.tolist() for rows in batches[rank :: sizing.world_size]]

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        return iter(self._mine)

    def __len__(self) -> int:
        return len(self._mine)


def _cut_evenly(batches: Sequence[np.ndarray], world_size: int) -> list[np.ndarray]:
    """Cut the largest batches in two until their number is a multiple of ``world_size``; empty if impossible."""
    even = list(batches)
    while len(even) % world_size:
        largest = max(range(len(even)), key=lambda number: len(even[number]))
        rows = even.pop(largest)
        if len(rows) < 2:
            return []
        even += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return even


def _join_evenly(batches: Sequence[np.ndarray], bucket: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Join small batches of one size until their number is a multiple of ``world_size``."""
    even = sorted(batches, key=len)
    sizes = bucket.reshape(-1)
    while len(even) % world_size:
        places = combinations(range(len(even)), 2)
        joined = next(((a, b) for a, b in places if sizes[even[a][0]] == sizes[even[b][0]]), None)
        if joined is None:
            raise InputError(
                f"{sum(map(len, batches))} pairs of {len({sizes[rows[0]] for rows in batches})} sizes cannot be "
                f"dealt out to {world_size} ranks in equally many batches; evaluate on fewer devices"
            )
        rest = [rows for place, rows in enumerate(even) if place not in joined]
        even = sorted([*rest, np.concatenate([even[place] for place in joined])], key=len)
    return even
