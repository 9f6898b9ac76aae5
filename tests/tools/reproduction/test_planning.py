"""A budget goes where it decides most, and never past what it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tools.reproduction.test_page import result
from tests.tools.reproduction.test_rows import ROWS, TOY
from tools.reproduction.planning import Planner, chance, further_seeds
from tools.reproduction.results import read_results, result_path, write_result
from tools.reproduction.rows import MOST_SEEDS, WHOLE, Row, read_row
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


def test_of_equal_claims_the_cheaper_comes_first(tmp_path: Path) -> None:
    rows = [measured(tmp_path, name, NEAR, seconds) for name, seconds in (("dear", 90.0), ("cheap", 5.0))]
    assert names(tmp_path, *rows) == ["cheap", "dear"]
    assert names(tmp_path, *rows, seconds=300.0) == ["cheap"]  # both do not fit
    assert names(tmp_path, *rows, seconds=5.0) == []


def test_steps_that_have_run_cost_nothing(tmp_path: Path) -> None:
    row = measured(tmp_path, "near", NEAR)
    (plan,) = Planner([row], tmp_path, lambda task: task.name in ("pickapic", "lrm")).chosen(1, 1e9)
    assert plan.seed == WHOLE
    assert plan.seconds == 10.0 * sum(task.name == "lrm_drawn" for task in row.tasks(WHOLE).values())


def test_planned_seeds_come_first_and_the_most_are_kept(tmp_path: Path) -> None:
    near, bare = measured(tmp_path, "near", NEAR), read_row("bare", TOY)
    assert names(tmp_path, near, bare) == ["bare", "near"]
    full = measured(tmp_path, "full", FAR * 4, first=WHOLE)
    assert names(tmp_path, full) == []
    assert len(read_results(tmp_path, full)) == MOST_SEEDS
    mixed = measured(tmp_path, "mixed", FAR)
    measured(tmp_path, "mixed", FAR * 4, first=WHOLE)
    assert names(tmp_path, mixed) == []


def test_further_seeds_are_whole_repetitions() -> None:
    row = read_row("toy", TOY)
    one = result(row, 0, {"one": 0.5, "other": 0.5})
    assert further_seeds(dict.fromkeys((0, 1, 2, WHOLE, WHOLE + 2), one), 2) == [WHOLE + 1, WHOLE + 3]


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


@pytest.mark.slow
def test_every_row_has_a_cost(tmp_path: Path) -> None:
    output = Path(__file__).resolve().parents[3] / "reproduction"
    for choice in Planner([*ROWS.values()], output, lambda task: False).chosen(99, 1e9):
        assert choice.seconds > 0, choice.row.name
