"""Batches of one image size each: which pairs meet, on which rank, in which order."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from latentreward.errors import InputError
from latentreward.seeding import pair_generator

SmallBuckets = Literal["fill", "short", "drop"]


@dataclass(frozen=True)
class Sizing:
    """What shapes the batches of an epoch.

    Attributes:
        batch_size: Pairs per batch and rank.
        tokens_per_batch: If given, pairs per batch are this divided by the latent's height × width, at least 1.
        small_buckets: What happens to the last pairs of a size, fewer than one batch on every rank.
        world_size: Number of ranks.
        seed: Seed of the order.
        shuffle: New order each epoch; the order of the data set otherwise.
    """

    batch_size: int
    tokens_per_batch: int | None = None
    small_buckets: SmallBuckets = "short"
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True

    def pairs_per_rank(self, tokens: int) -> int:
        """Batch size for latents of ``tokens`` positions."""
        return self.batch_size if self.tokens_per_batch is None else max(1, self.tokens_per_batch // tokens)


class BucketBatchSampler:
    """A rank's training batches, each of one image size; see :class:`~latentreward.data.loading.ResumableBatchSampler`.

    A step takes batch size × world size pairs of one size, dealt out to the ranks, so shapes and counts agree on all of
    them. The pairs left of a size, fewer than that, follow ``small_buckets``:

    - ``short``: one smaller step of them; if the ranks cannot share them evenly, fewer pairs than there are ranks come
      twice in the epoch. No pair is lost.
    - ``fill``: one full step, filled up with pairs of the same size, which come twice or more. No pair is lost, and
      there are no more shapes of batches than sizes.
    - ``drop``: left out of this epoch; other pairs are in the next one. A size with fewer pairs than that is never
      seen.

    The order depends on seed and epoch alone; with one size, it is that of
    :class:`~latentreward.data.sampling.PairBatchSampler`. A resumed epoch goes on with the pairs it has not used yet,
    also under another world or batch size.

    Args:
        sizes: ``(N, 2)`` latent height and width of each pair.
        sizing: What shapes the batches.
        rank: Number of this rank.

    Raises:
        InputError: If no batch is left.
    """

    def __init__(self, sizes: np.ndarray, sizing: Sizing, rank: int = 0) -> None:
        shapes, bucket = np.unique(np.asarray(sizes).reshape(-1, 2), axis=0, return_inverse=True)
        self.tokens, self.bucket = shapes.prod(axis=1).tolist(), bucket.reshape(-1)
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
        """Turn to an epoch; another one starts from its first batch."""
        if epoch != self.epoch:
            self.epoch, self.skip, self.spans = epoch, 0, []

    def __iter__(self) -> Iterator[list[int]]:
        for group in self._groups()[self.skip :]:
            yield group[self.rank :: self.sizing.world_size].tolist()

    def __len__(self) -> int:
        counts = np.bincount(self.bucket, minlength=len(self.tokens)).tolist()
        return sum(self._steps(count, tokens) for count, tokens in zip(counts, self.tokens, strict=True))

    def remaining(self) -> int:
        """Batches per rank that an iteration begun now yields."""
        return len(self._groups()) - self.skip

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Place after ``batches`` more batches: the epoch, and what each sizing took of it in turn."""
        span = {**asdict(self.sizing), "batches": self.skip + batches}
        spans = [*self.spans, span] if span["batches"] else self.spans
        return {"epoch": self.epoch, "pairs": len(self.bucket), "spans": [dict(span) for span in spans]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a place.

        Raises:
            InputError: If it lies within an epoch over other pairs.
        """
        spans = [dict(span) for span in state_dict["spans"]]
        if spans and state_dict["pairs"] != len(self.bucket):
            raise InputError(
                f"data.train has {len(self.bucket)} pairs, but the checkpoint stopped in an epoch of "
                f"{state_dict['pairs']}; go on with the data it was trained on, or start anew"
            )
        self.epoch, self.skip, self.spans = state_dict["epoch"], 0, spans
        if spans and {name: value for name, value in spans[-1].items() if name != "batches"} == asdict(self.sizing):
            self.skip = self.spans.pop()["batches"]

    def describe(self) -> str:
        """One line: pairs, sizes, steps, and what becomes of the last pairs of each size."""
        counts = np.bincount(self.bucket, minlength=len(self.tokens)).tolist()
        full = [self._full_step(tokens) for tokens in self.tokens]
        rests = [count % step for count, step in zip(counts, full, strict=True)]
        rest = [(left, step) for left, step in zip(rests, full, strict=True) if left]
        world = self.sizing.world_size
        repeats = {
            "short": f"{len(rest)} smaller steps, {sum(-left % world for left, _ in rest)} pairs twice",
            "fill": f"{sum(step - left for left, step in rest)} repeats fill up {len(rest)} steps",
            "drop": f"{sum(left for left, _ in rest)} pairs left out per epoch",
        }
        return (
            f"{len(self.bucket)} pairs of {len(counts)} sizes in {len(self)} steps of up to {max(full)} pairs over "
            f"{world} ranks; small_buckets={self.sizing.small_buckets}: {repeats[self.sizing.small_buckets]}"
        )

    def _full_step(self, tokens: int) -> int:
        return self.sizing.pairs_per_rank(tokens) * self.sizing.world_size

    def _steps(self, count: int, tokens: int) -> int:
        full, rest = divmod(count, self._full_step(tokens))
        return full + (rest > 0 and self.sizing.small_buckets != "drop")

    def _groups(self) -> list[np.ndarray]:
        """Pairs of each step under the present sizing: of the whole epoch, or of what earlier sizings left."""
        if self._planned is None or self._planned[:2] != (self.epoch, self.spans):
            left = np.ones(len(self.bucket), dtype=bool)
            for span in map(dict, self.spans):
                taken = span.pop("batches")
                for group in self._plan_epoch(self.epoch, Sizing(**span), left)[:taken]:
                    left[group] = False
            self._planned = self.epoch, list(self.spans), self._plan_epoch(self.epoch, self.sizing, left)
        return self._planned[2]

    def _plan_epoch(self, epoch: int, sizing: Sizing, left: np.ndarray) -> list[np.ndarray]:
        """Steps over the pairs that are ``left``; one begins where its first pair stands in the epoch's order."""
        order = np.arange(len(left))
        if sizing.shuffle:
            generator = pair_generator(sizing.seed, "order", epoch, "")
            order = torch.randperm(len(left), generator=generator).numpy()
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        order = order[left[order]]
        buckets = self.bucket[order]
        groups = []
        for number, tokens in enumerate(self.tokens):
            step = sizing.pairs_per_rank(tokens) * sizing.world_size
            groups += _cut(order[buckets == number], step, sizing)
        return sorted(groups, key=lambda group: place[group[0]])


def _cut(order: np.ndarray, step: int, sizing: Sizing) -> list[np.ndarray]:
    """Pairs of one size in steps of ``step`` pairs; the last ones as ``small_buckets`` says."""
    rest = len(order) % step
    groups = list(order[: len(order) - rest].reshape(-1, step))
    if rest and sizing.small_buckets != "drop":
        size = step if sizing.small_buckets == "fill" else rest + -rest % sizing.world_size
        start = len(order) - rest
        groups.append(np.resize(np.concatenate([order[start:], order[:start]]), size))
    return groups


class EvaluationBatches(DistributedSampler[list[int]]):
    """A rank's evaluation batches, as the ``sampler`` of a ``DataLoader`` with ``batch_size=None``.

    Every pair comes once over all ranks, and all ranks get equally many batches. Where the number of batches is no
    multiple of the world size, the largest are cut in two; where there are too few pairs for that, the smallest of one
    size are joined.

    Args:
        sizes: ``(N, 2)`` latent height and width of each pair.
        sizing: Batch size and world size.
        rank: Number of this rank.

    Raises:
        InputError: If the pairs cannot be dealt out so.
    """

    def __init__(self, sizes: np.ndarray, sizing: Sizing, rank: int = 0) -> None:
        super().__init__(range(len(sizes)), sizing.world_size, rank, shuffle=False)  # type: ignore[arg-type]
        shapes, bucket = np.unique(np.asarray(sizes).reshape(-1, 2), axis=0, return_inverse=True)
        batches = []
        for number, tokens in enumerate(shapes.prod(axis=1).tolist()):
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
    """A multiple of ``world_size`` batches, by cutting; empty if there are too few pairs."""
    even = list(batches)
    while len(even) % world_size:
        largest = max(range(len(even)), key=lambda number: len(even[number]))
        rows = even.pop(largest)
        if len(rows) < 2:
            return []
        even += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return even


def _join_evenly(batches: Sequence[np.ndarray], bucket: np.ndarray, world_size: int) -> list[np.ndarray]:
    """The same by joining two batches of one size at a time."""
    even = sorted(batches, key=len)
    while len(even) % world_size:
        joined = _join_two(even, bucket.reshape(-1))
        if joined is None:
            raise InputError(
                f"{sum(map(len, batches))} pairs of {len({bucket.flat[rows[0]] for rows in batches})} sizes cannot be "
                f"dealt out to {world_size} ranks in equally many batches; evaluate on fewer devices"
            )
        even = sorted(joined, key=len)
    return even


def _join_two(batches: list[np.ndarray], bucket: np.ndarray) -> list[np.ndarray] | None:
    for number, rows in enumerate(batches):
        for other in range(number + 1, len(batches)):
            if bucket[batches[other][0]] == bucket[rows[0]]:
                rest = [batch for index, batch in enumerate(batches) if index not in (number, other)]
                return [*rest, np.concatenate([rows, batches[other]])]
    return None
