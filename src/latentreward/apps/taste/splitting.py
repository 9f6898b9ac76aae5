"""Split of own pairs so that no picture is both trained on and measured with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentreward.apps.taste.pairs import Collection, RatedPair, number_of
from latentreward.core.errors import InputError
from latentreward.data.readers.base import normalise_prompt
from latentreward.reward.metrics.intervals import shared_groups

TRAIN, STOP, HELD_OUT = PARTS = ("train", "stop", "held_out")
"""Parts: to train on, to stop early by, and to measure the accuracy with."""
SHARES = np.array([0.6, 0.15, 0.25])
ENOUGH_PROMPTS = 20  # number of different prompts from which the parts have no prompt in common either
LEAST_PAIRS = 3  # fewest pairs of a part, besides ties: they have no right order to measure


@dataclass(frozen=True)
class Split:
    """Pairs by part."""

    parts: dict[str, list[RatedPair]]  # part → pairs, in the order of PARTS
    how: str  # one line on the split


def split(found: Collection, most: int, seed: int) -> Split:
    """Split pairs into parts without common pictures, and without common prompts where there are enough prompts.

    1. With :data:`ENOUGH_PROMPTS` prompts, pairs that are linked by pictures or prompts stay together.
    2. Otherwise, or if the parts came out too unequal, pairs that are linked by pictures stay together.
    3. If these groups are too large as well, each picture is put into a part, and pairs across parts are left out.

    Of more than ``most`` pairs, each part's share of that number is then drawn.
    """
    rng, pairs = np.random.default_rng(seed), found.pairs
    links = [(pair.a.content, pair.b.content) for pair in pairs]
    prompts = [normalise_prompt(pair.prompt) for pair in pairs]
    number = len({*prompts} - {""})
    how, part_of = f"by picture, with {number_of(number, 'different caption')}: no picture is in two parts", None
    if number >= ENOUGH_PROMPTS:
        # A prompt's name in `links` starts with a space, which no digest does.
        both = [(*link, f" {prompt}") if prompt else link for link, prompt in zip(links, prompts, strict=True)]
        how, part_of = "by picture: no picture is in two parts", _by_group(shared_groups(both), rng)
        if part_of is not None:
            how = f"by prompt, of {number}, and by picture: no part shares either with another"
    if part_of is None:
        part_of = _by_group(shared_groups(links), rng)
    if part_of is None:
        part_of = _by_picture(links, rng)
        how += f"; left out, pairs across parts: {int((part_of < 0).sum())}"
    places = [np.flatnonzero(part_of == part) for part in range(len(PARTS))]
    if sum(map(len, places)) > most:
        wanted = np.diff(np.round(np.cumsum(SHARES) * most).astype(int), prepend=0)
        places = [np.sort(rng.permutation(some)[:count]) for some, count in zip(places, wanted, strict=True)]
        how += f"; {sum(map(len, places))} of {len(pairs)} drawn"
    parts = {name: [pairs[place] for place in some.tolist()] for name, some in zip(PARTS, places, strict=True)}
    for name, some in parts.items():
        ties = sum(pair.label == 0.5 for pair in some)
        if len(some) - ties < LEAST_PAIRS:
            drawn = "a higher --pairs, or " if len(pairs) > most else ""
            more = "more pairs with clear differences" if ties else "more pictures, each in fewer pairs"
            got = number_of(len(some) - ties, "pair") + (f" besides {number_of(ties, 'tie')}" if ties else "")
            raise InputError(f"folder: {name} gets {got} of the split ({how}); give {drawn}{more}")
    return Split(parts, how)


def _by_group(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Put whole groups into the part that lacks most pairs, large first; None if a part gets under half its share."""
    sizes = np.bincount(groups)
    wanted = SHARES * len(groups)
    left, part_of = wanted.copy(), np.zeros(len(sizes), int)
    order = rng.permutation(len(sizes))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        part_of[group] = part = int(np.argmax(left))
        left[part] -= sizes[group]
    return None if (wanted - left < wanted / 2).any() else part_of[groups]


def _by_picture(links: Sequence[tuple[str, str]], rng: np.random.Generator) -> np.ndarray:
    """Put each picture into a part, −1 for pairs across; of 200 random ways, take that whose parts fit the shares."""
    names, ends = np.unique(np.array(links), return_inverse=True)
    ends = ends.reshape(-1, 2)
    # A share of pictures keeps about the share's square of the pairs, so that small parts need more pictures.
    shares = np.sqrt(SHARES) / np.sqrt(SHARES).sum()
    cuts = np.round(np.cumsum(shares)[:-1] * len(names)).astype(int)
    best, best_parts = -1.0, np.zeros(len(links), int)
    for _ in range(200):
        part = np.searchsorted(cuts, np.argsort(rng.permutation(len(names))), side="right")
        inside = np.where(part[ends[:, 0]] == part[ends[:, 1]], part[ends[:, 0]], -1)
        worth = float(min(np.sum(inside == number) / share for number, share in enumerate(SHARES)))
        if worth > best:
            best, best_parts = worth, inside
    return best_parts
