"""Base class of the readers of this package: a table with a row per pair, the rules of its rows, and their images."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentreward.core.contracts import EditPrompt, ImageRef, PathText, PreferencePair
from latentreward.core.errors import InputError
from latentreward.core.running import coin_flips
from latentreward.core.storage.user_files import escapes, relative_path, resolve_inside
from latentreward.data.images import NO_IMAGE, OUTSIDE, file_image, outside
from latentreward.data.readers.base import MAX_VOTES, PairReader, content_key
from latentreward.data.readers.json_rows import (
    EDIT_UNREAD,
    MOST_SOURCES,
    SOURCES,
    edit_problem,
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
NULLS = ("", "null", "none", "nan")
NO_OBJECT, NO_LABEL, NO_PROMPT = "row is no object", "unlabelled (no label)", "null prompt read as empty"
BAD_LABEL = "label not readable"
TOLERANCE = 1e-6


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
        used = {name for name in table.column_names if table[name].null_count < len(table)}
        used |= {f"{name[:-1]}{side}" for name in used if name[-2:] in ("_a", "_b") for side in "ab"}
        return table.select([name for name in table.column_names if name in ALWAYS or name in used])

    def parse(self, name: str, number: int, content: Any) -> list[Pair]:
        """Parse a row to its pairs, applying ``on_error``."""
        reader, row, prompt = self.reader, content if isinstance(content, dict) else {}, None
        bad, pairs = None, list[Pair]()
        try:
            prompt = self._prompt(content)
            self._check_edit(row)
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

    def _check_edit(self, row: Mapping[str, Any]) -> None:
        """Raise BadRow for a row that edits a picture in a field that is not read."""
        if self.sources is None:
            return
        known = [self.columns.get(field, field) for field in self.sources]
        if self.reader.sources == "read" and (source := find_edit_source(row, known)) is not None:
            raise BadRow(edit_problem(source, bool(known)), EDIT_UNREAD)

    def _prompt(self, row: Any) -> str | None:
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
        self.reader.remarks[NO_PROMPT] += 1
        return None

    def own_pair(self, name: str, row: Mapping[str, Any]) -> list[Pair]:
        """Return the pair of a row with the keys of :class:`~latentreward.data.DatasetPairReader`."""
        if self.columns:
            row = {**row, **{field: row.get(column) for field, column in self.columns.items()}}
        images = BY_LABEL if WINNER_FIRST[0] not in row and WINNER_FIRST[1] not in row else WINNER_FIRST
        values = [row.get(field) for field in images]
        pair: Pair = {field: parse_text(text) for field in TEXTS if (text := row.get(field)) is not None}
        pair |= {"winner_first": images is WINNER_FIRST, "label": 1.0, "confidence": self._confidence(row)}
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
            pair["label"] = self._label(row)
        elif row.get("label") is not None:
            self.reader.remarks["label not read (chosen and rejected say who won)"] += 1
        return [pair | self._weigh(row)]

    def _confidence(self, row: Mapping[str, Any]) -> float | None:
        if (value := _value(row.get("confidence"))) is None:
            return None
        if (number := parse_number(value)) is None or not 0 <= number <= 1:
            self.reader.remarks["confidence not readable"] += 1
            return None
        return number

    def _weigh(self, row: Mapping[str, Any]) -> Pair:
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
            self.reader.remarks["votes not readable"] += 1
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

    def _label(self, row: Mapping[str, Any]) -> float | None:
        """Return the label of a row's first image, None with a remark if there is none; raise BadRow for another."""
        value = row.get("label")
        if value is None:
            self.reader.remarks[NO_LABEL] += 1
            return None
        if self.labels is not None:
            if (label := self.labels.get(_key(value))) is None:
                raise BadRow(f"label is {short(value)}, none of labels: {', '.join(self.labels)}", BAD_LABEL)
            return label
        if isinstance(value, str) and value in WORDS:
            self._whole.add(False)
            return WORDS[value]
        number, digits = parse_number(value), isinstance(value, str) and value.strip().isdigit()
        whole = digits or (isinstance(value, int) and not isinstance(value, bool))
        self._whole.add(whole)
        if number is None or not 0 <= number <= 1:
            told = f"{short(value)}, neither in [0, 1] nor a, b or tie; say what it means, e.g. labels:"
            raise BadRow(f"label is {told} {'{1: a, 2: b}' if whole else '{left: a, right: b}'}", BAD_LABEL)
        return number


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


def parse_ranks(reader: PairReader, field: str, value: Any, count: int) -> Sequence[float | None]:
    """Return the ranks of ``count`` images, None with a remark if all are null; raise BadRow for another value."""
    if value is None or (value and value == [None] * count):
        reader.remarks[f"unlabelled (no {field})"] += 1
        return [None] * count
    ranks = [parse_number(item) for item in value] if isinstance(value, list) else [None]
    if None in ranks or len(ranks) != count:
        problem = f"{field} is {short(value)}, not one number for each of {count} images"
        raise BadRow(problem, f"{field} not readable")
    return ranks


def choice(reader: PairReader, labels: Mapping[str, Any]) -> float | None:
    """Return the label of the first image by the labels of both, None with a remark; raise BadRow outside [0, 1]."""
    for one, label in labels.items():
        if label is not None and not 0 <= label <= 1:
            raise BadRow(f"{one} is {label}, not in [0, 1]", "label outside [0, 1] or NaN")
    first, second = labels.values()
    if first is None or second is None:
        reader.remarks["unlabelled (null label)"] += 1
    elif abs(first + second - 1) > TOLERANCE:
        reader.remarks["unlabelled (labels do not add up to 1)"] += 1
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


SCORED_AXES = ("overall", "instruction_following", "visual_quality")
SIDED = (*SCORED_AXES, "model", "votes")
FACTS = (*(f"{name}_{side}" for name in SIDED for side in "ab"), "confidence", "vote", "label_0", "tags")
"""Columns of a reader's table that :meth:`PairReader.facts` returns."""


class RowReader(PairReader):
    """Base of readers that keep a table with a row per pair; a subclass sets it and finds the images of a row.

    The table has the columns ``pair_id``, ``prompt`` (null for an empty one) and ``label``, the probability that the
    image that the file names first is preferred (null without label), further ones of ``INDEX`` and ``FACTS``
    as they are published, and what :meth:`find_images` needs.

    A row is bad, and falls under ``on_error``, if it is no object, its prompt is no text or too long, or a field is not
    as the format says. A path that is missing or leads out of its folder raises InputError in the constructor under
    ``on_error: raise``; otherwise the problem is found when the image is decoded, as is a missing file. Under ``skip``
    and ``placeholder``, a split is read without its missing files. Ties and copies are kept.

    Args:
        source: Name of the data set.
        split: Name of the split.
        randomise_sides: Exchange images a and b of each row whose file names the preferred image first with probability
            ½, by a random number that depends on ``seed`` and the row's ``pair_id``. Without it, a model that always
            prefers a would always be right.
        seed: Seed of the random exchange.
        allow_outside: Whether rows may name files outside their folder, and links in it may lead out of it.
        options: ``on_error``, ``max_prompt_chars``, ``exif`` and ``sources``, see :class:`PairReader`.
    """

    table: pa.Table
    winner_first = True  # whether files name the preferred image first, where no column of this name tells it
    folder: Any = None  # path of the folder of images that are files; None if there is none
    prefix = ""  # start of the names of these images
    images_in: tuple[Any, Sequence[str]] | None = None  # table and two columns of images in bytes, if there is one
    sources_in: tuple[Any, str] | None = None  # table and column of pictures to edit in bytes, if there is one

    def __init__(
        self,
        source: PathText,
        split: str,
        *,
        randomise_sides: bool = True,
        seed: int = 0,
        allow_outside: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.source, self.split, self.seed, self.allow_outside = source, split, seed, allow_outside
        self.randomise_sides = randomise_sides and self.winner_first

    def fill(
        self, rows: Iterable[Row], told: str, empty: str, parser: PairRowParser, more: Mapping[str, Any] | None = None
    ) -> None:
        """Parse all rows to the table, with ``more`` columns, and report what was left out."""
        self.table = parser.table(rows, more)
        self.report(told, empty)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to the two images of a row, in the order of the file; ``row`` is column → value.

        The columns ``image_a`` and ``image_b`` have their names in a table, or their paths inside :attr:`folder`.
        """
        names = [row["image_a"], row["image_b"]]
        if self.images_in is None:
            return [*map(self.file_image, names)]
        table, columns = self.images_in
        return self.embedded_images(table.read(row["row"], columns), names)

    def find_sources(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to the pictures that a row's images are edits of, by default files of :attr:`folder`."""
        if self.sources_in is None:
            return [*map(self.file_image, row.get("sources") or ())]
        table, column = self.sources_in
        return self.embedded_images(table.read(row["row"], [column])[0], row.get("sources"))

    def file_image(self, path: str | bytes | None) -> ImageRef:
        """Return a reference to a file of :attr:`folder`."""
        return file_image(self.folder, path, self.prefix, self.allow_outside)

    def embedded_images(self, value: Any, keys: Sequence[str | None] | None = None) -> list[ImageRef]:
        """Return references to the images of a row that has several, or one, see :func:`embedded_image`."""
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        names = keys if keys and len(keys) == len(values) else [None] * len(values)
        return [embedded_image(one, key, self.file_image) for one, key in zip(values, names, strict=True)]

    def missing_files(self, rows: Iterable[int]) -> list[tuple[int, str]]:
        if self.folder is None or self.images_in is not None:
            return []
        numbers, listed, missing = [*map(int, rows)], dict[str, set[str]](), list[tuple[int, str]]()
        for column in {"image_a", "image_b", "sources"}.intersection(self.table.column_names):
            values = self.table[column].take(pa.array(numbers, pa.int64())).to_pylist()
            for row, value in zip(numbers, values, strict=True):
                for path in map(os.fsdecode, filter(None, value if isinstance(value, list) else [value])):
                    place, _, name = path.rpartition("/")
                    if place not in listed:  # one listing of a folder costs less than looking for each of its files
                        listed[place] = _names(self.folder / place)
                    if name not in listed[place] and not self.file_image(path).path.exists():  # type: ignore[union-attr]
                        missing.append((row, path))
        return sorted(missing)

    @property
    def root(self) -> Any:
        """Folder that files must lie in; None if they may lie anywhere."""
        return None if self.allow_outside else self.folder

    def check_inside(self, root: PathText, *files: Path) -> None:
        """Raise InputError for a file or folder of data that a link leads out of ``root``, unless that is allowed."""
        for file in () if self.allow_outside else files:
            if resolve_inside(Path(root), file) is None:
                raise InputError(f"{file} {outside(Path(root))}")

    def check_path(self, pair_id: str, field: str, path: Any) -> None:
        """Raise InputError for what is no path, or leads out of the folder, if ``on_error`` is raise."""
        if self.on_error != "raise":
            return
        if not isinstance(path, str) or not path:
            self.refuse(pair_id, f"{field} is {short(path)}, not a path", NO_IMAGE)
        elif not self.allow_outside and escapes(relative_path(path, self.folder)):
            self.refuse(pair_id, f"{field} {short(path)} {outside(self.folder)}", OUTSIDE)

    def read_row(self, index: int) -> dict[str, Any]:
        """Return the values of row ``index`` by column."""
        return {name: self.table[name][index].as_py() for name in self.table.column_names}

    def make_pair(self, row: dict[str, Any]) -> PreferencePair:
        """Return the pair of a row, with its images exchanged or not."""
        found = zip(self.find_images(row), (row.get("noise_a"), row.get("noise_b")), strict=True)
        image_a, image_b = (image if noise is None else replace(image, noise=noise) for image, noise in found)
        sources, prompt = self.find_sources(row), row["prompt"] or ""
        votes, weight = (row.get("votes_a"), row.get("votes_b")), row.get("weight")
        pair = PreferencePair(
            pair_id=row["pair_id"],
            prompt=EditPrompt(prompt, sources) if sources else prompt,
            image_a=image_a,
            image_b=image_b,
            label_a=row["label"],
            weight=1.0 if weight is None else weight,
            group_id=row.get("group_id"),
            votes=None if None in votes else votes,  # type: ignore[arg-type]
            confidence=row.get("confidence"),
            model_a=row.get("model_a"),
            model_b=row.get("model_b"),
            source=self.source,
            split=row.get("split") or self.split,
        )
        may_exchange = self.randomise_sides and row.get("winner_first", True)
        return pair.swapped() if may_exchange and coin_flips(self.seed, "side", 0, [pair.pair_id])[0] else pair

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> PreferencePair:
        return self.make_pair(self.read_row(index))

    def labels(self) -> np.ndarray:
        labels = self.table.column("label").to_numpy()
        return np.where(self.exchanged, 1.0 - labels, labels)

    def labelled(self) -> np.ndarray:
        return self.table.column("label").is_valid().to_numpy()

    def prompts(self) -> list[str]:
        """Return the raw prompt of every row; pictures in bytes that it edits are named without their bytes."""
        prompts, named = [prompt or "" for prompt in self.table.column("prompt").to_pylist()], self._named
        return [EditPrompt(prompt, named[row]) if named.get(row) else prompt for row, prompt in enumerate(prompts)]

    @cached_property
    def _named(self) -> dict[int, list[ImageRef]]:
        """References, without bytes, to the pictures that rows edit, by row; those in bytes without names are read."""
        known = "sources" in self.table.column_names
        keys = self.table["sources"].to_pylist() if known else [None] * len(self)
        if self.sources_in is None:
            return {row: self.find_sources({"sources": paths}) for row, paths in enumerate(keys) if paths}
        table, column = self.sources_in
        (alone := copy(table)).open_images([column])  # no other column is read
        named = {}
        for place, row in enumerate(self.table["row"].to_pylist()):
            read = () if keys[place] else self.embedded_images(alone.read(row)[0])
            named[place] = [*map(ImageRef, keys[place] or [image.image_key for image in read])]
        return named

    def pair_ids(self) -> list[str]:
        return self.table.column("pair_id").to_pylist()

    def groups(self) -> list[str]:
        return self.table.column("group").to_pylist() if "group" in self.table.column_names else super().groups()

    def facts(self) -> dict[str, list[Any]]:
        others = {f"{name}_{side}": f"{name}_{other}" for name in SIDED for side, other in ("ab", "ba")}
        columns = {name: self.table[name].combine_chunks() for name in FACTS if name in self.table.column_names}
        turned = pa.array(self.exchanged)
        facts = {name: pc.if_else(turned, columns[others.get(name, name)], column) for name, column in columns.items()}
        return {name: column.to_pylist() for name, column in facts.items()}

    @cached_property
    def exchanged(self) -> np.ndarray:
        """Whether the images of each row are exchanged, ``(len,)`` bool; a million rows take 4 s, once."""
        exchanged = np.full(len(self), self.randomise_sides)
        if "winner_first" in self.table.column_names:
            exchanged &= self.table.column("winner_first").fill_null(False).to_numpy()
        if exchanged.any():
            exchanged &= np.asarray(coin_flips(self.seed, "side", 0, self.pair_ids()), dtype=bool)
        return exchanged


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except (OSError, ValueError):
        return set()


def embedded_image(value: Any, key: str | None = None, find: Callable[[str], ImageRef] = ImageRef) -> ImageRef:
    """Return a reference to an image: bytes, or a struct of ``bytes`` or ``path``; None if it is missing.

    Without a ``key``, a hash of its bytes names the image, or its path, with which ``find`` makes a reference.
    """
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and path:
        found = find(path)
        return replace(found, image_key=key or found.image_key)
    return ImageRef(key or content_key(data), data)
