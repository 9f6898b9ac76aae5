"""Base class of benchmarks, which joins labels and scores for the protocols, and columns of sub-groups of pairs."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from latentreward.apps.evaluation.benchmark.results import BenchmarkPairs
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError
from latentreward.data import OnError, PairReader

Texts = tuple[str | None, ...]
SUBGROUP_COLUMNS = ("models", "model", "prompt length", "vote share", "confidence", "skill", "style")
"""Columns that define sub-groups; other columns, such as ``vote``, are read by protocols only."""

WORDS = {0: "no words", 1: "1 to 5 words", 6: "6 to 15 words", 16: "16 to 40 words", 41: "41 to 100 words"}
WORDS |= {101: "over 100 words"}
SHARES = {0.0: "below 0.5", 0.5: "0.5 to 0.6", 0.6: "0.6 to 0.7", 0.7: "0.7 to 0.8", 0.8: "0.8 to 0.9", 0.9: "0.9 to 1"}
CONFIDENCES = {0.0: "below 0.8", 0.8: "0.8 to 0.9", 0.9: "0.9 to 0.95", 0.95: "0.95 to 0.99", 0.99: "0.99 to 1"}
"""Bands of annotators' confidence: lowest value of a band, inclusive → name of the band.

``WORDS`` (number of words in a prompt) and ``SHARES`` (share of votes for the preferred image) have the same form.
"""


def subgroup_columns(prompts: Sequence[str], labels: np.ndarray, facts: dict[str, list[Any]]) -> dict[str, Texts]:
    """Compute the ``columns`` of :class:`~latentreward.apps.evaluation.benchmark.results.BenchmarkPairs` for N pairs.

    A column without a value for any pair is left out. ``labels`` ``(N,)`` are probabilities that image a is preferred,
    NaN without a label. ``facts`` are published facts from :meth:`~latentreward.data.PairReader.facts`: name → N
    values.

    Returns:
        Name → N values: ``models`` (names of both models in alphabetical order), ``model`` (one line per model),
        ``prompt length`` (band of the number of words), ``vote share`` (band of the share of votes for the preferred
        image), ``confidence`` (band of the annotators' confidence), ``skill`` (one line per tag), and ``model_a``,
        ``model_b``, ``vote``, ``label_0`` as published.
    """
    unknown = [None] * len(prompts)
    sides = list(zip(facts.get("model_a", unknown), facts.get("model_b", unknown), strict=True))
    shares: list[str | None] = []  # None without votes or without a preference
    for a, b, label in zip(facts.get("votes_a", unknown), facts.get("votes_b", unknown), labels.tolist(), strict=True):
        if a is None or b is None or not a + b or np.isnan(label) or label == 0.5:
            shares.append(None)
        else:
            shares.append(band((a if label > 0.5 else b) / (a + b), SHARES))
    columns = {
        "models": [" against ".join(sorted(both)) if None not in both else None for both in sides],
        "model": ["\n".join(sorted({model for model in both if model is not None})) or None for both in sides],
        "prompt length": [band(len(prompt.split()), WORDS) for prompt in prompts],
        "vote share": shares,
        "confidence": [None if x is None else band(x, CONFIDENCES) for x in facts.get("confidence", unknown)],
        "skill": ["\n".join(dict.fromkeys(tags or ())) or None for tags in facts.get("tags", unknown)],
        **{name: facts.get(name, unknown) for name in ("model_a", "model_b", "vote")},
        "label_0": [None if x is None else str(x) for x in facts.get("label_0", unknown)],
    }
    return {name: tuple(values) for name, values in columns.items() if values != unknown}


def band(value: float, bands: dict[Any, str]) -> str:
    """Return the name of the band, by its lowest value, that holds a value; lower values are in the first band."""
    return list(bands.values())[max(0, bisect_right(list(bands), value) - 1)]


@dataclass(frozen=True)
class Evaluation:
    """A protocol and the split on which its number is computed."""

    protocol: str  # key of the protocol in :data:`~latentreward.apps.evaluation.benchmark.protocols.PROTOCOLS`
    split: str  # split whose pairs give the protocol's number
    # Second split on which the protocol fits its threshold; None if the protocol fits none there
    fitting: str | None = None


class Benchmark(ABC):
    """Base class of preference data sets with their evaluation protocols; by default, all are computed on one split.

    Images that cannot be read are left out and counted by reason. Rows that break a rule of the file format are left
    out and counted too, or raise InputError if ``on_error`` is ``"raise"``.

    Args:
        root: Folder of the data set; a hub id if the data set's reader accepts hub ids.
        on_error: Treatment of rows that break the format, see :class:`~latentreward.data.PairReader`.

    Attributes:
        name: Name of the data set in reports.
        reader: Class of the reader that opens a split, and its further ``settings``.
        split: Split on which the protocols are computed.
    """

    name: str
    reader: Callable[..., PairReader]
    settings: Mapping[str, Any] = {}
    split = "test"

    def __init__(self, root: PathText, *, on_error: OnError = "skip") -> None:
        self.root, self.on_error = root, on_error
        self._opened: dict[str, PairReader] = {}
        self._unscored: dict[str, BenchmarkPairs] = {}

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """Keys of the protocols."""

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Protocols to compute, each with its splits."""
        return tuple(Evaluation(key, self.split) for key in self.keys)

    def open(self, split: str) -> PairReader:
        """Open the reader of a split.

        The reader should assign the sides a and b by chance or by the order in the file, never by the label.
        """
        return self.reader(self.root, split, on_error=self.on_error, **self.settings)

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
            table: Table written by :class:`~latentreward.reward.scorers.pair_scoring.PairScoring` for the first rows of
                the
                split's reader. Columns: ``pair_id``, ``image_a``, ``image_b``, ``COLUMN_a``, ``COLUMN_b``,
                ``problem_a``, ``problem_b``.
            column: Name of the scores without ``_a`` and ``_b``.
            scorer: Name of the scorer in results; ``column`` by default.

        Returns:
            Pairs of the table's rows, as every protocol takes them.
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
                split=split,
            )
        return self._unscored[split]

    def groups(self, reader: PairReader) -> Sequence[str]:
        """Return the name of each pair's group; pairs of one group are resampled together."""
        return reader.groups()

    def columns(self, reader: PairReader) -> dict[str, Texts]:
        """Return the columns by which the report splits the pairs into sub-groups."""
        return subgroup_columns(reader.prompts(), reader.labels(), reader.facts())

    def temperature(self, scorer: str) -> float | None:
        """Return the temperature T of a scorer's win probability σ(gap / T), which only PickScore's protocol reads.

        None means that the protocol fits T on its fitting split. The default is 1.
        """
        return 1.0
