"""Selection of rows so that no prompt is in two splits."""

import logging
import re
from functools import cache
from typing import Literal

import numpy as np

from latentreward.data.readers import PairReader
from latentreward.data.readers.base import normalise_prompt
from latentreward.errors import InputError

logger = logging.getLogger(__name__)

SharedPrompts = Literal["drop", "keep", "raise"]
KEEP = "set data.shared_prompts: keep"
MUCH = 0.2
"""Fraction of a split's labelled rows; if more are left out, the log line also says how to keep them."""


def select_rows(
    splits: dict[str, PairReader], shared_prompts: SharedPrompts = "drop", remedy: str = "label rows"
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Select the labelled rows of each split, by default only those whose prompt is not in a later split.

    Prompts are compared after :func:`normalise_prompt`.

    Args:
        splits: Readers by name of split, in the order train, val, test. The last split keeps all its labelled rows.
        shared_prompts: What happens to rows whose prompt is in a later split. ``"drop"`` leaves them out and logs their
            number; ``"keep"`` keeps them; ``"raise"`` raises InputError.
        remedy: What to do about unlabelled rows, for the message.

    Returns:
        Ascending row numbers, ``(rows,)``, by split; and the error message of each split that has no rows left.

    Raises:
        InputError: If a prompt is shared and ``shared_prompts`` is ``"raise"``.
    """
    taken: set[str] = set()
    selected: dict[str, np.ndarray] = {}
    emptied: dict[str, str] = {}
    later: list[str] = []
    normalise = cache(normalise_prompt)
    for name in reversed(splits):
        reader = splits[name]
        prompts = [] if shared_prompts == "keep" else [normalise(prompt) for prompt in reader.prompts()]
        labelled = reader.labelled()
        shared = np.zeros(len(reader), dtype=bool)
        shared[: len(prompts)] = [prompt in taken for prompt in prompts]
        have = f"have a prompt that {' or '.join(reversed(later))} has too"
        if shared.any() and shared_prompts == "raise":
            example = reader[int(np.flatnonzero(shared)[0])]
            raise InputError(
                f"data.{name}: {int(shared.sum())} of {len(reader)} rows {have}, first {example.pair_id} "
                f"{example.prompt[:60]!r}; set data.shared_prompts: drop, or keep"
            )
        selected[name] = np.flatnonzero(labelled & ~shared)
        if not len(selected[name]):
            causes = [
                (int((~labelled).sum()), "are unlabelled" + _why_unlabelled(reader), remedy),
                (int((labelled & shared).sum()), have, KEEP),
            ]
            emptied[name] = f"data.{name}: none of {len(reader)} rows left{_explain(causes)}"
        elif shared.any():
            much = (labelled & shared).sum() > MUCH * labelled.sum()
            remedy = f", {len(selected[name])} labelled rows remain; to keep them, {KEEP}" if much else ""
            logger.warning("data.%s: %d of %d rows %s; left out%s", name, shared.sum(), len(reader), have, remedy)
        taken.update(prompts)
        later.append(name)
    return selected, emptied


def _why_unlabelled(reader: PairReader) -> str:
    """Return the reader's remarks on unlabelled rows, in brackets; empty without such remarks."""
    why = [match[1] for remark in reader.remarks if (match := re.fullmatch(r"unlabelled \((.*)\)", remark))]
    return f" ({'; '.join(why)})" if why else ""


def _explain(causes: list[tuple[int, str, str]]) -> str:
    """Format the causes why no row is left, (number of rows, description, remedy) each, the most frequent first."""
    found = sorted((cause for cause in causes if cause[0]), key=lambda cause: -cause[0])
    told = ", ".join(f"{rows} {what}" for rows, what, _ in found)
    return f"{': ' if told else ''}{told}; {', '.join([*(remedy for *_, remedy in found), 'or give other splits'])}"


def tell_unopened(problem: object) -> None:
    """Log that ``test`` could not be opened, so that other splits may keep rows with its prompts."""
    logger.warning("data.test is not opened (%s): the other splits keep rows whose prompt it has", problem)
