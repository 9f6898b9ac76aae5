"""Split of own pairs so that no picture is both trained on and measured with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from latentreward.apps.taste.pairs import Collection, Picture, Pool, RatedPair, number_of
from latentreward.core.errors import InputError
from latentreward.data.readers.base import normalise_prompt
from latentreward.reward.metrics.shared_pictures import shared_groups

TRAIN, STOP, HELD_OUT = PARTS = ("train", "stop", "held_out")
"""Parts: to train on, to stop early by, and to measure the accuracy with."""
SHARES = (0.6, 0.15, 0.25)
ENOUGH_PROMPTS = 20  # number of different prompts from which the parts have no prompt in common either
LEAST_PAIRS = 3  # fewest pairs of a part, besides ties: they have no right order to measure
Item = TypeVar("Item", Picture, Pool)


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

    Pictures without pairs are put into parts first, and pairs are then drawn within each part. With
    :data:`ENOUGH_PROMPTS` prompts, or too few pictures of each prompt for all parts, the pictures of a prompt stay
    together.
    """
    rng = np.random.default_rng(seed)
    made = _pooled(found.pools, most, rng) if found.pools else _paired(list(found.pairs), most, rng)
    for name, pairs in made.parts.items():
        ties = sum(pair.label == 0.5 for pair in pairs)
        if len(pairs) - ties < LEAST_PAIRS:
            drawn = "a higher --pairs, or " if found.possible > most else ""
            more = "more pairs with clear differences" if ties else "more pictures, each in fewer pairs"
            got = number_of(len(pairs) - ties, "pair") + (f" besides {number_of(ties, 'tie')}" if ties else "")
            raise InputError(f"folder: {name} gets {got} of the split ({made.how}); give {drawn}{more}")
    return made


def _paired(pairs: list[RatedPair], most: int, rng: np.random.Generator) -> Split:
    told = ""
    if len(pairs) > most:
        pairs, told = [pairs[place] for place in np.sort(rng.permutation(len(pairs))[:most])], f", {most} drawn"
    links = [(pair.a.content, pair.b.content) for pair in pairs]
    prompts = [normalise_prompt(pair.prompt) for pair in pairs]
    number = len({*prompts} - {""})
    if number >= ENOUGH_PROMPTS:
        # A prompt's name in `links` starts with a space, which no digest does.
        both = [(*link, f" {prompt}") if prompt else link for link, prompt in zip(links, prompts, strict=True)]
        if parts := _by_group(pairs, shared_groups(both), rng):
            return Split(parts, f"by prompt, of {number}, and by picture: no part shares either with another{told}")
    few = f"by picture, with {number_of(number, 'different caption')}"
    why = few if number < ENOUGH_PROMPTS else "by picture"
    if parts := _by_group(pairs, shared_groups(links), rng):
        return Split(parts, f"{why}: no picture is in two parts{told}")
    parts = _by_picture(pairs, rng)
    lost = len(pairs) - sum(map(len, parts.values()))
    return Split(parts, f"{why}: no picture is in two parts; left out, pairs across parts: {lost}{told}")


def _by_group(pairs: Sequence[RatedPair], groups: np.ndarray, rng: np.random.Generator) -> dict[str, list[RatedPair]]:
    """Put whole groups into the part that lacks most pairs, large first; empty if a part gets under half its share."""
    sizes = np.bincount(groups)
    wanted = np.array(SHARES) * len(pairs)
    left, part_of = wanted.copy(), np.zeros(len(sizes), int)
    order = rng.permutation(len(sizes))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        part_of[group] = part = int(np.argmax(left))
        left[part] -= sizes[group]
    got = wanted - left
    if (got < wanted / 2).any():
        return {}
    return {
        name: [pair for pair, group in zip(pairs, groups, strict=True) if part_of[group] == part]
        for part, name in enumerate(PARTS)
    }


def _by_picture(pairs: Sequence[RatedPair], rng: np.random.Generator) -> dict[str, list[RatedPair]]:
    """Put each picture into a part; of 200 random ways, take that whose parts are nearest to the shares."""
    names = sorted({picture.content for pair in pairs for picture in (pair.a, pair.b)})
    index = {name: place for place, name in enumerate(names)}
    ends = np.array([(index[pair.a.content], index[pair.b.content]) for pair in pairs])
    best, best_parts = -1.0, np.zeros(len(pairs), int)
    # A share of pictures keeps about the share's square of the pairs, so that small parts need more pictures.
    shares = np.sqrt(SHARES) / np.sqrt(SHARES).sum()
    cuts = np.round(np.cumsum(shares)[:-1] * len(names)).astype(int)
    for _ in range(200):
        part = np.searchsorted(cuts, np.argsort(rng.permutation(len(names))), side="right")
        inside = np.where(part[ends[:, 0]] == part[ends[:, 1]], part[ends[:, 0]], -1)
        worth = float(min(np.sum(inside == number) / share for number, share in enumerate(SHARES)))
        if worth > best:
            best, best_parts = worth, inside
    return {
        name: [pair for pair, inside in zip(pairs, best_parts, strict=True) if inside == part]
        for part, name in enumerate(PARTS)
    }


def _pooled(pools: Sequence[Pool], most: int, rng: np.random.Generator) -> Split:
    by_prompt = len(pools) >= ENOUGH_PROMPTS
    parts: dict[str, list[RatedPair]] = {}
    if not by_prompt:
        parts = _drawn([part for pool in pools for part in _cut(pool, rng)], most, rng)
    if by_prompt or (len(pools) > len(PARTS) and min(map(len, parts.values())) < LEAST_PAIRS):
        divided = [(name, pool) for name, some in _dealt(pools, rng).items() for pool in some]
        by_prompt, parts = True, _drawn(divided, most, rng)
    drawn = sum(map(len, parts.values()))
    whole = sum(len(pool.chosen) * len(pool.rejected) for pool in pools)
    by = f"by prompt, of {len(pools)}, and by picture" if by_prompt else "by picture"
    return Split(parts, f"{by}: no picture is in two parts; {drawn} of {whole} possible pairs, drawn within the parts")


def _drawn(divided: Sequence[tuple[str, Pool]], most: int, rng: np.random.Generator) -> dict[str, list[RatedPair]]:
    """Draw each part's share of ``most`` pairs from its pools, of each in proportion to the pairs that it gives."""
    parts: dict[str, list[RatedPair]] = {name: [] for name in PARTS}
    ends = np.round(np.cumsum(SHARES) * most).astype(int)
    for name, wanted in zip(PARTS, np.diff(ends, prepend=0), strict=True):
        own = [pool for part, pool in divided if part == name]
        sizes = np.array([len(pool.chosen) * len(pool.rejected) for pool in own], int)
        total = min(wanted, sizes.sum())
        # In proportion to sizes: rounded down, then one more where most was cut off, among equals at random.
        numbers, cut_off = np.divmod(total * sizes, max(sizes.sum(), 1))
        order = rng.permutation(len(sizes))
        first = order[np.argsort(-cut_off[order], kind="stable")]
        numbers[first[: total - numbers.sum()]] += 1
        for pool, number in zip(own, numbers.tolist(), strict=True):
            parts[name] += pool.draw(number, rng)
    return parts


def _cut(pool: Pool, rng: np.random.Generator) -> list[tuple[str, Pool]]:
    """Divide the pictures of both sides over the parts; a picture that occurs twice stays in one part."""
    sides = []
    for side in (pool.chosen, pool.rejected):
        first = {picture.content: picture for picture in side}
        dealt = _dealt([first[content] for content in sorted(first)], rng)
        sides.append({name: sorted(some, key=lambda one: one.content) for name, some in dealt.items()})
    return [(name, Pool(pool.prompt, sides[0][name], sides[1][name])) for name in PARTS]


def _dealt(items: Sequence[Item], rng: np.random.Generator) -> dict[str, list[Item]]:
    """Divide items over the parts at random, by their shares."""
    ends = [0, *np.round(np.cumsum(SHARES) * len(items)).astype(int)]
    order = rng.permutation(len(items))
    return {name: [items[one] for one in order[ends[n] : ends[n + 1]]] for n, name in enumerate(PARTS)}
