"""Selection of rows so that no prompt is in two splits."""

import logging
import re
from functools import cache
from typing import Literal

import numpy as np

from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.data.cut import ChosenRows
from latentreward.data.readers.base import PairReader, normalise_prompt

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
            remarks = (re.fullmatch(r"unlabelled \((.*)\)", remark) for remark in reader.remarks)
            why = "; ".join(remark[1] for remark in remarks if remark)
            unlabelled = "are unlabelled" + (f" ({why})" if why else "")
            causes = [((~labelled).sum(), unlabelled, remedy), ((labelled & shared).sum(), have, KEEP)]
            found = sorted((cause for cause in causes if cause[0]), key=lambda cause: -cause[0])  # most frequent first
            told = ", ".join(f"{rows} {what}" for rows, what, _ in found)
            remedies = ", ".join([*(cause[2] for cause in found), "or give other splits"])
            emptied[name] = f"data.{name}: none of {len(reader)} rows left{': ' if told else ''}{told}; {remedies}"
        elif shared.any():
            much = (labelled & shared).sum() > MUCH * labelled.sum()
            rest = f", {len(selected[name])} labelled rows remain; to keep them, {KEEP}" if much else ""
            logger.warning("data.%s: %d of %d rows %s; left out%s", name, shared.sum(), len(reader), have, rest)
        taken.update(prompts)
        later.append(name)
    return selected, emptied


def split_by_prompt(reader: PairReader, share: float) -> tuple[PairReader, PairReader]:
    """Divide a reader's rows into two readers that share no prompt; the second has this share of the prompts.

    Which prompts these are depends on their texts and number alone, not on the seed of a run or the order of rows.

    Raises:
        InputError: If there are too few prompts.
    """
    prompts = [normalise_prompt(prompt) for prompt in reader.prompts()]
    drawn = sorted(set(prompts), key=lambda prompt: digest(["val", prompt]))
    number = max(1, round(share * len(drawn)))
    if not 0 < share < 1 or number >= len(drawn):
        raise InputError(
            f"data.val_share={share} of {len(drawn)} prompts leaves a split without any; give a share between 0 and 1 "
            "and pairs of more prompts, or set data.val"
        )
    taken = set(drawn[:number])
    held_out = np.array([prompt in taken for prompt in prompts], dtype=bool)
    return ChosenRows(reader, np.flatnonzero(~held_out)), ChosenRows(reader, np.flatnonzero(held_out))


def tell_unopened(problem: object) -> None:
    """Log that ``test`` could not be opened, so that other splits may keep rows with its prompts."""
    logger.warning("data.test is not opened (%s): the other splits keep rows whose prompt it has", problem)
