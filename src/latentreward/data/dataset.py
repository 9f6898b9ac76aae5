"""A data set that decodes the image pairs of a reader and applies ``on_error`` to unreadable images."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentreward.core.contracts import EditPrompt, PreferencePair, seen_as, sources_of, sources_wanted
from latentreward.core.errors import InputError, quoted
from latentreward.data.clips import ClipLoader
from latentreward.data.image_sizes import OneSize
from latentreward.data.images import COUNT, IMAGE_PROBLEMS, REFUSED, ImageError, PixelLoader, grey_picture
from latentreward.data.readers.base import DATA_ON_ERROR, OWN_ON_ERROR, OnError, PairReader

logger = logging.getLogger(__name__)


def any_prompt(prompt: str) -> None:
    """Accept any prompt."""


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

    Attributes:
        exif: Treatment of EXIF orientation, as the reader has it.
        image_sizes: Rule by which images are resized.
        taken: Least and largest number of pictures to edit that the network takes; None for any number.
        check_prompt: Function that raises InputError for a prompt that the network's text encoder does not take.
        unused: ``(rows, 2)`` number of frames of both clips that are read and not used; ``(0, 2)`` for images.

    Raises:
        InputError: If the reader's rows hold latents or nothing instead of images.
    """

    taken: tuple[int, int | None] = (0, None)
    check_prompt: Callable[[str], None] = staticmethod(any_prompt)

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
        self.unused = torch.zeros(len(self.rows) if clips else 0, 2, dtype=torch.int32).share_memory_()
        self._warned, self._in_a_row = False, 0
        self.targets = targets

    def __len__(self) -> int:
        return len(self.rows)

    def check_files(self, place: str) -> None:
        """Raise InputError, under ``on_error: raise``, if files of pictures are not there; nothing is opened."""
        if self.on_error == "raise" and (missing := self.reader.missing_files(self.rows)):
            row, path = missing[0]
            raise InputError(
                f"{place}: {len(missing)} files of pictures are missing, first {quoted(path)} of "
                f"{self.reader.pair_ids()[row]}; see that they are there, or set {DATA_ON_ERROR} to skip or placeholder"
            )

    def edits(self) -> bool:
        """Tell whether any pair edits pictures."""
        prompts = self.reader.prompts()
        return any(sources_of(prompts[row]) for row in self.rows)

    def source_numbers(self) -> np.ndarray:
        """Return the number of pictures that each pair edits, ``(N,)``, within the numbers that are ``taken``."""
        least, most = self.taken
        if least == most:
            return np.full(len(self), least)
        prompts = self.reader.prompts()
        return np.clip([len(sources_of(prompts[row])) for row in self.rows], least, most)

    def __getitem__(self, index: int | Sequence[int]) -> Any:
        """Read, decode and resize the pair at position ``index`` of ``rows``; several positions give a list.

        Returns:
            A :class:`SkippedPair` if ``on_error`` is ``"skip"`` and an image or a picture to edit cannot be read, or
            the network takes fewer or more of these or not such a prompt. Under ``"placeholder"`` the pair has no
            label, and all are mid-grey.

        Raises:
            ImageError: If one of these problems occurs and ``on_error`` is ``"raise"``, or :data:`MOST_IN_A_ROW` pairs
                one after the other are skipped.
        """
        if isinstance(index, Sequence):
            return [self[one] for one in index]
        row = int(self.rows[index])
        pair, targets = self.reader[row], None if self.targets is None else self.targets[row]
        try:
            if isinstance(self.loader, ClipLoader):
                check_taken(pair.prompt, self.taken)
                clips = self.loader.load(pair.image_a), self.loader.load(pair.image_b)
                self.unused[index] = torch.tensor([clip.unused for clip in clips])
                loaded = LoadedPair(pair, clips[0].pixels, clips[1].pixels, targets)
            else:
                pair, sources = load_sources(self.loader, pair, self.taken, self.check_prompt)
                loaded = LoadedPair(pair, self.loader(pair.image_a), self.loader(pair.image_b), targets, sources)
        except ImageError as error:
            split, setting = (f"data.{self.name}: ", DATA_ON_ERROR) if self.name else ("", OWN_ON_ERROR)
            if self.on_error == "raise":
                fix = "replace the file"
                if error.problem == COUNT:
                    fix = "correct the row" if self.taken[1] != 0 else "set the reader's sources to ignore"
                remedy = f"{fix}, or set {setting} to skip or placeholder"
                raise ImageError(f"{split}{pair.pair_id}: {error}; {remedy}", error.problem) from error
            self._problems[index] = 1 + IMAGE_PROBLEMS.index(error.problem)
            if not self._warned:
                self._warned = True
                logger.warning("%s%s: %s; this process only counts further ones", split, pair.pair_id, error)
            blank = blank_pair(self.loader, pair, self.taken, error, targets)
            if self.on_error != "skip":
                return blank
            self._in_a_row += 1
            refuse_lost(self._in_a_row, f"{split}{pair.pair_id}", error)
            return SkippedPair(pair.pair_id, str(error), blank)
        self._in_a_row = 0
        return loaded

    def skipped(self) -> Counter[str]:
        """Count, by reason, the pairs that this process and its workers skipped or replaced by a placeholder so far."""
        counts = torch.bincount(self._problems, minlength=len(IMAGE_PROBLEMS) + 1).tolist()[1:]
        return Counter({problem: count for problem, count in zip(IMAGE_PROBLEMS, counts, strict=True) if count})


def refuse_lost(in_a_row: int, place: str, error: ImageError) -> None:
    """Raise ImageError if :data:`MOST_IN_A_ROW` pairs one after the other cannot be read, the last one at ``place``."""
    if in_a_row >= MOST_IN_A_ROW:
        problem = f"{in_a_row} pairs one after the other cannot be read, the last is {place}: {error}"
        raise ImageError(f"{problem}; see that the files are there", error.problem) from error


def blank_pair(
    loader: PixelLoader,
    pair: PreferencePair,
    taken: tuple[int, int | None],
    error: ImageError,
    targets: Tensor | None = None,
) -> LoadedPair:
    """Return a pair without a label and with mid-grey images, in the place of one that cannot be read."""
    number, (least, most) = len(sources_of(pair.prompt)), taken
    number = max(least, number if most is None else min(number, most))
    text = "" if error.problem == REFUSED else str(pair.prompt)
    prompt = EditPrompt(text, [grey_picture()] * number)  # text encoders may see it, latents are kept by the key
    unlabelled, blanks = replace(pair, label_a=None, prompt=prompt), tuple(loader.blank() for _ in range(number))
    return LoadedPair(unlabelled, loader.blank(), loader.blank(), targets, blanks)


def check_edit(prompt: str, check: Callable[[str], None]) -> None:
    """Raise ImageError, as for a picture that cannot be read, if ``check`` raises InputError for a prompt."""
    try:
        check(prompt)
    except ImageError:
        raise
    except InputError as error:
        raise ImageError(str(error), REFUSED) from error


def check_taken(prompt: str, taken: tuple[int, int | None]) -> None:
    """Raise ImageError if a prompt edits another number of pictures than are ``taken``, as of :func:`load_sources`."""
    number = len(sources_of(prompt))
    if wanted := sources_wanted(number, taken):
        edits = "" if number else " in data of edits"
        raise ImageError(f"number of pictures to edit: {number}, and the network takes {wanted}{edits}", COUNT)


def load_sources(
    loader: PixelLoader, pair: PreferencePair, taken: tuple[int, int | None], check: Callable[[str], None]
) -> tuple[PreferencePair, tuple[Tensor, ...]]:
    """Decode and resize the pictures that a pair's prompt edits; return the pair as text encoders see it, and them.

    Raises:
        ImageError: If one cannot be read, or their number is not among those that are ``taken``: least and largest,
            None for any number; or if ``check`` raises InputError.
    """
    check_taken(pair.prompt, taken)
    if sources := sources_of(pair.prompt):
        pair = replace(pair, prompt=seen_as(pair.prompt, exif=loader.exif, max_pixels=loader.max_pixels))
    check_edit(pair.prompt, check)
    return pair, tuple(map(loader, sources))
