"""Scored pairs and results of benchmarks, their base class, and columns of sub-groups of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from latentreward.core.bootstrap import group_codes
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError
from latentreward.core.reports.tables import Row
from latentreward.data import OnError, PairReader

AVERAGE = "four_benchmarks"
"""Key of the mean accuracy over :data:`FOUR_BENCHMARKS`, in the place of a protocol's key."""
FOUR_BENCHMARKS = {
    "imagereward test": "imagereward/micro",
    "hpdv2 test": "hpdv2/micro",
    "hpdv3 test": "hpdv3",
    "genai_bench_tiger test": "genai_bench_tiger/no_tie",
}
"""Data set and split → key of the protocol whose accuracy is averaged."""
PUBLISHED: tuple[Row, ...] = tuple(
    {"protocol": protocol, "model": model, "value": round(cells[column] / 100, 6), "source": source}
    for table in yaml.safe_load(Path(__file__).with_name("published_numbers.yaml").read_text(encoding="utf-8"))
    for column, (protocol, source) in enumerate(table["columns"].items())
    for model, cells in table["models"].items()
    if cells[column] is not None
)
"""Rows with an accuracy ``value`` in [0, 1], the key of the ``protocol`` that it is comparable with, the name of the
``model``, and the ``source``: publication, and who measured it."""


def published_for(protocols: tuple[str, ...]) -> tuple[Row, ...]:
    """Return the published numbers of the given protocols, in the order of the protocols."""
    return tuple(number for key in protocols for number in PUBLISHED if number["protocol"] == key)


@dataclass(frozen=True)
class BenchmarkPairs:
    """Pairs of one split with the scores of one scorer."""

    scorer: str  # name of the scorer
    pair_ids: tuple[str, ...]  # N unique names
    prompts: tuple[str, ...]  # N raw prompts
    groups: tuple[str, ...]  # N names of prompt groups; pairs of one group are resampled together
    labels: np.ndarray  # ``(N,)`` probability that image a is preferred; NaN without a label
    first: np.ndarray  # ``(N,)`` scores of image a; NaN if the image could not be read
    second: np.ndarray  # ``(N,)`` scores of image b; NaN if the image could not be read
    # Further facts about each pair: name → N values, None where unknown. ``problem`` says why a score is NaN,
    # ``models`` defines sub-groups, and PickScore's protocol reads ``label_0``.
    columns: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    first_images: tuple[str, ...] = ()  # N keys of the images a, by which recurring images are recognised; may be empty
    second_images: tuple[str, ...] = ()  # N keys of the images b; may be empty
    benchmark: str = ""  # data set and split in reports, e.g. ``hpdv3 test``
    temperature: float | None = 1.0  # of the scorer, which only PickScore's protocol reads; None has it fitted

    @property
    def gap(self) -> np.ndarray:
        """``(N,)`` score of image a minus that of image b."""
        return self.first - self.second

    @cached_property
    def group_codes(self) -> np.ndarray:
        """``(N,)`` int64 index of each pair's group among the sorted names of groups."""
        return group_codes(self.groups)


@dataclass
class BenchmarkReport:
    """Results of one run of ``latentreward benchmark``, as lists of rows: name → value.

    In every row ``benchmark`` names data set and split, e.g. ``hpdv3 test``; ``protocol`` is a key of
    :data:`~latentreward.apps.evaluation.benchmark.protocols.PROTOCOLS`; ``scorer``, ``first`` and ``second`` are names
    of scorers; ``pairs`` is the number of pairs that count, and ``estimate`` the protocol's number in [0, 1] on these
    pairs with its :class:`~latentreward.core.bootstrap.Interval`.
    """

    scorers: dict[str, str]  # name of a scorer → its identity, in one line
    # Result of each scorer by each protocol. ``groups``: number of prompt groups that count. ``equal_scores``: number
    # of pairs that count and have two equal scores. ``excluded``: reason → number of pairs left out. ``details``:
    # further results of the protocol, e.g. the threshold that PickScore's protocol fits.
    protocols: list[Row] = field(default_factory=list)
    averages: list[Row] = field(default_factory=list)  # mean accuracy of a scorer over :data:`FOUR_BENCHMARKS`
    # ``estimate`` of the first scorer minus that of the second, on the pairs that count for both, with the interval of
    # the paired difference
    differences: list[Row] = field(default_factory=list)
    # A protocol's number on the pairs with one ``value`` of the ``column`` ``models``, e.g. ``flux against sdxl``
    subgroups: list[Row] = field(default_factory=list)
    # Accuracy of a latent reward at one noise level: ``sigma`` in [0, 1], ``timestep`` of the model's noise process
    levels: list[Row] = field(default_factory=list)
    # Calibration of win probabilities σ(gap / temperature). ``temperature``: maximum-likelihood temperature on all
    # pairs, inf if larger gaps do not win more often. ``error``: expected calibration error in [0, 1], with
    # temperatures fitted on other prompt groups. ``curve``: (pairs, mean confidence, mean outcome) of each bin.
    calibration: list[Row] = field(default_factory=list)
    # Agreement of two scorers on the pairs that both scored, without labels. ``pair``: share of pairs on which the two
    # score gaps have the same sign. ``spearman``, ``pearson``: rank and linear correlation of the scores of all images.
    agreement: list[Row] = field(default_factory=list)
    published: list[Row] = field(default_factory=list)  # accuracies published by others, rows of :data:`PUBLISHED`
    data: dict[str, Any] = field(default_factory=dict)  # data set and split → counts of pairs and images
    settings: dict[str, Any] = field(default_factory=dict)  # settings of the run, and versions of packages
    notes: list[str] = field(default_factory=list)  # remarks shown before all numbers


Texts = tuple[str | None, ...]


@dataclass(frozen=True)
class Evaluation:
    """A protocol and the split on which its number is computed."""

    protocol: str  # key of the protocol in :data:`~latentreward.apps.evaluation.benchmark.protocols.PROTOCOLS`
    split: str  # split whose pairs give the protocol's number
    # Second split on which the protocol fits its threshold; None if the protocol fits none there
    fitting: str | None = None


class Benchmark:
    """Base class of preference data sets with their evaluation protocols; by default, all are computed on one split.

    Images that cannot be read are left out and counted by reason. Rows that break a rule of the file format are left
    out and counted too, or raise InputError if ``on_error`` is ``"raise"``.

    Args:
        root: Folder of the data set, or a file of it; a hub id if the data set's reader accepts hub ids.
        split: Split on which the protocols are computed; by default that of the published evaluation.
        on_error: Treatment of rows that break the format, see :class:`~latentreward.data.PairReader`.

    Attributes:
        name: Name of the data set in reports.
        reader: Class of the reader that opens a split. It should assign the sides a and b by chance or by the order in
            the file, never by the label.
        keys: Keys of the protocols.
    """

    name: str
    reader: Callable[..., PairReader]
    keys: tuple[str, ...]
    split = "test"

    def __init__(self, root: PathText, split: str | None = None, *, on_error: OnError = "skip") -> None:
        self.root, self.split, self.on_error = root, split or type(self).split, on_error
        self._opened: dict[str, PairReader] = {}
        self._unscored: dict[str, BenchmarkPairs] = {}

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Protocols to compute, each with its splits."""
        return tuple(Evaluation(key, self.split) for key in self.keys)

    def open(self, split: str) -> PairReader:
        """Open the reader of a split."""
        return self.reader(self.root, split, on_error=self.on_error)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that must be scored, each once."""
        names = [name for item in self.evaluations for name in (item.split, item.fitting) if name]
        return tuple(dict.fromkeys(names))

    @property
    def protocols(self) -> tuple[str, ...]:
        """Keys of the benchmark's protocols, each once."""
        return tuple(dict.fromkeys(item.protocol for item in self.evaluations))

    def readers(self) -> dict[str, PairReader]:
        """Return the reader of each split by name; readers are opened once and kept."""
        self._opened = self._opened or {split: self.open(split) for split in self.splits}
        return self._opened

    def scored(self, split: str, table: pa.Table, column: str, *, scorer: str | None = None) -> BenchmarkPairs:
        """Join a split's labels and groups with the scores in one column of a table.

        Args:
            split: Name of the split.
            table: Table of :class:`~latentreward.reward.scorers.pair_scoring.PairScoring` for the first rows of the
                split's reader.
            column: Name of the scores without ``_a`` and ``_b``.
            scorer: Name of the scorer in results; ``column`` by default.

        Returns:
            Pairs of the table's rows, as every protocol takes them.
        """
        pairs, rows, name = self.pairs(split), table.num_rows, scorer or column
        if pairs.pair_ids[:rows] != tuple(table.column("pair_id").to_pylist()):
            raise InputError(f"scores of {self.name} {split} belong to other pairs; score the split again")
        first, second = (table.column(f"{column}_{side}").to_numpy().astype(np.float64) for side in ("a", "b"))
        problems = zip(*(table.column(f"problem_{side}").to_pylist() for side in ("a", "b")), strict=True)
        columns = {name: values[:rows] for name, values in pairs.columns.items()}
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
        """Return all pairs of a split with NaN in place of scores."""
        if split not in self._unscored:
            reader = self.readers()[split]
            nothing = np.full(len(reader), np.nan)
            self._unscored[split] = BenchmarkPairs(
                scorer="",
                pair_ids=tuple(reader.pair_ids()),
                prompts=tuple(reader.prompts()),
                groups=tuple(self.groups(reader)),
                labels=reader.labels(),
                first=nothing,
                second=nothing,
                columns=self.columns(reader),
                benchmark=f"{self.name} {split}",
            )
        return self._unscored[split]

    def groups(self, reader: PairReader) -> Sequence[str]:
        """Return the name of each pair's group; pairs of one group are resampled together."""
        return reader.groups()

    def columns(self, reader: PairReader) -> dict[str, Texts]:
        """Return the columns of pairs, of which the reader knows facts: of both models, and published labels."""
        facts, unknown = reader.facts(), [None] * len(reader)
        sides = zip(facts.get("model_a", unknown), facts.get("model_b", unknown), strict=True)
        columns = {
            "models": [None if None in both else " against ".join(sorted(both)) for both in sides],
            "label_0": [None if label is None else str(label) for label in facts.get("label_0", unknown)],
        }
        return {name: tuple(values) for name, values in columns.items() if values != unknown}

    def temperature(self, scorer: str) -> float | None:
        """Return T of a scorer's win probability σ(gap / T); None has PickScore's protocol, the only reader, fit it."""
        return 1.0
