"""Pairs of images on which scorers disagree most."""

from collections.abc import Sequence

import numpy as np

from latentreward.evaluation.benchmark.results import BenchmarkPairs
from latentreward.reports.tables import Row


def most_disputed(scored: Sequence[BenchmarkPairs], count: int) -> list[Row]:
    """Return the pairs on which two scorers disagree most; with one scorer, the pairs on which it errs most.

    A gap g is the score of image a minus that of image b, in units of the scorer's root mean square gap. With several
    scorers, pairs are ranked by min(max g, −min g) over the scorers, which is positive where two scorers prefer
    different images. With one scorer, pairs are ranked by its gap in favour of the image that people did not prefer.
    At most one pair of each prompt group is returned.
    """
    gaps = np.stack([_unit_gaps(pairs) for pairs in scored])
    first = scored[0]
    if len(scored) == 1:
        tells = -gaps[0] * np.sign(first.labels - 0.5)
    else:
        known = np.nan_to_num(gaps, nan=0.0)
        tells = np.minimum(known.max(axis=0), -known.min(axis=0))
    tells = np.nan_to_num(tells, nan=0.0)
    rows: dict[str, int] = {}
    for row in np.argsort(-tells, kind="stable").tolist():
        if len(rows) == count or tells[row] <= 0:
            break
        rows.setdefault(first.groups[row], row)
    return [_disagreement(scored, gaps, row) for row in rows.values()]


def _unit_gaps(pairs: BenchmarkPairs) -> np.ndarray:
    gaps = pairs.first - pairs.second
    typical = np.sqrt(np.mean(np.square(gaps[np.isfinite(gaps)]))) if np.isfinite(gaps).any() else 0.0
    return gaps / typical if typical > 0 else gaps


def _disagreement(scored: Sequence[BenchmarkPairs], gaps: np.ndarray, row: int) -> Row:
    first = scored[0]
    label = float(first.labels[row])
    finite = [(number, pairs) for number, pairs in enumerate(scored) if np.isfinite(gaps[number, row])]
    return {
        "benchmark": first.benchmark,
        "row": row,
        "pair_id": first.pair_ids[row],
        "prompt": first.prompts[row],
        "label": None if np.isnan(label) else label,
        "scores": {pairs.scorer: (float(pairs.first[row]), float(pairs.second[row])) for _, pairs in finite},
        "gaps": {pairs.scorer: float(gaps[number, row]) for number, pairs in finite},
    }
