"""Counts over a data set: labels, prompts, image sizes, rows left out, and what two splits share."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from latentreward.contracts import ImageRef, PreferencePair
from latentreward.data.buckets import MIN_PIXELS, PUBLISHED_BUCKETS, Bucket, assign_bucket
from latentreward.data.images import ExifOrientation, ImageError, decode_image, read_header
from latentreward.data.latents import decode_latents
from latentreward.data.readers import PairReader
from latentreward.data.splits import normalise_prompt
from latentreward.errors import InputError
from latentreward.storage.progress import Progress

LATENT_PIXELS = 8
QUANTILES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
NO_BUCKET = "no bucket of this aspect ratio"
ROTATED = {
    "apply": "EXIF orientation, turned upright (exif: apply)",
    "ignore": "EXIF orientation, not turned (exif: ignore)",
}

Seen = tuple[tuple[int, int] | str, int]
"""Of one image: (height, width), or what is wrong with it; and a hash of its bytes, 0 if they were not read."""


@dataclass
class ImageCounts:
    """What the images of a split are, each counted once however many pairs it is in.

    Attributes:
        rows: Rows whose images were looked at.
        distinct: Images of different names.
        sizes: Images by (height, width) in pixels; latents count as 8 × 8 pixels each.
        buckets: Images by bucket, or by why they have none.
        odd: Images by what is odd about them, as their headers show it.
        mixed_rows: Rows whose two images have different buckets.
        unreadable_rows: Rows by what is wrong with the first of their images that has a problem.
    """

    rows: int = 0
    distinct: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)
    odd: Counter[str] = field(default_factory=Counter)
    mixed_rows: int = 0
    unreadable_rows: Counter[str] = field(default_factory=Counter)


@dataclass
class SplitCounts:
    """What is known of one split.

    Attributes:
        name: Name of the split.
        reader: Class of its reader.
        rows: Rows that the reader offers.
        labels: Rows in which a wins, b wins, neither (ties), and unlabelled ones.
        distinct_prompts: Different prompts, as they stand.
        prompt_lengths: Characters of a row's prompt, by quantile.
        images: See :class:`ImageCounts`; None if the reader has none, or they were not to be looked at.
        skipped: Rows that the reader left out, by reason.
        remarks: Rows that the reader kept with something set aside, by reason.
        complete: Whether all rows that were to be looked at were.
    """

    name: str
    reader: str
    rows: int
    labels: dict[str, int]
    distinct_prompts: int
    prompt_lengths: dict[str, int]
    images: ImageCounts | None
    skipped: Counter[str]
    remarks: Counter[str]
    complete: bool = True


@dataclass
class SplitContents:
    """What a split is compared with others by.

    Attributes:
        prompts: Normalised prompt of every row.
        keys: ``(image key of a, of b)`` of the rows that were looked at.
        hashes: ``(rows, 2)`` hash of the bytes of their images, 0 where they were not read.
    """

    prompts: list[str]
    keys: list[tuple[str, str]]
    hashes: np.ndarray


@dataclass(frozen=True)
class Leakage:
    """What two splits share.

    Attributes:
        first: Name of a split.
        second: Name of another.
        shared: Distinct prompts, image names and image contents that both have.
        first_rows: Rows of the first split with such a prompt, image name or content.
        second_rows: Likewise.
    """

    first: str
    second: str
    shared: dict[str, int]
    first_rows: dict[str, int]
    second_rows: dict[str, int]


class ImageCensus:
    """Counts images, row by row.

    Args:
        buckets: Sizes to sort them into.
        decode: Decode every image; otherwise its header is read, which does not tell whether the rest is whole.
        hash_bytes: Read all bytes of every image, for their hash.
        min_pixels: Smaller images have no bucket.
        exif: Whether the images' EXIF orientation is applied.
    """

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
        self._seen: dict[str, Seen] = {}

    def add(self, pair: PreferencePair) -> None:
        """Count a row and those of its images that no row before had."""
        seen = [self._look_at(image) for image in (pair.image_a, pair.image_b)]
        self.counts.rows += 1
        self.keys.append((pair.image_a.image_key, pair.image_b.image_key))
        self.hashes.append((seen[0][1], seen[1][1]))
        sizes = [size for size, _ in seen if not isinstance(size, str)]
        if len(sizes) < len(seen):
            self.counts.unreadable_rows[next(size for size, _ in seen if isinstance(size, str))] += 1
        elif len({self._bucket(size) for size in sizes}) > 1:
            self.counts.mixed_rows += 1

    def _look_at(self, image: ImageRef) -> Seen:
        if image.image_key in self._seen and image.image_key:
            return self._seen[image.image_key]
        seen: Seen
        try:
            seen = self._size(image), hash_image(image) if self.hash_bytes else 0
        except ImageError as error:
            seen = error.problem, 0
        if image.image_key:
            self._seen[image.image_key] = seen
            self.counts.distinct += 1
        if not isinstance(seen[0], str):
            self.counts.sizes[seen[0]] += 1
            self.counts.buckets[self._bucket(seen[0])] += 1
        return seen

    def _size(self, image: ImageRef) -> tuple[int, int]:
        if image.holds == "latents":
            _, height, width = decode_latents(image).shape
            return LATENT_PIXELS * height, LATENT_PIXELS * width
        header = read_header(image, exif=self.exif)
        if self.decode:
            decode_image(image)
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


def hash_image(image: ImageRef) -> int:
    """64 bits of a hash of an image's bytes, as a signed number other than 0."""
    if image.data is not None:
        data = image.data
    elif image.path is not None:
        data = image.path.read_bytes()
    else:
        return 0
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True) or 1


def inspect_reader(
    name: str,
    reader: PairReader,
    census: ImageCensus,
    limit: int | None = None,
) -> tuple[SplitCounts, SplitContents]:
    """Count everything in a split; an interrupt (Ctrl-C) ends it with what was counted so far.

    Args:
        name: Name of the split.
        reader: Its rows.
        census: What counts its images; a new one for each split.
        limit: Look at the images of the first so many rows only; 0 for none.

    Raises:
        InputError: If ``limit`` is negative.
    """
    if limit is not None and limit < 0:
        raise InputError(f"limit is {limit}; give a number of rows, 0 for none, or leave it out for all")
    prompts, labels = reader.prompts(), reader.labels()
    total = len(reader) if limit is None else min(len(reader), limit)
    total = 0 if reader.holds == "nothing" else total
    complete = True
    try:
        with Progress(f"inspect {name}", total, "rows") as progress:
            for row in range(total):
                census.add(reader[row])
                progress.add()
    except KeyboardInterrupt:
        complete = False
    counts = SplitCounts(
        name=name,
        reader=type(reader).__name__,
        rows=len(reader),
        labels=count_labels(labels),
        distinct_prompts=len(set(prompts)),
        prompt_lengths=quantiles([len(prompt) for prompt in prompts]),
        images=census.counts if total else None,
        skipped=Counter(reader.skipped),
        remarks=Counter(reader.remarks),
        complete=complete,
    )
    normalised = [normalise_prompt(prompt) for prompt in prompts]
    return counts, SplitContents(normalised, census.keys, np.array(census.hashes, dtype=np.int64).reshape(-1, 2))


def count_labels(labels: np.ndarray) -> dict[str, int]:
    """Rows by winner, for labels of image a with NaN for none."""
    return {
        "a wins": int((labels > 0.5).sum()),
        "b wins": int((labels < 0.5).sum()),
        "ties": int((labels == 0.5).sum()),
        "unlabelled": int(np.isnan(labels).sum()),
    }


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Values at ``QUANTILES``, each one that occurs; empty without values."""
    if not values:
        return {}
    found = np.quantile(np.array(values), list(QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(QUANTILES, found, strict=True)}


def find_leakage(first: str, second: str, contents: tuple[SplitContents, SplitContents]) -> Leakage:
    """What two splits have in common; an image without name or hash is like no other."""
    shared: dict[str, int] = {}
    rows: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for what, unknown, values in (
        ("prompts", None, [[(prompt,) for prompt in split.prompts] for split in contents]),
        ("image names", "", [split.keys for split in contents]),
        ("image contents", 0, [split.hashes.tolist() for split in contents]),
    ):
        first_set, second_set = ({item for row in split for item in row} - {unknown} for split in values)
        common = first_set & second_set
        shared[what] = len(common)
        for side, split in zip(rows, values, strict=True):
            side[what] = sum(not common.isdisjoint(row) for row in split)
    return Leakage(first, second, shared, *rows)
