"""Reader of Pick-a-Pic v2 as webdataset tars, with members ``KEY.jpg_0.jpg``, ``KEY.label_0.txt`` and so on."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError
from latentreward.core.storage.hub import is_hub_id
from latentreward.core.storage.user_files import find_files
from latentreward.data.readers.base import content_key
from latentreward.data.readers.hub import fetch_split
from latentreward.data.readers.json_rows import encodable
from latentreward.data.readers.rows import RowReader, pack
from latentreward.data.readers.tars import ABSENT, Sample, read_extent, read_samples

IMAGES = ("jpg_0.jpg", "jpg_1.jpg")
LABELS = ("label_0.txt", "label_1.txt")
PROMPT = "original_prompt.txt"
MEMBERS = (*IMAGES, *LABELS, PROMPT)
TOLERANCE = 1e-6
INDEX = pa.schema(
    {
        **dict.fromkeys(("pair_id", "prompt"), pa.large_string()),
        "label": pa.float64(),
        "tar": pa.int32(),
        **dict.fromkeys(IMAGES, pa.list_(pa.int64(), 2)),
    }
)


class PickAPicTarReader(RowReader):
    """Reader of Pick-a-Pic tars; image 0 is a, image 1 is b.

    A sample consists of consecutive members with one file name up to the first dot; members with suffixes other than
    ``MEMBERS`` are ignored. The label is ``label_0`` (1, 0, or ½ for a tie). A row is unlabelled if a label is missing
    or not a number, or if the two labels do not add up to 1. A row falls under ``on_error`` if a label is NaN or
    outside [0, 1], or its prompt is too long. A missing prompt is read as an empty prompt; a missing image counts as
    unreadable. Images are named by a hash of their bytes, because the tars give no uid.

    The constructor reads the headers and texts of all tars once, which takes minutes for the whole data set. Rows are
    then read at their offsets, in any order. Tars must be uncompressed.

    Args:
        root: Folder that holds ``*.tar``, directly or in a subfolder named after the split; or one tar; otherwise the
            id of a hub data set, whose tars of this split are then downloaded.
        split: Name of the split.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        drop_identical: Leave out rows whose two images have identical bytes; recommended for training.
        weight: Weight of a row in the loss. ``per_prompt`` is 1 / (number of rows read with the row's prompt), so that
            each prompt counts once, as in the training of PickScore and LRM. ``equal`` is 1 for every row.
        options: ``on_error``, ``max_prompt_chars`` and ``exif``, see :class:`PairReader`. Of a truncated tar, the whole
            samples are kept under ``skip`` and ``placeholder``.

    Raises:
        InputError: If there are no tars or no samples in them, or a rule above is broken under ``on_error: raise``.
    """

    exif = "ignore"

    def __init__(
        self,
        root: PathText,
        split: str = "train",
        *,
        revision: str | None = None,
        drop_identical: bool = False,
        weight: Literal["per_prompt", "equal"] = "per_prompt",
        **options: Any,
    ) -> None:
        super().__init__("pickapic", split, randomise_sides=False, seed=0, **options)
        place = Path(root)
        if place.is_file():
            found = [(place.name, place)]
        elif not place.is_dir() and is_hub_id(str(place)):
            found = fetch_split(str(place), split, ".tar", revision)
        else:
            tars = find_files(place / split, "*.tar") or find_files(place, "*.tar")
            if not tars:
                raise InputError(f"root: no *.tar in {place} or {place / split}; set it to the folder of the tars")
            self.check_inside(place, *tars)
            found = [(tar.name, tar) for tar in tars]
        self._tars = [path for _, path in found]
        self.table = pack(self._read_rows(found, drop_identical), INDEX)
        if weight == "per_prompt":
            prompts = self.prompts()
            rows_of = Counter(prompts)
            self.table = self.table.append_column("weight", pa.array([1 / rows_of[prompt] for prompt in prompts]))
        empty = f"root: no samples with {', '.join(MEMBERS)} in the tars of {root}; check the folder"
        self.report(f"{root} {split}", empty)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to the images of a sample, with their bytes."""
        with self._tars[row["tar"]].open("rb", buffering=0) as tar:
            contents = [read_extent(tar, row[name]) for name in IMAGES]
        return [ImageRef(content_key(data), data) for data in contents]

    def _read_rows(self, tars: list[tuple[str, Path]], drop_identical: bool) -> Iterator[dict[str, Any]]:
        for number, (name, tar) in enumerate(tars):
            samples, problem = read_samples(tar, IMAGES, (*LABELS, PROMPT))
            if problem is not None:
                last = [*samples[-1].images, *samples[-1].texts, *samples[-1].unreadable] if samples else []
                if len(last) < len(MEMBERS):  # the last sample of a truncated tar, which is not whole
                    samples = samples[:-1]
                self.refuse(str(tar), f"{problem}; download it again", "tar not readable to its end")
            for sample in samples:
                label = self._judge(tar, sample)
                if label is None:
                    continue
                images = {image: sample.images.get(image, ABSENT) for image in IMAGES}
                first, second = images.values()
                if drop_identical and first[1] == second[1] and ABSENT not in (first, second):
                    with tar.open("rb", buffering=0) as file:
                        identical = read_extent(file, first) == read_extent(file, second)
                    if identical:
                        self.skipped["identical images"] += 1
                        continue
                prompt = sample.texts.get(PROMPT, "")
                yield {
                    "pair_id": encodable(f"{name}:{sample.key}"),
                    "prompt": prompt if len(prompt) <= self.max_prompt_chars else "",
                    "label": None if math.isnan(label) else label,
                    "tar": number,
                    **images,
                }

    def _judge(self, tar: Path, sample: Sample) -> float | None:
        """Return the label of image 0, NaN if unlabelled; None if ``on_error`` leaves the row out."""
        name, prompt = f"{tar.name}:{sample.key}", sample.texts.get(PROMPT, "")
        labels = [number for label in LABELS if (number := _number(sample.texts.get(label))) is not None]
        complete = len(labels) == len(LABELS)
        outside = [pair for pair in zip(LABELS, labels, strict=complete) if not 0 <= pair[1] <= 1]
        if PROMPT in sample.unreadable:
            self.refuse(name, sample.unreadable[PROMPT], "prompt not readable")
        elif len(prompt) > self.max_prompt_chars:
            self.refuse_long_prompt(name, len(prompt))
        elif complete and outside:
            label, value = outside[0]
            self.refuse(name, f"{label} is {value}, not in [0, 1]", "label outside [0, 1] or NaN")
        else:
            if PROMPT not in sample.texts:
                self.remarks["no prompt, read as empty"] += 1
            if complete and abs(sum(labels) - 1) <= TOLERANCE:
                return labels[0]
            reason = "labels do not add up to 1" if complete else "no label, or no number"
            self.remarks[f"unlabelled ({reason})"] += 1
            return math.nan
        return None if self.on_error == "skip" else math.nan


def _number(text: str | None) -> float | None:
    try:
        return None if text is None or "_" in text else float(text)
    except ValueError:
        return None
