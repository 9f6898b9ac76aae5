"""Inspection of a data set: counts of labels, image sizes, bad rows and shared prompts, as text and as JSON."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from latentreward.core.contracts import ImageRef, PreferencePair, sources_of
from latentreward.core.errors import check_range
from latentreward.core.reports.tables import NOTHING, Table, as_text
from latentreward.core.storage.progress import Progress
from latentreward.data.clips import clip_size
from latentreward.data.images import (
    CLIP,
    ExifOrientation,
    ImageError,
    check_scans,
    decode_image,
    decode_latents,
    read_header,
)
from latentreward.data.readers.base import PairReader
from latentreward.data.splits import normalise_prompt

LATENT_PIXELS = 8
MOST_UNREADABLE = 5
"""Unreadable images of a split to name; the others are counted."""
MOST_SIZES = 8
"""Image sizes to list by themselves; the others are summed up."""
OTHER_SIZES = "other sizes"
SIDES = (
    "a and b are the two images of a row; %: of the split's rows. Readers of data that names the chosen image first "
    "make it a or b at random."
)
SHARED = (
    "Prompts that two splits share. fit leaves their rows out of the earlier split, if its config also sets the later "
    "one as data.val or data.test (data.shared_prompts: drop); otherwise it trains on them, and numbers on the later "
    "split are too good"
)


@dataclass
class ImageCounts:
    """Counts of the images of a split, also of pictures to edit; an image that occurs in several pairs counts once."""

    rows: int = 0  # rows whose images were examined
    distinct: int = 0  # images with different names
    sizes: Counter[str] = field(default_factory=Counter)  # by height x width; a latent is 8 x 8 pixels
    unreadable_rows: Counter[str] = field(default_factory=Counter)  # by the problem of the row's first such image
    unreadable: int = 0  # images
    first_unreadable: list[str] = field(default_factory=list)  # row (from 0), pair and error of the first few


@dataclass
class SplitCounts:
    """Counts of one split."""

    name: str
    reader: str  # name of its class
    rows: int
    labels: dict[str, int]  # rows by winner: a, b, tie, or unlabelled
    edits: Counter[int]  # number of pictures to edit → rows
    distinct_prompts: int  # compared as raw text, and by the pictures to edit
    images: ImageCounts | None  # None if the reader has no images or no rows were to be examined
    skipped: Counter[str]  # rows that the reader left out, by reason
    remarks: Counter[str]  # rows that the reader kept with a remark, e.g. without their label, by reason
    first_problem: str  # name and problem of the first row that was left out; empty without one


class ImageCensus:
    """Counter of a split's images, to which rows are added; without ``decode``, truncated images are not found."""

    def __init__(self, decode: bool = False, exif: ExifOrientation = "ignore") -> None:
        self.decode, self.exif = decode, exif
        self.counts = ImageCounts()
        self._problems: dict[str, str] = {}  # name of an image → its problem, empty without one

    def add(self, pair: PreferencePair) -> None:
        """Count a row, and those of its images that occurred in no earlier row."""
        images = (pair.image_a, pair.image_b, *sources_of(pair.prompt))
        if problems := [*filter(None, [self._look_at(image, pair.pair_id) for image in images])]:
            self.counts.unreadable_rows[problems[0]] += 1
        self.counts.rows += 1

    def _look_at(self, image: ImageRef, pair_id: str) -> str:
        if image.image_key and image.image_key in self._problems:
            return self._problems[image.image_key]
        problem = ""
        try:
            self.counts.sizes["x".join(map(str, self._size(image)))] += 1
        except ImageError as error:
            problem = error.problem
            self.counts.unreadable += 1
            if len(self.counts.first_unreadable) < MOST_UNREADABLE:
                self.counts.first_unreadable.append(f"row {self.counts.rows}, pair {pair_id}: {error}")
        self.counts.distinct += bool(image.image_key)
        self._problems[image.image_key] = problem
        return problem

    def _size(self, image: ImageRef) -> tuple[int, int]:
        if image.holds == "latents":
            *_, height, width = decode_latents(image, clip=None).shape
            return LATENT_PIXELS * height, LATENT_PIXELS * width
        try:
            header = read_header(image, exif=self.exif)
        except ImageError as error:
            if error.problem != CLIP:
                raise
            return clip_size(image)
        (decode_image if self.decode else check_scans)(image)
        return header.height, header.width


def inspect_reader(name: str, reader: PairReader, decode: bool = False, limit: int | None = None) -> SplitCounts:
    """Count labels, prompts and images of a split; images are those of the first ``limit`` rows, or of all."""
    check_range("[0, inf)", "0 counts no images, leave it out for all", limit=limit)
    total = 0 if reader.holds == "nothing" else len(reader) if limit is None else min(len(reader), limit)
    census = ImageCensus(decode, reader.exif)
    with Progress(f"inspect {name}", total, "rows") as progress:
        for row in range(total):
            census.add(reader[row])
            progress.add()
    prompts, labels = reader.prompts(), reader.labels()
    won = {"a wins": labels > 0.5, "b wins": labels < 0.5, "ties": labels == 0.5, "unlabelled": np.isnan(labels)}
    return SplitCounts(
        name=name,
        reader=type(reader).__name__,
        rows=len(reader),
        labels={name: int(rows.sum()) for name, rows in won.items()},
        edits=Counter(len(sources_of(prompt)) for prompt in prompts),
        distinct_prompts=len(set(prompts)),
        images=census.counts if total else None,
        skipped=Counter(reader.skipped),
        remarks=Counter(reader.remarks),
        first_problem=reader.first_problem,
    )


def shared_prompts(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Count the distinct prompts that two splits share, and the rows of either that have one of them."""
    splits = [[normalise_prompt(prompt) for prompt in prompts] for prompts in (first, second)]
    common = set(splits[0]) & set(splits[1])
    return [len(common), *(sum(prompt in common for prompt in prompts) for prompts in splits)]


@dataclass
class Report:
    """Results of the inspection of a data set."""

    data: str  # folder, file or data set that was inspected
    decoded: bool = False  # whether images were decoded; otherwise only their headers were read
    splits: list[SplitCounts] = field(default_factory=list)  # counts of each split
    unread: dict[str, str] = field(default_factory=dict)  # split → why its reader could not be constructed
    shared: dict[str, list[int]] = field(default_factory=dict)  # two splits → as of :func:`shared_prompts`

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self, default=vars, indent=1, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        """Return the report as text tables with one column per split."""
        how = "all were decoded" if self.decoded else "by their headers; --decode also finds truncated ones"
        images = {split.name: split.images for split in self.splits if split.images}
        unreadable = []
        for name, found in images.items():
            unreadable += [f"{name}, {line}" for line in found.first_unreadable]
            if rest := found.unreadable - len(found.first_unreadable):
                unreadable.append(f"{name}: and {rest} more images")

        def counts(title: str, counts_of: Callable[[SplitCounts], Mapping[str, int]], none: bool = True) -> str:
            """Format counts by reason of every split, frequent reasons first; with ``none``, say if there are none."""
            found = [counts_of(split) for split in self.splits]
            rows = {reason: [counts.get(reason, 0) for counts in found] for counts in found for reason in counts}
            rows = dict(sorted(rows.items(), key=lambda row: (row[0] == OTHER_SIZES, -sum(row[1]))))
            return table(title, [split.name for split in self.splits], rows) or (f"{title}: none" if none else "")

        first = [f"{split.name}: {split.first_problem}" for split in self.splits if split.first_problem]
        sections = [
            f"{self.data} ({', '.join(dict.fromkeys(split.reader for split in self.splits))})",
            *(f"split {name} was not read: {problem}" for name, problem in self.unread.items()),
            table("", [split.name for split in self.splits], _overview(self.splits)),
            SIDES,
            counts("Sizes (height x width, most frequent)", lambda split: _frequent_sizes(split.images), none=False),
            counts("Rows left out", lambda split: split.skipped),
            counts("Rows kept with a remark", lambda split: split.remarks, none=False),
            "\n".join(["The first row left out", *first] if first else []),
            counts(
                f"Rows with unreadable images ({how})",
                lambda split: split.images.unreadable_rows if split.images else {},
                none=bool(images),
            ),
            "\n".join(["Unreadable images (rows count from 0)", *unreadable] if unreadable else []),
            table(SHARED, ["prompts", "rows of the first", "rows of the second"], self.shared),
        ]
        return "\n\n".join(section for section in sections if section)


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[object]]) -> str:
    """Format a table of named rows below its title; empty text if there are no rows."""
    text = as_text(Table(("", *columns), tuple((name, *map(str, cells)) for name, cells in rows.items())))
    return "\n".join(filter(None, [title, text])) if rows else ""


def _overview(splits: Sequence[SplitCounts]) -> dict[str, list[object]]:
    """Return the table rows of rows, labels, prompts and images of each split."""

    def shares(numbers: Sequence[int]) -> list[object]:
        pairs = zip(numbers, splits, strict=True)
        return [f"{n} ({100 * n / one.rows:.1f} %)" if one.rows else str(n) for n, one in pairs]

    rows: dict[str, list[object]] = {"rows": [split.rows for split in splits]}
    for label in splits[0].labels if splits else ():
        rows[f"  {label}"] = shares([split.labels[label] for split in splits])
    for number in sorted({number for split in splits for number in split.edits} - {0}):
        rows[f"edits of {number}"] = shares([split.edits[number] for split in splits])
    rows["distinct prompts"] = [split.distinct_prompts for split in splits]
    rows["rows whose images were looked at"] = [split.images.rows if split.images else NOTHING for split in splits]
    rows["distinct images, by name"] = [split.images.distinct if split.images else NOTHING for split in splits]
    return rows


def _frequent_sizes(images: ImageCounts | None) -> dict[str, int]:
    """Return the numbers of images of the most frequent sizes, and of all others."""
    sizes = images.sizes if images else Counter[str]()
    frequent = dict(sizes.most_common(MOST_SIZES))
    rest = sizes.total() - sum(frequent.values())
    return frequent | ({OTHER_SIZES: rest} if rest else {})
