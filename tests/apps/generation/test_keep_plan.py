"""The plan of halving: time of a schedule, what it ends with on a pool, and which schedules are shown."""

from pathlib import Path

import pytest
import torch

from latentreward.alignment import Halving
from latentreward.apps.generation.keep_plan import Pool, draw_frontier, frontier


def pool_of(prompts: int = 200, agreement: float = 0.9, candidates: int = 16) -> Pool:
    """States whose scores foresee the ends, after one step nearly exactly; a pass costs ten times a score."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(prompts, candidates, generator=generator)
    scores = {}
    for step, rho in ((0, agreement), (4, 0.99)):
        noise = torch.randn(ends.shape, generator=generator)
        scores[step] = rho * ends + (1 - rho**2) ** 0.5 * noise
    return Pool(scores, ends, steps=10, seconds_pass=1.0, seconds_score=0.1, seconds_end=0.2)


def test_the_time_of_a_schedule_counts_passes_and_scores() -> None:
    pool = pool_of(2)
    assert pool.seconds(Halving(1, {})) == 10
    assert pool.seconds(Halving(4, {})) == pytest.approx(4 * 10.2)
    assert pool.seconds(Halving(16, {0: 1})) == pytest.approx(16 * 0.1 + 10)
    assert pool.seconds(Halving(8, {0: 4, 4: 2})) == pytest.approx(8 * 0.1 + 4 * (4 + 0.1) + 2 * (6 + 0.2))


def test_a_replay_keeps_the_best_states() -> None:
    ends = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    scores = {0: torch.tensor([[0.0, 1.0, 3.0, 2.0]]), 2: torch.tensor([[0.0, 9.0, 1.0, 2.0]])}
    pool = Pool(scores, ends, 4, 1.0, 0.1, 0.1)
    assert pool.replay(Halving(4, {0: 1})).tolist() == [3.0]
    assert pool.replay(Halving(4, {0: 2, 2: 1})).tolist() == [2.0]
    assert pool.replay(Halving(2, {0: 1})).tolist() == [3.5]  # of both pairs of candidates
    assert pool.replay(Halving(4, {})).tolist() == [4.0]


def test_schedules_are_measured_on_prompts_that_they_were_not_chosen_on() -> None:
    """States that foresee the ends of the choosing prompts alone are chosen, and gain nothing."""
    pool = pool_of(400, agreement=0.0)
    for scores in pool.scores.values():
        scores[::2], scores[1::2] = pool.ends[::2], torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    taken = [one for one in frontier(pool) if one.chosen and one.schedule.keep]
    assert Halving(16, {0: 1}) in [one.schedule for one in taken]
    assert all(one.gain.value < 0.1 for one in taken)


def test_a_reward_that_foresees_gains_and_one_of_noise_does_not(tmp_path: Path) -> None:
    found = frontier(pool_of())
    noise = next(one for one in found if one.schedule == Halving(16, {0: 1}))
    assert noise.samples == pytest.approx(1.16) and noise.gain.low > 0.8
    assert {one.schedule.candidates for one in found if not one.schedule.keep} == {1, 2, 3, 4, 6, 8, 12, 16}
    ordered = sorted(found, key=lambda one: one.samples)
    assert ordered[0].schedule == Halving(1, {})
    blind = frontier(pool_of(agreement=0.0))
    assert all(one.gain.low < 0 for one in blind if set(one.schedule.keep) == {0})
    draw_frontier(found, tmp_path / "keep.png")
    assert (tmp_path / "keep.png").read_bytes().startswith(b"\x89PNG")
