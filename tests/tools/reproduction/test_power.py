"""The plan of seeds decides what it promises, at the spreads that it promises it for."""

import numpy as np
import pytest

from tools.reproduction.power import ONCE, SHARED, decide, simulate
from tools.reproduction.rows import MOST_SEEDS
from tools.reproduction.verdicts import Sample, judge

KINDS = ["Gaussian", "skewed", "three-valued"]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [SHARED, 0])
def test_power(shared: int, kind: str, ratio: float) -> None:
    """At a spread over seeds of up to 0.7 margins, in 1 000 claims of each kind."""
    for effect, right in ((2.0, "holds"), (0.0, "no difference")):
        words, _ = simulate(kind, effect, ratio, shared)
        assert np.mean(words == right) >= 0.9, (effect, ratio)
        assert np.mean((words != right) & (words != "open")) <= 0.05, (effect, ratio)
    words, _ = simulate(kind, 1.0, ratio, shared)
    assert np.mean(words == "no difference") <= 0.05


@pytest.mark.parametrize("shared", [SHARED, 0])
def test_simulated_claims_are_judged_as_measured_ones(shared: int) -> None:
    values = 0.5 * np.random.default_rng(1).normal(size=(8, SHARED + MOST_SEEDS - 1)) + np.arange(8)[:, None] / 4
    for value, word, count in zip(values, *decide(values, shared=shared), strict=True):
        together = [value[:shared].mean(), *value[shared:]] if shared else [*value]
        seen = value[:shared] if count == 1 else np.array(together[:count])
        assert judge(Sample(np.repeat(seen[:, None], 20, axis=1), count > 1, shared > 0), 1.0).word == word


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.3, 1.0, 3.0])
def test_a_first_look_and_one_more_err_in_five_of_a_hundred(kind: str, ratio: float) -> None:
    words, _ = simulate(kind, 0.0, ratio, once=ONCE)
    assert np.mean(np.isin(words, ["holds", "does not hold"])) <= 0.06
    words, _ = simulate(kind, 1.0, ratio, once=ONCE)
    assert np.mean(np.isin(words, ["no difference", "does not hold"])) <= 0.07
