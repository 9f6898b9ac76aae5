"""Small sets of scored pairs for tests."""

from typing import Any

import numpy as np

from latentreward.apps.evaluation.benchmark.base import BenchmarkPairs

NAN = float("nan")
LABELS = (1, 1, 0, 0.5, 0)
GROUPS = ("long", "long", "long", "long", "short")


def scored(first: Any, second: Any = 0.0, labels: Any = LABELS, groups: Any = None, **more: Any) -> BenchmarkPairs:
    """Pairs with given scores; a number stands for all of them."""
    number = len(labels)
    groups = groups or (GROUPS if tuple(labels) == LABELS else [f"prompt {n}" for n in range(number)])
    return BenchmarkPairs(
        scorer=more.pop("scorer", "model"),
        pair_ids=tuple(f"pair {n}" for n in range(number)),
        prompts=tuple(groups),
        groups=tuple(groups),
        labels=np.array(labels, dtype=float),
        first=np.broadcast_to(np.array(first, dtype=float), number),
        second=np.broadcast_to(np.array(second, dtype=float), number),
        **more,
    )


def drawn(number: int, seed: int = 0, **more: Any) -> BenchmarkPairs:
    """Pairs of random scores that agree with random labels more often than not, three to a prompt."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 0.5, 1], number, p=[0.4, 0.2, 0.4])
    first, second = rng.normal(size=(2, number))
    groups = [f"prompt {n // 3}" for n in range(number)]
    return scored(first + 1.5 * (labels - 0.5), second, labels, groups, **more)
