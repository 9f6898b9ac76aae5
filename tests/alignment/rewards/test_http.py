"""Rewards on a server: pictures for judges, in mixtures, while others are sampled."""

import time

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    Branching,
    DiffusionNFTModule,
    HTTPReward,
    PixelReward,
    Policy,
    RewardMixture,
    Sampling,
    StepwiseGRPOModule,
    TrajectoryGRPOModule,
    begin_finished,
    score_finished,
)
from latentreward.core.contracts import NoisyStates, PromptBatch
from latentreward.core.errors import InputError
from latentreward.reward import CallableScorer, RemoteError, RemoteServer
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.alignment.modules.test_grpo import attached, source
from tests.alignment.policies.alignment import tiny_source
from tests.reward.remote.judges import hangs_up, judged, judging

PROMPTS = PromptBatch(("a red circle", "two blue squares on a white background", "a cross"), ("0/0", "0/1", "0/2"))
BY_HAND = CallableScorer(
    lambda prompts, images: torch.tensor([judged(*row) for row in zip(prompts, images, strict=True)]), "judge"
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_source("sd35").load()


def latents_of(policy: Policy, count: int = 6) -> Tensor:
    return torch.randn(count, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))


def test_pictures_get_the_scores_that_the_same_judge_gives_in_this_process(policy: Policy) -> None:
    latents, rows = latents_of(policy), torch.arange(6) // 2
    states = NoisyStates(latents.flip(0), torch.full((6,), 500.0), rows, latents)
    here = PixelReward(BY_HAND).load(policy)
    with judging() as judge:
        there = HTTPReward(RemoteServer(judge.url), batch_size=4, decode_batch_size=5).load(policy)
        known = here.encode_prompts(PROMPTS.prompts)
        assert there.encode_prompts(PROMPTS.prompts) == known
        assert torch.equal(there(states, known), here(states, known))
        assert torch.equal(there.score_clean(latents, rows, known), here.score_clean(latents, rows, known))
        assert sorted(judge.sizes) == [2, 4]  # the second time they are remembered
    assert not there.differentiable
    assert not list(there.parameters())


@pytest.mark.parametrize("normalise", ["group", "running", "none"])
def test_a_mixture_scores_at_once_and_later_alike(policy: Policy, normalise: str) -> None:
    latents = latents_of(policy)
    with judging() as judge:
        rewards = [FirstChannelReward(1.0), HTTPReward(RemoteServer(judge.url))]
        inner = RewardMixture(rewards, [1.0, 2.0], normalise="none")
        source = RewardMixture([*rewards, inner], [0.5, 1.0, 0.1], normalise=normalise)
        at_once, later = source.load(policy), source.load(policy)
        scores = score_finished(at_once, latents, PROMPTS, 0, (0.4,))
        parts = begin_finished(later, latents, PROMPTS, 0, (0.4,))()
        torch.testing.assert_close(later.mix(parts, torch.arange(6) // 2), scores)
        assert later.answers_later
        torch.testing.assert_close(later.take_means(), at_once.take_means())


def trajectories(url: str, at_once: int | None, **server: float) -> TrajectoryGRPOModule:
    reward = HTTPReward(RemoteServer(url, **server))
    options = {"sampling": Sampling(2), "num_trajectories": 2, "guidance_scale": 1.0, "seed": 1}
    return attached(TrajectoryGRPOModule(source("sd35_tiny"), reward, prompts_at_once=at_once, **options))


@pytest.mark.slow
def test_prompts_are_scored_while_the_next_are_sampled_and_learned_from_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with judging() as judge:
        judge.delay_s = 0.3
        whole = trajectories(judge.url, None).roll_out(PROMPTS)
        judge.sizes.clear()
        judge.times.clear()
        module, began = trajectories(judge.url, 1), []
        sample = module.rollout.sample
        monkeypatch.setattr(
            module.rollout, "sample", lambda *given, **more: (began.append(time.monotonic()), sample(*given, **more))[1]
        )
        parts = module.roll_out(PROMPTS)
        assert judge.sizes == [2, 2, 2]
        assert began[1] < judge.times[0][1]  # the second prompt was begun before the first one's scores were there
    assert parts.keys == whole.keys
    torch.testing.assert_close(parts.latents, whole.latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.advantage, whole.advantage, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="prompts_at_once is 0"):
        trajectories("http://judge", 0)


def test_finished_samples_of_nft_are_scored_in_the_same_way() -> None:
    with judging() as judge:
        options = {"sampling": Sampling(2), "num_samples": 2, "prompts_at_once": 2, "seed": 1}
        module = attached(DiffusionNFTModule(source("sd35_tiny"), HTTPReward(RemoteServer(judge.url)), **options))
        rows = module.roll_out(PROMPTS)
        assert sorted(judge.sizes) == [2, 4]
        assert len({key.rsplit("/", 2)[0] for key in rows.keys}) == 3


def test_a_failure_in_a_rollout_leaves_reward_and_statistics_as_they_were() -> None:
    """Step rewards are waited for at each step, so that a later step fails when earlier ones have been counted."""
    with judging(faults=[None, hangs_up]) as judge:
        remote = HTTPReward(RemoteServer(judge.url, retry_s=0.0))
        mixture = RewardMixture([remote, FirstChannelReward(1.0)], normalise="running")
        options = {"sampling": Sampling(3), "candidates": Branching(2), "guidance_scale": 1.0, "seed": 1}
        module = attached(StepwiseGRPOModule(source("sd15"), mixture, **options))
        with pytest.raises(RemoteError):
            module.roll_out(PROMPTS)
        assert not module.reward.seen.any()
        assert module.rollout_statistics is None
        assert module.roll_out(PROMPTS) is not None
        assert module.reward.seen.any()


def test_another_ranks_failure_is_this_ranks_too(policy: Policy) -> None:
    with judging() as judge:
        reward = HTTPReward(RemoteServer(judge.url)).load(policy)
        reward.agree = lambda fine: False
        with pytest.raises(RemoteError, match="the reward server of another rank gave no scores"):
            reward.score_clean(latents_of(policy), torch.zeros(6, dtype=torch.int64), ("a cat",))


def test_settings_that_cannot_be() -> None:
    remote = HTTPReward(RemoteServer("http://judge"))
    assert remote.latent_space() is None
    with pytest.raises(InputError, match="credit needs the score of a noisy state, which HTTPReward does not give"):
        remote.require_step_scores("credit")
    with pytest.raises(InputError, match="needs the gradient of the reward, and HTTPReward has none"):
        remote.require_gradient("ReFL")
    with pytest.raises(InputError, match=r"reward\.batch_size is 0"):
        HTTPReward(RemoteServer("http://judge"), batch_size=0)
