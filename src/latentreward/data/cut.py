"""Fixed random cut of a data set of preference pairs."""

import numpy as np
import torch

from latentreward.data.chosen import ChosenRows
from latentreward.data.readers import PairReader
from latentreward.data.readers.base import OnError, normalise_prompt
from latentreward.errors import InputError, check_at_least_one
from latentreward.seeding import pair_generator


class CutReader(ChosenRows):
    """Reader of a fixed random choice of another reader's labelled rows, in their order.

    Each row draws a random number from ``seed`` and its ``pair_id``, and the rows with the smallest numbers are chosen.
    Two cuts of one data set with one seed therefore share their rows as far as possible: the smaller cut is part of the
    larger one, and rows that are missing from a copy change nothing for the others but to make room.

    Args:
        reader: Source of the pairs.
        pairs: Number of pairs to choose.
        seed: Seed of the choice.
        apart_from: Reader of pairs that the model will be tested on; rows with one of its prompts are left out.
        on_error: What happens to images that cannot be read, see :class:`PairReader`; by default as ``reader`` has it.

    Raises:
        InputError: If fewer rows are left than ``pairs``.
    """

    def __init__(
        self,
        reader: PairReader,
        pairs: int,
        seed: int = 0,
        apart_from: PairReader | None = None,
        on_error: OnError | None = None,
    ) -> None:
        check_at_least_one(pairs=pairs)
        keep = reader.labelled()
        if apart_from is not None:
            taken = set(map(normalise_prompt, apart_from.prompts()))
            keep = keep & np.array([normalise_prompt(prompt) not in taken for prompt in reader.prompts()], dtype=bool)
        rows = np.flatnonzero(keep)
        if len(rows) < pairs:
            raise InputError(
                f"pairs={pairs}, but {len(rows)} of {len(reader)} rows have a label and no prompt of apart_from; set "
                f"pairs to {len(rows)} or less, or add files to the data set"
            )
        names = reader.pair_ids()
        drawn = [float(torch.rand((), generator=pair_generator(seed, "cut", 0, names[row]))) for row in rows]
        super().__init__(reader, np.sort(rows[np.argsort(drawn, kind="stable")[:pairs]]), on_error)
