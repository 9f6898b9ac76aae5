"""Rows of a reader through a list of scorers: each image decoded and scored once for a prompt."""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from latentreward.contracts import ImageRef, PreferencePair
from latentreward.data.images import MAX_PIXELS, ImageError, decode_image
from latentreward.data.readers import PairReader
from latentreward.data.score_table import oriented_gap
from latentreward.errors import InputError
from latentreward.scorers.base import ImageScorer, Scorer, TableScorer

Item = tuple[str, str]
"""Key of an image, and a prompt."""
READING = "reading and decoding"


class PairScoring:
    """Scores of both images of a reader's rows.

    Scores are remembered, by a hash of image and prompt, for as long as the object lives: about 0.2 kB for each image
    and scorer.

    Args:
        reader: Where pairs come from.
        scorers: Scorers with different names.
        decode_threads: Threads that decode images ahead.
        max_pixels: Images with more are recorded as unreadable.

    Attributes:
        seconds: Time spent, by scorer and for ``READING``.
        images: Images scored, by scorer.

    Raises:
        InputError: If there is no scorer, two have one name, or the reader has no images.
    """

    def __init__(
        self, reader: PairReader, scorers: Sequence[Scorer], decode_threads: int = 4, max_pixels: int = MAX_PIXELS
    ) -> None:
        names = [scorer.name for scorer in scorers]
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"scorers are {', '.join(names) or 'none'}; give at least one, each with a name of its own"
            )
        if decode_threads < 1:
            raise InputError(f"decode_threads is {decode_threads}; it must be at least 1")
        if reader.holds != "images":
            raise InputError(f"reader: {type(reader).__name__} holds {reader.holds}; scorers need images")
        self.reader, self.scorers = reader, list(scorers)
        self.image_scorers = [scorer for scorer in scorers if isinstance(scorer, ImageScorer)]
        self.decode_threads, self.max_pixels = decode_threads, max_pixels
        self._group = max((scorer.batch_size for scorer in self.image_scorers), default=1)
        self._prompts = reader.prompts()
        self._known: dict[str, dict[bytes, float]] = {scorer.name: {} for scorer in self.image_scorers}
        self.seconds: Counter[str] = Counter()
        self.images: Counter[str] = Counter()

    def spec(self) -> dict[str, Any]:
        """What the scores depend on, as JSON takes it."""
        digest = hashlib.blake2b(self.reader.labels().tobytes(), digest_size=16)
        for texts in (self.reader.pair_ids(), self._prompts):
            for text in texts:
                digest.update(text.encode("utf-8", "replace") + b"\0")
        return {
            "reader": f"{type(self.reader).__name__} with {len(self.reader)} rows, {digest.hexdigest()}",
            "scorers": {scorer.name: scorer.identity() for scorer in self.scorers},
            "max_pixels": self.max_pixels,
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
                scores = table.column(f"{scorer.name}_{side}").to_numpy()
                for row, key, score in zip(rows, keys, scores, strict=True):
                    if not np.isnan(score):
                        self._known[scorer.name][_name(scorer, (key, self._prompts[row]))] = float(score)

    def score(self, rows: range) -> pa.Table:
        """The table of some rows of the reader.

        Columns are ``pair_id``, ``image_a``, ``image_b``, ``label_a``, ``different_flag``, for each scorer ``NAME_a``,
        ``NAME_b`` and ``NAME_gap`` (winner minus loser, the absolute difference for ties, NaN without label), and
        ``problem_a``, ``problem_b``: why an image could not be read, in which case its scores are NaN.
        """
        start = time.perf_counter()
        pairs = [self.reader[row] for row in rows]
        self.seconds[READING] += time.perf_counter() - start
        problems = self._score_missing(pairs)
        labels = np.array([np.nan if pair.label_a is None else pair.label_a for pair in pairs])
        columns: dict[str, Any] = {
            "pair_id": pa.array([pair.pair_id for pair in pairs], pa.string()),
            "image_a": pa.array([pair.image_a.image_key for pair in pairs], pa.string()),
            "image_b": pa.array([pair.image_b.image_key for pair in pairs], pa.string()),
            "label_a": pa.array(labels, pa.float64(), from_pandas=True),
            "different_flag": pa.array((labels != 0.5).astype(np.int8), mask=np.isnan(labels)),
        }
        for scorer in self.scorers:
            first, second = self._scores(scorer, pairs).T
            gap = oriented_gap(first, second, labels)
            columns |= {f"{scorer.name}_a": first, f"{scorer.name}_b": second, f"{scorer.name}_gap": gap}
        for side in ("a", "b"):
            texts = [problems.get(_item(pair, side)) for pair in pairs]
            columns[f"problem_{side}"] = pa.array(texts, pa.string())
        return pa.table(columns)

    def _scores(self, scorer: Scorer, pairs: Sequence[PreferencePair]) -> np.ndarray:
        """``(N, 2)`` float64."""
        if isinstance(scorer, TableScorer):
            return scorer.lookup(pairs)
        known = self._known[scorer.name]
        items = [_item(pair, side) for pair in pairs for side in ("a", "b")]
        scores = [known.get(_name(scorer, item), np.nan) for item in items]
        return np.array(scores, dtype=np.float64).reshape(len(pairs), 2)

    def _score_missing(self, pairs: Sequence[PreferencePair]) -> dict[Item, str]:
        """Score what is not known yet; returns why images could not be read."""
        wanted: dict[Item, ImageRef] = {}
        for pair in pairs:
            for side, image in (("a", pair.image_a), ("b", pair.image_b)):
                item = _item(pair, side)
                if not all(_name(scorer, item) in self._known[scorer.name] for scorer in self.image_scorers):
                    wanted.setdefault(item, image)
        problems: dict[Item, str] = {}
        for group in self._decoded(wanted):
            readable = {item: image for item, image in group if not isinstance(image, ImageError)}
            problems |= {item: image.problem for item, image in group if isinstance(image, ImageError)}
            for scorer in self.image_scorers:
                self._score_group(scorer, readable)
        return problems

    def _score_group(self, scorer: ImageScorer, readable: Mapping[Item, Image.Image]) -> None:
        known = self._known[scorer.name]
        missing = {name: item for item in readable if (name := _name(scorer, item)) not in known}
        start = time.perf_counter()
        scores = scorer([prompt for _, prompt in missing.values()], [readable[item] for item in missing.values()])
        self.seconds[scorer.name] += time.perf_counter() - start
        self.images[scorer.name] += len(missing)
        known.update(zip(missing, scores.tolist(), strict=True))

    def _decoded(self, wanted: Mapping[Item, ImageRef]) -> Iterator[list[tuple[Item, Image.Image | ImageError]]]:
        """Groups of decoded images; the next group is decoded while one is scored."""
        todo = iter(wanted.items())
        with ThreadPoolExecutor(self.decode_threads) as pool:
            ahead: deque[tuple[Item, Future[Image.Image | ImageError]]] = deque()

            def submit(entries: Iterable[tuple[Item, ImageRef]]) -> None:
                ahead.extend((item, pool.submit(self._decode, image)) for item, image in entries)

            submit(islice(todo, 2 * self._group))
            while ahead:
                start = time.perf_counter()
                group = [(item, future.result()) for item, future in islice(ahead, self._group)]
                self.seconds[READING] += time.perf_counter() - start
                for _ in group:
                    ahead.popleft()
                submit(islice(todo, len(group)))
                yield group

    def _decode(self, image: ImageRef) -> Image.Image | ImageError:
        try:
            return decode_image(image, self.max_pixels)
        except ImageError as error:
            return error


def _item(pair: PreferencePair, side: str) -> Item:
    return (pair.image_a if side == "a" else pair.image_b).image_key, pair.prompt


def _name(scorer: Scorer, item: Item) -> bytes:
    """Short name of what a scorer looks at."""
    image_key, prompt = item
    text = f"{image_key}\0{prompt}" if getattr(scorer, "uses_prompt", True) else image_key
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
