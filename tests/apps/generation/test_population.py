"""Population search: what it chooses, on what its random numbers depend, and a reward that was trained."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentreward.alignment import LatentReward, Policy, PolicySource, RolloutDraws, Sampling, sample_latents
from latentreward.apps.generation import Population, search_population
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from tests.alignment.policies.alignment import tiny_source
from tests.alignment.rewards.stored import write_run
from tests.apps.generation.toy_rewards import MeanLatent
from tests.marks import rotated_after

PROMPTS = PromptBatch(("a large red circle on a white background", "two blue crosss on a gray background"), ("0", "1"))
SAMPLING = Sampling(5)
SHARP = Population(6, 0.5, (1, 2, 3), temperature=1e-3)


@pytest.fixture(scope="module", params=rotated_after(1, ["sd35_tiny", "sd_tiny"]))
def policy(request: pytest.FixtureRequest) -> Policy:
    return PolicySource(request.param).load().eval()


def test_the_start_with_the_best_state_is_finished(policy: Policy) -> None:
    reward = MeanLatent()
    found = search_population(policy, reward, PROMPTS, SHARP, SAMPLING, 3.0, seed=0)
    shape = SAMPLING.latent_shape(policy.family)
    keys = [f"{key}/near {k}" if k else key for k in range(6) for key in PROMPTS.keys]
    drawn = RolloutDraws(0, keys).initial(shape).unflatten(0, (6, 2)).transpose(0, 1)
    starts = SHARP.starts(drawn[:, 0], drawn[:, 1:])
    assert torch.equal(starts[:, 0], RolloutDraws(0, PROMPTS.keys).initial(shape))
    best = reward.asked[0].latents.flatten(1).mean(dim=1).view(2, 6).argmax(dim=1)
    chosen = SimpleNamespace(initial=lambda _: starts[torch.arange(2), best])
    ended = sample_latents(policy, PROMPTS, SAMPLING, 3.0, seed=0, draws=chosen)
    torch.testing.assert_close(found, ended, rtol=1e-3, atol=1e-4)


def test_members_are_scored_at_their_own_noise_level_until_one_is_left(policy: Policy) -> None:
    reward, sampler = MeanLatent(), SAMPLING.sampler(policy.family)
    search_population(policy, reward, PROMPTS, replace(SHARP, temperature=1.0), SAMPLING, 1.0, seed=0)
    told = [states.timesteps.unique().tolist() for states in reward.asked]
    assert told == [[sampler.timesteps[step].item()] for step in (1, 2, 3)]
    sizes = [torch.bincount(states.rows).tolist() for states in reward.asked]
    assert sizes[0] == [6, 6]
    assert 12 > sum(sizes[1]) >= sum(sizes[2]) > 2
    assert all(count != 1 for later in sizes for count in later)


@pytest.mark.slow
@pytest.mark.parametrize("eta", rotated_after(1, [0.0, 1.0]))
def test_a_prompt_is_searched_alike_in_any_batch(eta: float) -> None:
    policy, sampling = PolicySource("sd_tiny").load().eval(), Sampling(4, eta=eta)
    both = search_population(policy, MeanLatent(), PROMPTS, SHARP, sampling, 2.0, seed=3)
    alone = PromptBatch(PROMPTS.prompts[1:], PROMPTS.keys[1:])
    one = search_population(policy, MeanLatent(), alone, SHARP, sampling, 2.0, seed=3)
    torch.testing.assert_close(both[1:], one, rtol=1e-3, atol=1e-4)
    other = search_population(policy, MeanLatent(), alone, SHARP, sampling, 2.0, seed=4)
    assert not torch.allclose(other, one, atol=0.1)


def test_a_trained_reward_chooses(tmp_path: Path) -> None:
    write_run(tmp_path, "lrm", "sd15")
    policy = tiny_source("sd15").load().eval()
    reward = LatentReward(str(tmp_path)).load(policy)
    found = search_population(policy, reward, PROMPTS, SHARP, SAMPLING, 1.0, seed=0)
    assert found.shape == (2, *SAMPLING.latent_shape(policy.family))
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", 1), ("perturbation", 0.0), ("temperature", 0.0), ("after_steps", ()), ("after_steps", (3, 2)),
     ("after_steps", (0, 2))],
)  # fmt: skip
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        Population(**{name: value})


@pytest.mark.parametrize("temperature", [1e-44, 1.0, 1e30])
def test_weights_are_finite_at_any_temperature(temperature: float) -> None:
    weights = Population(temperature=temperature).weights(torch.tensor([1e12, -1e12, 3.0]))
    assert weights.isfinite().all() and weights.sum().item() == pytest.approx(1.0)
