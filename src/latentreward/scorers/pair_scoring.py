"""Rows of a reader through a list of scorers: each image decoded and scored once for a prompt."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from latentreward.contracts import ImageRef, PreferencePair
from latentreward.data.ahead import map_ahead
from latentreward.data.images import MAX_PIXELS, ImageError, decode_image
from latentreward.data.readers import PairReader
from latentreward.data.score_table import oriented_gap
from latentreward.errors import InputError, check_at_least_one
from latentreward.scorers.base import ImageScorer, Scorer, TableScorer
from latentreward.storage.digests import digest

Item = tuple[str, str]
"""Key of an image, and a prompt."""
Place = tuple[int, int]
"""Number of a pair, and 0 for its image a, 1 for b."""
Decoded = tuple[Image.Image | None, dict[Place, str]]
"""An image, and why copies of it before this one could not be read; no image if none could."""
READING = "reading and decoding"


class PairScoring:
    """Scores of both images of a reader's rows.

    Scores are remembered, by a hash of image and prompt, for as long as the object lives: about 0.2 kB for each image
    and score.

    Args:
        reader: Where pairs come from.
        scorers: Scorers with different names.
        decode_threads: Threads that decode images ahead.
        max_pixels: Images with more pixels are recorded as unreadable.

    Attributes:
        seconds: Time spent, by scorer and for ``READING``.
        images: Images scored, by scorer.

    Raises:
        InputError: If there is no scorer, two have one name, one does not score pairs, or the reader has no images.
    """

    def __init__(
        self, reader: PairReader, scorers: Sequence[Scorer], decode_threads: int = 4, max_pixels: int = MAX_PIXELS
    ) -> None:
        names = [scorer.name for scorer in scorers]
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"scorers are {', '.join(names) or 'none'}; give at least one, each with a name of its own"
            )
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
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.images: Counter[str] = Counter()

    def spec(self) -> dict[str, Any]:
        """What the scores depend on, as JSON takes it."""
        texts = (f"{text}\0" for text in chain(self.reader.pair_ids(), self._prompts))
        rows = digest(chain([self.reader.labels().tobytes()], texts))
        return {
            "reader": f"{type(self.reader).__name__} with {len(self.reader)} rows, {rows}",
            "scorers": {scorer.name: scorer.identity() for scorer in self.scorers},
            "max_pixels": self.max_pixels,
            "exif": None if self.reader.exif == "ignore" else self.reader.exif,  # null as in tables of before
        }

    def prepare(self) -> None:
        """Load the scorers."""
        for scorer in self.image_scorers:
            scorer.prepare()

    def recall(self, rows: range, table: pa.Table) -> None:
        """Remember the scores of rows that an earlier run left."""
        for side in ("a", "b"):
            keys = table.column(f"image_{side}").to_pylist()
            for scorer in self.image_scorers:
                scores = np.stack([table.column(f"{name}_{side}").to_numpy() for name in scorer.columns], axis=1)
                for row, key, values in zip(rows, keys, scores, strict=True):
                    if not np.isnan(values).any():
                        self._known[scorer.name][_name(scorer, (key, self._prompts[row]))] = tuple(values.tolist())

    def read(self, rows: range) -> list[PreferencePair]:
        """Some rows of the reader."""
        start = time.perf_counter()
        pairs = [self.reader[row] for row in rows]
        self.seconds[READING] += time.perf_counter() - start
        return pairs

    def tables(self, parts: Sequence[range]) -> Iterator[tuple[range, pa.Table]]:
        """Yield rows of the reader with their table; at Ctrl-C, those of the part that are scored already.

        Columns are ``pair_id``, ``image_a``, ``image_b``, ``label_a``, ``different_flag``, for each scorer ``NAME_a``,
        ``NAME_b`` and ``NAME_gap`` (winner minus loser, the absolute difference for ties, NaN without label), and
        ``problem_a``, ``problem_b``: why an image could not be read, in which case its scores are NaN. A scorer of
        several columns has each of them under its own name.
        """
        for rows in parts:
            pairs = self.read(rows)
            problems: dict[Place, str] = {}
            try:
                self._score_missing(pairs, problems)
            except KeyboardInterrupt:
                done = pairs[: self._first_unfinished(pairs, problems)]
                if done:
                    yield range(rows.start, rows.start + len(done)), self._table(done, problems)
                raise
            yield rows, self._table(pairs, problems)

    def _first_unfinished(self, pairs: Sequence[PreferencePair], problems: Mapping[Place, str]) -> int:
        """Index of the first pair with an image that is neither scored nor known to be unreadable."""
        for place, image, prompt in _sides(pairs):
            names = {scorer.name: _name(scorer, (image.image_key, prompt)) for scorer in self.image_scorers}
            if place not in problems and not all(name in self._known[scorer] for scorer, name in names.items()):
                return place[0]
        return len(pairs)

    def _table(self, pairs: Sequence[PreferencePair], problems: Mapping[Place, str]) -> pa.Table:
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
        return pa.table(columns)

    def _scores(self, scorer: Scorer, pairs: Sequence[PreferencePair], problems: Mapping[Place, str]) -> np.ndarray:
        """``(N, 2, K)`` float64 of a scorer of K columns."""
        if isinstance(scorer, TableScorer):
            return scorer.lookup(pairs)[:, :, None]
        known = self._known[scorer.name]
        scores = np.full((len(pairs), 2, len(scorer.columns)), np.nan)
        for place, image, prompt in _sides(pairs):
            if place not in problems:
                scores[place] = known[_name(scorer, (image.image_key, prompt))]
        return scores

    def _score_missing(self, pairs: Sequence[PreferencePair], problems: dict[Place, str]) -> None:
        """Score what is not known yet; why images could not be read is added to ``problems``.

        Where copies of an image recur, the first that can be read counts for itself and all later ones, so that the
        result does not depend on how rows are grouped.
        """
        wanted: dict[Item, list[tuple[Place, ImageRef]]] = {}
        for place, image, prompt in _sides(pairs):
            item = image.image_key, prompt if self._prompt_matters else ""
            if not all(_name(scorer, item) in self._known[scorer.name] for scorer in self.image_scorers):
                wanted.setdefault(item, []).append((place, image))
        for group in self._decoded(wanted):
            readable = {item: image for item, (image, _) in group if image is not None}
            for _, (_, unread) in group:
                problems.update(unread)
            for scorer in self.image_scorers:
                self._score_group(scorer, readable)

    def _score_group(self, scorer: ImageScorer, readable: Mapping[Item, Image.Image]) -> None:
        known = self._known[scorer.name]
        missing = {name: item for item in readable if (name := _name(scorer, item)) not in known}
        start = time.perf_counter()
        scores = scorer([prompt for _, prompt in missing.values()], [readable[item] for item in missing.values()])
        self.seconds[scorer.name] += time.perf_counter() - start
        self.images[scorer.name] += len(missing)
        known.update(zip(missing, scores.reshape(len(missing), len(scorer.columns)).tolist(), strict=True))

    def _decoded(self, wanted: Mapping[Item, list[tuple[Place, ImageRef]]]) -> Iterator[list[tuple[Item, Decoded]]]:
        """Groups of decoded images; the next group is decoded while one is scored."""
        decoded = map_ahead(
            lambda entry: (entry[0], self._decode(entry[1])), wanted.items(), 2 * self._group, self.decode_threads
        )
        with closing(decoded):
            while True:
                start = time.perf_counter()
                group = list(islice(decoded, self._group))
                self.seconds[READING] += time.perf_counter() - start
                if not group:
                    return
                yield group

    def _decode(self, copies: Sequence[tuple[Place, ImageRef]]) -> Decoded:
        """The first copy of an image that can be read."""
        problems: dict[Place, str] = {}
        for place, image in copies:
            try:
                return decode_image(image, self.max_pixels, self.reader.exif), problems
            except ImageError as error:
                problems[place] = error.problem
        return None, problems


def _sides(pairs: Sequence[PreferencePair]) -> Iterator[tuple[Place, ImageRef, str]]:
    """Place, image and prompt of both sides of all pairs."""
    for number, pair in enumerate(pairs):
        for side, image in enumerate((pair.image_a, pair.image_b)):
            yield (number, side), image, pair.prompt


def _name(scorer: ImageScorer, item: Item) -> bytes:
    """Short name of what a scorer looks at."""
    image_key, prompt = item
    text = f"{image_key}\0{prompt}" if scorer.uses_prompt else image_key
    return bytes.fromhex(digest([text]))  # half the memory of the digits
