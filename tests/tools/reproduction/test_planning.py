"""A budget goes where it decides most, and never past what it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tools.reproduction.test_page import result
from tests.tools.reproduction.test_rows import TOY
from tools.reproduction.planning import Planner, chance
from tools.reproduction.results import result_path, write_result
from tools.reproduction.rows import Row, read_row
from tools.reproduction.verdicts import Sample

CLEAR, NEAR, FAR = (0.3, 0.31, 0.32), (0.1, 0.05, 0.15), (0.01, -0.2, 0.2)
"""Differences of seeds that decide, nearly decide, and do not decide a claim."""


def measured(folder: Path, name: str, differences: tuple[float, ...], seconds: float = 10.0, first: int = 0) -> Row:
    """A row with results, each step of which took so long."""
    arms = {arm: {"lrm": f"--model.head.guidance={seconds + one}"} for one, arm in enumerate(("one", "other"))}
    row = read_row(name, {**TOY, "arms": arms})
    for seed, difference in enumerate(differences, first):
        tasks = {key[:16]: seconds for key in row.tasks(seed)}
        found = replace(result(row, seed, {"one": 0.5 + difference, "other": 0.5}), tasks=tasks)
        write_result(result_path(folder, row, seed), found)
    return row


def names(folder: Path, *rows: Row, number: int = 9, seconds: float = 1e9) -> list[str]:
    planner = Planner(rows, folder, lambda task: False)
    return [one.row.name for one in planner.chosen(number, seconds)]


def test_the_claim_nearest_to_a_decision_comes_first(tmp_path: Path) -> None:
    rows = [measured(tmp_path, name, values) for name, values in (("clear", CLEAR), ("far", FAR), ("near", NEAR))]
    assert names(tmp_path, *rows) == ["near", "far"]
    assert names(tmp_path, *rows, number=1) == ["near"]


@pytest.mark.parametrize("effect", [0.0, 0.5, 1.0])
def test_the_chance_of_a_decision(effect: float) -> None:
    """By simulation of the repetitions to come, from a mean and a spread that are known."""
    values = np.array([-1.0, 0.0, 1.0, 0.5, -0.5]) + effect
    sample, rng = Sample(np.repeat(values[:, None], 10, axis=1)), np.random.default_rng(0)
    truth = rng.normal(values.mean(), sample.spread / 5**0.5, 20_000)
    later = (5 * values.mean() + rng.normal(5 * truth, sample.spread * 5**0.5)) / 10
    half, within = sample.half_width(10), sample.half_width(10, sides=1)
    for margin in (0.5, 1.5):
        decided = (abs(later) > half) | (abs(later) + within < margin)
        assert chance(sample, margin, 10) == pytest.approx(decided.mean(), abs=0.01)
