"""Scoring of a reader's pairs with several scorers; each image is decoded and scored once per prompt."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from latentreward.core.contracts import ImageRef, PreferencePair, sources_of
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.storage.digests import digest
from latentreward.data import ImageError, PairReader, count_text, decode_image
from latentreward.data.images import CLIP, MAX_PIXELS, map_ahead
from latentreward.data.readers.base import spread
from latentreward.data.score_table import oriented_gap
from latentreward.reward.scorers.base import ImageScorer, Scorer, TableScorer, one_model
from latentreward.reward.scorers.fingerprints import scorer_fingerprints

Item = tuple[str, str]  # key of an image, and its prompt
Side = tuple[int, int]  # index of a pair in a list, and 0 for image a or 1 for image b
Decoded = tuple[Image.Image | None, dict[Side, str]]
"""First copy of an image that could be decoded, or None; and an error message for each copy that could not."""
MODELS = b"served_models"
"""Key in a table's metadata of the models that servers named with the scores, by scorer, as JSON."""
TRIED_PAIRS = 8  # number of pairs whose images are tried before any model is loaded


class PairScoring:
    """Scores both images of each row of a reader with several scorers.

    Scores are kept in memory for the life of the object, by a hash of image key and prompt, so that an image that
    recurs is not scored again. A score takes about 0.2 kB. ``decode_threads`` decode images ahead; images of more than
    ``max_pixels`` are recorded as unreadable.
    """

    def __init__(
        self, reader: PairReader, scorers: Sequence[Scorer], decode_threads: int = 4, max_pixels: int = MAX_PIXELS
    ) -> None:
        names = [scorer.name for scorer in scorers]
        if not names or len(set(names)) < len(names):
            raise InputError(f"scorers are {', '.join(names) or 'none'}; give at least one, each with its own name")
        if others := [scorer for scorer in scorers if not isinstance(scorer, ImageScorer | TableScorer)]:
            kind = type(others[0]).__name__
            raise InputError(f"scorers: {kind} scores whole sets of pictures, not pairs; use it with evaluate-policy")
        check_at_least_one(decode_threads=decode_threads)
        if reader.holds != "images":
            raise InputError(f"reader: {type(reader).__name__} holds {reader.holds}; scorers need images")
        self.reader, self.scorers = reader, list(scorers)
        self.image_scorers = [scorer for scorer in scorers if isinstance(scorer, ImageScorer)]
        self.decode_threads, self.max_pixels = decode_threads, max_pixels
        self._group = max((scorer.batch_size for scorer in self.image_scorers), default=1)
        self._prompt_matters = any(scorer.uses_prompt for scorer in self.image_scorers)
        self._prompts = reader.prompts()
        self._known: dict[str, dict[bytes, Sequence[float]]] = {scorer.name: {} for scorer in self.image_scorers}
        self._models: dict[str, str | None] = {}
        self._sound: set[Any] = set()  # identities of pictures to edit that can be read: many images are edits of one

    def spec(self) -> dict[str, Any]:
        """Describe reader, scorers and settings that the scores depend on, as values for JSON."""
        texts = (f"{text}\0" for text in chain(self.reader.pair_ids(), map(_named, self._prompts)))
        rows = digest(chain([self.reader.labels().tobytes()], texts))
        return {
            "reader": f"{type(self.reader).__name__} with {len(self.reader)} rows, {rows}",
            "images": self.reader.image_digest,
            "scorers": {scorer.name: scorer.identity() for scorer in self.scorers},
            "files": {scorer.name: scorer_fingerprints(scorer) for scorer in self.scorers},
            "max_pixels": self.max_pixels,
            "exif": None if self.reader.exif == "ignore" else self.reader.exif,
        }

    def prepare(self) -> None:
        """Load the models of all image scorers."""
        for scorer in self.image_scorers:
            scorer.prepare()

    def recall(self, rows: range, table: pa.Table) -> None:
        """Take over the scores in ``table``, which an earlier run wrote for ``rows`` of the reader."""
        for name, model in json.loads((table.schema.metadata or {}).get(MODELS, b"{}")).items():
            self._note_model(name, model)
        for side in ("a", "b"):
            keys = table.column(f"image_{side}").to_pylist()
            for scorer in self.image_scorers:
                scores = np.stack([table.column(f"{name}_{side}").to_numpy() for name in scorer.columns], axis=1)
                for row, key, values in zip(rows, keys, scores, strict=True):
                    if not np.isnan(values).any():
                        name = _memory_key(scorer, (key, self._prompts[row]))
                        self._known[scorer.name][name] = tuple(values.tolist())

    def tables(self, parts: Sequence[range]) -> Iterator[tuple[range, pa.Table]]:
        """Yield each part's range of rows of the reader with its table of scores.

        Columns: ``pair_id``, ``image_a``, ``image_b``, ``label_a``, ``different_flag`` (0 for ties, else 1); for each
        column name of each scorer ``NAME_a``, ``NAME_b`` and ``NAME_gap`` (winner minus loser; absolute difference for
        ties; NaN without label); and ``problem_a``, ``problem_b``, the reason why an image could not be read. Scores of
        such an image are NaN.
        """
        for rows in parts:
            pairs = [self.reader[row] for row in rows]
            problems: dict[Side, str] = {}
            self._score_missing(pairs, problems)
            yield rows, self._table(pairs, problems)

    def _table(self, pairs: Sequence[PreferencePair], problems: Mapping[Side, str]) -> pa.Table:
        labels = np.array([np.nan if pair.label_a is None else pair.label_a for pair in pairs])
        columns: dict[str, Any] = {
            "pair_id": pa.array([pair.pair_id for pair in pairs], pa.string()),
            "image_a": pa.array([pair.image_a.image_key for pair in pairs], pa.string()),
            "image_b": pa.array([pair.image_b.image_key for pair in pairs], pa.string()),
            "label_a": pa.array(labels, pa.float64(), from_pandas=True),
            "different_flag": pa.array((labels != 0.5).astype(np.int8), mask=np.isnan(labels)),
        }
        for scorer in self.scorers:
            for name, (first, second) in zip(scorer.columns, self._scores(scorer, pairs, problems).T, strict=True):
                gap = oriented_gap(first, second, labels)
                columns |= {f"{name}_a": first, f"{name}_b": second, f"{name}_gap": gap}
        for side, name in enumerate(("problem_a", "problem_b")):
            texts = [problems.get((number, side)) for number in range(len(pairs))]
            columns[name] = pa.array(texts, pa.string())
        models = {name: model for name, model in self._models.items() if model is not None}
        return pa.table(columns, metadata={MODELS: json.dumps(models).encode()} if models else None)

    def _scores(self, scorer: Scorer, pairs: Sequence[PreferencePair], problems: Mapping[Side, str]) -> np.ndarray:
        """Return the scores ``(N, 2, K)`` float64 of N pairs by a scorer with K columns."""
        if isinstance(scorer, TableScorer):
            return scorer.lookup(pairs)[:, :, None]
        known = self._known[scorer.name]
        scores = np.full((len(pairs), 2, len(scorer.columns)), np.nan)
        for side_index, image, prompt in _sides(pairs):
            if side_index not in problems:
                scores[side_index] = known[_memory_key(scorer, (image.image_key, prompt))]
        return scores

    def _score_missing(self, pairs: Sequence[PreferencePair], problems: dict[Side, str]) -> None:
        """Score images without a known score, and add the reasons why images could not be read to ``problems``.

        Of an image that occurs several times, the first copy that can be read is scored, for all.
        """
        wanted: dict[Item, list[tuple[Side, ImageRef]]] = {}
        for side_index, image, prompt in _sides(pairs):
            item = image.image_key, prompt if self._prompt_matters else ""
            if not all(_memory_key(scorer, item) in self._known[scorer.name] for scorer in self.image_scorers):
                wanted.setdefault(item, []).append((side_index, image))
        for group in self._decoded(wanted):
            readable = {item: image for item, (image, _) in group if image is not None}
            for _, (_, unread) in group:
                problems.update(unread)
            for scorer in self.image_scorers:
                known = self._known[scorer.name]
                missing = {key: item for item in readable if (key := _memory_key(scorer, item)) not in known}
                scores = scorer([prompt for _, prompt in missing.values()], [readable[one] for one in missing.values()])
                self._note_model(scorer.name, scorer.served_model)
                known.update(zip(missing, scores.reshape(len(missing), len(scorer.columns)).tolist(), strict=True))

    def _note_model(self, scorer: str, model: str | None) -> None:
        remedy = "serve that model, or delete the table with its parts, and the same command scores all pairs again"
        self._models[scorer] = one_model(scorer, self._models.get(scorer), model, remedy)

    def _decoded(self, wanted: Mapping[Item, list[tuple[Side, ImageRef]]]) -> Iterator[list[tuple[Item, Decoded]]]:
        """Yield groups of decoded images; the next group is decoded while the current one is scored."""

        def decode(entry: tuple[Item, list[tuple[Side, ImageRef]]]) -> tuple[Item, Decoded]:
            """Decode the first copy of an image that can be read, and collect the problems of the copies before it."""
            problems: dict[Side, str] = {}
            for side_index, image in entry[1]:
                try:
                    for source in sources_of(entry[0][1]):  # before a scorer that reads it would fail for the batch
                        if source.identity not in self._sound:
                            decode_image(source, self.max_pixels)
                            self._sound.add(source.identity)
                    return entry[0], (decode_image(image, self.max_pixels, self.reader.exif), problems)
                except ImageError as error:
                    problems[side_index] = error.problem
            return entry[0], (None, problems)

        with closing(map_ahead(decode, wanted.items(), 2 * self._group, self.decode_threads)) as decoded:
            while group := list(islice(decoded, self._group)):
                yield group


def require_images(name: str, reader: PairReader, rows: int) -> None:
    """Check that some image of a split can be read, so that a wrong folder is refused before a model is loaded.

    Up to ``TRIED_PAIRS`` of the ``rows`` that are going to be scored are tried. Messages call the split ``name``.
    """
    if not rows:
        raise InputError(f"{name}: there are no pairs; rows left out by the reader: {count_text(reader.skipped)}")
    problems, tried = dict[str, str](), 0
    for row in spread(rows, TRIED_PAIRS):
        pair = reader[row]
        for image in (pair.image_a, pair.image_b):
            try:
                decode_image(image, exif=reader.exif)
                return
            except ImageError as error:
                tried += 1
                problems.setdefault(error.problem, pair.pair_id)
    if CLIP in problems:
        raise InputError(f"{name}: {problems[CLIP]} is a pair of clips; score clips by `latentreward score`")
    problem, pair_id = next(iter(problems.items()))
    tried_ones = f"none of {tried} images that were tried can be read ({pair_id}: {problem})"
    raise InputError(f"{name}: {tried_ones}; check where the images of this data set lie")


def _sides(pairs: Sequence[PreferencePair]) -> Iterator[tuple[Side, ImageRef, str]]:
    """Yield index, image and prompt of both sides of all pairs."""
    for number, pair in enumerate(pairs):
        for side, image in enumerate((pair.image_a, pair.image_b)):
            yield (number, side), image, pair.prompt


def _named(prompt: str) -> str:
    """Return a prompt's text with the names of the pictures that it edits."""
    return "\0".join([prompt, *(source.image_key for source in sources_of(prompt))])


def _memory_key(scorer: ImageScorer, item: Item) -> bytes:
    """Return the key under which a scorer's score of an image and prompt is kept in memory."""
    image_key, prompt = item
    text = f"{image_key}\0{_named(prompt)}" if scorer.uses_prompt else image_key
    return bytes.fromhex(digest([text]))  # bytes take half the memory of hexadecimal digits
