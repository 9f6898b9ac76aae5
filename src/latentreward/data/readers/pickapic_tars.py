"""Reader of Pick-a-Pic v2 as webdataset tars, with members ``KEY.jpg_0.jpg``, ``KEY.label_0.txt`` and so on."""

import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentreward.contracts import ImageRef, PreferencePair
from latentreward.data.readers.base import PairReader, content_key
from latentreward.data.readers.hub import fetch_split
from latentreward.data.readers.tars import ABSENT, Extent, Sample, read_extent, read_samples
from latentreward.errors import InputError
from latentreward.storage.hub import is_hub_id
from latentreward.storage.ignored_files import find_files

IMAGES = ("jpg_0.jpg", "jpg_1.jpg")
LABELS = ("label_0.txt", "label_1.txt")
PROMPT = "original_prompt.txt"
MEMBERS = (*IMAGES, *LABELS, PROMPT)
TOLERANCE = 1e-6


class PickAPicTarReader(PairReader):
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
        root: str,
        split: str = "train",
        *,
        revision: str | None = None,
        drop_identical: bool = False,
        weight: Literal["per_prompt", "equal"] = "per_prompt",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root, self.split = Path(root), split
        found = _find_tars(self.root, split, revision)
        self._names, self._tars = [name for name, _ in found], [path for _, path in found]
        self._keys: list[tuple[int, str]] = []
        self._prompts: list[str] = []
        labels: list[float] = []
        extents: list[tuple[Extent, Extent]] = []
        for number, tar in enumerate(self._tars):
            for sample in self._read_samples(tar):
                label = self._judge(tar, sample)
                images = tuple(sample.images.get(name, ABSENT) for name in IMAGES)
                if label is None or (drop_identical and self._is_identical(tar, images)):
                    continue
                self._keys.append((number, sample.key))
                prompt = sample.texts.get(PROMPT, "")
                self._prompts.append(prompt if len(prompt) <= self.max_prompt_chars else "")
                labels.append(label)
                extents.append(images)
        if not self._keys:
            raise InputError(f"root: no samples with {', '.join(MEMBERS)} in the tars of {root}; check the folder")
        self._labels, self._extents = np.array(labels), np.array(extents, dtype=np.int64)
        rows_of = Counter(self._prompts if weight == "per_prompt" else ())
        self._weights = np.array([1 / max(1, rows_of[prompt]) for prompt in self._prompts])
        self.report(f"{root} {split}")

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> PreferencePair:
        number, _ = self._keys[index]
        with self._tars[number].open("rb", buffering=0) as tar:
            image_0, image_1 = (read_extent(tar, extent) for extent in self._extents[index].tolist())
        label = float(self._labels[index])
        return PreferencePair(
            pair_id=self._pair_id(index),
            prompt=self._prompts[index],
            image_a=ImageRef(content_key(image_0), image_0),
            image_b=ImageRef(content_key(image_1), image_1),
            label_a=None if math.isnan(label) else label,
            weight=float(self._weights[index]),
            source="pickapic",
            split=self.split,
        )

    def labels(self) -> np.ndarray:
        """Return the label of image 0 of every row, ``(len,)`` float64, NaN for unlabelled rows."""
        return self._labels.copy()

    def prompts(self) -> list[str]:
        """Return the raw prompt of every row."""
        return list(self._prompts)

    def pair_ids(self) -> list[str]:
        """Return the ``pair_id`` of every row, ``TAR:KEY``."""
        return [self._pair_id(index) for index in range(len(self))]

    def _pair_id(self, index: int) -> str:
        number, key = self._keys[index]
        return f"{self._names[number]}:{key}"

    def _read_samples(self, tar: Path) -> list[Sample]:
        """Read the samples of one tar; the last sample of a truncated tar is left out unless it is whole."""
        samples, problem = read_samples(tar, IMAGES, (*LABELS, PROMPT))
        if problem is not None:
            if samples and len(samples[-1].images) + len(samples[-1].texts) + len(samples[-1].unreadable) < len(
                MEMBERS
            ):
                samples.pop()
            self.refuse(str(tar), f"{problem}; download it again", "tar not readable to its end")
        return samples

    def _judge(self, tar: Path, sample: Sample) -> float | None:
        """Return the label of image 0, NaN if unlabelled; None if ``on_error`` leaves the row out."""
        if PROMPT in sample.unreadable:
            self.refuse(f"{tar.name}:{sample.key}", sample.unreadable[PROMPT], "prompt not readable")
            return None if self.on_error == "skip" else math.nan
        if PROMPT not in sample.texts:
            self.remarks["no prompt, read as empty"] += 1
        elif len(sample.texts[PROMPT]) > self.max_prompt_chars:
            self.refuse_long_prompt(f"{tar.name}:{sample.key}", len(sample.texts[PROMPT]))
            return None if self.on_error == "skip" else math.nan
        values = [_number(sample.texts.get(name)) for name in LABELS]
        if None in values:
            self.remarks["unlabelled (no label, or no number)"] += 1
            return math.nan
        label_0, label_1 = (float(value) for value in values if value is not None)
        for name, value in zip(LABELS, (label_0, label_1), strict=True):
            if not 0 <= value <= 1:
                problem = f"{name} is {value}, not in [0, 1]"
                self.refuse(f"{tar.name}:{sample.key}", problem, "label outside [0, 1] or NaN")
                return None if self.on_error == "skip" else math.nan
        if abs(label_0 + label_1 - 1) > TOLERANCE:
            self.remarks["unlabelled (labels do not add up to 1)"] += 1
            return math.nan
        return label_0

    def _is_identical(self, tar: Path, images: tuple[Extent, ...]) -> bool:
        first, second = images
        if first[1] != second[1] or ABSENT in images:
            return False
        with tar.open("rb", buffering=0) as file:
            identical = read_extent(file, first) == read_extent(file, second)
        self.skipped["identical images"] += identical
        return identical


def _find_tars(root: Path, split: str, revision: str | None) -> list[tuple[str, Path]]:
    """Find the tars of a split, as (published name, local path)."""
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir() and is_hub_id(str(root)):
        return fetch_split(str(root), split, ".tar", revision)
    for folder in (root / split, root):
        if tars := find_files(folder, "*.tar"):
            return [(tar.name, tar) for tar in tars]
    raise InputError(f"root: no *.tar in {root} or {root / split}; set it to the folder of the tars")


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
