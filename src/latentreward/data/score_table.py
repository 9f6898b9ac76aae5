"""Tables of scores of pairs: gaps between winner and loser, values that a loss learns from, and a filter."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, did_you_mean, errors_at, first_line
from latentreward.core.storage.run_folder import load_table
from latentreward.data.readers.base import OnError, PairReader, count_text
from latentreward.data.splits import USED, ChosenRows

PAIR_ID = "pair_id"
FLAG = "different_flag"
GAP, SIDES, WINNER_FIRST = "_gap", ("_a", "_b"), ("_chosen", "_rejected")
NOT_SCORES = ("label_a", "problem_a")
"""Columns of the tables of ``score-pairs`` that are no scores, even where empty."""
CHECKED_ROWS = 64
"""Number of rows whose images are compared with the reader's."""


@dataclass(frozen=True)
class PairGaps:
    """Score gaps of N pairs: score of the winner minus score of the loser; for ties the absolute difference."""

    decided: np.ndarray  # ``(N,)`` bool; true where one image won, false for ties and unlabelled pairs
    values: Mapping[str, np.ndarray]  # scorer → ``(N,)`` float64 gaps in its unit; NaN where a score is missing
    problems: Mapping[str, np.ndarray] = field(default_factory=dict)  # reason → ``(N,)`` bool: without usable gap

    def __len__(self) -> int:
        return len(self.decided)


class ScoreTable:
    """A file (CSV, JSON lines, parquet) with scores and one row per pair, such as ``latentreward score-pairs`` writes.

    For each scorer NAME the file has a column ``NAME_gap`` (winner minus loser; for ties the absolute difference), or
    two columns: ``NAME_a`` and ``NAME_b`` with the scores of the *reader's* images a and b, which it may exchange,
    or ``NAME_chosen`` and ``NAME_rejected``. From two columns the gap is computed with the reader's labels. If the file
    has ``image_a`` and ``image_b`` too, those of the first rows must be the reader's, in either order where all scorers
    have gaps. The optional column ``different_flag`` is 1 for a decided pair and 0 for a tie. An empty or NaN score
    stays NaN.

    With a column ``pair_id``, rows are matched to the reader's rows by name. Without it, the table must have exactly
    the reader's rows in their order. An example is LRM's published file for the training set of Pick-a-Pic v1, with
    columns ``different_flag, aesthetic_gap, clipscore_gap, vqascore_gap``.

    Args:
        path: File that ends in ``.csv``, ``.jsonl`` or ``.parquet``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._table = read_table(self.path)
        names = self._table.column_names
        gaps = [name.removesuffix(GAP) for name in names if name.endswith(GAP)]
        first = [(name, side) for side in ("_a", "_chosen") for name in names if name.endswith(side)]
        scorers = [name.removesuffix(side) for name, side in first if name not in NOT_SCORES]
        kinds = dict(zip(names, self._table.schema.types, strict=True))
        numeric = (pa.types.is_floating, pa.types.is_integer, pa.types.is_null)
        held = {name for name, kind in kinds.items() if any(holds(kind) for holds in numeric)}
        self.scorers = tuple(
            dict.fromkeys([*gaps, *(name for name in scorers if held.issuperset(self._columns(name)))])
        )
        if not self.scorers:
            told = "no column NAME_gap, nor NAME_a and NAME_b, nor NAME_chosen and NAME_rejected"
            raise InputError(f"{self.path}: {told}; it has {', '.join(names)}")
        counts = Counter(self._table.column(PAIR_ID).to_pylist() if PAIR_ID in names else ())
        if twice := next(((name, rows) for name, rows in counts.items() if rows > 1), None):
            raise InputError(f"{self.path}: {PAIR_ID} {twice[0]!r} is in {twice[1]} rows; leave one row per pair")

    def __len__(self) -> int:
        return self._table.num_rows

    def gaps(self, reader: PairReader) -> PairGaps:
        """Return the gaps of every row of ``reader``.

        ``problems`` marks pairs that are not in the table, unlabelled pairs, and pairs whose ``different_flag``
        contradicts the reader's label (a sign that the table belongs to other rows).
        """
        rows, labels = self._rows_of(reader), reader.labels()
        sided = any(f"{name}{GAP}" not in self._table.column_names and self._by_side(name) for name in self.scorers)
        self._check_images(rows, reader, sided)
        found = rows >= 0
        decided, unlabelled = ~np.isnan(labels) & (labels != 0.5), np.isnan(labels)
        problems = {"not in the score table": ~found, "unlabelled": unlabelled}
        if FLAG in self._table.column_names:
            flag = _take(numbers(self._table, FLAG, self.path), rows)
            problems[f"{FLAG} contradicts the label"] = found & ~unlabelled & (flag != decided)
        values = {}
        for name in self.scorers:
            if f"{name}{GAP}" in self._table.column_names:
                values[name] = _take(numbers(self._table, f"{name}{GAP}", self.path), rows)
            else:
                first, second = self._scores(name, rows, labels).T
                values[name] = oriented_gap(first, second, labels)
        return PairGaps(decided, values, problems)

    def sides(self, name: str, reader: PairReader | None = None) -> np.ndarray:
        """Return the scores of both images of every row of ``reader``, or of the table: ``(N, 2)`` float64.

        Those of a reader's rows are of its images a and b. Images without a score, and pairs that are not in the table,
        have NaN.
        """
        if reader is None:
            return self._scores(name, np.arange(len(self)))
        rows = self._rows_of(reader)
        self._check_images(rows, reader, self._by_side(name))
        return self._scores(name, rows, reader.labels())

    def _check_images(self, rows: np.ndarray, reader: PairReader, sided: bool) -> None:
        """Raise InputError if the table's images of the reader's first pairs are those of other pairs.

        Where columns are ``sided``, of images a and b, they must not be exchanged either.
        """
        images = ("image_a", "image_b")
        if not {*images} <= {*self._table.column_names}:
            return
        pairs = {row: reader[row] for row in np.flatnonzero(rows >= 0)[:CHECKED_ROWS].tolist()}
        keys = {row: (pair.image_a.image_key, pair.image_b.image_key) for row, pair in pairs.items()}
        known = {key for both in keys.values() for key in both}  # a table may name images in a way of its own
        for row, both in keys.items():
            named = tuple(str(self._table.column(image)[int(rows[row])].as_py()) for image in images)
            if named == both or not {*named} & known or (named[::-1] == both and not sided):
                continue
            side = int(named[0] == both[0])
            problem = f"{self.path}: {images[side]} of pair {pairs[row].pair_id} is {named[side]}"
            if named[::-1] == both:
                remedy = "make the table by score-pairs, or name its columns NAME_chosen and NAME_rejected"
                raise InputError(f"{problem}, which is image b of the reader; {remedy}")
            raise InputError(f"{problem}, but {both[side]} in the reader; make the table by score-pairs anew")

    def _by_side(self, name: str) -> bool:
        """Tell whether a scorer's columns are of images a and b, not of winner and loser."""
        return {f"{name}_a", f"{name}_chosen"} & {*self._table.column_names} != {f"{name}_chosen"}

    def _columns(self, name: str) -> tuple[str, str]:
        first, second = SIDES if self._by_side(name) else WINNER_FIRST
        return f"{name}{first}", f"{name}{second}"

    def _scores(self, name: str, rows: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """Return the scores ``(N, 2)`` of rows; with labels those of images a and b, also from winner and loser."""
        columns = self._columns(name)
        scores = np.stack([_take(numbers(self._table, column, self.path), rows) for column in columns], axis=1)
        if labels is None or self._by_side(name):
            return scores
        undecided = (np.isnan(labels) | (labels == 0.5)) & (rows >= 0)
        if undecided.any():
            told = f"{columns[0]} and {columns[1]}, but {undecided.sum()} pairs have no winner"
            raise InputError(f"{self.path}: {told}; give {name}_a and {name}_b for images a and b")
        return np.where((labels > 0.5)[:, None], scores, scores[:, ::-1])

    def _rows_of(self, reader: PairReader) -> np.ndarray:
        """Return the table's row number of each of the reader's pairs, ``(len(reader),)``; -1 if not in the table."""
        if PAIR_ID not in self._table.column_names:
            if len(reader) != len(self):
                told = f"{len(self)} rows for {len(reader)} of the reader, which left out {count_text(reader.skipped)}"
                remedy = "let the reader keep all (drop_identical: false, on_error: placeholder)"
                raise InputError(f"{self.path}: {told}; a table without {PAIR_ID} must have the same rows: {remedy}")
            return np.arange(len(self))
        wanted = reader.pair_ids()
        rows = pc.index_in(pa.array(wanted, pa.string()), self._table.column(PAIR_ID).combine_chunks())
        rows = rows.fill_null(-1).to_numpy().astype(np.int64)
        if not (rows >= 0).any():
            known = self._table.column(PAIR_ID)[0].as_py() if len(self) else None
            told = f"(the reader's first is {wanted[0]!r}, the table's {known!r})"
            remedy = "give the table that was made from this data set and split"
            raise InputError(f"{self.path}: none of the reader's {len(wanted)} pairs is in it {told}; {remedy}")
        return rows


def oriented_gap(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the gap of scores ``(N,)``: winner minus loser, ``|a - b|`` for label ½, NaN for label NaN."""
    gap = np.where(labels > 0.5, first - second, second - first)
    gap = np.where(labels == 0.5, np.abs(gap), gap)
    return np.where(np.isnan(labels), np.nan, gap)


def read_table(path: Path) -> pa.Table:
    """Read a CSV file, JSON lines or a parquet file; a column ``pair_id`` is read as text."""
    if path.suffix not in (".csv", ".jsonl", ".parquet"):
        raise InputError(f"{path}: a table of scores ends in .csv, .jsonl or .parquet")
    if not path.is_file():
        raise InputError(f"no table of scores {path}; give its path, or have it written")
    try:
        table = load_table(path, [PAIR_ID])
    except (pa.ArrowException, OSError) as error:
        told = f"{path}: not a whole {path.suffix[1:]} file ({first_line(error)})"
        raise InputError(f"{told}; get or make it anew") from error
    names = table.column_names
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path}: column {repeated[0]!r} is there twice; leave one")
    if PAIR_ID in names:
        table = table.set_column(names.index(PAIR_ID), PAIR_ID, table.column(PAIR_ID).cast(pa.string()))
    return table


def numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """Return column ``name`` as ``(rows,)`` float64, with NaN for nulls."""
    if name not in table.column_names:
        raise InputError(f"{path}: no column {name}; it has {', '.join(table.column_names)}")
    column = table.column(name)
    try:
        return column.cast(pa.float64()).to_numpy().astype(np.float64)
    except pa.ArrowException as error:
        raise InputError(f"{path}: column {name} is {column.type}, not numbers ({first_line(error)})") from error


def _take(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return ``values[rows]``, with NaN where a row is -1."""
    return np.where(rows >= 0, values[rows], np.nan) if len(values) else np.full(len(rows), np.nan)


logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test", "predict")


@dataclass(frozen=True)
class ScoreTargets:
    """Columns of tables of scores, see :class:`ScoreTable`, that a loss compares scores with; images may lack a value.

    Attributes:
        tables: Split, such as ``train`` or ``val`` → CSV or parquet file of its pairs.
        columns: Names of the values, one for each score of the head.
        uncertainties: Names of the standard deviations of ``columns``, in the same order; empty for none.
        standardise: Whether to z-score each column: the mean and standard deviation over all images in the table of
            ``train`` become 0 and 1. Uncertainties are divided by the same standard deviation. Set False for labels.
    """

    tables: Mapping[str, PathText]
    columns: Sequence[str]
    uncertainties: Sequence[str] = ()
    standardise: bool = True

    def __post_init__(self) -> None:
        if not self.columns or not self.tables:
            missing = "columns" if self.tables else "tables"
            raise InputError(f"data.targets.{missing} is empty; name at least one, or leave targets out")
        if unknown := [name for name in self.tables if name not in SPLITS]:
            raise InputError(f"data.targets.tables: there is no split {unknown[0]!r}{did_you_mean(unknown[0], SPLITS)}")
        if len(self.uncertainties) not in (0, len(self.columns)):
            raise InputError("data.targets.uncertainties: name one for each of columns, or none")
        if self.standardise and "train" not in self.tables:
            told = "data.targets.tables has no train, over which columns are z-scored"
            raise InputError(f"{told}; add it or set standardise: false")

    def values(self, split: str, reader: PairReader) -> Tensor | None:
        """Return the values of every row of the reader of a split.

        Returns:
            ``(N, 2, 1, K)`` float32 for images a and b and K columns, ``(N, 2, 2, K)`` with the uncertainties after the
            values; NaN where an image has none. None if the split has no table.
        """
        if split not in self.tables:
            return None
        table = ScoreTable(self.tables[split])
        values = np.stack([table.sides(name, reader) for name in self.columns], axis=-1)
        self._check_finite(table, values, self.columns, reader)
        missing = np.isnan(values).all(axis=-1)
        if missing.all():
            raise InputError(f"{table.path}: no image of data.{split} has a value of {', '.join(self.columns)}")
        if missing.any():
            logger.warning(
                "%s: %d of %d images of data.%s have no value", table.path, missing.sum(), missing.size, split
            )
        mean, scale = self._scales()
        parts = [(values - mean) / scale]
        if self.uncertainties:
            spread = np.stack([table.sides(name, reader) for name in self.uncertainties], axis=-1)
            self._check_finite(table, spread, self.uncertainties, reader)
            if (wrong := ~(spread > 0) & ~np.isnan(values)).any():
                name = self.uncertainties[int(np.argwhere(wrong)[0][-1])]
                told = f"{table.path}: {name} is {spread[wrong][0]:g} for an image with a value"
                raise InputError(f"{told}; an uncertainty is a positive number")
            parts.append(spread / scale)
        return torch.from_numpy(np.stack(parts, axis=2)).float()

    @staticmethod
    def _check_finite(table: ScoreTable, values: np.ndarray, names: Sequence[str], reader: PairReader) -> None:
        if (wrong := np.isinf(values)).any():
            row, side, column = np.argwhere(wrong)[0]
            told = f"{names[column]}_{'ab'[side]} of pair {reader[int(row)].pair_id} is {values[row, side, column]:g}"
            raise InputError(f"{table.path}: {told}; give a finite number, or an empty cell for none")

    def _scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of each column over the images of ``train``, 0 and 1 for no z-scores."""
        if not self.standardise:
            return np.zeros(len(self.columns)), np.ones(len(self.columns))
        table = ScoreTable(self.tables["train"])
        values = np.stack([table.sides(name).ravel() for name in self.columns], axis=-1)
        mean, scale = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        if not (scale > 0).all():
            told = f"all values of {self.columns[int(np.argmin(scale > 0))]} are equal or missing"
            raise InputError(f"{table.path}: {told}; give a column that tells images")
        return mean, scale


def label_remedy(targets: ScoreTargets | None) -> str:
    """Return what to do about unlabelled rows."""
    return "label rows" + (" (0.5 where only the values of data.targets are learned)" if targets else "")


def check_targets(module: Any, datasets: Mapping[str, Any], stage: str | None) -> None:
    """Check, before the first batch, that the splits of a stage hold the values that the module's loss needs."""
    check = getattr(getattr(module, "loss", None), "check_targets", None)
    if check is None:
        return
    for name in USED.get(stage or "", ()):
        if name in datasets and name != "predict":
            with errors_at(f"data.targets.tables.{name}: "):
                check(datasets[name].targets)


Strategy = Literal[1, 2, 3]
Comparison = Literal["code", "paper"]
Ties = Literal["limits", "drop", "keep"]

AESTHETIC_FLOORS: dict[int, float] = {1: 0.0, 2: -0.5, 3: -1.0}
"""Strategy → floor of the aesthetic gap; the floor of the CLIP and VQA gaps is 0 in all strategies."""
TIE_LIMITS = {"aesthetic": 0.2, "clipscore": 0.03, "vqascore": 0.07}
"""Scorer → gap below which the released code keeps a tie; in aesthetic points, cosine similarity and probability."""


@dataclass(frozen=True)
class MPCF:
    """Rule by which multi-preference consistent filtering keeps a pair.

    A decided pair is kept if each scorer's gap (score of the winner minus score of the loser) is above a floor. The
    scorers of the published strategies are ``aesthetic``, ``clipscore`` and ``vqascore``.

    Attributes:
        strategy: Published preset. The floor of the aesthetic gap is 0 (strategy 1), -0.5 (strategy 2, used for the
            released models) or -1 (strategy 3); the floor of the CLIP and VQA gaps is 0.
        comparison: ``"code"`` keeps gaps above the floor, as the released code does; ``"paper"`` also keeps gaps equal
            to the floor.
        ties: ``"limits"`` keeps a tie if all its gaps are below ``tie_limits``; ``"drop"`` drops all ties; ``"keep"``
            keeps all ties.
        floors: Scorer → floor, in place of the strategy's floors; only these scorers apply.
        tie_limits: Scorer → limit for the gap of a tie; by default the released code's limits for the scorers in use.

    Note:
        The paper compares with ≥ and states no rule for ties. The released code compares with >, and uses the gaps of
        ties from its table, which presumably are absolute differences.
    """

    strategy: Strategy = 2
    comparison: Comparison = "code"
    ties: Ties = "limits"
    floors: Mapping[str, float] | None = None
    tie_limits: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.floors is not None and not self.floors:
            raise InputError("floors is empty, so nothing would be filtered; name a scorer, or leave it out")
        if self.ties == "limits" and (lacking := set(self.floors_in_use()) - set(self.limits_in_use())):
            raise InputError(f"tie_limits lacks {sorted(lacking)[0]!r}; add its limit, or set ties to drop or keep")

    def floors_in_use(self) -> dict[str, float]:
        """Return scorer → floor: ``floors`` if set, else those of the strategy."""
        published = {"aesthetic": AESTHETIC_FLOORS[self.strategy], "clipscore": 0.0, "vqascore": 0.0}
        return dict(published if self.floors is None else self.floors)

    def limits_in_use(self) -> dict[str, float]:
        """Return scorer → limit for ties: ``tie_limits`` if set, else those of the released code."""
        released = {name: TIE_LIMITS[name] for name in self.floors_in_use() if name in TIE_LIMITS}
        return dict(released if self.tie_limits is None else self.tie_limits)


def select_consistent(gaps: PairGaps, rule: MPCF) -> tuple[np.ndarray, Counter[str]]:
    """Select the pairs that a rule keeps, ``(N,)`` bool; also count the dropped ones by the first reason."""
    floors, limits = rule.floors_in_use(), rule.limits_in_use() if rule.ties == "limits" else {}
    if lacking := [name for name in (*floors, *limits) if name not in gaps.values]:
        told = f"the score table has no {lacking[0]!r}{did_you_mean(lacking[0], gaps.values)}"
        raise InputError(f"{told}; set FilteredReader's floors to the scorers that should count")
    keep, dropped = np.ones(len(gaps), dtype=bool), Counter[str]()

    def drop(rows: np.ndarray, reason: str) -> None:
        if number := int((keep & rows).sum()):
            dropped[reason] += number
        keep[rows] = False

    for reason, rows in gaps.problems.items():
        drop(rows, reason)
    for name in dict.fromkeys((*floors, *limits)):
        drop(np.isnan(gaps.values[name]), f"{name} missing or NaN")
    for name, floor in floors.items():
        above = gaps.values[name] >= floor if rule.comparison == "paper" else gaps.values[name] > floor
        drop(gaps.decided & ~above, f"{name} gap too low")
    for name, limit in limits.items():
        drop(~gaps.decided & ~(gaps.values[name] < limit), f"{name} gap of a tie too large")
    if rule.ties == "drop":
        drop(~gaps.decided, "tie")
    return keep, dropped


class FilteredReader(ChosenRows):
    """Reader of the rows of another reader that multi-preference consistent filtering keeps, in their order.

    No image is decoded for it. ``skipped`` counts the dropped rows by reason.

    Args:
        reader: Source of the pairs. If the table has no column ``pair_id``, it must keep every row of its files.
        scores: Path of the table of scores, see :class:`ScoreTable`.
        on_error: What happens to images that cannot be read; by default as ``reader`` has it.
        rule: Settings of :class:`MPCF`.
    """

    def __init__(self, reader: PairReader, scores: str | Path, *, on_error: OnError | None = None, **rule: Any) -> None:
        self.rule = MPCF(**rule)
        keep, skipped = select_consistent(ScoreTable(scores).gaps(reader), self.rule)
        super().__init__(reader, np.flatnonzero(keep), on_error)
        self.skipped = skipped
        if not len(self.rows):
            told = f"{scores}: none of {len(reader)} rows left ({count_text(self.skipped)})"
            raise InputError(f"{told}; check the table and the floors")
        self.report(f"filtered by {scores}")
