"""Counts of labels, prompts, images and left-out rows of a data set, of items that splits share, and of scores."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import get_args

import numpy as np

from latentreward.contracts import ImageRef, PreferencePair, sources_of
from latentreward.data.buckets import MIN_PIXELS, PUBLISHED_BUCKETS, Bucket, assign_bucket
from latentreward.data.clips import read_clip_header
from latentreward.data.images import (
    CLIP,
    ExifOrientation,
    ImageError,
    check_scans,
    decode_image,
    decode_latents,
    read_header,
)
from latentreward.data.mpcf import MPCF, Comparison, Strategy, select_consistent
from latentreward.data.readers import PairReader
from latentreward.data.score_table import PairGaps
from latentreward.data.splits import normalise_prompt
from latentreward.errors import InputError, check_range, quoted
from latentreward.storage.progress import Progress

LATENT_PIXELS = 8
MOST_UNREADABLE = 5
"""Unreadable images of a split, and doubtful rows of a kind, to name; the others are counted."""
SELF_PAIR, REPEATED, CONTRADICTORY, OTHER_SHAPE = (
    "same image on both sides",
    "pair of an earlier row",
    "other winner than an earlier row",
    "image of another aspect ratio than what was edited",
)
"""Kinds of doubtful rows; two pairs are equal if their prompts and both images are, in any order."""
OTHER_ASPECT = 0.1  # smallest difference of the logarithms of two aspect ratios; sides of whole tokens differ by less
QUANTILES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
NO_BUCKET = "no bucket of this aspect ratio"
ROTATED = {
    "apply": "EXIF orientation, turned upright (exif: apply)",
    "ignore": "EXIF orientation, not turned (exif: ignore)",
}

Seen = tuple[tuple[int, int] | str | None, int]
"""Result for one image: (height, width), None for a clip, or a problem's name; and a hash of its bytes or 0."""


@dataclass
class ImageCounts:
    """Counts of the images of a split; an image that occurs in several pairs is counted once."""

    rows: int = 0  # rows whose images were examined
    distinct: int = 0  # images with different names
    sources: int = 0  # pictures of which images are edits, with different names
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width); a latent is 8 x 8 pixels
    buckets: Counter[str] = field(default_factory=Counter)  # images by bucket, or by the reason why they have none
    clips: Counter[str] = field(default_factory=Counter)  # by length and frame rate, or why no header was read
    odd: Counter[str] = field(default_factory=Counter)  # images by unusual property, e.g. alpha or EXIF orientation
    mixed_rows: int = 0  # rows whose two images have different buckets
    unreadable_rows: Counter[str] = field(default_factory=Counter)  # by the problem of the row's first such image
    unreadable: int = 0  # images
    first_unreadable: list[str] = field(default_factory=list)  # row (from 0), pair and error of the first few
    doubtful: Counter[str] = field(default_factory=Counter)  # rows by one of the four kinds above
    first_doubtful: list[str] = field(default_factory=list)  # row, pair and kind of the first few of each kind


@dataclass
class SplitCounts:
    """Counts of one split."""

    name: str
    reader: str  # name of its class
    rows: int
    labels: dict[str, int]  # rows by winner: a, b, tie, or unlabelled
    distinct_prompts: int  # compared as raw text, and by the pictures to edit
    edits: dict[str, int]  # rows whose images are edits, by the number of pictures that each edits
    prompt_lengths: dict[str, int]  # quantile -> number of characters of a row's prompt
    images: ImageCounts | None  # None if the reader has no images or no rows were to be examined
    skipped: Counter[str]  # rows that the reader left out, by reason
    remarks: Counter[str]  # rows that the reader kept with a remark, e.g. without their label, by reason
    named: dict[str, list[str]] = field(default_factory=dict)  # pairs of the first few of these rows, by reason
    complete: bool = True  # False if an interrupt ended the count early


@dataclass
class SplitContents:
    """Prompts and images of a split, for comparison with other splits."""

    prompts: list[str]  # normalised prompt of every row
    keys: list[tuple[str, str]]  # ``image_key`` of images a and b of every examined row
    hashes: np.ndarray  # (examined rows, 2) int64, of the bytes of images a and b; 0 if the bytes were not read
    sources: list[tuple[str, ...]] = field(default_factory=list)  # ``image_key`` of each row's pictures to edit


@dataclass(frozen=True)
class Leakage:
    """Numbers of prompts and images that two splits share.

    The keys of the dicts are ``prompts``, ``image names``, ``image contents`` and, of edits, ``pictures to edit``,
    which are compared by name.
    """

    first: str  # name of the first split
    second: str  # name of the second split
    shared: dict[str, int]  # number of distinct prompts, image names and image contents that occur in both splits
    first_rows: dict[str, int]  # number of rows of the first split with a shared prompt, image name or image content
    second_rows: dict[str, int]  # number of rows of the second split with a shared prompt, image name or image content


class ImageCensus:
    """Counter of a split's images, to which rows are added one by one.

    Args:
        buckets: Buckets to sort image sizes into.
        decode: Decode every image. Without it only headers are read, so that truncated images are not found.
        hash_bytes: Read all bytes of every image to compute its hash.
        min_pixels: Least height × width; a smaller image has no bucket.
        exif: Whether the EXIF orientation of images is applied, see :class:`PixelLoader`.
    """

    interrupt: KeyboardInterrupt | None = None  # Ctrl-C or SIGTERM that ended the count early

    def __init__(
        self,
        buckets: Sequence[Bucket] = PUBLISHED_BUCKETS,
        decode: bool = False,
        hash_bytes: bool = True,
        min_pixels: int = MIN_PIXELS,
        exif: ExifOrientation = "ignore",
    ) -> None:
        self.buckets, self.decode, self.hash_bytes, self.min_pixels = buckets, decode, hash_bytes, min_pixels
        self.exif = exif
        self.counts = ImageCounts()
        self.keys: list[tuple[str, str]] = []
        self.hashes: list[tuple[int, int]] = []
        self.sources: list[tuple[str, ...]] = []
        self._seen: dict[str, Seen] = {}
        self._sources: dict[str, tuple[int, int] | str | None] = {}
        self._pairs: dict[int, tuple[int, float]] = {}

    def add(self, pair: PreferencePair) -> None:
        """Count a row, and those of its images that occurred in no earlier row."""
        (size_a, hash_a), (size_b, hash_b) = (self._look_at(one, pair.pair_id) for one in (pair.image_a, pair.image_b))
        sources = []  # the size of each picture to edit, or a problem's name
        for source in sources_of(pair.prompt):
            key = source.image_key
            if key not in self._sources or not key:
                self.counts.sources += 1
                try:
                    self._sources[key] = self._size(source)
                except ImageError as error:
                    self._sources[key] = self._unreadable(error, pair.pair_id)
            sources.append(self._sources[key])
        self._compare(pair, (hash_a, hash_b))
        edited = [math.log(size[0] / size[1]) for size in sources if isinstance(size, tuple)]
        made = [math.log(size[0] / size[1]) for size in (size_a, size_b) if isinstance(size, tuple)]
        if edited and any(min(abs(one - other) for other in edited) > OTHER_ASPECT for one in made):
            self._doubt(OTHER_SHAPE, pair)
        self.counts.rows += 1
        self.keys.append((pair.image_a.image_key, pair.image_b.image_key))
        self.hashes.append((hash_a, hash_b))
        self.sources.append(tuple(source.image_key for source in sources_of(pair.prompt)))
        if problems := [size for size in (size_a, size_b, *sources) if isinstance(size, str)]:
            self.counts.unreadable_rows[problems[0]] += 1
        elif len({self._bucket(size) for size in (size_a, size_b) if isinstance(size, tuple)}) > 1:
            self.counts.mixed_rows += 1

    def _compare(self, pair: PreferencePair, hashes: tuple[int, int]) -> None:
        images = zip(hashes, (pair.image_a, pair.image_b), strict=True)
        first, second = (str(number or image.image_key) for number, image in images)
        if not first or not second:
            return
        label = math.nan if pair.label_a is None else pair.label_a
        if first > second:
            first, second, label = second, first, 1 - label
        place = self.counts.rows, label
        named = hash((normalise_prompt(pair.prompt), first, second))  # the texts of a million rows take a gigabyte
        row, before = self._pairs.setdefault(named, place)
        if first == second:
            kind, told = SELF_PAIR, ""
        elif row == self.counts.rows:
            return
        else:
            kind, told = CONTRADICTORY if (before - 0.5) * (label - 0.5) < 0 else REPEATED, f" ({row})"
        self._doubt(kind, pair, told)

    def _doubt(self, kind: str, pair: PreferencePair, told: str = "") -> None:
        self.counts.doubtful[kind] += 1
        if self.counts.doubtful[kind] <= MOST_UNREADABLE:
            self.counts.first_doubtful.append(f"row {self.counts.rows}, pair {quoted(pair.pair_id)}: {kind}{told}")

    def _unreadable(self, error: ImageError, pair_id: str) -> str:
        self.counts.unreadable += 1
        if len(self.counts.first_unreadable) < MOST_UNREADABLE:
            self.counts.first_unreadable.append(f"row {self.counts.rows}, pair {pair_id}: {error}")
        return error.problem

    def _look_at(self, image: ImageRef, pair_id: str) -> Seen:
        if image.image_key in self._seen and image.image_key:
            return self._seen[image.image_key]
        seen: Seen
        try:
            seen, data = (self._size(image), 0), image.data
            if self.hash_bytes and data is None and image.path is not None:
                data = image.path.read_bytes()
            if self.hash_bytes and data is not None:
                number = int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)
                seen = seen[0], number or 1
        except ImageError as error:
            seen = self._unreadable(error, pair_id), 0
        if image.image_key:
            self._seen[image.image_key] = seen
            self.counts.distinct += 1
        if isinstance(seen[0], tuple):
            self.counts.sizes[seen[0]] += 1
            self.counts.buckets[self._bucket(seen[0])] += 1
        return seen

    def _size(self, image: ImageRef) -> tuple[int, int] | None:
        if image.holds == "latents":
            *_, height, width = decode_latents(image, clip=None).shape
            return LATENT_PIXELS * height, LATENT_PIXELS * width
        try:
            header = read_header(image, exif=self.exif)
        except ImageError as error:
            if error.problem != CLIP:
                raise
            try:
                clip = read_clip_header(image)
            except ImageError:
                raise
            except InputError as missing:  # PyAV is missing
                self.counts.clips[f"not inspected: {missing}"] += 1
            else:
                self.counts.sizes[clip.height, clip.width] += 1
                self.counts.clips[str(clip)] += 1
            return None
        (decode_image if self.decode else check_scans)(image)
        self.counts.odd.update(header.oddities)
        if header.rotated:
            self.counts.odd[ROTATED[self.exif]] += 1
        if header.height * header.width < self.buckets[0].area:
            self.counts.odd[f"fewer pixels than the smallest bucket, {self.buckets[0]}"] += 1
        if header.height * header.width == 1:
            self.counts.odd["a single pixel"] += 1
        return header.height, header.width

    def _bucket(self, size: tuple[int, int]) -> str:
        if math.prod(size) < self.min_pixels:
            return f"below {self.min_pixels} pixels"
        bucket = assign_bucket(*size, self.buckets, min_pixels=0)
        return NO_BUCKET if bucket is None else str(bucket)


def inspect_reader(
    name: str, reader: PairReader, census: ImageCensus, limit: int | None = None
) -> tuple[SplitCounts, SplitContents]:
    """Count labels, prompts and images of a split.

    Images are those of the first ``limit`` rows; None takes all. Ctrl-C or SIGTERM ends counting and keeps the counts
    so far. Each split needs a ``census`` of its own.

    Raises:
        InputError: If ``limit`` is negative.
    """
    check_range("[0, inf)", "0 counts no images, leave it out for all", limit=limit)
    prompts, labels = reader.prompts(), reader.labels()
    total = len(reader) if limit is None else min(len(reader), limit)
    total = 0 if reader.holds == "nothing" else total
    try:
        with Progress(f"inspect {name}", total, "rows") as progress:
            for row in range(total):
                census.add(reader[row])
                progress.add()
    except KeyboardInterrupt as stop:
        census.interrupt = stop
    counts = SplitCounts(
        name=name,
        reader=type(reader).__name__,
        rows=len(reader),
        labels=count_labels(labels),
        distinct_prompts=len(set(prompts)),
        edits=count_edits(prompts),
        prompt_lengths=quantiles([len(prompt) for prompt in prompts]),
        images=census.counts if total else None,
        skipped=Counter(reader.skipped),
        remarks=Counter(reader.remarks),
        named=dict(reader.named),
        complete=census.interrupt is None,
    )
    normalised = [normalise_prompt(prompt) for prompt in prompts]
    hashes = np.array(census.hashes, dtype=np.int64).reshape(-1, 2)
    return counts, SplitContents(normalised, census.keys, hashes, census.sources)


def count_labels(labels: np.ndarray) -> dict[str, int]:
    """Count rows by winner, from ``label_a`` ``(N,)`` with NaN for unlabelled rows."""
    return {
        "a wins": int((labels > 0.5).sum()),
        "b wins": int((labels < 0.5).sum()),
        "ties": int((labels == 0.5).sum()),
        "unlabelled": int(np.isnan(labels).sum()),
    }


def count_edits(prompts: Sequence[str]) -> dict[str, int]:
    """Count the rows that are edits by their number of pictures, as text, in ascending order."""
    counts = Counter(len(sources_of(prompt)) for prompt in prompts)
    return {str(number): counts[number] for number in sorted(counts) if number}


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return the quantiles ``QUANTILES``, each an element of ``values``; empty if there are no values."""
    if not values:
        return {}
    found = np.quantile(np.array(values), list(QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(QUANTILES, found, strict=True)}


def find_leakage(first: str, second: str, contents: tuple[SplitContents, SplitContents]) -> Leakage:
    """Count prompts, image names and image contents that two splits share.

    Images without a name are left out of the names, images without a hash out of the contents.
    """
    shared: dict[str, int] = {}
    rows: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for what, unknown, values in (
        ("prompts", None, [[(prompt,) for prompt in split.prompts] for split in contents]),
        ("image names", "", [split.keys for split in contents]),
        ("image contents", 0, [split.hashes.tolist() for split in contents]),
        ("pictures to edit", "", [split.sources for split in contents]),
    ):
        if what == "pictures to edit" and not all(map(any, values)):
            continue
        first_set, second_set = ({item for row in split for item in row} - {unknown} for split in values)
        common = first_set & second_set
        shared[what] = len(common)
        for side, split in zip(rows, values, strict=True):
            side[what] = sum(not common.isdisjoint(row) for row in split)
    return Leakage(first, second, shared, *rows)


@dataclass(frozen=True)
class ScorerCounts:
    """Agreement of one scorer with the labels."""

    pairs: int  # decided pairs (not ties) that have a score gap
    below: int  # pairs of these whose chosen image scores below the rejected image
    equal: int  # pairs of these whose images have equal scores
    missing: int  # decided pairs and ties without a score
    share_below: float | None  # below / pairs; None if pairs is 0


@dataclass(frozen=True)
class StrategyCounts:
    """Numbers of pairs that one filter keeps and drops, see :class:`~latentreward.data.mpcf.MPCF`."""

    strategy: int  # number of the published strategy
    comparison: str  # code keeps gaps above the floors; paper also keeps gaps equal to the floors
    decided: int  # decided pairs (not ties) that are kept
    ties: int  # ties that are kept, by the limits of the released code
    dropped: Counter[str]  # dropped pairs by reason


@dataclass
class ScoreCounts:
    """Counts over a score table for the rows of one split."""

    rows: int  # of the split
    problems: dict[str, int]  # rows for which the table has no usable gap, by reason
    scorers: dict[str, ScorerCounts]
    strategies: list[StrategyCounts] = field(default_factory=list)  # empty if the table lacks one of their scorers
    note: str = ""  # reason why strategies is empty


def inspect_scores(gaps: PairGaps) -> ScoreCounts:
    """Count how each scorer agrees with the labels, and how many pairs each MPCF strategy keeps."""
    problems = {reason: int(rows.sum()) for reason, rows in gaps.problems.items() if rows.any()}
    sound = np.ones(len(gaps), dtype=bool)
    for rows in gaps.problems.values():
        sound &= ~rows
    scorers = {}
    for name, values in gaps.values.items():
        known = sound & ~np.isnan(values)
        decided = values[known & gaps.decided]
        below, equal, missing = (int(rows.sum()) for rows in (decided < 0, decided == 0, sound & ~known))
        share = below / len(decided) if len(decided) else None
        scorers[name] = ScorerCounts(len(decided), below, equal, missing, share)
    counts = ScoreCounts(len(gaps), problems, scorers)
    try:
        for strategy in get_args(Strategy):
            for comparison in get_args(Comparison):
                keep, dropped = select_consistent(gaps, MPCF(strategy, comparison))
                kept = int((keep & gaps.decided).sum()), int((keep & ~gaps.decided).sum())
                counts.strategies.append(StrategyCounts(strategy, comparison, *kept, dropped))
    except InputError as error:
        counts.note = str(error)
    return counts
