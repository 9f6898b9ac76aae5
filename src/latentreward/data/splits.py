"""Keeping splits apart: no prompt in two of them."""

import logging
from functools import cache
from typing import Literal

import numpy as np

from latentreward.data.readers import PairReader
from latentreward.data.readers.base import normalise_prompt
from latentreward.errors import InputError

logger = logging.getLogger(__name__)

SharedPrompts = Literal["drop", "raise"]


def select_rows(splits: dict[str, PairReader], shared_prompts: SharedPrompts = "drop") -> dict[str, np.ndarray]:
    """Labelled rows of each split whose prompt is in no later split.

    Args:
        splits: Readers by the name of their split, e.g. train, val, test: a later split keeps its rows.
        shared_prompts: ``"drop"`` leaves rows of the earlier split out and logs how many; ``"raise"`` stops.

    Returns:
        Row numbers by split, ascending.

    Raises:
        InputError: If a prompt is shared and ``shared_prompts`` is ``"raise"``, or if a split has no rows left.
    """
    taken: set[str] = set()
    selected: dict[str, np.ndarray] = {}
    normalise = cache(normalise_prompt)
    for name in reversed(splits):
        reader = splits[name]
        prompts = [normalise(prompt) for prompt in reader.prompts()]
        labelled = reader.labelled()
        shared = np.array([prompt in taken for prompt in prompts], dtype=bool)
        if shared.any():
            summary = f"data.{name}: {int(shared.sum())} of {len(reader)} rows have a prompt of a later split"
            if shared_prompts == "raise":
                example = reader[int(np.flatnonzero(shared)[0])]
                prompt = f"{example.pair_id} {example.prompt[:60]!r}"
                raise InputError(f"{summary}, first {prompt}; set shared_prompts to drop")
            logger.warning("%s; left out", summary)
        selected[name] = np.flatnonzero(labelled & ~shared)
        if not len(selected[name]):
            raise InputError(
                f"data.{name}: none of {len(reader)} rows left: {int((~labelled).sum())} are unlabelled, "
                f"{int(shared.sum())} have a prompt of a later split; give other splits"
            )
        taken.update(prompts)
    return selected
