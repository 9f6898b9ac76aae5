"""A data set that decodes a reader's pairs under ``on_error``, and their collation to a batch."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentreward.core.contracts import (
    EditPrompt,
    PairTargets,
    PreferenceBatch,
    PreferencePair,
    seen_as,
    sources_of,
    sources_wanted,
)
from latentreward.core.errors import InputError, quoted
from latentreward.data.clips import ClipLoader
from latentreward.data.image_sizes import OneSize
from latentreward.data.images import COUNT, IMAGE_PROBLEMS, REFUSED, ImageError, PixelLoader, grey_picture
from latentreward.data.readers.base import DATA_ON_ERROR, OWN_ON_ERROR, OnError, PairReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedPair:
    """A preference pair with its decoded pixels."""

    pair: PreferencePair  # record that the reader returned
    pixels_a: Tensor  # Pixels of image a, ``(3, H, W)``, or of clip a, ``(3, F, H, W)``; float32 in [-1, 1]
    pixels_b: Tensor  # Pixels of image or clip b
    targets: Tensor | None = None  # ``(2, T, K)`` given values, see :meth:`ScoreTargets.values`; None if there are none
    sources: tuple[Tensor, ...] = ()  # Pixels of the pictures that the images are edits of


MOST_IN_A_ROW = 64
"""Number of unreadable pairs one after the other with which ``skip`` ends: files are then lost, not damaged."""


@dataclass(frozen=True)
class SkippedPair:
    """Marker for a pair with an unreadable image; ``collate_pairs`` leaves the pair out of the batch."""

    pair_id: str  # name of the pair
    problem: str  # description of the problem, in one line
    blank: LoadedPair  # pair without label in its place, for a batch of which no pair can be read


class PairDataset(Dataset[LoadedPair | SkippedPair]):
    """Map-style data set over rows of a reader.

    Args:
        reader: Source of the pairs. Its ``on_error``, if set, also applies to images that cannot be read.
        loader: Decodes and resizes one image or clip. Its ``exif`` is replaced by the reader's ``exif``.
        rows: Row numbers of the reader to use; all rows by default.
        on_error: Default for a reader whose own ``on_error`` is None.
        name: Name of the split in a data module, for messages; empty outside a data module.
        targets: ``(len(reader), 2, T, K)`` given values of the images of every row of the reader; None for none.
    """

    taken: tuple[int, int | None] = (0, None)  # least and largest number of pictures to edit; None for any number
    # Raises InputError for a prompt that the network's text encoder does not take.
    check_prompt: Callable[[str], None] | None = None

    def __init__(
        self,
        reader: PairReader,
        loader: PixelLoader,
        rows: Sequence[int] | np.ndarray | None = None,
        on_error: OnError = "raise",
        name: str = "",
        targets: Tensor | None = None,
    ) -> None:
        if reader.holds != "images":
            remedy = "import them with `latentreward cache` and train on the cache"
            remedy = remedy if reader.holds == "latents" else "give a copy of the data set that has images"
            raise InputError(f"{type(reader).__name__}: its rows hold {reader.holds}, not images; {remedy}")
        self.reader, self.loader, self.name = reader, replace(loader, exif=reader.exif), name
        clips = (loader.frames, loader.fps) if isinstance(loader, ClipLoader) else ()
        self.exif, self.image_sizes = reader.exif, OneSize(loader.height, loader.width, loader.resize, *clips)
        self.on_error = reader.own_on_error or on_error
        self.rows = np.arange(len(reader)) if rows is None else np.asarray(rows)
        # Per row: 0, or 1 + index of the problem in IMAGE_PROBLEMS. Shared memory, because worker processes write it.
        self._problems = torch.zeros(len(self.rows), dtype=torch.uint8).share_memory_()
        self._warned, self._in_a_row = False, 0
        self.targets = targets

    def __len__(self) -> int:
        return len(self.rows)

    def check_files(self, place: str) -> None:
        """Raise InputError, under ``on_error: raise``, if files of pictures are not there; nothing is opened."""
        if self.on_error == "raise" and (missing := self.reader.missing_files(self.rows)):
            row, path = missing[0]
            first = f"first {quoted(path)} of {self.reader.pair_ids()[row]}"
            told = f"{len(missing)} files of pictures are missing, {first}"
            remedy = f"see that they are there, or set {DATA_ON_ERROR} to skip or placeholder"
            raise InputError(f"{place}: {told}; {remedy}")

    def edits(self) -> bool:
        """Tell whether any pair edits pictures."""
        prompts = self.reader.prompts()
        return any(sources_of(prompts[row]) for row in self.rows)

    def check_sources(self) -> None:
        """Raise InputError, under ``on_error: raise``, if a pair edits fewer or more pictures than are ``taken``."""
        if self.on_error != "raise":
            return
        prompts = self.reader.prompts()
        for place, row in enumerate(self.rows):
            try:
                check_taken(prompts[row], self.taken)
            except ImageError as error:
                self._without(self.reader[int(row)], place, error, None)

    def source_numbers(self) -> np.ndarray:
        """Return the number of pictures that each pair edits, ``(N,)``, within the numbers that are ``taken``."""
        least, most = self.taken
        if least == most:
            return np.full(len(self), least)
        prompts = self.reader.prompts()
        return np.clip([len(sources_of(prompts[row])) for row in self.rows], least, most)

    def __getitem__(self, index: int | Sequence[int]) -> Any:
        """Read, decode and resize the pair at position ``index`` of ``rows``, see :meth:`load`; several give a list."""
        if isinstance(index, Sequence):
            return [self[one] for one in index]
        row = int(self.rows[index])
        return self.load(self.reader[row], index, None if self.targets is None else self.targets[row])

    def load(self, pair: PreferencePair, place: int, targets: Tensor | None = None) -> LoadedPair | SkippedPair:
        """Decode and resize the images of a pair, and the pictures that they are edits of.

        If one cannot be read, or the network takes fewer or more of these or not such a prompt, the result is a
        :class:`SkippedPair` under ``on_error: skip``, and a pair of mid-grey images without label under
        ``placeholder``. Under ``raise``, and after ``MOST_IN_A_ROW`` skipped pairs in succession, it is an ImageError.
        """
        try:
            check_taken(pair.prompt, self.taken)
            if sources := sources_of(pair.prompt):  # as text encoders see them
                pictures = {"exif": self.loader.exif, "max_pixels": self.loader.max_pixels}
                pair = replace(pair, prompt=seen_as(pair.prompt, **pictures))
            if self.check_prompt is not None:
                check_edit(pair.prompt, self.check_prompt)
            edited = tuple(map(self.loader, sources))
            loaded = LoadedPair(pair, self.loader(pair.image_a), self.loader(pair.image_b), targets, edited)
        except ImageError as error:
            return self._without(pair, place, error, targets)
        self._in_a_row = 0
        return loaded

    def _without(
        self, pair: PreferencePair, place: int, error: ImageError, targets: Tensor | None
    ) -> LoadedPair | SkippedPair:
        """Apply ``on_error`` to a pair that cannot be read."""
        split, setting = (f"data.{self.name}: ", DATA_ON_ERROR) if self.name else ("", OWN_ON_ERROR)
        problem = f"{split}{pair.pair_id}: {error}"
        if self.on_error == "raise":
            fix = "replace the file"
            if error.problem == COUNT:
                fix = "correct the row" if self.taken[1] != 0 else "set the reader's sources to ignore"
            raise ImageError(f"{problem}; {fix}, or set {setting} to skip or placeholder", error.problem) from error
        self.count(place, error.problem)
        if not self._warned:
            self._warned = True
            logger.warning("%s; this process only counts further ones", problem)
        blank = self._blank(pair, error, targets)
        if self.on_error != "skip":
            return blank
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            lost = f"{self._in_a_row} pairs one after the other cannot be read, the last is {problem}"
            raise ImageError(f"{lost}; see that the files are there", error.problem) from error
        return SkippedPair(pair.pair_id, str(error), blank)

    def _blank(self, pair: PreferencePair, error: ImageError, targets: Tensor | None) -> LoadedPair:
        """Return a pair without a label and with mid-grey images, in the place of one that cannot be read."""
        number, (least, most) = len(sources_of(pair.prompt)), self.taken
        number = max(least, number if most is None else min(number, most))
        text = "" if error.problem == REFUSED else str(pair.prompt)
        prompt = EditPrompt(text, [grey_picture()] * number)  # text encoders may see it, latents are kept by the key
        image_a, image_b, *blanks = (self.loader.blank() for _ in range(2 + number))
        return LoadedPair(replace(pair, label_a=None, prompt=prompt), image_a, image_b, targets, tuple(blanks))

    def count(self, place: int, problem: str) -> None:
        """Count the pair at position ``place`` of ``rows`` by its problem, once."""
        self._problems[place] = 1 + IMAGE_PROBLEMS.index(problem)

    def skipped(self) -> Counter[str]:
        """Count, by reason, the pairs that this process and its workers skipped or replaced by a placeholder so far."""
        counts = torch.bincount(self._problems, minlength=len(IMAGE_PROBLEMS) + 1).tolist()[1:]
        return Counter({problem: count for problem, count in zip(IMAGE_PROBLEMS, counts, strict=True) if count})


def check_edit(prompt: str, check: Callable[[str], None]) -> None:
    """Raise ImageError, as for a picture that cannot be read, if ``check`` raises InputError for a prompt."""
    try:
        check(prompt)
    except ImageError:
        raise
    except InputError as error:
        raise ImageError(str(error), REFUSED) from error


def check_taken(prompt: str, taken: tuple[int, int | None]) -> None:
    """Raise ImageError if a prompt edits fewer or more pictures than are ``taken``."""
    number = len(sources_of(prompt))
    if wanted := sources_wanted(number, taken):
        edits = "" if number else " in data of edits"
        raise ImageError(f"number of pictures to edit: {number}, and the network takes {wanted}{edits}", COUNT)


NAMED = 5


def collate_pairs(items: Sequence[LoadedPair | SkippedPair], blanks: bool = True) -> PreferenceBatch:
    """Stack pairs to a batch, each with its preferred image as ``chosen``, so that labels are in [½, 1].

    In a tie or an unlabelled pair the image with the smaller ``image_key`` becomes ``chosen``. The batch is therefore
    the same if images a and b of the source are exchanged. An unlabelled pair gets label ½ and weight 0: it is scored,
    but losses and metrics ignore it. Unlabelled pairs occur only in prediction and as placeholders.

    Each :class:`SkippedPair` makes the batch one pair smaller. A batch of such pairs alone becomes one grey pair
    without a label, which counts nowhere; without ``blanks``, for prediction, which would write its score, an error.
    """
    skipped = [item for item in items if isinstance(item, SkippedPair)]
    if len(skipped) == len(items) and not blanks:
        problems = "; ".join(f"{item.pair_id}: {item.problem}" for item in skipped[:NAMED])
        more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        problem = f"no pair of this batch can be read: {problems}{more}"
        raise ImageError(f"{problem}; replace the files, or set {DATA_ON_ERROR} to placeholder")
    pairs = []
    for item in [item for item in items if isinstance(item, LoadedPair)] or [skipped[0].blank]:
        pair, targets = item.pair, item.targets
        if is_turned(pair.label_a, pair.image_a.image_key, pair.image_b.image_key):
            turned = None if targets is None else targets.flip(0)
            pairs.append(LoadedPair(pair.swapped(), item.pixels_b, item.pixels_a, turned, item.sources))
        else:
            pairs.append(item)
    records = [item.pair for item in pairs]
    return PreferenceBatch(
        pair_ids=tuple(pair.pair_id for pair in records),
        prompts=tuple(pair.prompt for pair in records),
        chosen=torch.stack([item.pixels_a for item in pairs]),
        rejected=torch.stack([item.pixels_b for item in pairs]),
        chosen_keys=tuple(pair.image_a.image_key for pair in records),
        rejected_keys=tuple(pair.image_b.image_key for pair in records),
        label=torch.tensor([0.5 if one.label_a is None else one.label_a for one in records], dtype=torch.float32),
        weight=torch.tensor([0.0 if one.label_a is None else one.weight for one in records], dtype=torch.float32),
        targets=stack_targets([item.targets for item in pairs if item.targets is not None]),
        sources=stack_sources([item.sources for item in pairs]),
        chosen_noise=tuple(pair.image_a.noise for pair in records),
        rejected_noise=tuple(pair.image_b.noise for pair in records),
    )


def stack_sources(rows: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Stack the pictures that B pairs are edits of, place by place."""
    counts = sorted({len(row) for row in rows})
    if len(counts) > 1:
        told = f"pairs of one batch are edits of {counts[0]} and of {counts[-1]} pictures"
        raise InputError(f"{told}; split the data by that number, or set batch_size: 1")
    return tuple(torch.stack(place) for place in zip(*rows, strict=True))


def stack_targets(targets: Sequence[Tensor]) -> PairTargets | None:
    """Stack the given values of B oriented pairs, each ``(2, T, K)``; a single column becomes ``(B,)``."""
    if not targets:
        return None
    images = torch.stack(tuple(targets)).unbind(dim=1)
    chosen, rejected = ((image.squeeze(-1) if image.shape[-1] == 1 else image).unbind(dim=1) for image in images)
    return PairTargets(chosen[0], rejected[0], *((chosen[1], rejected[1]) if len(chosen) > 1 else ()))


def is_turned(label_a: float | None, key_a: str, key_b: str) -> bool:
    """Tell whether image b becomes the chosen one: the label prefers it, or without preference its key is smaller."""
    if label_a is None or label_a == 0.5:
        return key_b < key_a
    return label_a < 0.5
