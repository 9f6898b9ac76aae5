"""Training batches made from a policy's rollouts.

A rollout runs inside the data loader, when Lightning requests a batch and too few rows are in store. Lightning's loops
are unchanged: a step is an optimiser step, and gradient accumulation, clipping, precision and checkpoint intervals work
as in any training.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset

from latentreward.core.contracts import (
    EditPrompt,
    ImageRef,
    RolloutStatistics,
    SampledStates,
    TensorRecord,
    join_rows,
    sources_of,
    take_rows,
)
from latentreward.core.errors import InputError
from latentreward.core.running import pair_generator
from latentreward.data.loading import CountedBatches

if TYPE_CHECKING:
    from latentreward.data.alignment.prompts import PromptOrder


class ExperienceRows(Dataset[Any]):
    """Data set of the rows in store from rollouts, equal on all ranks and on the CPU."""

    record: Any = None  # the rows; None before the first rollout that kept some

    def __len__(self) -> int:
        return 0 if self.record is None else len(self.record)

    def __getitems__(self, index: Sequence[int]) -> Any:
        """Return the rows at the given indices as a batch."""
        return take_rows(self.record, index)


class ExperienceSampler(CountedBatches):
    """Sampler of one rank's training batches from rollouts; runs a rollout when too few rows are in store.

    Before the first batch of an optimiser step, while there are fewer rows in store than it takes on all ranks, every
    rank rolls out its part of the next prompts. All ranks then exchange their rows, sort them by key and shuffle them
    with the seed, so that every rank holds the same rows in the same order.

    An optimiser step takes the next ``batch_size * num_replicas * accumulated()`` rows. Rank r takes every
    ``num_replicas``-th of them, starting with row r. A step therefore has the same rows for every world size, as long
    as the global batch size is equal. Rows that a step does not take stay in store for the next step. No rollout runs
    in the middle of a step, so that a checkpoint can go back to the step's first batch. The state holds the rows that
    are not used yet (tensors, beside plain values) and the number of prompts used.
    """

    def __init__(
        self,
        prompts: "PromptOrder",
        learner: Any,  # a :class:`~latentreward.alignment.modules.alignment.AlignmentModule`
        *,
        prompts_per_rollout: int,
        max_empty_rollouts: int = 4,
        accumulated: Callable[[], int] = lambda: 1,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.prompts, self.learner, self.accumulated = prompts, learner, accumulated
        self.rollout, self.max_empty_rollouts = prompts_per_rollout * self.num_replicas, max_empty_rollouts
        self.rows, self.cursor = ExperienceRows(), 0
        self.prompts_used = self.rollouts = self.empty_rollouts = 0
        self._prepared = True

    def __iter__(self) -> Iterator[list[int]]:
        self.taken = 0
        for number in range(self.remaining()):
            place, step = self.batches + number, self.accumulated()
            if number == 0 or place % step == 0:
                rows = min(step - place % step, len(self) - place) * self.global_batch
                while len(self.rows) - self.cursor < rows:
                    self._roll_out()
                if not self._prepared:
                    self.learner.prepare_prompts(list(dict.fromkeys(self.rows.record.prompts[self.cursor :])))
                    self._prepared = True
            start, self.cursor, self.taken = self.cursor, self.cursor + self.global_batch, number + 1
            ends = (place + 1) % step == 0 or place + 1 == len(self)
            spent = self.max_prompts is not None and self.prompts_used >= self.max_prompts
            if ends and spent and len(self.rows) - self.cursor < step * self.global_batch:
                self.finish()
            yield list(range(start + self.rank, self.cursor, self.num_replicas))

    def _roll_out(self) -> None:
        places = range(self.prompts_used + self.rank, self.prompts_used + self.rollout, self.num_replicas)
        found = self.learner.roll_out(self.prompts.__getitems__(places))
        gathered = of_all_ranks((found, self.learner.rollout_statistics))
        kept = [found for found, _ in gathered if found is not None and len(found)]
        ranks, self.learner.rollout_statistics = [statistics for _, statistics in gathered if statistics], None
        if ranks:  # all scored the same timesteps
            joined = {
                name: torch.cat([getattr(one, name) for one in ranks], dim=-1) for name in ("scores", "gap", "kept")
            }
            self.learner.rollout_statistics = RolloutStatistics(ranks[0].timesteps, **joined)
        if kept:
            generator = pair_generator(self.seed, "experience", self.rollouts, "")
            new = shuffled(join_rows(kept), generator)
            left = self._left()
            self.rows.record, self.cursor = new if left is None else join_rows([left, new]), 0
        self.prompts_used, self.rollouts, self._prepared = self.prompts_used + self.rollout, self.rollouts + 1, False
        self.empty_rollouts = 0 if kept else self.empty_rollouts + 1
        if self.empty_rollouts >= self.max_empty_rollouts:
            told = f"{self.empty_rollouts} rollouts of {self.rollout} prompts kept nothing to learn from"
            raise InputError(f"{told} (data.max_empty_rollouts): {self.learner.describe_rollouts()}")

    def _left(self) -> Any:
        """Return a copy of the rows from the cursor on; None if there are none."""
        left = range(self.cursor, len(self.rows))
        return take_rows(self.rows.record, left) if left else None

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Return the state after ``batches`` batches of the current iteration: counts, unused rows and statistics.

        ``batches`` may be smaller than the number of batches taken, but not go back before the current optimiser step.
        """
        now, self.cursor = self.cursor, self.cursor - (self.taken - batches) * self.global_batch
        left, self.cursor = self._left(), now
        return {
            **super().state_dict(batches),
            "prompts_used": self.prompts_used,
            "rollouts": self.rollouts,
            "empty_rollouts": self.empty_rollouts,
            "rows": as_plain(left),
            "settings": self.learner.rollout_settings(),
            "statistics": as_plain(self.learner.rollout_statistics),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.rows.record, self.cursor = from_plain(state_dict["rows"], self.learner.experience), 0
        if self.rows.record is not None:
            self.learner.check_experience(self.rows.record)
            now, before = self.learner.rollout_settings(), state_dict["settings"]
            if changed := [name for name in now if before.get(name) != now[name]]:
                told = "the checkpoint has rows left of rollouts with other settings, not the present ones"
                values = ", ".join(f"{name}={now[name]} (was {before.get(name)})" for name in changed)
                raise InputError(f"{told}: {values}; resume with the earlier values, or start a new run")
        self.learner.rollout_statistics = from_plain(state_dict["statistics"], RolloutStatistics)
        for name in ("prompts_used", "rollouts", "empty_rollouts"):
            setattr(self, name, state_dict[name])
        self._prepared = False


def of_all_ranks(value: Any) -> list[Any]:
    """Gather a picklable value from every rank, as a list by rank.

    Ranks broadcast in turn, so that only one value is in transit at a time; values may be large.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values = []
    for rank in range(distributed.get_world_size()):
        box = [value if rank == distributed.get_rank() else None]
        distributed.broadcast_object_list(box, src=rank)
        values.append(box[0])
    return values


def shuffled(record: Any, generator: torch.Generator) -> Any:
    """Shuffle rows into an order that depends only on their keys and the generator, not on their present order."""
    by_key = sorted(range(len(record)), key=lambda row: record.keys[row])
    return take_rows(record, [by_key[place] for place in torch.randperm(len(by_key), generator=generator).tolist()])


def as_plain(record: TensorRecord | None) -> dict[str, Any] | None:
    """Convert a record to a dict of tensors and lists, which ``torch.load(weights_only=True)`` accepts.

    A prompt that edits pictures becomes a dict of its text and these; their bytes become tensors, one for all rows.
    """
    if record is None:
        return None
    values = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    pictures: dict[int, Tensor] = {}

    def plain(value: Any) -> Any:
        if not isinstance(value, str) or not sources_of(value):
            return value
        for source in sources_of(value):
            if source.data is not None and id(source.data) not in pictures:
                pictures[id(source.data)] = torch.frombuffer(bytearray(source.data), dtype=torch.uint8)
        sources = [
            {
                **{name: getattr(source, name) for name in ("image_key", "holds")},
                **{name: place and str(place) for name, place in (("path", source.path), ("root", source.root))},
                "data": None if source.data is None else pictures[id(source.data)],
            }
            for source in sources_of(value)
        ]
        return {"text": str.__str__(value), "sources": sources}

    made = {name: [*map(plain, value)] if isinstance(value, tuple) else value for name, value in values.items()}
    return {"record": type(record).__name__, **made}


def from_plain(values: dict[str, Any] | None, kind: type[Any]) -> Any:
    """Rebuild a record of class ``kind`` from the dict that :func:`as_plain` made; tensors are copied."""
    if values is None:
        return None
    given = {name: value for name, value in values.items() if name != "record"}
    known = {field.name: field.default is MISSING for field in fields(kind)}
    if values["record"] != kind.__name__ or given.keys() - known or {n for n in known if known[n]} - given.keys():
        raise other_rows(values["record"], given)
    kinds: dict[type, Callable[[Any], Any]] = {Tensor: Tensor.clone, list: lambda items: tuple(map(_from_plain, items))}
    return kind(**{name: kinds[type(v)](v) if type(v) in kinds else v for name, v in given.items()})


def _from_plain(value: Any) -> Any:
    """Return the prompt that edits pictures of its plain form, and any other value as it is."""
    if not isinstance(value, dict):
        return value
    sources = []
    for source in value["sources"]:
        places = {name: source[name] and Path(source[name]) for name in ("path", "root")}
        data = None if source["data"] is None else source["data"].numpy().tobytes()
        sources.append(ImageRef(**{**source, **places, "data": data}))
    return EditPrompt(value["text"], sources)


def wrong_rows(record: SampledStates) -> str | None:
    """Return what is wrong with rows of a rollout: every field holds a value for each key; None if nothing is."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    lengths = {name: len(value) for name, value in values.items() if value is not None}
    if len({*lengths.values()}) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        return f"fields of unequal length ({told}); each must hold one value for each key"
    twice = next((key for key, number in Counter(record.keys).items() if number > 1), None)
    return twice and f"key {twice!r:.200} for several rows; each must be unique, as those of PromptBatch.times"


def other_rows(kind: str, names: Iterable[str]) -> InputError:
    """Return the error for rows of a checkpoint, a record ``kind`` with fields ``names``, that do not fit the model."""
    told = f"the checkpoint has rows left of its rollouts ({kind}: {', '.join(sorted(names))})"
    why = "which another method, loss, credit or trust_region made than the model's"
    return InputError(f"{told}, {why}; resume with these, or start a new run")
