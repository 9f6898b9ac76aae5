"""Which candidates become a pair."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    CandidateStep,
    DDIMSampler,
    FixedThreshold,
    FlowSDESampler,
    LinearThreshold,
    QuantileThreshold,
    ScheduledThreshold,
    SigmaThreshold,
    VarianceThreshold,
    gap_quantiles,
    step_pairs,
)
from latentreward.core.contracts import PromptBatch
from latentreward.diffusion.noise.schedules import static_levels
from tests.reward.losses.two_ranks import on_ranks

DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULED = (SigmaThreshold, VarianceThreshold, LinearThreshold)


def step_of(scores: Tensor, index: int = 0) -> CandidateStep:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(scores.shape[1], 2, 3, 3, generator=generator)
    candidates = torch.randn(*scores.shape, 2, 3, 3, generator=generator)
    return CandidateStep(index, 951.0, latents, candidates, scores, torch.zeros_like(scores))


@pytest.fixture
def sampler() -> DDIMSampler:
    return DDIMSampler(DDIM | {"set_alpha_to_one": False}, 20)


def test_best_against_worst(sampler: DDIMSampler) -> None:
    scores = torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.0, 5.5], [2.0, -1.0, 5.2]])
    selected = FixedThreshold(0.4).select(step_of(scores), sampler)
    assert selected.winner.tolist() == [1, 0, 1]
    assert selected.loser.tolist() == [0, 2, 0]
    two = torch.tensor([[3.0, 1.0], [0.0, -1.0], [5.5, 5.0]]).softmax(dim=1)
    torch.testing.assert_close(selected.gap, two[:, 0] - two[:, 1])
    assert selected.kept.tolist() == [True, True, False]


def test_a_gap_equal_to_the_threshold_is_not_kept(sampler: DDIMSampler) -> None:
    assert FixedThreshold(0.0).select(step_of(torch.zeros(4, 2)), sampler).kept.tolist() == [False, False]


@pytest.mark.parametrize("kind", SCHEDULED)
@pytest.mark.parametrize("steps", [2, 5, 20, 50])
def test_thresholds_run_from_low_to_high(kind: type[ScheduledThreshold], steps: int) -> None:
    for sampler in (
        DDIMSampler(DDIM | {"set_alpha_to_one": False}, steps),
        FlowSDESampler(*static_levels({"shift": 3.0}, steps)),
    ):
        thresholds = torch.tensor([kind(0.2, 0.6).threshold(index, sampler) for index in range(steps)])
        order = sampler.timesteps if kind is LinearThreshold else sampler.noise_std
        assert thresholds[order.argmin()].item() == pytest.approx(0.2)
        assert thresholds[order.argmax()].item() == pytest.approx(0.6)
        assert (thresholds[order.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("kind", SCHEDULED)
def test_steps_without_noise_do_not_count(kind: type[ScheduledThreshold]) -> None:
    silent_at_the_end = DDIMSampler(DDIM | {"set_alpha_to_one": True}, 20)
    assert kind(0.2, 0.6).threshold(18, silent_at_the_end) == pytest.approx(0.2)


@pytest.mark.parametrize(("quantile", "kept"), [(0.0, 40), (0.5, 20), (0.75, 10), (1.0, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_quantile_keeps_a_share_at_any_scale(quantile: float, kept: int, scale: float, sampler: DDIMSampler) -> None:
    scores = scale * torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    selected = QuantileThreshold(quantile).select(step_of(scores), sampler)
    assert selected.kept.sum() == kept
    if kept < 40:
        assert selected.gap[selected.kept].min() > selected.gap[~selected.kept].max()


def test_quantile_keeps_no_pair_without_a_gap(sampler: DDIMSampler) -> None:
    assert not QuantileThreshold(0.0).select(step_of(torch.ones(4, 3)), sampler).kept.any()


def ranks_kept(rank: int, argument: str) -> dict[str, Tensor]:
    """Pairs that one of two ranks keeps; runs in a process of its own."""
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2.0, 20)
    rows = slice(10 * rank, 10 * rank + 10)
    sampler = DDIMSampler(DDIM, 20)
    selection = QuantileThreshold(float(argument))
    return {
        "kept": selection.select(step_of(scores[:, rows]), sampler).kept,
        "rows": torch.arange(20)[rows],
        "gap": FixedThreshold(0.0).select(step_of(scores), sampler).gap,
    }


@pytest.mark.slow
def test_quantile_is_that_of_all_ranks(tmp_path: Path) -> None:
    ranks = on_ranks("tests.alignment.rollout.test_pair_selection:ranks_kept", "0.7", tmp_path)
    gap = ranks[0]["gap"]
    expected = gap >= gap.quantile(0.7)
    for rank in ranks:
        assert torch.equal(rank["kept"], expected[rank["rows"]])
    assert ranks[0]["kept"].sum() != ranks[1]["kept"].sum()


def test_kept_pairs_as_rows(sampler: DDIMSampler) -> None:
    scores = torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.1, 1.0], [2.0, 0.0, 4.0]])
    step = step_of(scores, index=4)
    prompts = PromptBatch(("a", "b", "c"), ("x", "y", "z"))
    pairs = step_pairs(step, FixedThreshold(0.5).select(step, sampler), prompts)
    assert pairs.prompts == ("a", "c")
    assert len(set(pairs.keys)) == len(pairs) == 2
    assert torch.equal(pairs.latents, step.latents[[0, 2]])
    assert torch.equal(pairs.chosen, torch.stack([step.candidates[1, 0], step.candidates[0, 2]]))
    assert torch.equal(pairs.rejected, torch.stack([step.candidates[0, 0], step.candidates[1, 2]]))
    assert pairs.timesteps.tolist() == [951.0, 951.0]
    assert len(step_pairs(step, FixedThreshold(1.0).select(step, sampler), prompts)) == 0


def test_gap_quantiles_in_one_line() -> None:
    gaps = [(float(t), torch.linspace(0.0, 1.0, 11)) for t in range(901, 0, -100)]
    line = gap_quantiles(gaps * 2)
    assert "\n" not in line
    assert line.startswith("score gaps (10/50/90 % quantiles) t=901: 0.1/0.5/0.9, t=701: ")
    assert line.endswith("t=1: 0.1/0.5/0.9")
    assert line.count("t=") == 5
    assert gap_quantiles([]) == "no score gaps seen"
    assert gap_quantiles([(1.0, torch.zeros(3))]).startswith("all scores of a group are equal")
