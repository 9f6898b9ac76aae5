"""Agreement of two scorers on the same images; with CLIP or aesthetic scorers, LRM's CLIP-Corr and Aes-Corr."""

from collections.abc import Mapping
from itertools import permutations

import numpy as np

from latentreward.errors import InputError
from latentreward.evaluation.benchmark.results import BenchmarkPairs
from latentreward.metrics.bootstrap import clustered_mean
from latentreward.metrics.rank_correlation import clustered_correlation, same_order
from latentreward.reports.tables import Row

REFERENCES = {"CLIPScorer": "clip_corr", "AestheticScorer": "aes_corr"}
"""Class name of a scorer → prefix of the names under which agreement with that scorer is reported."""


def agreement_result(pairs: BenchmarkPairs, others: BenchmarkPairs) -> Row:
    """Compute the share of pairs with score gaps of the same sign, and the correlations of the scores of all images.

    Labels are not used. If the pairs have image keys, an image that recurs with the same prompt counts once in the
    correlations, in the prompt group of the first pair that contains it.

    Raises:
        InputError: If the two scorers scored different pairs.
    """
    if pairs.pair_ids != others.pair_ids:
        raise InputError(f"{pairs.scorer} and {others.scorer} scored other pairs; score both on the same split")
    alike = same_order(pairs.gap, others.gap)
    rows = _distinct_images(pairs)
    x, y = (np.concatenate([item.first, item.second])[rows] for item in (pairs, others))
    groups = np.tile(pairs.group_codes, 2)[rows]
    return {
        "benchmark": pairs.benchmark,
        "first": pairs.scorer,
        "second": others.scorer,
        "pairs": int((~np.isnan(alike)).sum()),
        "pair": clustered_mean(alike, pairs.group_codes),
        "spearman": clustered_correlation(x, y, groups, "spearman"),
        "pearson": clustered_correlation(x, y, groups, "pearson"),
    }


def correlation_results(result: Row, identities: Mapping[str, str]) -> list[Row]:
    """Return CLIP-Corr and Aes-Corr of a reward; the list is empty if neither scorer is one of ``REFERENCES``.

    The LRM paper (arXiv:2502.01051) names both numbers without defining them. The three variants here are our own and
    cannot be compared with the paper's figures. Closest to the paper are the split ``validation_unique`` of Pick-a-Pic
    and an LRM at timestep 1.
    """
    found: list[Row] = []
    for scorer, reference in permutations((result["first"], result["second"])):
        stem = REFERENCES.get(identities[reference].split(" ")[0])
        for kind in ("pearson", "spearman", "pair") if stem else ():
            named = {"name": f"{stem}_{kind}", "scorer": scorer, "reference": reference}
            found.append({"benchmark": result["benchmark"], **named, "estimate": result[kind]})
    return found


def _distinct_images(pairs: BenchmarkPairs) -> np.ndarray:
    """Return the index of the first occurrence of every (image, prompt), in all images a followed by all images b."""
    total = 2 * len(pairs.pair_ids)
    keys = pairs.first_images + pairs.second_images
    if len(keys) != total:
        return np.arange(total)
    seen: dict[tuple[str, str], int] = {}
    for index, item in enumerate(zip(keys, pairs.prompts * 2, strict=True)):
        seen.setdefault(item, index)
    return np.fromiter(seen.values(), dtype=np.int64)
