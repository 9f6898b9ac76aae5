"""Columns by which the report splits pairs into sub-groups, computed from what readers publish about each pair."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

Texts = tuple[str | None, ...]
SUBGROUP_COLUMNS = ("models", "model", "prompt length", "vote share", "confidence", "skill", "style")
"""Columns that define sub-groups; other columns, such as ``vote``, are read by protocols only."""

WORDS = {0: "no words", 1: "1 to 5 words", 6: "6 to 15 words", 16: "16 to 40 words", 41: "41 to 100 words"}
WORDS |= {101: "over 100 words"}
SHARES = {0.0: "below 0.5", 0.5: "0.5 to 0.6", 0.6: "0.6 to 0.7", 0.7: "0.7 to 0.8", 0.8: "0.8 to 0.9", 0.9: "0.9 to 1"}
CONFIDENCES = {0.0: "below 0.8", 0.8: "0.8 to 0.9", 0.9: "0.9 to 0.95", 0.95: "0.95 to 0.99", 0.99: "0.99 to 1"}
"""Bands of annotators' confidence: lowest value of a band, inclusive → name of the band.

``WORDS`` (number of words in a prompt) and ``SHARES`` (share of votes for the preferred image) have the same form.
"""


def subgroup_columns(prompts: Sequence[str], labels: np.ndarray, facts: dict[str, list[Any]]) -> dict[str, Texts]:
    """Compute the ``columns`` of :class:`~latentreward.evaluation.benchmark.results.BenchmarkPairs` for N pairs.

    A column without a value for any pair is left out. ``labels`` ``(N,)`` are probabilities that image a is preferred,
    NaN without a label. ``facts`` are published facts from :meth:`~latentreward.data.PairReader.facts`: name → N
    values.

    Returns:
        Name → N values: ``models`` (names of both models in alphabetical order), ``model`` (one line per model),
        ``prompt length`` (band of the number of words), ``vote share`` (band of the share of votes for the preferred
        image), ``confidence`` (band of the annotators' confidence), ``skill`` (one line per tag), and ``model_a``,
        ``model_b``, ``vote``, ``label_0`` as published.
    """
    unknown = [None] * len(prompts)
    sides = list(zip(facts.get("model_a", unknown), facts.get("model_b", unknown), strict=True))
    votes = zip(facts.get("votes_a", unknown), facts.get("votes_b", unknown), labels.tolist(), strict=True)
    columns = {
        "models": [" against ".join(sorted(both)) if None not in both else None for both in sides],
        "model": [_lines(sorted({model for model in both if model is not None})) for both in sides],
        "prompt length": [band(len(prompt.split()), WORDS) for prompt in prompts],
        "vote share": [_share(*item) for item in votes],
        "confidence": [None if x is None else band(x, CONFIDENCES) for x in facts.get("confidence", unknown)],
        "skill": [_lines(tags) for tags in facts.get("tags", unknown)],
        **{name: facts.get(name, unknown) for name in ("model_a", "model_b", "vote")},
        "label_0": [None if x is None else str(x) for x in facts.get("label_0", unknown)],
    }
    return {name: tuple(values) for name, values in columns.items() if values != unknown}


def band(value: float, bands: dict[Any, str]) -> str:
    """Return the name of the band, by its lowest value, that holds a value; lower values are in the first band."""
    return list(bands.values())[max(0, bisect_right(list(bands), value) - 1)]


def _share(votes_a: int | None, votes_b: int | None, label: float) -> str | None:
    """Return the band of the share of votes for the preferred image; None without votes or without a preference."""
    if votes_a is None or votes_b is None or not votes_a + votes_b or np.isnan(label) or label == 0.5:
        return None
    return band((votes_a if label > 0.5 else votes_b) / (votes_a + votes_b), SHARES)


def _lines(texts: Sequence[str] | None) -> str | None:
    return "\n".join(dict.fromkeys(texts)) if texts else None
