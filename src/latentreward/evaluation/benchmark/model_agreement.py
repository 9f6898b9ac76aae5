"""Whether two scorers like the same images; with CLIP or aesthetic scores, LRM's CLIP-Corr and Aes-Corr."""

from collections.abc import Mapping

import numpy as np

from latentreward.errors import InputError
from latentreward.evaluation.benchmark.results import AgreementResult, BenchmarkPairs, CorrelationResult
from latentreward.metrics.bootstrap import clustered_mean
from latentreward.metrics.rank_correlation import clustered_correlation, same_order

REFERENCES = {"CLIPScorer": "clip_corr", "AestheticScorer": "aes_corr"}
"""Class of a scorer → what agreement with it is called."""


def agreement_result(benchmark: str, pairs: BenchmarkPairs, others: BenchmarkPairs) -> AgreementResult:
    """Share of pairs with gaps of the same sign, and correlations of the scores of all images.

    Labels play no part. An image that recurs with the same prompt counts once in the correlations, in the group of
    the first pair that has it, if the pairs name their images.

    Args:
        benchmark: Name of the data set.
        pairs: One scorer's scores.
        others: The other's, of the same pairs.

    Raises:
        InputError: If the pairs are others.
    """
    if pairs.pair_ids != others.pair_ids:
        raise InputError(f"{pairs.scorer} and {others.scorer} scored other pairs; score both on the same split")
    alike = same_order(pairs.first - pairs.second, others.first - others.second)
    rows = _distinct_images(pairs)
    x, y = (np.concatenate([item.first, item.second])[rows] for item in (pairs, others))
    groups = np.tile(pairs.group_codes, 2)[rows]
    return AgreementResult(
        benchmark=benchmark,
        first=pairs.scorer,
        second=others.scorer,
        pairs=int((~np.isnan(alike)).sum()),
        pair=clustered_mean(alike, pairs.group_codes),
        spearman=clustered_correlation(x, y, groups, "spearman"),
        pearson=clustered_correlation(x, y, groups, "pearson"),
    )


def correlation_results(result: AgreementResult, identities: Mapping[str, str]) -> list[CorrelationResult]:
    """CLIP-Corr and Aes-Corr of a reward, where the other scorer is one of ``REFERENCES``.

    The LRM paper (arXiv:2502.01051) names them without a definition, so these are variants, and no figure of the
    paper can be compared with them. Nearest to it are ``validation_unique`` of Pick-a-Pic and LRM at timestep 1.

    Args:
        result: Two scorers on the same pairs.
        identities: Scorer → identity, which begins with its class.
    """
    found = []
    for scorer, reference in ((result.first, result.second), (result.second, result.first)):
        stem = REFERENCES.get(identities[reference].split(" ")[0])
        for kind in ("pearson", "spearman", "pair") if stem else ():
            estimate = getattr(result, kind)
            found.append(CorrelationResult(result.benchmark, f"{stem}_{kind}", scorer, reference, estimate))
    return found


def _distinct_images(pairs: BenchmarkPairs) -> np.ndarray:
    """Places, in all images a followed by all images b, of the first occurrence of every image with its prompt."""
    total = 2 * len(pairs.pair_ids)
    keys = pairs.first_images + pairs.second_images
    if len(keys) != total:
        return np.arange(total)
    seen: dict[tuple[str, str], int] = {}
    for place, item in enumerate(zip(keys, pairs.prompts * 2, strict=True)):
        seen.setdefault(item, place)
    return np.fromiter(seen.values(), dtype=np.int64)
