"""What pairs are told apart by in tables of sub-groups, from what readers publish."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

Texts = tuple[str | None, ...]
SUBGROUP_COLUMNS = ("models", "model", "prompt length", "vote share", "confidence", "skill", "style")
"""Columns that make sub-groups; others, such as ``vote``, are there for protocols."""

WORDS = {0: "no words", 1: "1 to 5 words", 6: "6 to 15 words", 16: "16 to 40 words", 41: "41 to 100 words"}
WORDS |= {101: "over 100 words"}
SHARES = {0.0: "below 0.5", 0.5: "0.5 to 0.6", 0.6: "0.6 to 0.7", 0.7: "0.7 to 0.8", 0.8: "0.8 to 0.9", 0.9: "0.9 to 1"}
CONFIDENCES = {0.0: "below 0.8", 0.8: "0.8 to 0.9", 0.9: "0.9 to 0.95", 0.95: "0.95 to 0.99", 0.99: "0.99 to 1"}
"""Bands by their lowest value, which belongs to them."""


def subgroup_columns(prompts: Sequence[str], labels: np.ndarray, facts: dict[str, list[Any]]) -> dict[str, Texts]:
    """Columns of :class:`~latentreward.evaluation.benchmark.results.BenchmarkPairs`, without those that no pair has.

    Args:
        prompts: N raw prompts.
        labels: ``(N,)`` probability that image a is preferred, NaN without.
        facts: What :meth:`~latentreward.data.PairReader.facts` gives: N values each.

    Returns:
        ``models`` (both, whatever the side), ``model`` (a line for each), ``prompt length`` in words, ``vote share``
        (of the votes those for the preferred image), ``confidence`` of the annotators, ``skill`` (a line for each
        tag), and ``model_a``, ``model_b``, ``vote``, ``label_0`` as published.
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
    """Name of the band that holds a value."""
    return list(bands.values())[max(0, bisect_right(list(bands), value) - 1)]


def _share(votes_a: int | None, votes_b: int | None, label: float) -> str | None:
    """Band of the share of votes for the preferred image; None without votes, or where none is preferred."""
    if votes_a is None or votes_b is None or not votes_a + votes_b or np.isnan(label) or label == 0.5:
        return None
    return band((votes_a if label > 0.5 else votes_b) / (votes_a + votes_b), SHARES)


def _lines(texts: Sequence[str] | None) -> str | None:
    return "\n".join(dict.fromkeys(texts)) if texts else None
