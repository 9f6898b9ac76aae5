"""Accuracy on pairs that share pictures, with an interval that does not take such pairs for independent."""

from collections.abc import Sequence

import numpy as np

from latentreward.metrics.bootstrap import (
    FEW,
    RESAMPLES,
    Interval,
    clustered_accuracy,
    group_codes,
    group_sums,
    percentile_ends,
    wilson_ends,
)


def shared_groups(links: Sequence[Sequence[str]]) -> np.ndarray:
    """Number the groups of rows that hang together by common names.

    Two rows are in one group if they have a name in common, or if further rows link them.

    Args:
        links: Names of each of N rows, such as the two pictures of a pair.

    Returns:
        ``(N,)`` int64 numbers from 0 on, in the order of each group's first row.
    """
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while (parent := above.setdefault(name, name)) != name:
            above[name] = name = above[parent]  # halves the way for the next search
        return name

    for names in links:
        for name in names[1:]:
            above[top(name)] = top(names[0])
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(top(names[0]), len(numbers)) for names in links], dtype=np.int64)


def picture_accuracy(credit: np.ndarray, pictures: Sequence[tuple[str, str]], seed: int = 0) -> tuple[Interval, str]:
    """Compute the accuracy on pairs, and its 95 % interval.

    Pairs without a common picture are independent, so whole groups of :func:`shared_groups` are resampled where there
    are at least :data:`~latentreward.metrics.bootstrap.FEW` groups. Otherwise pictures are resampled: a pair counts as
    often as the product of how often its two pictures were drawn (Owen 2007, "The pigeonhole bootstrap",
    doi:10.1214/07-AOAS122). That interval is too wide rather than too narrow. It is at least as wide as that of
    :func:`~latentreward.metrics.bootstrap.wilson_ends` for half as many answers as there are pictures.

    Args:
        credit: ``(N,)`` credit of each pair: 1 for a right answer, 0 for a wrong one, ½ for equal scores.
        pictures: Names of the two pictures of each pair.
        seed: Seed of the resampling.

    Returns:
        Accuracy with its interval, and the name of what was resampled: ``groups of pictures`` or ``pictures``.
    """
    groups = shared_groups(pictures)
    if not len(groups) or groups.max() + 1 >= FEW:
        return clustered_accuracy(group_sums(groups, credit, np.ones(len(credit)))), "groups of pictures"
    codes = group_codes([name for pair in pictures for name in pair]).reshape(-1, 2)
    number, value = int(codes.max()) + 1, float(credit.mean())
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    weights = drawn[:, codes[:, 0]] * drawn[:, codes[:, 1]]
    with np.errstate(invalid="ignore"):
        ends = percentile_ends((weights @ credit) / weights.sum(axis=1))
    least = wilson_ends(value, max(number // 2, 1))
    low, high = np.fmin(ends[0], least[0]), np.fmax(ends[1], least[1])  # resamples without any pair have no ends
    return Interval(value, float(low), float(high), number), "pictures"
