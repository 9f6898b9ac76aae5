"""Collation of pairs to a batch; images a and b become chosen and rejected here and nowhere else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentreward.core.contracts import PairTargets, PreferenceBatch
from latentreward.core.errors import InputError
from latentreward.data.dataset import LoadedPair, SkippedPair
from latentreward.data.images import ImageError
from latentreward.data.readers.base import DATA_ON_ERROR

NAMED = 5


def collate_pairs(items: Sequence[LoadedPair | SkippedPair], blanks: bool = True) -> PreferenceBatch:
    """Stack pairs to a batch, each with its preferred image as ``chosen``, so that labels are in [½, 1].

    In a tie or an unlabelled pair the image with the smaller ``image_key`` becomes ``chosen``. The batch is therefore
    the same if images a and b of the source are exchanged. An unlabelled pair gets label ½ and weight 0: it is scored,
    but losses and metrics ignore it. Unlabelled pairs occur only in prediction and as placeholders.

    Args:
        items: Pairs of one image size; each :class:`SkippedPair` makes the batch one pair smaller.
        blanks: Whether a batch of such pairs alone becomes one grey pair without a label, which counts nowhere. For
            prediction, which would write its score, it is an error.

    Raises:
        ImageError: If every item is a :class:`SkippedPair` and ``blanks`` is false.
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
        raise InputError(
            f"pairs of one batch are edits of {counts[0]} and of {counts[-1]} pictures; split the data by that number, "
            "or set batch_size: 1"
        )
    return tuple(torch.stack(place) for place in zip(*rows, strict=True))


def stack_targets(targets: Sequence[Tensor]) -> PairTargets | None:
    """Stack the given values of B oriented pairs, each ``(2, T, K)``; a single column becomes ``(B,)``."""
    if not targets:
        return None
    images = torch.stack(tuple(targets)).unbind(dim=1)
    chosen, rejected = ((image.squeeze(-1) if image.shape[-1] == 1 else image).unbind(dim=1) for image in images)
    return PairTargets(chosen[0], rejected[0], *((chosen[1], rejected[1]) if len(chosen) > 1 else ()))


def is_turned(label_a: float | None, key_a: str, key_b: str) -> bool:
    """Tell whether image b becomes the chosen image.

    Image b is chosen if the label prefers it. For a tie or an unlabelled pair, it is chosen if its key is the smaller.
    """
    if label_a is None or label_a == 0.5:
        return key_b < key_a
    return label_a < 0.5
