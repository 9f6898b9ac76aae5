"""Candidates of a state: windows, scores, what the rollout goes on with, and how often the network is asked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import Branching, DDIMSampler, RolloutDraws, Sampling, StepSampler
from latentreward.alignment.rollout.samplers import inside_window
from latentreward.core.contracts import PromptBatch
from tests.alignment.rollout.tiny_rollout import PROMPTS, Brightness, NetworkRows, roll_out, tiny_policy

STEPS = Sampling(num_inference_steps=5).with_noise()
GUIDANCE = 3.0
both_families = pytest.mark.parametrize("name", ["sd15", "sd35_tiny"])


def parts(name: str, sampling: Sampling = STEPS) -> tuple[Any, StepSampler]:
    policy = tiny_policy(name)
    return policy, sampling.sampler(policy.family)


@both_families
def test_steps_hang_together(name: str) -> None:
    policy, sampler = parts(name)
    reward = Brightness()
    steps, finished = roll_out(policy, sampler, reward, PROMPTS, Branching(3), STEPS, GUIDANCE, seed=0)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert [step.timestep for step in steps] == sampler.timesteps.tolist()
    shape = (3, *policy.latent_shape())
    conditioning, uncond = policy.encode_prompts(PROMPTS.prompts), policy.encode_uncond()
    for step, asked, following in zip(steps, reward.asked, [*steps[1:], None], strict=True):
        assert step.latents.shape == shape
        assert step.candidates.shape == (3, *shape)
        assert step.scores.shape == step.log_prob.shape == (3, 3)
        assert torch.equal(asked.latents, step.candidates.flatten(0, 1))
        assert torch.equal(asked.rows, torch.tensor([0, 1, 2] * 3))
        assert (asked.timesteps == step.timestep).all()
        after = finished if following is None else following.latents
        for row in range(3):
            assert any(torch.equal(after[row], candidate) for candidate in step.candidates[:, row])
    step, timesteps = steps[2], torch.full((3,), steps[2].timestep)
    with torch.no_grad():
        output = policy.predict_guided(step.latents, timesteps, conditioning, uncond, GUIDANCE)
    expected = sampler.transition(step.latents, output, timesteps).log_prob(step.candidates)
    torch.testing.assert_close(step.log_prob, expected)
    assert not step.candidates.requires_grad


@pytest.mark.parametrize(("how", "extreme"), [("best", Tensor.argmax), ("worst", Tensor.argmin)])
def test_going_on_from_the_best_or_the_worst(how: Any, extreme: Callable[..., Tensor]) -> None:
    policy, sampler = parts("sd15")
    branching = Branching(3, continue_from=how)
    steps, finished = roll_out(policy, sampler, Brightness(), PROMPTS, branching, STEPS, 1.0, seed=0)
    for step, after in zip(steps, [*(step.latents for step in steps[1:]), finished], strict=True):
        assert torch.equal(after, step.candidates[extreme(step.scores, dim=0), torch.arange(3)])


@both_families
@pytest.mark.parametrize("needs_clean", [False, True])
def test_outside_the_window_nothing_is_scored(name: str, needs_clean: bool) -> None:
    policy, sampler = parts(name)
    times, reward = sampler.timesteps.tolist(), Brightness(needs_clean)
    branching = Branching(4, low=times[2], high=times[1])
    with NetworkRows(policy) as calls:
        steps, _ = roll_out(policy, sampler, reward, PROMPTS, branching, STEPS, 1.0, seed=0)
    assert [step.index for step in steps] == [1, 2]
    assert len(reward.asked) == 2
    rows = [3, 3, 12, 12, 3] if needs_clean else [3] * 5
    assert calls == list(zip(rows, times, strict=True))


def test_a_window_holds_timesteps_at_its_bounds_up_to_rounding() -> None:
    times = torch.tensor([750.02, 750.006, 600.0, 499.994, 499.98])
    assert inside_window(times, 500.0, 750.0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(("score_at", "last"), [("step", 1.0), ("candidate", 0.0)])
@pytest.mark.parametrize("needs_clean", [False, True])
def test_timestep_that_the_reward_is_told(score_at: Any, last: float, needs_clean: bool) -> None:
    policy, sampler = parts("sd15")
    reward, times = Brightness(needs_clean), sampler.timesteps.tolist()
    roll_out(policy, sampler, reward, PROMPTS, Branching(2, score_at=score_at), STEPS, 1.0, seed=0)
    told = [states.timesteps[0].item() for states in reward.asked]
    assert told == (times if score_at == "step" else [*times[1:], last])


@both_families
def test_clean_latents_of_candidates(name: str) -> None:
    policy, sampler = parts(name)
    reward, plain = Brightness(needs_clean=True), Brightness()
    branching = Branching(3, score_at="candidate")
    steps, finished = roll_out(policy, sampler, reward, PROMPTS, branching, STEPS, GUIDANCE, seed=0)
    conditioning, uncond = policy.encode_prompts(PROMPTS.prompts), policy.encode_uncond()
    for step, asked in zip(steps[:-1], reward.asked[:-1], strict=True):
        flat, timesteps = step.candidates.flatten(0, 1), torch.full((9,), sampler.next_timestep(step.index))
        with torch.no_grad():
            output = policy.predict_guided(flat, timesteps, conditioning.select([0, 1, 2] * 3), uncond, GUIDANCE)
        torch.testing.assert_close(asked.clean, sampler.clean(flat, output, timesteps), rtol=1e-4, atol=1e-4)
    assert torch.equal(reward.asked[-1].clean, steps[-1].candidates.flatten(0, 1))
    # what a reward asks for changes no state: outputs of candidates are used again as the next step's
    _, expected = roll_out(policy, sampler, plain, PROMPTS, branching, STEPS, GUIDANCE, seed=0)
    torch.testing.assert_close(finished, expected, rtol=1e-3, atol=1e-3)


def test_a_prompt_is_rolled_out_alike_in_any_batch() -> None:
    policy, sampler = parts("sd15")
    together = roll_out(policy, sampler, Brightness(), PROMPTS, Branching(3), STEPS, GUIDANCE, seed=0)[1]
    others = PromptBatch(PROMPTS.prompts[2::-2], PROMPTS.keys[2::-2])
    turned = roll_out(policy, sampler, Brightness(), others, Branching(3), STEPS, GUIDANCE, seed=0)[1]
    torch.testing.assert_close(turned, together[[2, 0]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[2], atol=0.1)
    other = roll_out(policy, sampler, Brightness(), PROMPTS, Branching(3), STEPS, GUIDANCE, seed=1)[1]
    assert not torch.allclose(together, other, atol=0.1)


def test_draws_of_different_kinds_are_independent() -> None:
    draws = RolloutDraws(0, ("first", "second"))
    initial, noise = draws.initial((4, 8, 8)), draws.noise(0, 1, (4, 8, 8))
    assert initial.shape == (2, 4, 8, 8)
    assert noise.shape == (1, 2, 4, 8, 8)
    values = [initial[0], initial[1], noise[0, 0], noise[0, 1], draws.noise(1, 1, (4, 8, 8))[0, 0]]
    correlation = torch.corrcoef(torch.stack([value.flatten() for value in values]))
    assert (correlation - torch.eye(5)).abs().max() < 0.3
    choices = torch.stack([RolloutDraws(seed, ("first", "second")).choice(3, 4) for seed in range(400)])
    shares = torch.stack([(choices == k).float().mean(dim=0) for k in range(4)])
    torch.testing.assert_close(shares, torch.full((4, 2), 0.25), rtol=0, atol=0.08)


def test_steps_without_noise_have_no_candidates() -> None:
    policy = tiny_policy("sd15")
    sampler = DDIMSampler(
        {**policy.family.pipeline.config("scheduler"), "set_alpha_to_one": True},
        STEPS.num_inference_steps,
        STEPS.eta or 0.0,
    )
    assert Branching().steps(sampler) == [0, 1, 2, 3]
    steps, finished = roll_out(policy, sampler, Brightness(), PROMPTS, Branching(2), STEPS, 1.0, seed=0)
    assert len(steps) == 4
    assert finished.isfinite().all()
