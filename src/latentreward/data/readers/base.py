"""What every source of preference pairs offers: rows by number, and what was left out of them and why."""

import logging
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from latentreward.contracts import PreferencePair
from latentreward.data.images import ExifOrientation
from latentreward.errors import InputError, check_at_least_one
from latentreward.seeding import pair_generator
from latentreward.storage.digests import digest

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip", "placeholder"]
Contents = Literal["images", "latents", "nothing"]
MAX_PROMPT_CHARS, MAX_VOTES = 10_000, 10**9
"""Characters of a prompt, and votes for an image, beyond which a row is odd."""
OWN_ON_ERROR, DATA_ON_ERROR = "the reader's on_error", "data.on_error (or the reader's own, which wins)"
"""What messages call the setting, where a reader stands alone and in a data module."""
ON_ERROR_REMEDY = f"correct the row, or set {OWN_ON_ERROR} to skip or placeholder"


class PairReader(ABC):
    """Rows of one split of a preference data set; images are fetched only when a row is asked for.

    Derive from it to read a data set of your own; a reader must pickle, since worker processes get a copy.

    Args:
        on_error: What happens to a row that breaks the rules of its format. ``"raise"`` stops. ``"skip"`` leaves the
            row out and counts it; no other row takes its place. ``"placeholder"`` keeps the row, unlabelled, so that
            row numbers and batch sizes stay; an image that cannot be read becomes mid-grey. Whether an image can be
            read shows only when it is decoded, so its rows count in ``len`` and are left out by the data set. None
            takes the ``on_error`` of the data module, ``"raise"`` elsewhere.
        max_prompt_chars: Characters of a prompt; a row with more breaks the rules. Text encoders read some hundred, and
            a prompt of megabytes costs minutes and gigabytes.
        exif: ``apply`` turns images upright by their EXIF orientation, ``ignore`` takes the pixels as they are stored;
            null takes what the class has: ``apply`` for data of your own, ``ignore`` for published data sets, which
            the published models saw so.

    Raises:
        InputError: If ``max_prompt_chars`` is below 1.

    Attributes:
        exif: See above; a class for a published data set says ``exif = "ignore"``.
        holds: What the references of the rows lead to; only images can be trained on directly.
        own_on_error: ``on_error`` as it was given, perhaps None.
        skipped: Rows left out, by reason.
        remarks: Rows kept with something set aside, such as their label, by reason.
    """

    holds: Contents = "images"
    exif: ExifOrientation = "apply"

    def __init__(
        self,
        on_error: OnError | None = None,
        max_prompt_chars: int = MAX_PROMPT_CHARS,
        exif: ExifOrientation | None = None,
    ) -> None:
        check_at_least_one(max_prompt_chars=max_prompt_chars)
        self.own_on_error, self.on_error, self.max_prompt_chars = on_error, on_error or "raise", max_prompt_chars
        if exif is not None:
            self.exif = exif
        self.skipped: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> PreferencePair:
        """Row ``index``, with sides in the order of the file or as randomised by the reader."""

    def labels(self) -> np.ndarray:
        """``(len,)`` float: ``label_a`` of every row, NaN for none. Override it where no row need be fetched for it."""
        labels = (self[index].label_a for index in range(len(self)))
        return np.array([np.nan if label is None else label for label in labels], dtype=np.float64)

    def labelled(self) -> np.ndarray:
        """``(len,)`` bool: whether a row has a label. Override it where that is known without fetching rows."""
        return ~np.isnan(self.labels())

    def prompts(self) -> list[str]:
        """Raw prompt of every row. Override it where that is known without fetching rows."""
        return [self[index].prompt for index in range(len(self))]

    def pair_ids(self) -> list[str]:
        """``pair_id`` of every row. Override it where that is known without fetching rows."""
        return [self[index].pair_id for index in range(len(self))]

    def groups(self) -> list[str]:
        """Group of every row: rows of a group are no independent evidence. By default rows of the same prompt."""
        return [normalise_prompt(prompt) for prompt in self.prompts()]

    def facts(self) -> dict[str, list[Any]]:
        """More about every row, without fetching images: name → ``len`` values, None where not published.

        Names in use: ``model_a``, ``model_b``, ``votes_a``, ``votes_b``, ``confidence`` as in a row; ``vote`` and
        ``label_0`` as published, where they hold more than the label; ``tags``, a list of texts.
        """
        return {}

    def refuse(self, pair_id: str, problem: str, reason: str, rows: int = 1) -> None:
        """Apply ``on_error`` to rows that break a rule of the format.

        Args:
            pair_id: Name of the first such row.
            problem: The field and its value in that row.
            reason: Short words to count under; no values.
            rows: How many rows have the problem.

        Raises:
            InputError: If ``on_error`` is ``"raise"``.
        """
        if self.on_error == "raise":
            others = f" (and {rows - 1} more such rows)" if rows > 1 else ""
            raise InputError(f"{pair_id}: {problem}{others}; {ON_ERROR_REMEDY}")
        (self.skipped if self.on_error == "skip" else self.remarks)[reason] += rows

    def refuse_long_prompt(self, pair_id: str, length: int, rows: int = 1) -> None:
        """Apply ``on_error`` to rows whose prompt is too long, the first with ``length`` characters."""
        problem = f"prompt has {length} characters, more than max_prompt_chars={self.max_prompt_chars}"
        self.refuse(pair_id, problem, "prompt too long", rows)

    def report(self, name: str) -> None:
        """Log one line about rows left out or kept with a remark, if there are any."""
        counts = {"left out": self.skipped, "kept with a remark": self.remarks}
        if told := [f"{what}: {count_text(count)}" for what, count in counts.items() if count]:
            logger.warning("%s: %d rows kept; %s", name, len(self), "; ".join(told))


class SideExchangingReader(PairReader):
    """Rows whose order in the file may tell the winner, so their sides are exchanged by chance.

    Args:
        randomise_sides: Exchange the sides of every other row, by a draw from ``seed`` and the row's name; without it
            an image that the file names first is always a, and if that is the preferred one, a model that answers "the
            first" is always right.
        seed: Seed of that draw.
        options: ``on_error``, ``max_prompt_chars`` and ``exif``, see :class:`PairReader`.
    """

    def __init__(self, *, randomise_sides: bool = True, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.randomise_sides, self.seed = randomise_sides, seed

    def is_exchanged(self, pair_id: str) -> bool:
        """Whether the sides of a row are exchanged."""
        if not self.randomise_sides:
            return False
        return bool(torch.randint(2, (), generator=pair_generator(self.seed, "side", 0, pair_id)))

    def exchanged(self) -> list[bool]:
        """The same of every row."""
        return [self.is_exchanged(name) for name in self.pair_ids()] if self.randomise_sides else [False] * len(self)


def exchange_sides(facts: dict[str, list[Any]], exchanged: Sequence[bool]) -> dict[str, list[Any]]:
    """The facts with what belongs to a and to b exchanged in some rows."""
    swapped = {}
    for name, values in facts.items():
        other = {"_a": f"{name[:-2]}_b", "_b": f"{name[:-2]}_a"}.get(name[-2:], name)
        both = zip(exchanged, values, facts[other], strict=True)
        swapped[name] = [theirs if exchange else own for exchange, own, theirs in both]
    return swapped


def normalise_prompt(prompt: str) -> str:
    """The prompt without differences that are none to a reader: Unicode form, case, white space."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def content_key(data: bytes | None) -> str:
    """Name of an image that its data set gives none: a hash of its bytes; empty where there are none to hash."""
    return "" if data is None else digest([data])


def count_text(counts: Counter[str]) -> str:
    """``"3 empty image, 1 missing file"``, most frequent first; ``"none"`` if there are none."""
    return ", ".join(f"{number} {reason}" for reason, number in counts.most_common()) or "none"
