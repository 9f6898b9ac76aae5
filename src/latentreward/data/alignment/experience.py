"""What a policy's rollouts gave, dealt out as training batches.

A rollout happens when Lightning asks for a batch, so that its loops need not know of it: steps are optimiser steps, and
accumulation, clipping, precision and the intervals of checkpoints mean what they always do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset

from latentreward.contracts import (
    PromptBatch,
    RolloutStatistics,
    StepPairs,
    StepSamples,
    TensorRecord,
    join_rows,
    take_rows,
)
from latentreward.data.loading import CountedBatches
from latentreward.errors import InputError
from latentreward.seeding import pair_generator

Experience = StepPairs | StepSamples
RECORDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (StepPairs, StepSamples, RolloutStatistics)}
"""Records that a checkpoint may hold, by name."""


class Learner(Protocol):
    """What is asked of a module that learns from its own rollouts; all calls come on all ranks at once.

    Attributes:
        rollout_statistics: Of this rank's last rollout, set by :meth:`roll_out`; of all ranks' afterwards.
    """

    rollout_statistics: RolloutStatistics | None

    def roll_out(self, prompts: PromptBatch) -> Experience | None:
        """What is worth learning from this rank's prompts, equally many on every rank, on the CPU; None if nothing."""

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """Encode the distinct prompts, the same on all ranks, that the next batches have."""

    def describe_rollouts(self) -> str:
        """What the last rollouts looked like, in one line."""


class Prompts(Protocol):
    """An endless series of prompts."""

    def __getitems__(self, places: Sequence[int]) -> PromptBatch:
        """The prompts at some places."""


class ExperienceRows(Dataset[Any]):
    """The rows in store, the same on every rank, on the CPU; None before the first."""

    record: Any = None

    def __len__(self) -> int:
        """Number of rows."""
        return 0 if self.record is None else len(self.record)

    def __getitems__(self, index: Sequence[int]) -> Any:
        """A batch of them."""
        return take_rows(self.record, index)


class ExperienceSampler(CountedBatches):
    """A rank's batches of rows, and the rollouts that make rows.

    Before the first batch of an optimiser step, if fewer rows are in store than the step takes on all ranks, every rank
    rolls out the next prompts; then all ranks get all rows, in an order by their keys that the seed shuffles. A step
    takes the next batch size × world size × accumulated batches of them, and rank r every world-size-th: the same for
    every split of one global batch size into ranks. Since no rollout falls into the middle of a step, a checkpoint can
    go back to the step's first batch. What a step cannot use is there for the next.

    A :class:`~latentreward.data.loading.ResumableBatchSampler`, whose state holds the rows that are not used yet, with
    the number of prompts used; beyond plain values it has tensors.

    Args:
        prompts: Where prompts come from.
        learner: Who rolls them out.
        prompts_per_rollout: Prompts per rollout and rank.
        max_empty_rollouts: Rollouts in succession that may keep nothing before the run stops.
        accumulated: Returns the number of batches per optimiser step.
        seed: Seed of the order of rows.
        settings: See :class:`~latentreward.data.loading.CountedBatches`.
    """

    def __init__(
        self,
        prompts: Prompts,
        learner: Learner,
        *,
        prompts_per_rollout: int,
        max_empty_rollouts: int = 4,
        accumulated: Callable[[], int] = lambda: 1,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.prompts, self.learner, self.accumulated, self.seed = prompts, learner, accumulated, seed
        self.rollout, self.max_empty_rollouts = prompts_per_rollout * self.num_replicas, max_empty_rollouts
        self.rows, self.cursor = ExperienceRows(), 0
        self.prompts_used = self.rollouts = self.empty_rollouts = 0
        self._prepared = True

    def __iter__(self) -> Iterator[list[int]]:
        self.taken = 0
        for number in range(self.remaining()):
            place, step = self.batches + number, self.accumulated()
            if number == 0 or place % step == 0:
                self._provide(min(step - place % step, len(self) - place) * self.global_batch)
            start, self.cursor, self.taken = self.cursor, self.cursor + self.global_batch, number + 1
            ends = (place + 1) % step == 0 or place + 1 == len(self)
            spent = self.max_prompts is not None and self.prompts_used >= self.max_prompts
            if ends and spent and len(self.rows) - self.cursor < step * self.global_batch:
                self.finish()
            yield list(range(start + self.rank, self.cursor, self.num_replicas))

    def _provide(self, rows: int) -> None:
        """Have so many rows in store."""
        while len(self.rows) - self.cursor < rows:
            self._roll_out()
        if not self._prepared:
            self.learner.prepare_prompts(list(dict.fromkeys(self.rows.record.prompts[self.cursor :])))
            self._prepared = True

    def _roll_out(self) -> None:
        places = range(self.prompts_used + self.rank, self.prompts_used + self.rollout, self.num_replicas)
        found = self.learner.roll_out(self.prompts.__getitems__(places))
        gathered = of_all_ranks((found, self.learner.rollout_statistics))
        kept = [found for found, _ in gathered if found is not None and len(found)]
        self.learner.rollout_statistics = join_statistics([statistics for _, statistics in gathered if statistics])
        if kept:
            generator = pair_generator(self.seed, "experience", self.rollouts, "")
            new = shuffled(join_rows(kept), generator)
            left = self._left()
            self.rows.record, self.cursor = new if left is None else join_rows([left, new]), 0
        self.prompts_used, self.rollouts, self._prepared = self.prompts_used + self.rollout, self.rollouts + 1, False
        self.empty_rollouts = 0 if kept else self.empty_rollouts + 1
        if self.empty_rollouts >= self.max_empty_rollouts:
            raise InputError(
                f"{self.empty_rollouts} rollouts of {self.rollout} prompts kept nothing to learn from "
                f"(data.max_empty_rollouts): {self.learner.describe_rollouts()}"
            )

    def _left(self) -> Any:
        """Rows from the cursor on, in memory of their own; None if there are none."""
        left = range(self.cursor, len(self.rows))
        return take_rows(self.rows.record, left) if left else None

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Place in the epoch after ``batches`` batches of an iteration begun now, and what is in store there.

        Of the batches that were taken, only those of the present optimiser step can be given back.
        """
        now, self.cursor = self.cursor, self.cursor - (self.taken - batches) * self.global_batch
        left, self.cursor = self._left(), now
        return {
            **super().state_dict(batches),
            "prompts_used": self.prompts_used,
            "rollouts": self.rollouts,
            "empty_rollouts": self.empty_rollouts,
            "rows": as_plain(left),
            "statistics": as_plain(self.learner.rollout_statistics),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to that place, whatever the batch and world size it was left with."""
        super().load_state_dict(state_dict)
        self.rows.record, self.cursor = from_plain(state_dict["rows"]), 0
        self.learner.rollout_statistics = from_plain(state_dict["statistics"])
        for name in ("prompts_used", "rollouts", "empty_rollouts"):
            setattr(self, name, state_dict[name])
        self._prepared = False


def of_all_ranks(value: Any) -> list[Any]:
    """A picklable value of every rank, in their order; one at a time, so that of large ones only one is in transit."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values = []
    for rank in range(distributed.get_world_size()):
        box = [value if rank == distributed.get_rank() else None]
        distributed.broadcast_object_list(box, src=rank)
        values.append(box[0])
    return values


def shuffled(record: Any, generator: torch.Generator) -> Any:
    """The rows in an order that depends on their keys and the generator alone."""
    by_key = sorted(range(len(record)), key=lambda row: record.keys[row])
    return take_rows(record, [by_key[place] for place in torch.randperm(len(by_key), generator=generator).tolist()])


def join_statistics(ranks: Sequence[RolloutStatistics]) -> RolloutStatistics | None:
    """Those of several ranks, which took the same steps, as one; None if there are none."""
    if not ranks:
        return None
    names = ("scores", "gap", "kept")
    joined = {name: torch.cat([getattr(statistics, name) for statistics in ranks], dim=-1) for name in names}
    return RolloutStatistics(ranks[0].timesteps, **joined)


def as_plain(record: TensorRecord | None) -> dict[str, Any] | None:
    """A record as a dictionary of tensors and lists, which ``torch.load(weights_only=True)`` takes."""
    if record is None:
        return None
    values = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    plain = {name: value if isinstance(value, Tensor) else list(value) for name, value in values.items()}
    return {"record": type(record).__name__, **plain}


def from_plain(values: dict[str, Any] | None) -> Any:
    """The record that :func:`as_plain` took apart, in memory of its own."""
    if values is None:
        return None
    own = {name: value.clone() if isinstance(value, Tensor) else tuple(value) for name, value in values.items()}
    return RECORDS[values["record"]](**{name: value for name, value in own.items() if name != "record"})
