"""Trainers learn what they should: short trainings against thresholds that pilot runs derived.

All tests of ``test_it_learns`` together fail for a working trainer once in 1 000 random runs; their seed is fixed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.marks import slow_after
from tests.statistical.broken import FAULTS, idle_lora
from tests.statistical.pilot import (
    FALSE_ALARMS,
    PILOT,
    caught,
    caught_seeds,
    reach,
    student_quantile,
    tables,
    threshold,
)
from tests.statistical.trainings import TRAININGS

MEASURED: dict[str, Any] = json.loads(PILOT.read_text())
ROOT = Path(__file__).resolve().parents[2]
SEED = 0


@pytest.mark.rotated
@pytest.mark.slow
@pytest.mark.parametrize("training", slow_after(1, TRAININGS))
def test_it_learns(training: str) -> None:
    trained = TRAININGS[training](SEED)
    assert not caught(trained.statistics, MEASURED["thresholds"]), trained.statistics
    assert not trained.idle_lora()


@pytest.mark.rotated
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_trainer_is_caught(fault: str) -> None:
    training, change = FAULTS[fault]
    assert caught(TRAININGS[training](SEED, change).statistics, MEASURED["thresholds"])


@pytest.mark.rotated
@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_a_lora_that_does_not_train_is_caught(training: str) -> None:
    trained = TRAININGS[training](SEED, idle_lora, steps=4)
    matrices = [name for name in trained.after if "lora_B" in name]
    assert matrices
    assert trained.idle_lora() == matrices


def test_thresholds_are_those_of_the_pilot() -> None:
    pilot = MEASURED["values"]["pilot"]
    assert all(len(values) >= 30 for values in pilot.values())
    expected = {name: threshold(values, len(pilot)) for name, values in pilot.items()}
    assert MEASURED["thresholds"] == pytest.approx(expected, abs=1e-4)
    assert student_quantile(0.025, 10) == pytest.approx(2.228, abs=1e-3)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, shape: rng.standard_normal(shape),
        lambda rng, shape: rng.standard_t(8, shape),
        lambda rng, shape: -rng.gamma(8, size=shape),
    ],
    ids=["normal", "heavy tails", "skewed"],
)
def test_a_working_trainer_fails_once_in_a_thousand(draw: Callable[..., np.ndarray]) -> None:
    rng, count = np.random.default_rng(0), len(MEASURED["thresholds"])
    pilot, new = draw(rng, (150_000, 30)), draw(rng, 150_000)
    alarms = new < pilot.mean(axis=1) - reach(30, count) * pilot.std(axis=1, ddof=1)
    assert count * alarms.mean() < FALSE_ALARMS


def test_the_pilot_passed_new_seeds_caught_broken_trainers_and_is_in_the_docs() -> None:
    groups, thresholds = MEASURED["values"], MEASURED["thresholds"]
    assert all(len(values) == 20 for name in ("new", *FAULTS) for values in groups[name].values())
    assert caught_seeds(groups["new"], thresholds) == 0
    assert all(caught_seeds(groups[fault], thresholds) >= 19 for fault in FAULTS)
    assert tables(groups, thresholds) in (ROOT / "docs" / "measurements.md").read_text()
