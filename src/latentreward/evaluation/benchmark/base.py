"""What every benchmark offers: readers, protocols, and scores put in the form that protocols take."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from latentreward.data import PairReader
from latentreward.data.readers import OnError
from latentreward.errors import InputError
from latentreward.evaluation.benchmark.columns import Texts, subgroup_columns
from latentreward.evaluation.benchmark.protocols import Judgement, judge
from latentreward.evaluation.benchmark.results import BenchmarkPairs


@dataclass(frozen=True)
class Evaluation:
    """A protocol and the split that it counts.

    Attributes:
        protocol: Key.
        split: Split that counts.
        fitting: Split whose scores it needs as well.
    """

    protocol: str
    split: str
    fitting: str | None = None

    def judge(self, splits: Mapping[str, BenchmarkPairs]) -> Judgement:
        """Credit of every pair of the split, from the scores of all splits."""
        return judge(self.protocol, splits[self.split], splits[self.fitting] if self.fitting else None)


class Benchmark(ABC):
    """Preference data with the protocols that it is known by.

    Rows that break a rule of the format and images that cannot be read are left out and counted by reason, unless
    ``on_error`` is ``"raise"``.

    Args:
        root: Folder of the data set, or the id of one on the hub where its reader takes one.
        on_error: What happens to bad rows, see :class:`~latentreward.data.PairReader`.

    Attributes:
        name: Name in reports.
    """

    name: str

    def __init__(self, root: str, *, on_error: OnError = "skip") -> None:
        self.root, self.on_error = root, on_error
        self._opened: dict[str, PairReader] = {}
        self._unscored: dict[str, BenchmarkPairs] = {}

    @property
    @abstractmethod
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Protocols with their splits."""

    @abstractmethod
    def open(self, split: str) -> PairReader:
        """A reader of a split, whose rows tell a and b by chance or by the file, never by who won."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that must be scored."""
        names = [name for item in self.evaluations for name in (item.split, item.fitting) if name]
        return tuple(dict.fromkeys(names))

    @property
    def protocols(self) -> tuple[str, ...]:
        """Keys of its protocols."""
        return tuple(dict.fromkeys(item.protocol for item in self.evaluations))

    def readers(self) -> dict[str, PairReader]:
        """Split → its reader; each is opened once.

        Raises:
            InputError: If a split cannot be found or has no rows.
        """
        self._opened = self._opened or {split: self.open(split) for split in self.splits}
        return self._opened

    def scored(self, split: str, table: pa.Table, column: str, *, scorer: str | None = None) -> BenchmarkPairs:
        """A split's pairs with the scores of one column, for any protocol.

        Args:
            split: Name of the split.
            table: What :class:`~latentreward.scorers.pair_scoring.PairScoring` gives for the first rows of the
                split's reader: ``pair_id``, ``image_a``, ``image_b``, ``COLUMN_a``, ``COLUMN_b``, ``problem_a``,
                ``problem_b``.
            column: Name of the scores without ``_a`` and ``_b``.
            scorer: Name in results; ``column`` by default.

        Raises:
            InputError: If the table's rows are others than the reader's.
        """
        pairs, rows = self.pairs(split), table.num_rows
        if pairs.pair_ids[:rows] != tuple(table.column("pair_id").to_pylist()):
            raise InputError(f"scores of {self.name} {split} belong to other pairs; score the split again")
        first, second = (table.column(f"{column}_{side}").to_numpy().astype(np.float64) for side in ("a", "b"))
        problems = zip(*(table.column(f"problem_{side}").to_pylist() for side in ("a", "b")), strict=True)
        columns = {name: values[:rows] for name, values in pairs.columns.items()}
        name = scorer or column
        return replace(
            pairs,
            scorer=name,
            pair_ids=pairs.pair_ids[:rows],
            prompts=pairs.prompts[:rows],
            groups=pairs.groups[:rows],
            labels=pairs.labels[:rows],
            first=first,
            second=second,
            columns={**columns, "problem": tuple(a or b for a, b in problems)},
            first_images=tuple(table.column("image_a").to_pylist()),
            second_images=tuple(table.column("image_b").to_pylist()),
            temperature=self.temperature(name),
        )

    def pairs(self, split: str) -> BenchmarkPairs:
        """All pairs of a split without scores."""
        if split not in self._unscored:
            reader = self.readers()[split]
            nothing = np.full(len(reader), np.nan)
            self._unscored[split] = BenchmarkPairs(
                scorer="",
                pair_ids=tuple(reader.pair_ids()),
                prompts=tuple(reader.prompts()),
                groups=tuple(reader.groups()),
                labels=reader.labels(),
                first=nothing,
                second=nothing,
                columns=self.columns(reader),
                split=split,
            )
        return self._unscored[split]

    def columns(self, reader: PairReader) -> dict[str, Texts]:
        """What sub-groups of the pairs are made by."""
        return subgroup_columns(reader.prompts(), reader.labels(), reader.facts())

    def temperature(self, scorer: str) -> float | None:
        """Temperature of a scorer's win probabilities where a protocol needs it; None fits it."""
        return 1.0
