"""No picture is both trained on and measured with, nor a prompt where there are enough."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from latentreward.apps.taste.pairs import Collection, Picture, RatedPair
from latentreward.apps.taste.splitting import PARTS, Split, split
from latentreward.core.errors import InputError

PICTURES = [Picture(f"{number}.png", f"c{number}", "") for number in range(300)]


def pair(a: int, b: int, prompt: str = "") -> RatedPair:
    return RatedPair(prompt, PICTURES[a], PICTURES[b], 1.0)


def apart(found: Split) -> dict[str, int]:
    """Numbers of pairs, after a look whether the parts share a picture or a pair is there twice."""
    assert tuple(found.parts) == PARTS
    contents = [{one.content for pair in part for one in (pair.a, pair.b)} for part in found.parts.values()]
    assert sum(map(len, contents)) == len(set.union(*contents))
    for part in found.parts.values():
        assert len({(pair.a.content, pair.b.content) for pair in part}) == len(part)
    return {name: len(part) for name, part in found.parts.items()}


def test_pairs_of_few_prompts_are_split_by_picture() -> None:
    found = split(Collection("", [pair(2 * n, 2 * n + 1, f"p{n % 3}") for n in range(100)]), 500, 0)
    assert apart(found) == {"train": 60, "stop": 15, "held_out": 25}
    assert found.how == "by picture, with 3 different captions: no picture is in two parts"
    assert split(Collection("", found.parts["train"]), 500, 0) == split(Collection("", found.parts["train"]), 500, 0)


def test_with_enough_prompts_no_prompt_is_in_two_parts() -> None:
    found = split(Collection("", [pair(2 * n, 2 * n + 1, f"p{n % 30}") for n in range(100)]), 500, 0)
    apart(found)
    prompts = [{pair.prompt for pair in part} for part in found.parts.values()]
    assert sum(map(len, prompts)) == 30 == len(set.union(*prompts))
    assert found.how.startswith("by prompt, of 30, and by picture")


def test_pairs_linked_by_a_picture_stay_together() -> None:
    blocks = [pair(8 * block + a, 8 * block + b) for block in range(20) for a in range(8) for b in range(a)]
    assert apart(split(Collection("", blocks), 1000, 0)) == {"train": 336, "stop": 84, "held_out": 140}


def test_pairs_that_all_hang_together_lose_those_across_parts() -> None:
    rng = np.random.default_rng(0)
    ends = {tuple(sorted(rng.choice(40, 2, replace=False).tolist())) for _ in range(300)}
    found = split(Collection("", [pair(a, b) for a, b in sorted(ends)]), 500, 0)
    counts = apart(found)
    assert min(counts.values()) >= 10 and counts["train"] > counts["held_out"] > counts["stop"]
    assert f"left out, pairs across parts: {len(ends) - sum(counts.values())}" in found.how


@pytest.mark.parametrize(("captions", "sides", "most"), [(1000, 1, 500), (300, 2, 500), (300, 2, 20), (7, 9, 101)])
def test_so_many_pairs_are_drawn_and_no_more(captions: int, sides: int, most: int) -> None:
    both = np.arange(2 * captions * sides).reshape(captions, 2, sides)
    pictures = [Picture(f"{n}.png", f"c{n}", "") for n in range(both.size)]
    pairs = [
        RatedPair(f"p{n}", pictures[a], pictures[b], 1.0)
        for n, (chosen, rejected) in enumerate(both)
        for a, b in product(chosen, rejected)
    ]
    found = split(Collection("", pairs), most, 0)
    assert sum(apart(found).values()) == most and f"{most} of {len(pairs)} drawn" in found.how
    assert found == split(Collection("", pairs), most, 0)
    assert found.parts != split(Collection("", pairs), most, 1).parts


def test_a_part_with_hardly_more_than_ties_is_refused_before_any_work() -> None:
    """The accuracy leaves ties out, so that nothing would be left to measure after the training."""
    pairs = [pair(2 * n, 2 * n + 1) for n in range(40)]
    held_out = split(Collection("", pairs), 500, 0).parts["held_out"]

    def rated(clear: int) -> Collection:
        ties = {one.a.path for one in held_out[clear:]}
        return Collection("", [replace(one, label=0.5) if one.a.path in ties else one for one in pairs])

    for clear, got in ((0, "no pairs besides 10 ties"), (2, "2 pairs besides 8 ties")):
        message = rf"folder: held_out gets {got} of the split \(by picture.*\); give more pairs with clear differences$"
        with pytest.raises(InputError, match=message):
            split(rated(clear), 500, 0)
    assert len(split(rated(3), 500, 0).parts["held_out"]) == 10
