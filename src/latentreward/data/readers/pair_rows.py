"""Rows to pairs: the rules of prompts, labels, ranks, votes and paths, and what happens to a row that breaks one."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Any

import pyarrow as pa

from latentreward.core.errors import InputError
from latentreward.data.readers.base import MAX_VOTES, PairReader
from latentreward.data.readers.json_rows import (
    EDIT_UNREAD,
    MOST_SOURCES,
    SOURCES,
    edit_problem,
    edit_remark,
    find_edit_source,
    list_sources,
    parse_json,
    parse_number,
    parse_text,
    short,
)

Pair = dict[str, Any]
"""Row of a reader's table: column of ``INDEX``, or of the reader's own → value; a missing one is null."""
Row = tuple[str, int, Any]
"""Name and number of a row, and its fields as a dict, or a text that says why it has none."""

INDEX = {
    "row": pa.int64(),
    **dict.fromkeys(("pair_id", "prompt", "image_a", "image_b"), pa.large_string()),
    "label": pa.float64(),
    "winner_first": pa.bool_(),
    "weight": pa.float64(),
    "votes_a": pa.int64(),
    "votes_b": pa.int64(),
    "confidence": pa.float64(),
    **dict.fromkeys(("model_a", "model_b", "noise_a", "noise_b"), pa.string()),
    **dict.fromkeys(("group", "group_id", "split"), pa.large_string()),
    "sources": pa.list_(pa.large_string()),
}
ALWAYS = ("row", "pair_id", "prompt", "image_a", "image_b", "label")
"""Columns that a table keeps even where all values are null."""
ROWS_AT_ONCE = 1 << 14
"""Rows that are Python's objects at one time: as such they take ten times the memory of a table."""
WINNER_FIRST, BY_LABEL = ("chosen", "rejected"), ("image_a", "image_b")
WORDS = {"a": 1.0, "b": 0.0, "tie": 0.5}
MODELS, NOISES = ("model_a", "model_b"), ("noise_a", "noise_b")
TEXTS = (*MODELS, *NOISES, "group_id", "split")
NOT_LABELS = (*WINNER_FIRST, *BY_LABEL, *TEXTS, *SOURCES, "prompt", "label", "confidence", "weight", "pair_id")
"""Keys under which nobody looks for a label, beside the keys of labels themselves."""
OTHER_PROMPT = re.compile(
    r"(?!.*negative)(.*_)?(prompt|caption|text|instruction|description|query)s?(_[a-z]{2})?(?<!_id)", re.I
)
"""Names under which other programs write prompts."""
NULLS = ("", "null", "none", "nan")
NO_OBJECT, NO_LABEL, NO_PROMPT = "row is no object", "unlabelled (no label)", "null prompt read as empty"
BAD_LABEL = "label not readable"
TOLERANCE = 1e-6
MOST_KEYS = 3
"""Other keys of unlabelled rows that a remark names; the rest are counted."""


class BadRow(ValueError):
    """Error about a row that breaks a rule.

    Args:
        problem: Field and value that break it.
        reason: Short name of the problem, without values, under which rows are counted.
    """

    def __init__(self, problem: str, reason: str) -> None:
        super().__init__(problem)
        self.problem, self.reason = problem, reason


class WholeNumbersError(InputError):
    """Labels of the column ``name`` that are whole numbers: many programs number the winner so."""

    def __init__(self, name: str) -> None:
        told = "holds whole numbers, which may be probabilities of a or the number of the winner"
        super().__init__(f"{name} {told}; say which by labels, e.g. labels: {{1: a, 0: b}} or {{0: a, 1: b}}")


class PairRowParser:
    """Parser of rows to the table of a reader; ``on_error`` is applied to a row here, and nowhere else.

    Under ``placeholder``, a bad row keeps its place, or those of its pairs, without labels; images that it names are
    kept only if the fault is not in them.

    Args:
        reader: Reader whose ``on_error`` applies to the rows.
        pairs_of: Function of a row's name and fields that returns its pairs, or raises :class:`BadRow`; the prompt is
            added to them. Without it, a row is one pair of your own, see :meth:`own_pair`.
        columns: Field → name under which rows have it, where it is another one.
        sources: Fields with pictures to edit that are read; any other such field is refused. None looks for none.
        check_image: Function of a row's name, a field and its value that applies ``on_error`` to what is no path of an
            image; None checks nothing.
        labels: Label as a row has it → ``a``, ``b``, ``tie`` or a probability.
        unique: Whether a ``pair_id`` must not occur again.
    """

    def __init__(
        self,
        reader: PairReader,
        pairs_of: Callable[[str, dict[str, Any]], Sequence[Pair]] | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        sources: Sequence[str] | None = SOURCES,
        check_image: Callable[[str, str, Any], None] | None = None,
        labels: Mapping[Any, Any] | None = None,
        unique: bool = True,
    ) -> None:
        self.reader, self.pairs_of, self.check_image = reader, pairs_of or self.own_pair, check_image
        self.columns, self.unique = columns or {}, unique
        self.prompt = self.columns.get("prompt", "prompt")
        self.sources = sources if sources is None or reader.sources == "read" else ()
        self.labels = None if labels is None else parse_labels(labels)
        self._other_keys: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._whole: set[bool] = set()  # whether labels are whole numbers

    def table(self, rows: Iterable[Row], columns: Mapping[str, pa.DataType] | None = None) -> pa.Table:
        """Parse all rows to a table with the columns of ``INDEX``, and more ``columns``, that are not all null."""
        schema, parts = pa.schema({**INDEX, **(columns or {})}), []
        pairs = (pair for row in rows for pair in self.parse(*row))
        while some := list(islice(pairs, ROWS_AT_ONCE)):
            parts.append(pa.Table.from_pylist(some, schema))
        table = pa.concat_tables([schema.empty_table(), *parts])
        self._seen.clear()
        if self._whole == {True}:
            raise WholeNumbersError("label")
        if self._other_keys and self.reader.remarks[NO_LABEL]:
            keys = [f"{short(key)} ({rows} rows)" for key, rows in self._other_keys.most_common(MOST_KEYS)]
            keys += [f"{more} other keys"] if (more := len(self._other_keys) - MOST_KEYS) > 0 else []
            told = f"a label is read from 'label', or from 'chosen' and 'rejected', not from {', '.join(keys)}"
            self.rename_no_label(told)
        used = {name for name in table.column_names if table[name].null_count < len(table)}
        used |= {f"{name[:-1]}{side}" for name in used if name[-2:] in ("_a", "_b") for side in "ab"}
        return table.select([name for name in table.column_names if name in ALWAYS or name in used])

    def parse(self, name: str, number: int, content: Any) -> list[Pair]:
        """Parse a row to its pairs, applying ``on_error``."""
        reader, row, prompt = self.reader, content if isinstance(content, dict) else {}, None
        bad, pairs = None, list[Pair]()
        try:
            prompt = self._prompt(name, content)
            self._check_edit(name, row)
        except BadRow as error:
            bad = error
        if bad is None or (reader.on_error == "placeholder" and row):
            try:
                pairs = [*self.pairs_of(name, row)]
            except BadRow as error:
                bad = bad or error
        if bad is not None:
            reader.refuse(name, bad.problem, bad.reason)
            pairs = [] if reader.on_error == "skip" else [{**pair, "label": None} for pair in pairs or [{}]]
        return [{"row": number, "pair_id": name, "prompt": prompt, **pair} for pair in pairs]

    def _check_edit(self, name: str, row: Mapping[str, Any]) -> None:
        """Raise BadRow for a row that edits a picture in a field that is not read, or remark on it."""
        if self.sources is None:
            return
        known = [self.columns.get(field, field) for field in self.sources]
        if (source := find_edit_source(row, known)) is not None:
            if self.reader.sources == "read":
                raise BadRow(edit_problem(source, bool(known)), EDIT_UNREAD)
            self.reader.remark(name, edit_remark(source))

    def _prompt(self, name: str, row: Any) -> str | None:
        """Return a row's prompt, None for an empty one; raise BadRow for an unsound one."""
        if not isinstance(row, dict):
            raise BadRow(row if isinstance(row, str) else f"{short(row)} is no JSON object", NO_OBJECT)
        most, prompt = self.reader.max_prompt_chars, row.get(self.prompt)
        if isinstance(prompt, str):
            if len(prompt) > most:
                raise BadRow(
                    f"prompt has {len(prompt)} characters, more than max_prompt_chars={most}", "prompt too long"
                )
            return parse_text(prompt)
        if prompt is not None:
            raise BadRow(f"prompt is {short(prompt)}, not text", "prompt is no text")
        if self.prompt not in row:
            texts = (key for key, value in row.items() if isinstance(value, str))
            if (other := next(filter(OTHER_PROMPT.fullmatch, texts), None)) is not None:
                problem = f"it has no prompt, but {short(other)}; rename that to prompt"
                raise BadRow(problem, "prompt under another name")
        self.reader.remark(name, NO_PROMPT)
        return None

    def own_pair(self, name: str, row: Mapping[str, Any]) -> list[Pair]:
        """Return the pair of a row with the keys of :class:`~latentreward.data.DatasetPairReader`."""
        if self.columns:
            row = {**row, **{field: row.get(column) for field, column in self.columns.items()}}
        images = BY_LABEL if WINNER_FIRST[0] not in row and WINNER_FIRST[1] not in row else WINNER_FIRST
        values = [row.get(field) for field in images]
        pair: Pair = {field: parse_text(text) for field in TEXTS if (text := row.get(field)) is not None}
        pair |= {"winner_first": images is WINNER_FIRST, "label": 1.0, "confidence": self._confidence(name, row)}
        pair["image_a"], pair["image_b"] = map(parse_text, values)
        if pair_id := parse_text(row.get("pair_id")):
            if pair_id in self._seen:
                raise BadRow(f"pair_id {short(pair_id)} occurred before", "pair_id occurs twice")
            if self.unique:
                self._seen.add(pair_id)
            pair["pair_id"] = pair_id
        if self.check_image is not None:
            for field, value in zip(images, values, strict=True):
                self.check_image(name, self.columns.get(field, field), value)
        if self.sources:
            pair |= self.edited(name, *list_sources(row, self.sources))
        if images is BY_LABEL:
            pair["label"] = self._label(name, row)
        elif row.get("label") is not None:
            self.reader.remark(name, "label not read (chosen and rejected say who won)")
        return [pair | self._weigh(name, row)]

    def _confidence(self, name: str, row: Mapping[str, Any]) -> float | None:
        if (value := _value(row.get("confidence"))) is None:
            return None
        if (number := parse_number(value)) is None or not 0 <= number <= 1:
            self.reader.remark(name, "confidence not readable")
            return None
        return number

    def _weigh(self, name: str, row: Mapping[str, Any]) -> Pair:
        """Return weight and votes of a row; raise BadRow for a weight that is none, or too many votes."""
        found: Pair = {}
        if (weight := row.get("weight")) is not None:
            if (number := parse_number(weight)) is None or number < 0:
                raise BadRow(f"weight is {short(weight)}, not a number of 0 or more", "weight not readable")
            found["weight"] = number
        if (votes := _value(row.get("votes"))) is None:
            return found
        votes = parse_json(votes, votes) if isinstance(votes, str) else votes
        counts = list(map(parse_number, votes)) if isinstance(votes, list) else []
        whole = [int(count) for count in counts if count is not None and count >= 0 and count % 1 == 0]
        if len(whole) != 2 or len(counts) != 2:
            self.reader.remark(name, "votes not readable")
            return found
        if max(whole) > MAX_VOTES:
            raise BadRow(f"votes is {short(whole)}, more than {MAX_VOTES} for an image", "too many votes")
        return found | {"votes_a": whole[0], "votes_b": whole[1]}

    def edited(self, name: str, field: str, values: Sequence[Any]) -> Pair:
        """Return the column of the pictures to edit in a field, none without; raise BadRow for too many."""
        if len(values) > MOST_SOURCES:
            problem = f"{field} has {len(values)} pictures to edit, more than {MOST_SOURCES}"
            raise BadRow(problem, "too many pictures to edit")
        for value in values if self.check_image is not None else ():
            self.check_image(name, field, value)  # type: ignore[misc]
        return {"sources": [parse_text(value) or "" for value in values]} if values else {}

    def _label(self, name: str, row: Mapping[str, Any]) -> float | None:
        """Return the label of a row's first image, None with a remark if there is none; raise BadRow for another."""
        value = row.get("label")
        if value is None:
            self.reader.remark(name, NO_LABEL)
            self._other_keys.update(key for key in row if key not in NOT_LABELS)
            return None
        if self.labels is not None:
            if (label := self.labels.get(_key(value))) is None:
                raise BadRow(f"label is {short(value)}, none of labels: {', '.join(self.labels)}", BAD_LABEL)
            return label
        if isinstance(value, str) and value in WORDS:
            self._whole.add(False)
            return WORDS[value]
        number, digits = parse_number(value), isinstance(value, str) and value.strip().isdigit()
        self._whole.add(digits or (isinstance(value, int) and not isinstance(value, bool)))
        if number is None or not 0 <= number <= 1:
            told = "neither in [0, 1] nor a, b or tie; say what it means, e.g. labels: {left: a, right: b}"
            raise BadRow(f"label is {short(value)}, {told}", BAD_LABEL)
        return number

    def rename_no_label(self, told: str) -> None:
        """Put what is known of the label of unlabelled rows into the remark on them."""
        reason, reader = f"unlabelled ({told})", self.reader
        reader.remarks[reason] = reader.remarks.pop(NO_LABEL)
        reader.named[reason] = reader.named.pop(NO_LABEL)


def parse_labels(labels: Mapping[Any, Any]) -> dict[str, float]:
    """Return a map of labels with probabilities that image a is preferred; raise InputError for another meaning."""
    found = {_key(one): WORDS.get(str(meaning), parse_number(meaning)) for one, meaning in labels.items()}
    for one, label in found.items():
        if label is None or not 0 <= label <= 1:
            raise InputError(f"labels: {one} has no meaning; give a, b, tie or a probability that a is preferred")
    return found  # type: ignore[return-value]


def compare(first: float | None, second: float | None) -> float | None:
    """Return the label of the first of two images by their values, of which the larger is better; None without one."""
    return None if first is None or second is None else 0.5 + 0.5 * ((first > second) - (first < second))


def ranked_pairs(
    name: str, images: Sequence[Any], ranks: Sequence[float | None], fields: Sequence[Pair] | None = None, **shared: Any
) -> list[Pair]:
    """Return all pairs i < j of the ranked images of a group, named ``NAME:i-j``.

    The image with the lower rank is preferred; equal ranks are a tie (label ½); an image without rank has no label.
    ``fields`` are further fields of each image, whose pairs have them with ``_a`` and ``_b``.
    """
    pairs = []
    for i, j in combinations(range(len(images)), 2):
        pair = {"pair_id": f"{name}:{i}-{j}", "image_a": images[i], "image_b": images[j]}
        pair["label"] = compare(ranks[j], ranks[i])
        for side, place in (("a", i), ("b", j)) if fields else ():
            pair |= {f"{field}_{side}": value for field, value in fields[place].items()}  # type: ignore[index]
        pairs.append(pair | shared)
    return pairs


def parse_ranks(reader: PairReader, name: str, field: str, value: Any, count: int) -> Sequence[float | None]:
    """Return the ranks of ``count`` images, None with a remark if all are null; raise BadRow for another value."""
    if value is None or (value and value == [None] * count):
        reader.remark(name, f"unlabelled (no {field})")
        return [None] * count
    ranks = [parse_number(item) for item in value] if isinstance(value, list) else [None]
    if None in ranks or len(ranks) != count:
        problem = f"{field} is {short(value)}, not one number for each of {count} images"
        raise BadRow(problem, f"{field} not readable")
    return ranks


def choice(reader: PairReader, name: str, labels: Mapping[str, Any]) -> float | None:
    """Return the label of the first image by the labels of both, None with a remark; raise BadRow outside [0, 1]."""
    for one, label in labels.items():
        if label is not None and not 0 <= label <= 1:
            raise BadRow(f"{one} is {label}, not in [0, 1]", "label outside [0, 1] or NaN")
    first, second = labels.values()
    if first is None or second is None:
        reader.remark(name, "unlabelled (null label)")
    elif abs(first + second - 1) > TOLERANCE:
        reader.remark(name, "unlabelled (labels do not add up to 1)")
    else:
        return first
    return None


def batches(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as dicts, some at a time."""
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _value(value: Any) -> Any:
    """Return a value, None for a text that means null, as tables of texts have it."""
    return None if isinstance(value, str) and value.strip().lower() in NULLS else value


def _key(value: Any) -> str:
    """Return a label as a text, a whole number without decimals."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().casefold()
