"""Pairs to a batch: the only place where the sides of a file become chosen and rejected."""

from collections.abc import Sequence

import torch

from latentreward.contracts import PreferenceBatch
from latentreward.data.dataset import LoadedPair, SkippedPair
from latentreward.data.images import ImageError
from latentreward.data.readers.base import DATA_ON_ERROR

NAMED = 5


def collate_pairs(items: Sequence[LoadedPair | SkippedPair]) -> PreferenceBatch:
    """Stack pairs, each turned so that its label is in [½, 1].

    A tie has no better side, and an unlabelled pair none that is known: the image with the smaller key stands first.
    So exchanging the sides of the source changes nothing. An unlabelled pair (only prediction sees them, and
    placeholders) gets label ½ and weight 0: it has scores, but no part in a loss or a metric.

    Args:
        items: Pairs of one image size; skipped ones make the batch smaller.

    Raises:
        ImageError: If every pair was skipped.
    """
    pairs = [orient(item) for item in items if isinstance(item, LoadedPair)]
    if not pairs:
        problems = [f"{item.pair_id}: {item.problem}" for item in items if isinstance(item, SkippedPair)]
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ImageError(
            f"no pair of this batch can be read: {'; '.join(problems[:NAMED])}{more}; "
            f"replace the files, set {DATA_ON_ERROR} to placeholder, or raise batch_size"
        )
    records = [item.pair for item in pairs]
    return PreferenceBatch(
        pair_ids=tuple(pair.pair_id for pair in records),
        prompts=tuple(pair.prompt for pair in records),
        chosen=torch.stack([item.pixels_a for item in pairs]),
        rejected=torch.stack([item.pixels_b for item in pairs]),
        chosen_keys=tuple(pair.image_a.image_key for pair in records),
        rejected_keys=tuple(pair.image_b.image_key for pair in records),
        label=torch.tensor([0.5 if pair.label_a is None else pair.label_a for pair in records]),
        weight=torch.tensor([0.0 if pair.label_a is None else pair.weight for pair in records]),
    )


def orient(item: LoadedPair) -> LoadedPair:
    """The pair with the better image as a, or the one with the smaller key if none is better."""
    pair = item.pair
    turn = is_turned(pair.label_a, pair.image_a.image_key, pair.image_b.image_key)
    return LoadedPair(pair.swapped(), item.pixels_b, item.pixels_a) if turn else item


def is_turned(label_a: float | None, key_a: str, key_b: str) -> bool:
    """Whether image b of a pair becomes the chosen one: it is better, or neither is and its key is the smaller."""
    if label_a is None or label_a == 0.5:
        return key_b < key_a
    return label_a < 0.5
