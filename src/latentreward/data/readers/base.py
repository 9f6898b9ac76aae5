"""Base class of readers of preference pairs: access to rows by number, and treatment of bad rows."""

import logging
import sys
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import numpy as np

from latentreward.core.contracts import ImageRef, PreferencePair, sources_of
from latentreward.core.errors import InputError, check_at_least_one, printable, quoted
from latentreward.core.promises import Part, number, returns, shown
from latentreward.core.storage.digests import digest, size_and_time
from latentreward.data.images import ExifOrientation

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip", "placeholder"]
Contents = Literal["images", "latents", "nothing"]
Sources = Literal["read", "ignore"]
MAX_PROMPT_CHARS, MAX_VOTES = 10_000, 10**9
"""Largest number of characters in a prompt, and of votes for an image; rows with more fall under ``on_error``."""
OWN_ON_ERROR, DATA_ON_ERROR = "the reader's on_error", "data.on_error (or the reader's own, which wins)"
"""Names of the setting in messages: for a reader used alone, and for one in a data module."""
FILE_ROWS, TABLE_ROWS = 4096, 16
"""Largest number of rows whose images tell :attr:`PairReader.image_digest`: files, and bytes in a table."""
ON_ERROR_REMEDY = f"correct the row, or set {OWN_ON_ERROR} to skip or placeholder"


def _wrong_pair(found: PreferencePair, reader: "PairReader", index: int) -> str | None:
    """Return what is wrong with the row that a user's reader returned; None if nothing is."""
    if not isinstance(found, PreferencePair):
        return f"{shown(found)} for row {index}; it must be a PreferencePair"
    holds = {"images": "image"}.get(reader.holds, reader.holds)
    for image in (found.image_a, found.image_b, *sources_of(found.prompt)):
        if not isinstance(image, ImageRef) or holds not in (image.holds, "nothing"):
            return f"row {found.pair_id!r:.60} with other images; it must be ImageRef with the reader's holds={holds}"
    for name, value, most in (("label_a", found.label_a, 1.0), ("weight", found.weight, sys.float_info.max)):
        if value is not None and not (isinstance(value, float | int | np.number) and 0 <= value <= most):
            bounds = "a number from 0 to 1, or None" if name == "label_a" else "finite and at least 0"
            return f"{name}={value!r:.60} of row {found.pair_id!r:.60}; it must be {bounds}"
    return None


class PairReader(Part):
    """Reader of the rows of one split of a preference data set; images are read only when a row is accessed.

    Subclass :class:`PairReader` to read a data set of your own. A reader must be picklable, since worker processes get
    a copy. Override :meth:`labels`, :meth:`labelled`, :meth:`prompts` and :meth:`pair_ids` if they are known without
    reading whole rows.

    Args:
        on_error: What happens to a row that breaks the rules of its format. ``"raise"`` raises InputError. ``"skip"``
            leaves the row out and counts it; no other row takes its place. ``"placeholder"`` keeps the row without
            label, so that row numbers and batch sizes do not change; an image that cannot be read becomes mid-grey.
            Unreadable images are found only when they are decoded: their rows count in ``len``, and under ``"skip"``
            the data set leaves them out. None takes the ``on_error`` of the data module, and ``"raise"`` outside one.
        max_prompt_chars: Largest number of characters in a prompt. Text encoders read a few hundred, and tokenizing a
            prompt of megabytes costs minutes and gigabytes.
        exif: ``apply`` turns images upright by their EXIF orientation; ``ignore`` takes the pixels as they are stored,
            as the published models were trained. null takes that of the class: ``apply`` for data of your own,
            ``ignore`` for published data sets.
        sources: What happens to the pictures of which a row's images are edits. ``read`` gives them with the prompt, an
            :class:`~latentreward.core.contracts.EditPrompt`. ``ignore`` gives the text alone.

    Attributes:
        holds: Kind of content of the rows' ``image_a`` and ``image_b``: images, latents or nothing.
        own_on_error: ``on_error`` as given to the constructor; may be None.
        skipped: Number of rows left out, by reason.
        remarks: Number of rows kept with a remark, e.g. without their label, by reason.
        first_problem: Name and problem of the first row that broke a rule; empty without one.
    """

    holds: Contents = "images"
    exif: ExifOrientation = "apply"
    first_problem = ""

    def __init__(
        self,
        on_error: OnError | None = None,
        max_prompt_chars: int = MAX_PROMPT_CHARS,
        exif: ExifOrientation | None = None,
        sources: Sources = "read",
    ) -> None:
        check_at_least_one(max_prompt_chars=max_prompt_chars)
        self.own_on_error, self.on_error, self.max_prompt_chars = on_error, on_error or "raise", max_prompt_chars
        self.sources = sources
        if exif is not None:
            self.exif = exif
        self.skipped: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()

    @abstractmethod
    @returns(number(int | np.integer, "a whole number of at least 0"))
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    @returns(_wrong_pair, each=True)
    def __getitem__(self, index: int) -> PreferencePair:
        """Return row ``index``; images a and b are in the order of the file, or exchanged at random by the reader."""

    def labels(self) -> np.ndarray:
        """Return ``label_a`` of every row, ``(len,)`` float64, NaN for unlabelled rows."""
        labels = (self[index].label_a for index in range(len(self)))
        return np.array([np.nan if label is None else label for label in labels], dtype=np.float64)

    def labelled(self) -> np.ndarray:
        """Return whether each row has a label, ``(len,)`` bool."""
        return ~np.isnan(self.labels())

    def prompts(self) -> list[str]:
        """Return the raw prompt of every row; pictures that it edits may be named without their bytes."""
        return [self[index].prompt for index in range(len(self))]

    def pair_ids(self) -> list[str]:
        """Return the ``pair_id`` of every row."""
        return [self[index].pair_id for index in range(len(self))]

    def groups(self) -> list[str]:
        """Return the group of every row, by default its normalised prompt.

        Rows of one group are not statistically independent; bootstrap intervals resample whole groups.
        """
        return [normalise_prompt(prompt) for prompt in self.prompts()]

    def facts(self) -> dict[str, list[Any]]:
        """Return further fields of every row, by name, without reading images; None where nothing is published.

        Names in use are ``model_a``, ``model_b``, ``votes_a``, ``votes_b`` and ``confidence``, as in
        :class:`PreferencePair`; ``overall_a``, ``instruction_following_a``, ``visual_quality_a`` and the same of b, the
        published scores of edits; ``vote`` and ``label_0``, as published; ``tags``, a list of texts per row.
        """
        return {}

    def missing_files(self, rows: Iterable[int]) -> list[tuple[int, str]]:
        """Return row number and path of the pictures of some rows that are files and are not there."""
        return []

    @cached_property
    def image_digest(self) -> str:
        """Number of rows, and a hash of names and sizes of some images, by which scores of others are recognised.

        Where images are files, up to ``FILE_ROWS`` rows count; else ``TABLE_ROWS``, which are read with their bytes.
        """
        images = self._spread_images(TABLE_ROWS)
        if all(image.path is not None for image in images):
            images = self._spread_images(FILE_ROWS)
        sizes = (
            (size_and_time(image.path) or (None,))[0] if image.path else len(image.data or b"") for image in images
        )
        held = (f"{image.image_key}\0{size}\0" for image, size in zip(images, sizes, strict=True))
        return f"{len(self)} pairs, {digest(held)}"

    def _spread_images(self, rows: int) -> list[ImageRef]:
        """Return references to the images of up to so many rows, spread over the data."""
        pairs = (self[row] for row in spread(len(self), rows))
        return [image for pair in pairs for image in (pair.image_a, pair.image_b, *sources_of(pair.prompt))]

    def refuse(self, pair_id: str, problem: str, reason: str, rows: int = 1) -> None:
        """Apply ``on_error`` to rows that break a rule of the format; InputError if it is ``"raise"``.

        ``pair_id`` and ``problem``, with field and value, are those of the first such row. ``reason`` is the short name
        of the problem, without values, under which rows are counted.
        """
        if self.on_error == "raise":
            others = f" (and {rows - 1} more such rows)" if rows > 1 else ""
            raise InputError(f"{quoted(pair_id)}: {problem}{others}; {ON_ERROR_REMEDY}")
        self.first_problem = self.first_problem or f"{quoted(pair_id)}: {problem}"
        (self.skipped if self.on_error == "skip" else self.remarks)[reason] += rows

    def report(self, name: str, empty: str = "") -> None:
        """Log one line with the numbers of rows left out and kept with a remark, if there are any.

        Without a row, InputError has the text ``empty``, if given, with what was left out put before the remedy.
        """
        if empty and not len(self):
            what, _, remedy = empty.rpartition("; ")
            left_out = f"{count_text(self.skipped)} left out" if self.skipped else ""
            raise InputError("; ".join(filter(None, [what, left_out, self.first_problem, remedy])))
        counts = {"left out": self.skipped, "kept with a remark": self.remarks}
        if told := [f"{what}: {count_text(count)}" for what, count in counts.items() if count]:
            logger.warning("%s: %d rows kept; %s", printable(name), len(self), printable("; ".join(told)))


def spread(count: int, most: int) -> list[int]:
    """Return up to ``most`` of the numbers 0 to ``count`` − 1, evenly spread, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist()


def normalise_prompt(prompt: str) -> str:
    """Return the prompt with Unicode form (NFKC), case and white space made uniform, for comparison of prompts.

    The names of the pictures that it edits follow, a line each, so that edits of unlike pictures differ.
    """
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return "\n".join([text, *(source.image_key for source in sources_of(prompt))])


def content_key(data: bytes | None) -> str:
    """Return a hash of an image's bytes, as name of an image to which its data set gives none; empty for None."""
    return "" if data is None else digest([data])


def count_text(counts: Counter[str]) -> str:
    """Format counts as ``"3 empty image, 1 missing file"``, most frequent first; ``"none"`` if empty."""
    return ", ".join(f"{number} {reason}" for reason, number in counts.most_common()) or "none"
